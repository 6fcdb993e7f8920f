"""Counts the memory of a training run's step, before any weight is loaded (``train --dry-run``).

Nothing is guessed from a formula, which another architecture would break. The run's own code makes a step on
tensors that have shapes and dtypes but no data, and the bytes in use are counted (``live_bytes``).
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from dpo_opt.optimize.adapters.lora import add_adapter, plan_adapter
from dpo_opt.optimize.config import LOSS_OPTIONS, TrainConfig
from dpo_opt.optimize.forward.activations import checkpoint_activations
from dpo_opt.optimize.forward.architecture import decoder_of, model_without_weights, projection_of
from dpo_opt.optimize.forward.attention import without_kept_masks
from dpo_opt.optimize.forward.balance import ForwardCost
from dpo_opt.optimize.forward.device_path import standing_for_gpu
from dpo_opt.optimize.forward.layout import layout_by_structure
from dpo_opt.optimize.forward.load_policy import make_trainable
from dpo_opt.optimize.forward.packing import Batch
from dpo_opt.optimize.forward.policy import Policy, compute_dtype
from dpo_opt.optimize.forward.prompt_groups import Sides, both_sides, own_side, prompt_groups
from dpo_opt.optimize.losses.preference_loss import is_unpaired
from dpo_opt.optimize.memory.budget import Device
from dpo_opt.optimize.memory.live_bytes import LiveBytes
from dpo_opt.optimize.processes.distributed import World, clip_gradients
from dpo_opt.optimize.processes.fsdp import shard_policy
from dpo_opt.optimize.step import Batching, forward_pairs
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.optimize.update.optimizer import make_optimizer, optimizer_bytes
from dpo_opt.optimize.update.optimizer_state import begin_state
from dpo_opt.optimize.update.set_apart import set_apart
from dpo_opt.schemas.pairs import ScoredPair, TokenizedPair, TokenSequence

# This logger prints a traceback for every operation that does not work without data.
_log = logging.getLogger("torch._subclasses.fake_tensor")
_CPU = torch.device("cpu")
_FOUR_BIT_WEIGHT = 0.5 + 1 / 64


class Memory(NamedTuple):
    """Bytes in use at the peak of a step, on the policy's device."""

    parameters: int
    """Number of weights, including an adapter's."""
    trained: int
    """Number of trained weights."""
    weights: int
    gradients: int
    """Of the parameters that have one at the peak, which may be before or during backward."""
    optimizer: int
    """The optimizer's state."""
    activations: int | None
    """What the decoder's forward and backward hold, and the update. None: not known without data."""
    head: int
    """What the head holds beyond its parameter's gradient: logits, their derivatives, fp32 sums."""
    save: int
    """What a save copies to main memory: the weights that a checkpoint holds, and the optimizer's state."""
    online_reference: int
    """What a reference model in memory would add, in the compute dtype; 0 for an adapter: its base is one."""
    rows: int
    """Most token rows of a micro-batch."""

    @property
    def total(self) -> int:
        """Sum of the components, without Python, its libraries and the allocator's waste."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0) + self.head


def count_memory(
    config: TrainConfig,
    model_folder: Path,
    step: Sequence[ScoredPair],
    *,
    rows: int,
    device: Device,
    processes: int = 1,
) -> Memory:
    """Memory of a run on each of its processes.

    Args:
        config: Decides what is trained, how it is stored and with which optimizer.
        model_folder: The policy; only its config.json is read.
        step: The pairs of one step, of whose micro-batches the largest are made.
        rows: Token rows per micro-batch.
        device: The device of each process; nothing is allocated on it.
        processes: Number of processes that share the model.

    Raises:
        ConfigError: transformers cannot build the model, or the adapter does not fit it.
    """
    compute = compute_dtype(config.dtype, torch.device(device.type))
    model = _model(config, model_folder, compute)
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.load_in_4bit:
        _pack_in_four_bits(model)
    weights = _bytes([*model.parameters(), *model.buffers()])
    state = optimizer_bytes(trained, config)
    found = _peak(model, config, step, compute=compute, rows=rows, device=device, processes=processes)
    if found is None:
        found = {"weights": weights, "gradients": _bytes(trained), "optimizer": state}
    return Memory(
        parameters=whole,
        trained=sum(parameter.numel() for parameter in trained),
        weights=found["weights"],
        gradients=found.get("gradients", 0),
        optimizer=found["optimizer"],
        activations=found.get("activations"),
        head=found.get("head", 0),
        save=_bytes(trained if config.use_peft else model.parameters()) + state,
        online_reference=0 if config.use_peft else whole * compute.itemsize,
        rows=rows,
    )


def _model(config: TrainConfig, folder: Path, compute: torch.dtype) -> PreTrainedModel:
    """The model as training has it, on the ``meta`` device."""
    model = model_without_weights(folder)
    torch.nn.Module.to(model, compute if config.use_peft else getattr(torch, config.param_dtype))
    model.requires_grad_(False)
    if config.use_peft:
        # 4 bits change no shape of the adapter, and this machine need not have a GPU.
        plan = plan_adapter(config.model_copy(update={"load_in_4bit": False}), folder)
        add_adapter(model, plan._replace(continued=None), seed=config.seed)
    else:
        make_trainable(model, compute)
    checkpoint_activations(model, config.activation_checkpointing)
    return model


def _peak(
    model: PreTrainedModel,
    config: TrainConfig,
    step: Sequence[ScoredPair],
    *,
    compute: torch.dtype,
    rows: int,
    device: Device,
    processes: int,
) -> dict[str, int] | None:
    """Bytes of each part at the peak; None if something in the model does not run without data."""
    live = LiveBytes()
    disabled, _log.disabled = _log.disabled, True
    try:
        with (
            without_kept_masks(),
            _mesh(processes) as mesh,
            standing_for_gpu(device.type == "cuda"),
            FakeTensorMode(allow_non_fake_inputs=True),
            live,
        ):
            model = _on_device(model)
            live.name([*model.parameters(), *model.buffers()], "weights")
            packs = layout_by_structure(model, _CPU, compute)
            if packs is None:
                return None
            policy: Policy = _counted(live)(model, _CPU, compute, packs)
            if mesh is not None:
                policy = _sharded(policy, mesh, device)
                live.name([*model.parameters(), *model.buffers()], "weights")
            sides_of = own_side if is_unpaired(config.loss_type) else both_sides
            pairs = _largest(policy, step, rows, processes, sides_of)
            _make_steps(policy, config, pairs, rows=rows, live=live)
        return live.peak()
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    finally:
        _log.disabled = disabled


def _on_device(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on the ``meta`` device, in whose place stand tensors without data."""
    memo: dict[int, object] = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device=_CPU), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device=_CPU) for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _mesh(processes: int) -> Iterator[DeviceMesh | None]:
    """So many processes, of which this one is the first and the others do not exist; None for one process."""
    if processes == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()


def _sharded(policy: Policy, mesh: DeviceMesh, device: Device) -> Policy:
    return shard_policy(policy, World(0, mesh.size(), 0, _CPU, None), mesh, memory=device.memory)


def _counted(live: LiveBytes) -> type[Policy]:
    """``Policy`` that tells the counter which part allocates. Backward enters the parts in reverse order."""

    class CountedPolicy(Policy):
        def batch_logps(self, batch: Batch, *, log_squares: Tensor | None = None) -> Tensor:
            live.enter("activations")
            hook = decoder_of(self.model).register_forward_hook(head_begins)
            logps = super().batch_logps(batch, log_squares=log_squares)
            hook.remove()
            live.enter("activations")
            if logps.requires_grad:
                logps.register_hook(lambda _: live.enter("head"))  # type: ignore[no-untyped-call]
            return logps

    def head_begins(_module: Any, _inputs: Any, output: Any) -> None:
        live.enter("head")
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda _: live.enter("activations"))

    return CountedPolicy


def _largest(
    policy: Policy,
    step: Sequence[ScoredPair],
    rows: int,
    processes: int,
    sides_of: Callable[[TokenizedPair], Sides],
) -> list[ScoredPair]:
    """The pairs of a step's first micro-batch and of its largest other one.

    The first has the longest pair. Gradients are kept while the others run.
    """
    groups = prompt_groups(step, rows=policy.rows, budget=rows, sides_of=sides_of)
    sizes = [policy.rows(group.sequences) + _scored(group.sequences) for group in groups]
    first, *others = policy.bins([group.sequences for group in groups], rows)
    if len(others) < processes:
        others = []  # each process has at most one
    chosen = first + max(others, key=lambda members: sum(sizes[i] for i in members), default=[])
    return [step[pair] for i in chosen for pair in groups[i].pairs]


def _scored(group: Sequence[TokenSequence]) -> int:
    return sum(len(sequence.completion_ids) for sequence in group)


def _make_steps(
    policy: Policy, config: TrainConfig, pairs: Sequence[ScoredPair], *, rows: int, live: LiveBytes
) -> None:
    """An update, so that the optimizer has its state, and then the step that is counted."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    if config.optim == "adamw-8bit":
        # torchao's update runs only on data.
        state = torch.empty(optimizer_bytes(trained, config), dtype=torch.uint8)
        live.name([state], "optimizer")
        update = None
    else:
        optimizer = make_optimizer(policy.model, config)
        update = optimizer.step
        live.name(set_apart(optimizer), "gradients")
        begin_state(optimizer)
        held = [value for state in optimizer.state.values() for value in state.values()]
        live.name([value for value in held if isinstance(value, Tensor)], "optimizer")
    # Losses take a few numbers for each pair, and some need data.
    kept = config.loss_type if is_unpaired(config.loss_type) else ["sigmoid"]
    plain = {"loss_type": kept, "loss_weights": None, "label_smoothing": 0.0}
    options = dict.fromkeys(name for name in LOSS_OPTIONS if name not in plain)
    live.start()
    forward_pairs(
        policy,
        pairs,
        config.model_copy(update=plain | options),
        batching=Batching(rows, ForwardCost(0, 0, 0), World(0, 1, 0, _CPU, None)),
        weights=None,
        backward=True,
        stop=StopSignals(),
    )
    live.name([p.grad for p in trained if p.grad is not None], "gradients")
    clip_gradients(trained, config.max_grad_norm)
    if update is not None:
        update()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


class _FourBitProduct(torch.autograd.Function):
    """Product with bitsandbytes' weights: they are widened each time, and only the packed ones are kept."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(states, states.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        return grad @ grad.new_empty(ctx.shape), None, None


def _pack_in_four_bits(model: PreTrainedModel) -> None:
    """Let frozen layers take the memory that they take in 4 bits."""
    head = projection_of(model)
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear) or module is head or module.weight.requires_grad:
            continue
        shape, dtype = module.weight.shape, module.weight.dtype
        packed = torch.empty(int(_FOUR_BIT_WEIGHT * shape.numel()), dtype=torch.uint8, device="meta")
        module.weight = torch.nn.Parameter(packed, requires_grad=False)
        module.forward = partial(_four_bit_forward, module, shape, dtype)  # type: ignore[method-assign]


def _four_bit_forward(
    module: torch.nn.Linear, shape: torch.Size, dtype: torch.dtype, states: Tensor
) -> Tensor:
    product: Tensor = _FourBitProduct.apply(states.to(dtype), module.weight, shape)  # type: ignore[no-untyped-call]
    return product if module.bias is None else product + module.bias.to(dtype)
