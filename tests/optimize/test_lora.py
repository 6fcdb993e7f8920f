"""An adapter's log-probs, gradients and files, against full logits, plain autograd and peft itself."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from all_architectures import (
    BROKEN,
    MORE_THAN_TEXT,
    ORDINARY,
    auto_class,
    model_types,
    randomize,
    tiny_config,
)
from architectures import contrast
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_opt.commands.merge import MergeConfig
from dpo_opt.merge import merge
from dpo_opt.optimize.adapters.lora import (
    AdapterPlan,
    add_adapter,
    four_bit_options,
    plan_adapter,
    save_adapter,
    trainable_names,
    without_adapter,
)
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.architecture import decoder_of, model_without_weights
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.identity import require_same_model
from dpo_opt.optimize.measure_parity import measure_parity
from dpo_opt.optimize.parity_sample import spread_pairs
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.schemas.errors import ConfigError, FingerprintError
from dpo_opt.schemas.fingerprint import MODEL_FIELDS
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.pairs import TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.weights import weights_digest

pytest.importorskip("peft")
FullLogps = Callable[[PreTrainedModel, TokenSequence], Tensor]
CPU = torch.device("cpu")
VOCABULARY = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("LlamaConfig", {}, ATTENTION | MLP),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}, ATTENTION | MLP),
    "phi-biased": ("PhiConfig", {}, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 8}, ATTENTION),
    "gemma2-padded": ("Gemma2Config", {"head_dim": 8}, ATTENTION | MLP),
    "gpt2-transposed": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        {"c_attn", "c_proj", "c_fc"},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
            **{"qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
        },
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    ),
}


def make_model(name: str, folder: Path) -> Path:
    """Weights large enough that every token has its own log-prob."""
    kind, sizes, _ = MODELS[name]
    known = {} if kind == "GPT2Config" else SIZES
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{"vocab_size": VOCABULARY, **known, **sizes})
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder


def configured(model: Path, **options: Any) -> TrainConfig:
    options = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, **options}
    return TrainConfig(shards="unused", model=str(model), output_dir="unused", **options)


def planned(model: Path, **options: Any) -> AdapterPlan:
    return plan_adapter(configured(model, **options), model)


def loaded(model: Path, *, dtype: torch.dtype = torch.float32) -> Policy:
    return load_policy(model, dtype=dtype, device=CPU, trainable=False, param_dtype=dtype)


def with_adapter(model: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Policy:
    policy = loaded(model, dtype=dtype)
    add_adapter(policy.model, planned(model, **options), seed=3)
    return policy


def perturb(model: PreTrainedModel) -> None:
    """As if it had been trained: B is no longer 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def groups() -> list[Group]:
    rng = np.random.default_rng(1)

    def ids(count: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, size=count).astype(np.int32)

    return [
        tuple(TokenSequence(prompt, ids(length)) for length in lengths)
        for prompt, lengths in ((ids(12), (9, 5)), (ids(1), (3, 8)), (ids(20), (1, 6)))
    ]


def score(model: Path, folder: Path, *, dtype: str) -> Path:
    """A few pairs with ``model`` as their reference."""
    folder.mkdir()
    rows = [{"prompt": f"{i} cats", "chosen": f" sat {i}.", "rejected": " ran off"} for i in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrecomputeConfig(
        model=str(model), data=folder / "pairs.jsonl", shards=folder / "shards", dtype=dtype
    )
    precompute(config, scorer=HfScorer(model, dtype=dtype))
    return folder / "shards"


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_changes_no_log_prob(tmp_path: Path, name: str) -> None:
    folder = make_model(name, tmp_path)
    before = loaded(folder)
    policy = with_adapter(folder)
    assert policy.packs == before.packs
    for mine, plain in zip(policy.sequence_logps(groups()), before.sequence_logps(groups()), strict=True):
        assert torch.equal(mine, plain)
        assert mine.requires_grad
    perturb(policy.model)
    moved = torch.cat(policy.sequence_logps(groups())) - torch.cat(before.sequence_logps(groups()))
    assert moved.abs().max() > 0.05


@pytest.mark.parametrize("name", MODELS)
def test_by_default_every_linear_layer_but_the_head_has_an_adapter(tmp_path: Path, name: str) -> None:
    folder = make_model(name, tmp_path)
    plan = planned(folder)
    assert {layer.rpartition(".")[2] for layer in plan.layers} == MODELS[name][2]
    policy = with_adapter(folder)
    trained = {n.partition(".lora_")[0] for n in trainable_names(policy.model)}
    assert trained == set(plan.layers)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == plan.parameters
    assert {p.dtype for p in parameters} == {torch.float32}
    assert (plan.note is not None) == ("experts" in str([n for n, _ in policy.model.named_parameters()]))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd_through_full_logits(
    tmp_path: Path, full_logps: FullLogps, name: str
) -> None:
    folder = make_model(name, tmp_path)
    policy = with_adapter(folder)
    perturb(policy.model)
    found = policy.sequence_logps(groups())
    contrast(found).backward()

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    add_adapter(stock, planned(folder), seed=3)
    perturb(stock)
    expected = [full_logps(stock, sequence) for group in groups() for sequence in group]
    contrast(expected).backward()
    torch.testing.assert_close(torch.cat(found).double(), torch.cat(expected), rtol=0, atol=1e-4)
    exact = gradients(stock)
    largest = max(float(grad.abs().max()) for grad in exact.values())
    assert set(gradients(policy.model)) == set(exact) == set(trainable_names(stock))
    for parameter, grad in gradients(policy.model).items():
        assert exact[parameter].any()
        torch.testing.assert_close(grad, exact[parameter], rtol=0, atol=1e-4 * largest)


def test_training_changes_the_adapter_and_nothing_else(tiny_model: Path) -> None:
    policy = with_adapter(tiny_model)
    trainable = set(trainable_names(policy.model))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = -contrast(policy.sequence_logps(groups()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    changed = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trainable
    saved = load_file(tiny_model / "model.safetensors")
    # peft keeps the layer itself as `base_layer`.
    now = {n.replace(".base_layer", ""): p for n, p in policy.model.named_parameters()}
    assert all(torch.equal(now[name], weight) for name, weight in saved.items())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_keeps_the_gradients(tiny_model: Path, mode: Any) -> None:
    # The embeddings take no gradient, so the first layer's input needs none.
    plain, checkpointed = with_adapter(tiny_model), with_adapter(tiny_model)
    checkpoint_activations(checkpointed.model, mode)
    for policy in (plain, checkpointed):
        perturb(policy.model)
        contrast(policy.sequence_logps(groups())).backward()
    expected = gradients(plain.model)
    assert set(expected) == set(trainable_names(plain.model))
    for name, grad in gradients(checkpointed.model).items():
        # Rounding alone: a norm gives its input one gradient, where autograd adds its parts one by one.
        same = expected.pop(name)
        assert float((grad - same).abs().max()) <= (
            2e-6 * float(same.abs().max()) if mode == "selective" else 0
        )
    assert expected == {}


def test_in_bf16_the_adapter_stays_fp32_and_its_inputs_are_kept_once(tiny_model: Path) -> None:
    policy = with_adapter(tiny_model, dtype=torch.bfloat16)
    perturb(policy.model)
    frozen = {p.dtype for p in policy.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = policy.sequence_logps(groups())
    contrast(found).backward()
    assert {grad.dtype for grad in gradients(policy.model).values()} == {torch.float32}
    rows = sum(len(g[0].prompt_ids) + sum(len(s.completion_ids) for s in g) - 2 for g in groups())
    inputs = [t for t in kept if t.shape in [(1, rows, 64), (rows, 64)] and t.dtype == torch.bfloat16]
    # q, k and v read the same input.
    assert len({t.data_ptr() for t in inputs}) < len(inputs)
    exact = with_adapter(tiny_model)
    perturb(exact.model)
    difference = (torch.cat(found) - torch.cat(exact.sequence_logps(groups()))).abs()
    assert 1e-4 < difference.max() < 0.3


def saved(folder: Path, base: Path, **options: Any) -> Policy:
    """A perturbed adapter of ``base``, saved in ``folder``."""
    policy = with_adapter(base, **options)
    perturb(policy.model)
    folder.mkdir()
    save_adapter(policy.model, folder, base="somebody/model", base_weights=weights_digest(base))
    return policy


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_adapter_gives_the_same_log_probs_in_peft_and_when_continued(
    tmp_path: Path, full_logps: FullLogps, name: str
) -> None:
    from peft import PeftModel

    folder = make_model(name, tmp_path / "base")
    policy = saved(tmp_path / "adapter", folder)
    found = torch.cat(policy.sequence_logps(groups())).detach()

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    logps = [full_logps(theirs, s) for group in groups() for s in group]
    torch.testing.assert_close(found.double(), torch.cat(logps), rtol=0, atol=1e-4)

    continued = with_adapter(folder, lora_r=16, lora_alpha=32, adapter=tmp_path / "adapter")
    assert torch.equal(torch.cat(continued.sequence_logps(groups())), found)
    assert trainable_names(continued.model) == trainable_names(policy.model)


def test_saving_twice_says_the_same_without_the_machines_paths(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        saved(tmp_path / name, tiny_model)
        assert {f.name for f in (tmp_path / name).iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors")
        }
        assert not any(str(tiny_model).encode() in f.read_bytes() for f in (tmp_path / name).iterdir())
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("first", "second")]
    assert configs[0] == configs[1]
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("first", "second"))
    # The library writes its metadata in no fixed order.
    saved_first, saved_second = load_file(first), load_file(second)
    assert saved_first.keys() == saved_second.keys()
    assert all(torch.equal(tensor, saved_second[name]) for name, tensor in saved_first.items())
    assert json.loads(configs[0])["base_model_name_or_path"] == "somebody/model"
    with safe_open(first, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base_weights": weights_digest(tiny_model)}


def test_without_an_adapter_every_parameter_is_trainable(policy: Policy) -> None:
    assert trainable_names(policy.model) == [name for name, _ in policy.model.named_parameters()]


def test_the_seed_decides_a_and_leaves_the_global_generator_alone(tiny_model: Path) -> None:
    plan = planned(tiny_model)
    first, second, other = (loaded(tiny_model).model for _ in range(3))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    add_adapter(first, plan, seed=3)
    assert torch.equal(torch.rand(3), expected)
    add_adapter(second, plan, seed=3)
    add_adapter(other, plan, seed=4)
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    weights = [dict(m.named_parameters())[name] for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_named_layers_alone_get_an_adapter(tiny_model: Path) -> None:
    plan = planned(tiny_model, lora_target_modules=["q_proj", "layers.1.mlp.up_proj"])
    assert plan.layers == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    )
    # 64 -> 128 three times (q has 4 heads of 32).
    assert plan.parameters == 3 * 4 * (64 + 128)
    assert planned(tiny_model, lora_target_modules=["all-linear"]) == planned(tiny_model)


LINEAR = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_target_modules": ["q_proj", "query"]}, r"query: the model has no layer named 'query'"),
        ({"lora_target_modules": ["lm_head"]}, r"lm_head is the head(.|\n)*pass some of: " + LINEAR),
        ({"lora_target_modules": ["embed_tokens"]}, r"embed_tokens is an embedding"),
        ({"lora_target_modules": ["mlp"]}, r"layers\.0\.mlp is not a plain linear layer"),
        ({"lora_target_modules": ["norm"]}, r"model\.norm is not a plain linear layer"),
        ({"lora_r": 513}, r"--lora-r 513 is more than 512(.|\n)*vLLM serves no adapter"),
        ({"use_peft": False, "load_in_4bit": True}, r"--load-in-4bit works only with an adapter"),
        ({"use_peft": False, "adapter": "somewhere"}, r"--adapter works only with an adapter"),
        ({"use_peft": False, "lora_alpha": 32}, r"--lora-r works only with an adapter"),
        ({"use_peft": False, "lora_r": 16}, r"--lora-alpha works only with an adapter"),
        ({"use_peft": False, "lora_target_modules": ["q_proj"]}, r"--lora-target-modules works only with"),
        ({"adapter": "a", "lora_target_modules": ["q_proj"]}, r"exclude each other"),
        ({"adapter": "nowhere"}, r"nowhere holds no adapter_config\.json"),
    ],
)
def test_what_would_be_ignored_or_refused_later_is_refused_at_the_start(
    tiny_model: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(tiny_model, **options)


def test_four_bits_without_a_gpu_are_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--load-in-4bit needs a CUDA device"):
        planned(tiny_model, load_in_4bit=True)


def test_four_bits_are_nf4() -> None:
    options = four_bit_options(CPU, torch.bfloat16)
    quantization = options.pop("quantization_config").to_dict()
    assert options == {"device_map": {"": CPU}}
    assert quantization["load_in_4bit"]
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["bnb_4bit_compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_experts_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = make_model(name, tmp_path)
    for target in ("gate", "experts", "down_proj"):
        with pytest.raises(ConfigError, match=rf"--lora-target-modules {target}"):
            planned(folder, lora_target_modules=[target])
    assert planned(folder).note is not None


ADAPTED: dict[str, tuple[set[str], str | None]] = {
    # dt_proj of a Mamba is no default either: its weight is read, and an adapter would stay untrained.
    "mamba": ({"in_proj", "x_proj"}, "the out_proj of state-space layers gets no adapter: peft refuses it"),
    "falcon_mamba": ({"in_proj", "x_proj"}, "peft refuses it there"),
    "falcon_h1": (ATTENTION | MLP | {"in_proj"}, "peft refuses it there"),
    "falcon": ({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, None),
    "nemotron_h": ({"in_proj", "q_proj", "k_proj", "v_proj", "o_proj"}, "experts get no adapter, .* peft"),
}


@pytest.mark.parametrize("model_type", ADAPTED)
def test_layers_that_peft_refuses_are_left_out_and_others_are_trained(
    tmp_path: Path, model_type: str
) -> None:
    names, note = ADAPTED[model_type]
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).float()
    randomize(model)
    model.save_pretrained(tmp_path)
    plan = planned(tmp_path)
    assert {name.rpartition(".")[2] for name in plan.layers} == names
    assert re.search(note, plan.note or "") if note else plan.note is None
    policy = with_adapter(tmp_path)
    perturb(policy.model)
    contrast(policy.sequence_logps([tuple(s for s in group) for group in ordinary_groups()])).backward()
    assert set(gradients(policy.model)) == set(trainable_names(policy.model))
    assert all(grad.any() for grad in gradients(policy.model).values())


def ordinary_groups() -> list[Group]:
    """Of ids that no configuration gives a meaning."""
    ids = np.random.default_rng(1).choice([*ORDINARY], size=(4, 9)).astype(np.int32)
    return [(TokenSequence(prompt, a), TokenSequence(prompt, b[:5])) for prompt, a, b in [ids[:3], ids[1:]]]


def test_a_layer_that_cannot_be_adapted_is_refused_with_the_reason(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("mamba")).save_pretrained(tmp_path)
    for target, reason in (("out_proj", "peft refuses it"), ("dt_proj", "read without calling it")):
        with pytest.raises(ConfigError, match=rf"{target}: .*{reason}(.|\n)*pass some of: in_proj x_proj"):
            planned(tmp_path, lora_target_modules=[target])


@pytest.mark.parametrize("model_type", sorted({*model_types()} - {*BROKEN} - {*MORE_THAN_TEXT}))
def test_every_architecture_gets_an_adapter_on_its_text_model_alone(tmp_path: Path, model_type: str) -> None:
    config = tiny_config(model_type)
    config.architectures = [auto_class(model_type)._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    plan = planned(tmp_path)
    model = model_without_weights(tmp_path)
    assert type(model).__name__ == config.architectures[0]
    inside = {id(module) for module in decoder_of(model).modules()}
    assert plan.layers
    assert {id(model.get_submodule(layer)) for layer in plan.layers} <= inside
    assert not any(tower in layer for layer in plan.layers for tower in ("vision", "image", "audio"))


def damage(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"not plain LoRA \(use_dora=True\)"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, r"rank_pattern"),
        ({"bias": "all"}, r"bias='all'"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa'"),
        ({"something_new": 3}, r"something_new=3"),
        ({"peft_type": "IA3"}, r"peft_type='IA3'"),
        ({"r": 8}, r"not pairs of LoRA matrices of rank 8"),
        ({"r": None}, r"not an adapter's configuration"),
    ],
)
def test_an_adapter_that_is_more_than_two_matrices_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    saved(tmp_path / "adapter", tiny_model)
    planned(tiny_model, adapter=tmp_path / "adapter")
    damage(tmp_path / "adapter", **changes)
    with pytest.raises((ConfigError, ValueError), match=message):
        planned(tiny_model, adapter=tmp_path / "adapter")


def test_a_reference_with_the_adapter_merged_is_recognised(
    tiny_model: Path, shards: Path, tmp_path: Path
) -> None:
    saved(tmp_path / "adapter", tiny_model)
    merged = tmp_path / "merged"
    merge(MergeConfig(model=str(tiny_model), adapter=tmp_path / "adapter", output=merged))
    own = ShardFolder.open(score(merged, tmp_path / "scored", dtype="float32"))
    policy = with_adapter(tiny_model, adapter=tmp_path / "adapter")
    pairs = spread_pairs(own, 8)
    assert measure_parity(policy, pairs, cached_dtype="float32").ok
    assert not measure_parity(with_adapter(tiny_model), pairs, cached_dtype="float32").ok

    def check(folder: ShardFolder, adapter: Path | None) -> None:
        require_same_model(folder, tiny_model, fields=MODEL_FIELDS, fix="merge", adapter=adapter)

    check(own, tmp_path / "adapter")
    check(ShardFolder.open(shards), None)
    for folder, adapter in ((own, None), (ShardFolder.open(shards), tmp_path / "adapter")):
        with pytest.raises(FingerprintError, match=r"weights(.|\n)*same: schema_version"):
            check(folder, adapter)


def test_an_adapter_is_not_taken_for_a_model(tiny_model: Path, tmp_path: Path) -> None:
    saved(tmp_path / "adapter", tiny_model)
    with pytest.raises(ConfigError, match=r"is an adapter, not a model(.|\n)*dpo-opt merge --model BASE"):
        find_model(str(tmp_path / "adapter"))


def test_an_adapter_of_another_model_is_refused(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    saved(tmp_path / "adapter", other_model)
    with pytest.raises(ConfigError, match="trained on a base with weights") as caught:
        planned(tiny_model, adapter=tmp_path / "adapter")
    assert re.search(weights_digest(tiny_model)[:16], str(caught.value))
    wider = make_model("llama", tmp_path / "wider")
    with pytest.raises(ConfigError, match=r"the adapter's matrices for .* the model needs|weights"):
        planned(wider, adapter=tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"has rank 4, --lora-r is 8"):
        planned(other_model, adapter=tmp_path / "adapter", lora_r=8)


def test_without_its_adapter_a_model_that_was_trained_computes_what_its_base_does() -> None:
    """On several processes the base's log-probs are compared when the adapter of a checkpoint is there."""
    layer = torch.nn.Module()
    layer.part = LoraLinear(
        torch.nn.Linear(4, 4), adapter_name="default", r=2, config=LoraConfig(r=2, init_lora_weights=False)
    )
    given = torch.ones(1, 4)
    base, adapted = layer.part.base_layer(given), layer.part(given)
    assert not torch.equal(base, adapted)
    with without_adapter(layer):
        assert torch.equal(layer.part(given), base)
    assert torch.equal(layer.part(given), adapted)
    assert layer.part.lora_A["default"].weight.requires_grad
