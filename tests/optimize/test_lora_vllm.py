"""A trained adapter in a real vLLM engine: what is served is what was trained."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_opt.commands.merge import MergeConfig
from dpo_opt.merge import merge
from dpo_opt.optimize.adapters.lora import add_adapter, plan_adapter, save_adapter
from dpo_opt.optimize.config import TrainConfig

pytest.importorskip("peft")
NEW_TOKENS = 12


def made_up_adapter(base: Path, folder: Path, *, rank: int) -> None:
    config = TrainConfig(
        shards="unused", model=str(base), output_dir="unused", use_peft=True, lora_r=rank, lora_alpha=2 * rank
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_adapter(model, plan_adapter(config, base), seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    save_adapter(model, folder, base="base", base_weights=None)


def top_logps(folder: Path, ids: list[int]) -> torch.Tensor:
    """(tokens, V) log-probs by transformers' plain forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.slow
@pytest.mark.vllm
def test_an_adapter_served_by_vllm_writes_what_the_merged_model_writes(
    tiny_model: Path, tmp_path: Path
) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    # Not a rank that vLLM's own setting allows: it serves any up to that one.
    made_up_adapter(tiny_model, tmp_path / "adapter", rank=5)
    merged = tmp_path / "merged"
    merge(MergeConfig(model=str(tiny_model), adapter=tmp_path / "adapter", output=merged))
    engine = LLM(
        str(tiny_model),
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**26,
        logprobs_mode="raw_logprobs",
    )
    rng = np.random.default_rng(0)
    prompts = [[0, *rng.integers(2, 100, 9).tolist()] for _ in range(3)]
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = engine.generate(
        requests, settings, lora_request=LoRARequest("adapter", 1, str(tmp_path / "adapter")), use_tqdm=False
    )
    plain = engine.generate(requests, settings, use_tqdm=False)
    differs = 0
    for prompt, answer, without in zip(prompts, answers, plain, strict=True):
        ids = list(answer.outputs[0].token_ids)
        assert len(ids) == NEW_TOKENS
        expected = top_logps(merged, prompt + ids)[len(prompt) - 1 : -1]
        assert ids == expected.argmax(-1).tolist()
        for token, found, row in zip(ids, answer.outputs[0].logprobs, expected, strict=True):
            assert math.isclose(found[token].logprob, float(row[token]), abs_tol=1e-3)
        differs += ids != list(without.outputs[0].token_ids)
    assert differs == len(prompts)
