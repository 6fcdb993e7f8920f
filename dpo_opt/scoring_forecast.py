"""What scoring would take on GPUs: tokens, hours, memory of the weights, and shards of a fitting size."""

from typing import NamedTuple

from dpo_opt.model_size import count_parameters
from dpo_opt.precompute.check.forecast import estimate
from dpo_opt.precompute.check.pair_statistics import Wanted, collect
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine.option_rules import read_engine_options
from dpo_opt.precompute.shards.reference import Reference
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.progress import Silent

# A shard is what a killed worker loses. Much shorter ones spend their time on commits.
_SHORT, _FITTING, _LONG = 120.0, 300.0, 600.0
_BYTES = {"float32": 4}


class ScoringForecast(NamedTuple):
    """For the shards that are not scored yet, on H100s; see ``assumption``."""

    sequences: int
    """Of the whole data, as are the tokens."""
    tokens: int
    parameters: int
    gpu_hours: float
    workers: int
    gpus_per_worker: int
    """At least 1: what CPU cores would take is not known."""
    hours: float
    weights_gb_per_gpu: float
    seconds_per_shard: float
    advised_pairs_per_shard: int | None
    """None where the shards are neither too long, too short nor too few, or some are scored."""
    warnings: list[str]
    assumption: str


def forecast_scoring(
    config: PrecomputeConfig, reference: Reference, *, shards: int, shards_scored: int
) -> ScoringForecast:
    """Read the data once more, for the lengths of its sequences.

    Args:
        config: Of the run.
        reference: The model that scores.
        shards: Of the plan.
        shards_scored: How many of them are.

    Raises:
        ConfigError, DataError: The data or the model cannot be read.
    """
    wanted = Wanted(reference.folder, train_on=config.train_on)
    facts = collect(config, wanted, processes=config.processes, progress=Silent())
    whole = estimate(
        facts,
        max_length=reference.max_length,
        truncation=config.truncation,
        parameters=count_parameters(reference.folder),
        pairs_per_shard=config.pairs_per_shard,
    )
    options = read_engine_options(config.engine_option)
    gpus_of_a_model = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    workers, gpus = config.num_workers or 1, max(1, config.gpus_per_worker)
    left = 1 - shards_scored / max(1, shards)
    seconds = whole.gpu_hours * 3600 / gpus / max(1, shards)
    advised = None
    if not shards_scored:  # later the folder's own size counts
        advised = _advised_size(len(facts), shards, workers, seconds, current=config.pairs_per_shard)
    return ScoringForecast(
        sequences=whole.sequences,
        tokens=whole.tokens,
        parameters=whole.parameters,
        gpu_hours=whole.gpu_hours * left,
        workers=workers,
        gpus_per_worker=gpus,
        hours=whole.gpu_hours * left / gpus / max(1, min(workers, shards)),
        weights_gb_per_gpu=whole.parameters * _BYTES.get(reference.dtype, 2) / gpus_of_a_model / 1e9,
        seconds_per_shard=seconds,
        advised_pairs_per_shard=advised,
        warnings=_warnings(config, shards, workers, gpus_of_a_model),
        assumption=whole.assumption,
    )


def _advised_size(rows: int, shards: int, workers: int, seconds: float, *, current: int) -> int | None:
    """Rows of a shard that takes some minutes, as a power of two, so few that each worker has a shard.

    Args:
        rows: Of the data.
        shards: Of the plan.
        workers: That share them.
        seconds: One worker's, for a shard of the plan.
        current: Rows of such a shard.
    """
    in_time = _FITTING / (seconds * shards / rows) if seconds else rows
    size = 1 << max(0, int(min(in_time, rows / workers)).bit_length() - 1)
    too_short = seconds < _SHORT and size > current and seconds * shards > workers * _LONG
    return size if size != current and (shards < workers or too_short or seconds > _LONG) else None


def _warnings(config: PrecomputeConfig, shards: int, workers: int, gpus_of_a_model: int) -> list[str]:
    warnings = []
    if shards < workers:
        warnings.append(
            f"of {counted(workers, 'worker')} {workers - shards} would have nothing to do (shards: {shards})"
        )
    if config.launched and gpus_of_a_model < config.gpus_per_worker:
        idle = config.gpus_per_worker - gpus_of_a_model
        warnings.append(
            f"each worker has {counted(config.gpus_per_worker, 'GPU')}, and its engine uses "
            f"{gpus_of_a_model}: {idle} would be idle without --engine-option "
            f"tensor_parallel_size={config.gpus_per_worker}"
        )
    return warnings
