from pathlib import Path
from typing import Any

import pytest
from fakes import preference_rows, write_jsonl

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine.option_rules import canonical, read_engine_options, refuse_unknown
from dpo_opt.precompute.engine.vllm_model import VllmModel
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.fingerprint import MEMORY_OPTIONS
from dpo_opt.scorers import make_scorer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max_num_seqs=8", 8),
        ("max-num-seqs= 8", 8),
        ("gpu_memory_utilization=0.7", 0.7),
        ("kv_cache_memory_bytes=2e9", 2e9),
        ("quantization=fp8", "fp8"),
        ("quantization=null", None),
        ("enforce_eager=true", True),
        ("enforce_eager=on", True),
        ("attention_backend=FLASH_ATTN", "FLASH_ATTN"),
        ('hf_overrides={"head_dtype":"float32"}', {"head_dtype": "float32"}),
        ("hf_overrides={head_dtype: float32}", {"head_dtype": "float32"}),
        ('compilation_config={"cudagraph_mode": "NONE"}', {"cudagraph_mode": "NONE"}),
        ("served_model_name=a=b", "a=b"),
        # Switched off, what is refused otherwise does nothing.
        ("enable_lora=false", False),
        ("data_parallel_size=1", 1),
        ("speculative_config=null", None),
        ("distributed_executor_backend=mp", "mp"),
    ],
)
def test_values_are_json_or_yaml(text: str, value: Any) -> None:
    (found,) = read_engine_options([text]).values()
    assert found == value
    assert type(found) is type(value)


REFUSED: dict[str, tuple[str, str]] = {
    # No option at all.
    "max_num_seqs": ("not of the form", "tensor_parallel_size=2"),
    "=3": ("not of the form", "tensor_parallel_size=2"),
    "max_num_seqs=": ("not of the form", "tensor_parallel_size=2"),
    "a b=3": ("not of the form", "tensor_parallel_size=2"),
    "served_model_name=2026-01-01": ("neither JSON nor a YAML scalar", "quotes"),
    "kv_cache_memory_bytes=NaN": ("neither JSON nor a YAML scalar", "quotes"),
    "hf_overrides={": ("neither JSON nor a YAML scalar", "quotes"),
    # Set by this program.
    "model=x": ("set by this program", "--model"),
    "tokenizer=x": ("set by this program", "model folder"),
    "revision=main": ("set by this program", "--model"),
    "hf_token=hf_x": ("set by this program", "HF_TOKEN in the environment"),
    "dtype=auto": ("set by this program", "--dtype"),
    "max_model_len=10": ("set by this program", "--max-length"),
    "max-model-len=10": ("set by this program", "--max-length"),
    "enable_prefix_caching=true": ("set by this program", "leave it out"),
    "load_format=pt": ("set by this program", "safetensors"),
    "logprobs_mode=raw_logits": ("set by this program", "log-probs depend on it"),
    "max_logprobs=5": ("set by this program", "log-probs depend on it"),
    "runner=pooling": ("set by this program", "log-probs depend on it"),
    "seed=1": ("set by this program", "leave it out"),
    "generation_config=auto": ("set by this program", "temperature 1"),
    # Code by name.
    "trust_remote_code=true": ("run code", "leave it out"),
    "trust_remote_code=false": ("run code", "leave it out"),
    "worker_extension_cls=a.B": ("run code", "leave it out"),
    "logits_processors=[a.B]": ("run code", "leave it out"),
    # Wrong, late or never.
    "enable_lora=true": ("LM head", "merge the adapter"),
    "max_lora_rank=16": ("LM head", "merge the adapter"),
    'speculative_config={"method": "mtp"}': ("overwrites", "leave it out"),
    "spec_method=ngram": ("overwrites", "leave it out"),
    "kv_sharing_fast_prefill=true": ("leaves out rows", "leave it out"),
    "data_parallel_size=2": ("hangs", "--num-workers"),
    "data_parallel_rank=1": ("hangs", "--num-workers"),
    "pipeline_parallel_size=2": ("hang", "tensor_parallel_size"),
    "nnodes=2": ("hang", "tensor_parallel_size"),
    "distributed_executor_backend=ray": ("hang", "--launcher ray"),
    "distributed_executor_backend=external_launcher": ("hang", "--launcher ray"),
    "enable_dbo=true": ("another model runner", "leave it out"),
    'kv_transfer_config={"kv_connector": "x"}': ("outside the engine", "own prefix cache"),
    "kv_offloading_size=4": ("outside the engine", "own prefix cache"),
    "enable_prompt_embeds=true": ("not computed", "leave it out"),
    'hf_overrides={"rope_theta": 1}': ("another reference", "config.json"),
    "hf_overrides=x": ("another reference", "config.json"),
    # Sizes.
    "tensor_parallel_size=two": ("whole number above 0", ""),
    "tensor_parallel_size=0": ("whole number above 0", ""),
    "tensor_parallel_size=true": ("whole number above 0", ""),
    "max_num_batched_tokens=1.5": ("whole number above 0", ""),
    "gpu_memory_utilization=90": ("above 0 and at most 1", ""),
    "gpu_memory_utilization=0": ("above 0 and at most 1", ""),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_would_go_wrong_is_refused_with_the_reason(option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_engine_options(["max_num_seqs=4", option])
    reason, fix = REFUSED[option]
    assert option in caught.value.what
    assert reason in f"{caught.value.what} {caught.value.why}"
    assert fix in str(caught.value.fix)
    assert caught.value.exit_code == 2


def test_the_order_of_options_does_not_matter() -> None:
    there = read_engine_options(["quantization=fp8", "tensor_parallel_size=2"])
    back = read_engine_options(["tensor-parallel-size=2", "quantization=fp8"])
    assert canonical(there) == canonical(back) == '{"quantization":"fp8","tensor_parallel_size":2}'
    assert canonical({}) == "{}"


def test_settings_of_memory_are_no_part_of_what_is_recorded() -> None:
    given = ["max_num_seqs=4", "gpu_memory_utilization=0.5", "enforce_eager=true", "kv_cache_dtype=fp8"]
    assert canonical(read_engine_options(given)) == '{"kv_cache_dtype":"fp8"}'


def test_a_misspelt_option_is_refused_with_a_suggestion() -> None:
    known = {"max_num_seqs", "tensor_parallel_size"}
    refuse_unknown({"max_num_seqs": 1}, known=known)
    with pytest.raises(ConfigError, match="tensor_paralel_size: this vLLM has no such") as caught:
        refuse_unknown({"tensor_paralel_size": 2}, known=known)
    assert caught.value.fix == "did you mean tensor_parallel_size?"
    with pytest.raises(ConfigError) as caught:
        refuse_unknown({"zzz": 2}, known=known)
    assert "vllm serve --help" in str(caught.value.fix)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> PrecomputeConfig:
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(3))
    return PrecomputeConfig(model=str(tiny_model), data=[str(data)], shards=tmp_path / "shards")


@pytest.mark.vllm
def test_the_installed_engine_knows_the_options_that_are_named_here(config: PrecomputeConfig) -> None:
    given = ["max_num_batched_tokens=512", "gpu_memory_utilization=0.5", "tensor_parallel_size=1"]
    scorer = make_scorer(config.model_copy(update={"backend": "vllm", "engine_option": given}))
    assert scorer.numerics.engine_options == ('{"tensor_parallel_size":1}')
    options = [f"{name}=1" for name in MEMORY_OPTIONS - {"swap_space"}]
    make_scorer(config.model_copy(update={"backend": "vllm", "engine_option": options}))
    with pytest.raises(ConfigError, match="no such argument") as caught:
        make_scorer(config.model_copy(update={"backend": "vllm", "engine_option": ["max_num_seq=3"]}))
    assert caught.value.fix == "did you mean max_num_seqs?"


def test_the_other_backend_has_no_options(config: PrecomputeConfig) -> None:
    with pytest.raises(ConfigError, match="backend hf has no such options") as caught:
        make_scorer(config.model_copy(update={"backend": "hf", "engine_option": ["max_num_seqs=3"]}))
    assert "--backend vllm" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"num_workers": 2}, True),
        ({"num_workers": 2, "gpus_per_worker": 2}, False),
        ({"num_workers": 2, "gpus_per_worker": 0}, False),
        ({"num_workers": 2, "worker_index": 1}, False),
        ({"num_workers": 2, "launcher": "slurm"}, True),
        ({}, False),
    ],
)
def test_a_launched_worker_gets_the_gpus_that_its_engine_spans(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], refused: bool
) -> None:
    monkeypatch.setattr(VllmModel, "__init__", lambda self, folder, **settings: None)
    options = {"backend": "vllm", "engine_option": ["tensor_parallel_size=2"]}
    config = PrecomputeConfig.model_validate({**config.model_dump(), **options, **given})
    if refused:
        with pytest.raises(ConfigError, match="each worker gets 1 GPU") as caught:
            make_scorer(config)
        assert caught.value.fix == "pass --gpus-per-worker 2"
    else:
        make_scorer(config)
