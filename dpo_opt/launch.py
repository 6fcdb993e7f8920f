"""Several workers: plan here, have them run here or by an existing engine, finalize when they are done."""

import os
from typing import Any

from dpo_opt.console import watched
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine.failing_sequences import ENGINE_ERROR
from dpo_opt.precompute.run import work
from dpo_opt.precompute.shards.commits import committed
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.finished import is_finalized
from dpo_opt.precompute.shards.reference import make_tokenizer, pinned, resolve_reference
from dpo_opt.precompute.shards.write_plan import settle_plan
from dpo_opt.precompute.workers.assignment import worker_from_environment
from dpo_opt.precompute.workers.local import own_devices, worker_environments
from dpo_opt.precompute.workers.local import run_workers as run_here
from dpo_opt.schemas.counts import are, counted
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.manifest import COUNTS
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.scorers import make_scorer


def take_place(config: PrecomputeConfig) -> PrecomputeConfig:
    """The settings of the worker that a scheduler says this process is, on its own GPUs.

    Raises:
        ConfigError: The scheduler's variables make no sense beside the settings.
    """
    if config.launcher != "local":
        return config
    worker = worker_from_environment(os.environ)
    if config.launched:
        if worker is None:
            return config
        raise ConfigError(
            f"--num-workers {config.num_workers} would start workers in each of {worker.of}",
            why="a scheduler has numbered this process already",
            fix="leave --num-workers out, or start one process only",
        )
    if (
        not {"LOCAL_RANK", "SLURM_LOCALID"} & os.environ.keys()
        and "gpus_per_worker" in config.model_fields_set
    ):
        raise ConfigError(
            "--gpus-per-worker without workers: this process takes the GPUs that it sees",
            why="it would have no effect",
            fix="pass --num-workers, or leave it out and set CUDA_VISIBLE_DEVICES",
        )
    devices = own_devices(config, os.environ)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    if worker is None or config.worker_index is not None:
        return config
    return config.model_copy(update={"worker_index": worker.number, "num_workers": worker.of})


def launch(config: PrecomputeConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Plan, and hand the workers to ``config.launcher``; no more of them than there are shards left.

    Args:
        config: Of the run.
        progress: Told of workers that are too many, and of rows that are lost.

    Raises:
        ConfigError, DataError, FingerprintError: As ``precompute``; also where the launcher is not there.
        DpoOptError: Workers failed for good.
    """
    environments: list[dict[str, str]] = []
    if config.launcher == "local":
        environments = worker_environments(config, os.environ, cores=len(os.sched_getaffinity(0)))
    reference = resolve_reference(config)
    config = pinned(config, reference)
    numerics = make_scorer(config).numerics
    plan = settle_plan(
        config, reference=reference, tokenizer=make_tokenizer(config, reference), numerics=numerics
    )
    planned = {"shards": str(config.shards), "shards_total": len(plan.shards), "pairs_total": plan.rows}
    if is_finalized(config.shards, plan):
        return planned | {"finalized": True}
    left = len(plan.shards) - len(committed(config.shards, plan))
    asked, workers = config.num_workers or 1, max(1, min(config.num_workers or 1, left))
    progress = progress or Silent()
    if workers < asked:
        progress.say(
            # Also true where a launcher starts none: without --submit, or because it is not there.
            f"{workers} of {counted(asked, 'worker')} {are(workers)} enough: {left} of "
            f"{counted(len(plan.shards), 'shard')} {are(left)} left to score. In another folder, a "
            "smaller --pairs-per-shard would give every worker some"
        )
        config = config.model_copy(update={"num_workers": workers})
        environments = environments[:workers]
    if config.launcher == "slurm":
        from dpo_opt.precompute.workers.slurm import launch_array

        return planned | launch_array(config)
    scored: dict[str, Any] = {}
    if config.launcher == "ray":
        from dpo_opt.precompute.workers.ray_cluster import run_workers

        run_workers(config, score_as_worker)
    else:
        results = run_here(config, environments)
        checks = [result.reuse_check for result in results if result.reuse_check is not None]
        scored = {
            "scored_shards": [result.scored_shards for result in results],
            # Of several workers the one that saw most.
            "reuse_check": max(checks, key=lambda check: float(check["mean"]), default=None),
        }
    manifest = finalize(config.shards, own=plan)
    if lost := manifest.dropped.get(ENGINE_ERROR, 0):
        progress.say(f"left out because the engine failed on them: {lost} ({ENGINE_ERROR})")
    return planned | manifest.model_dump(include=COUNTS) | scored


def score_as_worker(config: PrecomputeConfig) -> int:
    """One worker, in a process of its own."""
    return work(config, scorer=make_scorer(config), progress=watched())
