"""Estimated memory against what a loaded model, its gradients, its optimizer and its saved tensors take."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import HEADS, PACKED, PADDED, SIZES, save_random
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.memory.estimate import Memory, estimate_memory, optimizer_bytes
from dpo_opt.optimize.update.optimizer import make_optimizer
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence

CPU = torch.device("cpu")
TESTED = {
    "llama": ("LlamaConfig", {**HEADS, "num_hidden_layers": 6}),
    "gpt-neox": PACKED["gpt-neox"],
    "gemma3-windowed": PACKED["gemma3-windowed"],
    "qwen3": PACKED["qwen3"],
    "gemma2-softcapped": PACKED["gemma2-softcapped"],
}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(shards=Path("shards"), model="model", output_dir=Path("run"), **changes)


def estimated(folder: Path, *, rows: int = 96, **changes: Any) -> Memory:
    return estimate_memory(settings(**changes), folder, rows=rows, device=CPU)


def groups(rows: int) -> list[Group]:
    """One sequence and the shortest of another, so that nothing is shared and nothing padded."""
    ids = np.random.default_rng(0).integers(3, 100, size=rows + 1).astype(np.int32)
    return [(TokenSequence(ids[:5], ids[5:]),)]


def saved_bytes(folder: Path, *, rows: int, dtype: str) -> int:
    """What autograd saves in a real forward of the decoder, each storage once, parameters left out."""
    policy = load_policy(folder, dtype=getattr(torch, dtype), device=CPU, trainable=True)
    parameters = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    found: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            found[storage._cdata] = tensor, storage.nbytes()
        return tensor

    batch = policy.layout(groups(rows))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=policy.dtype, enabled=dtype != "float32"),
    ):
        policy.model.base_model(input_ids=batch.input_ids, use_cache=False, **batch.model_kwargs)
    return sum(size for _, size in found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TESTED)
def test_activations_are_those_that_a_real_forward_keeps(tmp_path: Path, name: str, dtype: str) -> None:
    save_random(*TESTED[name], tmp_path)
    found = {rows: estimated(tmp_path, rows=rows, dtype=dtype).activations or 0 for rows in (48, 96)}
    real = {rows: saved_bytes(tmp_path, rows=rows, dtype=dtype) for rows in (48, 96)}
    # The difference of two sizes: copies of weights and peaks of the backward stay out of it.
    assert (found[96] - found[48]) == pytest.approx(real[96] - real[48], rel=0.25)
    assert found[96] > 0.8 * real[96]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_experts_are_not_underestimated(tmp_path: Path, dtype: str) -> None:
    save_random(*PACKED["qwen3-moe"], tmp_path)
    found = {rows: estimated(tmp_path, rows=rows, dtype=dtype).activations or 0 for rows in (48, 96)}
    real = {rows: saved_bytes(tmp_path, rows=rows, dtype=dtype) for rows in (48, 96)}
    assert 1 < (found[96] - found[48]) / (real[96] - real[48]) < 1.6


@pytest.mark.parametrize("name", ["llama", "gemma2-softcapped", "gpt-oss-sinks"])
def test_scores_are_counted_where_no_kernel_leaves_them_out(tmp_path: Path, name: str) -> None:
    save_random(*({"llama": ("LlamaConfig", HEADS)} | PADDED)[name], tmp_path)
    single, double = (estimated(tmp_path, rows=rows).activations or 0 for rows in (256, 512))
    # Of 4 heads in each of 4 layers, in fp32.
    scores = 4 * 4 * 4 * (512**2 - 2 * 256**2)
    assert (double - 2 * single > scores) == (name != "llama")


def test_checkpointing_lowers_the_activations_in_order(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "num_hidden_layers": 12}, tmp_path)
    none, selective, full = (
        estimated(tmp_path, activation_checkpointing=mode).activations or 0
        for mode in ("none", "selective", "full")
    )
    assert full < 0.3 * none
    assert full < selective < 0.65 * none


def test_weights_gradients_and_optimizer_are_counted_to_the_byte(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "tie_word_embeddings": True}, tmp_path)
    policy = load_policy(tmp_path, dtype=torch.float32, device=CPU, trainable=True)
    parameters = list(policy.model.parameters())
    size = sum(p.numel() for p in parameters)
    for optim in ("adamw", "rmsprop"):
        config = settings(optim=optim)
        optimizer = make_optimizer(policy.model, config)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held = sum(
            value.numel() * value.itemsize
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.numel() > 1
        )
        memory = estimated(tmp_path, optim=optim)
        assert (memory.parameters, memory.trained, memory.weights, memory.gradients) == (
            size,
            size,
            4 * size,
            4 * size,
        )
        assert memory.optimizer == optimizer_bytes(parameters, config) == held
        assert memory.head == 4 * 101 * 64
        assert memory.online_reference == 4 * size


def test_bfloat16_parameters_take_half_of_everything(tmp_path: Path) -> None:
    save_random("LlamaConfig", HEADS, tmp_path)
    fp32 = estimated(tmp_path, dtype="bfloat16")
    bf16 = estimated(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    assert (bf16.weights, bf16.gradients, bf16.optimizer) == (
        fp32.weights // 2,
        fp32.gradients // 2,
        fp32.optimizer // 2,
    )
    assert bf16.activations < fp32.activations
    # A reference that only scores needs no fp32 masters.
    assert bf16.online_reference == fp32.online_reference == fp32.weights // 2


def test_an_adapter_takes_gradients_and_moments_for_itself_alone(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_random("LlamaConfig", HEADS, tmp_path)
    full, lora = estimated(tmp_path), estimated(tmp_path, use_peft=True, lora_r=4)
    # Query and output are 64 x 64, key and value 64 x 32, gate, up and down 64 x 96, in 4 layers.
    trained = 4 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert lora.trained == trained
    assert lora.parameters == full.parameters + trained
    assert lora.weights == full.weights + 4 * trained
    assert (lora.gradients, lora.optimizer) == (4 * trained, 8 * trained)
    assert (lora.head, lora.online_reference) == (0, 0)
    assert lora.activations is not None


def test_no_memory_is_taken_for_a_model_of_any_size(tmp_path: Path) -> None:
    big = {**HEADS, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    save_config(tmp_path, {**big, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 80})

    class NothingIsMade(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor and tensor.device == CPU:
                    assert tensor.numel() < 1e6
            return result

    with NothingIsMade():
        memory = estimated(tmp_path, rows=4096, activation_checkpointing="full")
    assert memory.parameters > 60e9
    # Full checkpointing keeps a hidden state per layer, in fp32, and one layer's own.
    kept = 80 * 8192 * 4 * 4096
    assert kept < (memory.activations or 0) < 2 * kept


def save_config(folder: Path, sizes: dict[str, Any]) -> None:
    import transformers

    transformers.LlamaConfig(**sizes).save_pretrained(folder)


def test_where_shapes_depend_on_values_the_rest_is_still_known(tmp_path: Path) -> None:
    save_random("Lfm2Config", {**SIZES, "layer_types": ["conv", "full_attention"] * 2}, tmp_path)
    memory = estimated(tmp_path)
    assert memory.weights > 0
    assert memory.total >= memory.weights + memory.gradients + memory.optimizer


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ConfigError, match="transformers cannot make this model"):
        estimated(tmp_path)
