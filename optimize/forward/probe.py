"""Checks at loading, on a few random tokens, that a batched forward gives the model's own log-probs.

The model's own log-probs come from transformers' eager attention on one sequence at a time, in fp32. A layout
is used only if it gives the same ones in fp32. They are then compared once more in the compute dtype, on the
device and with the kernel that will train: rounding hides smaller errors there, but the kernel may differ.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_opt.optimize.forward.architecture import head_of, special_ids
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.precision import HALF, computing_in
from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.pairs import TokenSequence
from dpo_opt.schemas.weights import nonfinite_tensor

if TYPE_CHECKING:
    from dpo_opt.optimize.forward.policy import Policy

# Largest difference in fp32: forwards of the same numbers in another order differ by about 1e-6 nats, a wrong
# mask by 0.1.
EXACT_WITHIN = 1e-3
# Limits on the mean and largest difference between half precision and fp32, in nats; or twice the difference
# of the model's own forward, if that is larger. SmolLM2-135M in bf16 has 0.05 and 0.3 on random tokens, and
# 0.4 to 1.9 on average with a wrong mask.
_HALF_MEAN, HALF_MAX = 0.2, 2.0
# How much other tokens in the batch may change a log-prob in half precision, on average. It is 0 where each
# row is computed by itself, and small where the rows of one expert are computed together.
_FOREIGN_MEAN = 0.02
# Tokens of each group's prompt and of its two completions. The short ones are for models with a tiny context.
_LENGTHS = ((9, (5, 10)), (6, (7, 4)))
_SHORT_LENGTHS = ((2, (2, 3)), (1, (3, 2)))
_PROBED = 19
SUPPORTED = "a supported architecture (Llama, Qwen, Mistral, Gemma, Phi, OLMo, Granite, ...)"


class Probe(NamedTuple):
    """A few random sequences, and the model's own log-probs of them."""

    groups: tuple[Group, ...]
    changed: tuple[Group, ...]
    """The same groups with another first completion each."""
    expected: Tensor
    """Log-probs of all completions, in order, on the CPU; in fp32, unless the weights are in 4 bits."""
    rounding_mean: float
    """Mean difference, in nats, of the model's own forward in the compute dtype from ``expected``."""
    rounding_max: float
    """Largest such difference."""
    attention: str = ""
    """The attention that gives the same log-probs; empty before one was found."""


def require_same_in_compute_dtype(policy: "Policy", *, where: str) -> None:
    """Compare the policy's log-probs, in its compute dtype, with the model's own in fp32.

    With several processes, every process must call this.

    Raises:
        ConfigError: The kernel, the device or the dtype gives other log-probs.
    """
    probe = policy.probe
    if probe is None:
        return
    with torch.no_grad():
        found, changed = (
            torch.cat(policy.sequence_logps(groups)).float().cpu() for groups in (probe.groups, probe.changed)
        )
    difference = (found - probe.expected).abs()
    # Log-probs of the completions that did not change while another one in the batch did.
    foreign = (found - changed)[_of_unchanged(probe)].abs()
    mean, largest, foreign_mean = (
        (EXACT_WITHIN,) * 3
        if policy.dtype == torch.float32
        else (
            max(_HALF_MEAN, 2 * probe.rounding_mean),
            max(HALF_MAX, 2 * probe.rounding_max),
            max(_FOREIGN_MEAN, probe.rounding_mean / 2),
        )
    )
    bounds = [
        ("from the same model in fp32, on average", difference.mean(), mean),
        ("from the same model in fp32, at most", difference.max(), largest),
        ("when other completions in the batch change, on average", foreign.mean(), foreign_mean),
    ]
    if not torch.isfinite(found).all():
        raise not_finite_in(policy.dtype, where)
    for what, value, limit in bounds:
        if not value <= limit:
            raise ConfigError(
                f"computed in {_name(policy.dtype)} on {policy.device.type}, log-probs differ {what}: "
                f"{value:.3g} nats per token; {limit:.3g} is allowed",
                where=where,
                why="the model that is trained would not be the one that was scored",
                fix="pass --dtype float32, and report the versions with `dpo-opt env`",
            )


def no_numbers(folder: Path) -> ConfigError:
    """The error for a model whose fp32 log-probs are not finite, with the tensor that causes it."""
    tensor = nonfinite_tensor(folder)
    if tensor is None:
        return not_finite_in(torch.float32, str(folder))
    return ConfigError(
        f"weights that are NaN or infinite: {tensor}",
        where=str(folder),
        why="every log-prob would be NaN too",
        fix="copy or download the model again, or go back to an earlier checkpoint",
    )


def not_finite_in(dtype: torch.dtype, where: str) -> ConfigError:
    """The error for a model with finite weights whose log-probs are not finite."""
    fixes = {
        torch.float16: "pass --dtype bfloat16 or --dtype float32",
        torch.bfloat16: "pass --dtype float32",
    }
    return ConfigError(
        f"the model's logits are not finite in {_name(dtype)}",
        where=where,
        why="its activations are beyond the range of this dtype, so every log-prob would be NaN",
        fix=fixes.get(dtype, "check that the checkpoint was saved completely"),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def questions(model: PreTrainedModel, longest: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """The probe's groups, and the same groups with another first completion each.

    Raises:
        ConfigError: The model has no head that is one matrix.
    """
    try:
        embedding = cast(torch.nn.Embedding, model.get_input_embeddings())
        vocabulary = min(head_of(model).weight.shape[0], embedding.weight.shape[0])
    except (AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"{type(model).__name__} has no head that is one matrix ({error})",
            why="log-probs are computed from that matrix, without holding the logits",
            fix=f"train {SUPPORTED}",
        ) from error
    known = np.arange(vocabulary, dtype=np.int32)
    usable = np.setdiff1d(known, list(special_ids(model.config)))
    if not len(usable):
        usable = known
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.choice(usable, size=count)

    groups, changed = [], []
    for prompt_length, lengths in _LENGTHS if (longest or _PROBED) >= _PROBED else _SHORT_LENGTHS:
        prompt, first, second = ids(prompt_length), ids(lengths[0]), ids(lengths[1])
        groups.append((TokenSequence(prompt, first), TokenSequence(prompt, second)))
        # Of the same length and with the same first token, so that the shared prefix stays the same.
        other = np.concatenate([first[:1], ids(lengths[0] - 1)])
        changed.append((TokenSequence(prompt, other), TokenSequence(prompt, second)))
    return tuple(groups), tuple(changed)


def stock_answers(
    model: PreTrainedModel, groups: Iterable[Group], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The model's own log-probs of all completions, in order, on the CPU.

    Raises:
        ConfigError: The model needs more than token ids, or does not compute in this dtype.
    """
    try:
        with computing_in(dtype, model, device):
            found = [stock_logps(model, sequence, device) for group in groups for sequence in group]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and dtype in HALF:
            raise ConfigError(
                f"{type(model).__name__} does not compute in {_name(dtype)} ({first_line(error)})",
                why="some of its layers mix dtypes",
                fix="pass --dtype float32",
            ) from error
        raise ConfigError(
            f"{type(model).__name__} does not run on token ids alone ({first_line(error)})",
            why="preference pairs are text, and the shards hold nothing else",
            fix=f"train {SUPPORTED}",
        ) from error
    return torch.cat(found).cpu()


def _of_unchanged(probe: Probe) -> Tensor:
    """Mask of the log-probs whose sequence is the same in ``groups`` and ``changed``."""
    same = [
        np.full(len(a.completion_ids), np.array_equal(a.completion_ids, b.completion_ids))
        for before, after in zip(probe.groups, probe.changed, strict=True)
        for a, b in zip(before, after, strict=True)
    ]
    return torch.from_numpy(np.concatenate(same))


def stock_logps(model: PreTrainedModel, sequence: TokenSequence, device: torch.device) -> Tensor:
    """The model's own log-probs of a completion, (tokens,) float32, computed from all its logits."""
    joined = np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64)
    ids = torch.from_numpy(joined).to(device)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(sequence.prompt_ids) - 1 : -1].float()
    targets = ids[0, len(sequence.prompt_ids) :, None]
    logps: Tensor = logits.log_softmax(-1).gather(1, targets).squeeze(1)
    return logps
