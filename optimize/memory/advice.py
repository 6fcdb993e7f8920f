"""What would make a run smaller, by counting its memory again with other settings."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.packing import packed_size, pair_group
from dpo_opt.optimize.memory.count import Memory, count_memory
from dpo_opt.optimize.memory.gpus import Gpus
from dpo_opt.schemas.pairs import ScoredPair

_RECOMPUTED = {"activation_checkpointing": "full"}
_NARROW = {"param_dtype": "bfloat16"}
_EIGHT_BIT = {"optim": "adamw-8bit"}
_HALF_AS_LONG = "half_as_long"
# What to try, in this order: first what changes only the speed, last what trains less.
_CHANGES: tuple[dict[str, Any], ...] = (
    _RECOMPUTED,
    _NARROW,
    _RECOMPUTED | _NARROW,
    _RECOMPUTED | _NARROW | _EIGHT_BIT,
    _RECOMPUTED | _NARROW | _EIGHT_BIT | {_HALF_AS_LONG: True},
    {"use_peft": True},
    {"use_peft": True} | _RECOMPUTED,
)


class Advice(NamedTuple):
    """A change of a run, and the memory that a step then takes."""

    change: str
    """The options to add, as on a command line."""
    memory: Memory
    fits: bool


def fits(memory: Memory, gpus: Gpus) -> bool:
    """Whether a step fits on each of the GPUs."""
    return memory.total <= gpus.usable


def advise(
    config: TrainConfig, model_folder: Path, step: Sequence[ScoredPair], gpus: Gpus
) -> Iterator[Advice]:
    """Changes of a run that make it smaller, up to the first with which it fits.

    Args:
        config: The run that does not fit.
        model_folder: The policy; only its config.json is read.
        step: The pairs of one step, the longest among them.
        gpus: Of which each process has one.

    Raises:
        ConfigError: The model or the adapter cannot be made.
    """
    for changes in _CHANGES:
        settings = {name: value for name, value in changes.items() if name in TrainConfig.model_fields}
        if not _is_possible(config, settings, gpus):
            continue
        words = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in settings.items()
            if getattr(config, name) != value
        ]
        pairs = list(step)
        if changes.get(_HALF_AS_LONG):
            longest = max(_length(pair) for pair in step) // 2
            pairs = [_cut(pair, longest) for pair in step]
            words.append(f"and shards of `dpo-opt precompute --max-length {longest}`")
        changed = config.model_copy(update=settings)
        rows = config.micro_batch_tokens or max(packed_size(pair_group(pair)) for pair in pairs)
        memory = count_memory(
            changed, model_folder, pairs, rows=rows, device=gpus.device, processes=gpus.number
        )
        found = Advice(" ".join(words), memory, fits(memory, gpus))
        yield found
        if found.fits:
            return


def _is_possible(config: TrainConfig, settings: dict[str, Any], gpus: Gpus) -> bool:
    """Whether the settings change the run and go together with its other ones."""
    changed = config.model_copy(update=settings)
    return (
        changed != config
        and not (changed.use_peft and changed.param_dtype == "bfloat16")
        and not (changed.param_dtype == "bfloat16" and "rmsprop" in changed.optim)
        and not (changed.param_dtype == "bfloat16" and changed.dtype == "float32")
        and not (changed.optim == "adamw-8bit" and gpus.number > 1)
    )


def _length(pair: ScoredPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _cut(pair: ScoredPair, longest: int) -> ScoredPair:
    """The pair with at most so many tokens in a sequence: prompt and completions keep their shares."""
    share = min(1.0, longest / _length(pair))
    prompt, chosen, rejected = (
        max(1, int(share * len(ids))) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    return replace(pair.cut(chosen=chosen, rejected=rejected), prompt_ids=pair.prompt_ids[:prompt])
