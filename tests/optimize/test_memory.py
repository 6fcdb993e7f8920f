"""Counted memory against what the CPU's allocator gave out in a real step."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from architectures import EXPERTS, HEADS, PACKED, PADDED, SIZES, groups, load, save_random
from fakes import scored_pairs
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_opt.optimize.adapters.lora import add_adapter, plan_adapter
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.balance import forward_cost
from dpo_opt.optimize.memory.budget import Device
from dpo_opt.optimize.memory.count import Memory, count_memory
from dpo_opt.optimize.memory.gpus import parse_gpus
from dpo_opt.optimize.processes.distributed import World, clip_gradients
from dpo_opt.optimize.processes.fsdp import shard_policy
from dpo_opt.optimize.step import Batching, forward_pairs
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.optimize.update.optimizer import make_optimizer, optimizer_bytes
from dpo_opt.optimize.update.set_apart import set_apart
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import ScoredPair

CPU = torch.device("cpu")
ON_CPU, ON_GPU = Device("cpu", None), Device("cuda", 80 * 10**9)
# Large enough that tensors take far more than what comes with them.
LARGER: dict[str, Any] = {
    **HEADS,
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 1024,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LARGER),
    "qwen3": ("Qwen3Config", LARGER),
    "gemma2": ("Gemma2Config", {**LARGER, "sliding_window": 64, "query_pre_attn_scalar": 16}),
    "tied": ("LlamaConfig", {**LARGER, "tie_word_embeddings": True, "vocab_size": 8000}),
    "moe": ("Qwen3MoeConfig", {**LARGER, **EXPERTS, "moe_intermediate_size": 128}),
}
ONE = scored_pairs((20, 60, 80))
PAIRS = scored_pairs((60, 120, 150), (90, 80, 40), (30, 100, 20), (110, 30, 70), (20, 25, 15), (40, 90, 90))


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(shards=Path("shards"), model="model", output_dir=Path("run"), **changes)


def counted(
    folder: Path,
    pairs: Sequence[ScoredPair] = PAIRS,
    *,
    rows: int = 400,
    device: Device = ON_CPU,
    processes: int = 1,
    **changes: Any,
) -> Memory:
    return count_memory(settings(**changes), folder, pairs, rows=rows, device=device, processes=processes)


def allocated(
    folder: Path,
    pairs: Sequence[ScoredPair] = PAIRS,
    *,
    rows: int = 400,
    processes: int = 1,
    **changes: Any,
) -> int:
    """Most bytes in use in a real step: tensors held before it, and what torch's allocator gave out in it."""
    config = settings(**changes)
    compute = getattr(torch, config.dtype if config.dtype != "auto" else "float32")
    stored = compute if config.use_peft else getattr(torch, config.param_dtype)
    policy = load(folder, dtype=compute, trainable=not config.use_peft, param_dtype=stored)
    if config.use_peft:
        add_adapter(policy.model, plan_adapter(config, folder), seed=0)
    checkpoint_activations(policy.model, config.activation_checkpointing)
    if processes > 1:
        policy = shard_policy(policy, World(0, processes, 0, CPU, None))
    optimizer = make_optimizer(policy.model, config)
    places = set_apart(optimizer)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    batching = Batching(rows, forward_cost(policy), World(0, 1, 0, CPU, None))

    def step() -> None:
        forward_pairs(
            policy, pairs, config, batching=batching, weights=None, backward=True, stop=StopSignals()
        )
        clip_gradients(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    whole = [*policy.model.parameters(), *policy.model.buffers(), *places]
    whole += [value for state in optimizer.state.values() for value in state.values()]
    held = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in whole]
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step()
    now = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return sum(tensor.numel() * tensor.itemsize for tensor in held) + most


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("llama", {"dtype": "bfloat16", "param_dtype": "bfloat16"}, id="llama-bf16-parameters"),
        pytest.param("gemma2", {}, id="gemma2"),
        *(
            pytest.param(name, changes, id=f"{name}{'-' if changes else ''}{what}", marks=pytest.mark.slow)
            for name, what, changes in (
                ("llama", "", {}),
                ("llama", "bf16", {"dtype": "bfloat16"}),
                ("llama", "lora", {"use_peft": True, "dtype": "bfloat16"}),
                ("llama", "full", {"activation_checkpointing": "full"}),
                ("llama", "selective", {"activation_checkpointing": "selective"}),
                ("llama", "rmsprop", {"optim": "rmsprop"}),
                ("qwen3", "", {}),
                ("gemma2", "bf16", {"dtype": "bfloat16"}),
                ("tied", "", {}),
                ("tied", "bf16-parameters", {"dtype": "bfloat16", "param_dtype": "bfloat16"}),
                ("moe", "", {}),
                ("moe", "bf16", {"dtype": "bfloat16"}),
            )
        ),
    ],
)
def test_memory_is_what_a_real_step_takes(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    if changes.get("use_peft"):
        pytest.importorskip("peft")
    save_random(*MODELS[name], tmp_path)
    assert counted(tmp_path, **changes).total == pytest.approx(allocated(tmp_path, **changes), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_memory_of_one_of_several_processes_is_what_it_takes(tmp_path: Path, recomputed: str) -> None:
    save_random(*MODELS["tied"], tmp_path)
    changes = {"dtype": "bfloat16", "activation_checkpointing": recomputed}
    found = counted(tmp_path, processes=2, **changes)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        real = allocated(tmp_path, processes=2, **changes)
    finally:
        dist.destroy_process_group()
    assert found.total == pytest.approx(real, rel=0.1)
    assert found.weights == pytest.approx(counted(tmp_path, **changes).weights / 2, rel=0.01)


@pytest.mark.parametrize(
    ("text", "count", "name", "memory"),
    [
        ("1xH100-80GB", 1, "H100-80GB", 81559 * 2**20),
        ("8xh200", 8, "H200-141GB", 143771 * 2**20),
        ("L4-24GB", 1, "L4-24GB", 23034 * 2**20),
        ("2x24GB", 2, "24GB", 24 * 10**9),
    ],
)
def test_gpus_are_known_by_name_or_memory(text: str, count: int, name: str, memory: int) -> None:
    gpus = parse_gpus(text)
    assert gpus == (count, name, memory)
    assert 0.9 * memory < gpus.usable < memory


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("1xA100", "A100-40GB, A100-80GB"),
        ("0xH100-80GB", "H100-80GB"),
        ("", "1x80GB"),
        ("3xpotato", "3x80GB"),
    ],
)
def test_gpus_that_are_not_known_are_refused(text: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        parse_gpus(text)


@pytest.mark.parametrize("name", ["llama", "bloom-alibi"])
def test_scores_are_counted_where_no_kernel_leaves_them_out(tmp_path: Path, name: str) -> None:
    save_config(tmp_path, *(PACKED | PADDED)[name])
    single, double = (
        counted(tmp_path, scored_pairs((8, rows, rows)), rows=1, device=ON_GPU).activations or 0
        for rows in (256, 512)
    )
    # Scores take four times as much at twice the length.
    assert (double > 3 * single) == (name != "llama")
    assert (double < 2.2 * single) == (name == "llama")


def test_checkpointing_lowers_the_activations_in_order(tmp_path: Path) -> None:
    save_config(tmp_path, "LlamaConfig", {**HEADS, "num_hidden_layers": 8})
    none, selective, full = (
        counted(tmp_path, ONE, device=ON_GPU, activation_checkpointing=mode).activations or 0
        for mode in ("none", "selective", "full")
    )
    assert full < 0.4 * none
    assert full < selective < 0.6 * none


def test_weights_and_optimizer_are_counted_to_the_byte(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "tie_word_embeddings": True}, tmp_path)
    model = load(tmp_path).model
    parameters = list(model.parameters())
    size, buffers = sum(p.numel() for p in parameters), sum(4 * b.numel() for b in model.buffers())
    for optim in ("adamw", "rmsprop"):
        config = settings(optim=optim)
        optimizer = make_optimizer(model, config)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = [value for state in optimizer.state.values() for value in state.values()]
        memory = counted(tmp_path, ONE, optim=optim)
        assert (memory.parameters, memory.trained) == (size, size)
        assert memory.weights == 4 * size + buffers
        assert memory.optimizer == sum(value.numel() * value.itemsize for value in state)
        moments = sum(value.numel() * value.itemsize for value in state if value.ndim)
        assert optimizer_bytes(parameters, config) == moments
        assert memory.save == 4 * size + moments
        assert memory.online_reference == 4 * size


def test_of_unpaired_rows_one_completion_is_counted_for_backward(tmp_path: Path) -> None:
    save_random("LlamaConfig", LARGER, tmp_path)
    rows = [dataclasses.replace(pair, label=pair.row % 2 == 0) for pair in PAIRS]
    for budget in (400, 150):
        memory = counted(tmp_path, rows, rows=budget, loss_type=["kto"])
        assert memory.total == pytest.approx(
            allocated(tmp_path, rows, rows=budget, loss_type=["kto"]), rel=0.02
        )
        assert memory.total < 0.95 * counted(tmp_path, rows, rows=budget).total


def test_gradients_are_kept_while_other_micro_batches_run(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "vocab_size": 101}, tmp_path)
    whole = 4 * counted(tmp_path, ONE).trained
    # Long ones, so that the activations decide when memory is at its peak.
    long = scored_pairs((10, 150, 150), (10, 145, 145))
    fp32 = {"rows": 1, "dtype": "float32"}
    assert counted(tmp_path, long[:1], device=ON_GPU, **fp32).gradients < 0.1 * whole
    assert counted(tmp_path, long, device=ON_GPU, **fp32).gradients == whole
    # On a CPU they have their places from the first step on.
    assert counted(tmp_path, long[:1], rows=1).gradients == whole


@pytest.mark.parametrize("loss", ["exo_pair", "kto_pair", "rdpo"])
def test_a_loss_that_needs_data_is_no_obstacle(tmp_path: Path, loss: str) -> None:
    save_config(tmp_path, "LlamaConfig", HEADS)
    options = {"rdpo_alpha": 0.1} if loss == "rdpo" else {}
    assert counted(tmp_path, ONE, loss_type=loss, **options) == counted(tmp_path, ONE)


def test_eight_bit_state_is_counted_without_its_package(tmp_path: Path) -> None:
    save_random("LlamaConfig", LARGER, tmp_path)
    eight, full = counted(tmp_path, ONE, optim="adamw-8bit"), counted(tmp_path, ONE)
    assert 0.25 * full.optimizer < eight.optimizer < 0.26 * full.optimizer
    assert eight.weights == full.weights


def test_four_bit_weights_are_widened_one_product_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_random("LlamaConfig", LARGER, tmp_path)
    small, plain = (
        counted(tmp_path, ONE, device=ON_GPU, use_peft=True, load_in_4bit=four) for four in (True, False)
    )
    layers = 4 * (2 * 128 * 64 + 2 * 128 * 32 + 3 * 128 * 256)
    assert plain.weights - small.weights == int((2 - 0.5 - 1 / 64) * layers)
    assert small.activations == pytest.approx(plain.activations, rel=0.2)


def test_an_adapter_takes_gradients_and_moments_for_itself_alone(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_random("LlamaConfig", HEADS, tmp_path)
    full, lora = counted(tmp_path, ONE), counted(tmp_path, ONE, use_peft=True, lora_r=4)
    # Query and output are 64 x 64, key and value 64 x 32, gate, up and down 64 x 96, in 4 layers.
    trained = 4 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert lora.trained == trained
    assert lora.parameters == full.parameters + trained
    assert lora.weights == full.weights + 4 * trained
    assert lora.gradients <= 4 * trained
    assert lora.optimizer == pytest.approx(8 * trained, rel=0.01)
    assert lora.online_reference == 0


def test_a_gpu_holds_half_precision_derivatives_and_no_copy_for_each_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_opt.optimize.forward.head_products._multiplies_bf16", lambda: False)
    sizes = {**LARGER, "vocab_size": 32_000, "num_hidden_layers": 1, "tie_word_embeddings": True}
    save_random("LlamaConfig", sizes, tmp_path)
    long = scored_pairs((8, 1500, 1500))
    cpu, gpu = (counted(tmp_path, long, rows=1, device=d, dtype="bfloat16") for d in (ON_CPU, ON_GPU))
    # Of 3,000 scored tokens the derivatives are kept: in fp32 on a CPU without bf16 products, in bf16 on a
    # GPU, in larger blocks.
    assert cpu.head > 4 * 32_000 * 3000
    assert 2 * 32_000 * 3000 < gpu.head < 2 * 32_000 * 3000 + 2.2 * 2**28


def test_no_memory_is_taken_for_a_model_of_any_size(tmp_path: Path) -> None:
    big = {**HEADS, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    save_config(
        tmp_path, "LlamaConfig", {**big, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 8}
    )

    class NothingIsMade(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor and tensor.device == CPU:
                    assert tensor.numel() < 1e6
            return result

    with NothingIsMade():
        memory = counted(
            tmp_path,
            scored_pairs((1, 2048, 2048)),
            rows=1,
            device=ON_GPU,
            optim="adamw-8bit",
            param_dtype="bfloat16",
            activation_checkpointing="full",
        )
    assert memory.parameters > 6e9
    # Full checkpointing keeps a hidden state per layer, and one layer's own.
    kept = 8 * 8192 * 2 * 4096
    assert kept < (memory.activations or 0) < 6 * kept


def save_config(folder: Path, kind: str, sizes: dict[str, Any]) -> None:
    getattr(transformers, kind)(**sizes).save_pretrained(folder)


def test_where_shapes_depend_on_values_the_rest_is_still_known(tmp_path: Path) -> None:
    save_random("Lfm2Config", {**SIZES, "layer_types": ["conv", "full_attention"] * 2}, tmp_path)
    memory = counted(tmp_path, ONE)
    assert memory.weights > 0
    assert memory.total >= memory.weights + memory.gradients + memory.optimizer


def test_counting_leaves_nothing_behind(tmp_path: Path) -> None:
    save_random("LlamaConfig", HEADS, tmp_path)
    expected = load(tmp_path).sequence_logps(groups())
    counted(tmp_path, rows=1)
    counted(tmp_path, ONE, device=ON_GPU)
    # Masks without data, if the attention kept them, would break this.
    for before, after in zip(expected, load(tmp_path).sequence_logps(groups()), strict=True):
        assert torch.equal(before, after)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ConfigError, match="transformers cannot make this model"):
        counted(tmp_path)
