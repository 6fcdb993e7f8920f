"""Workers on a cluster: plan here, let an existing engine run the workers, finalize when they are done."""

from typing import Any

from dpo_opt.precompute.commits import finalize, is_finalized
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.plan import make_tokenizer, resolve_reference, settle_plan
from dpo_opt.precompute.run import work
from dpo_opt.scorers import make_scorer


def launch(config: PrecomputeConfig) -> dict[str, Any]:
    """Plan, and hand the workers to ``config.launcher``.

    Raises:
        ConfigError, DataError, FingerprintError: As ``precompute``; also where the launcher is not there.
        DpoOptError: Workers failed for good.
    """
    numerics = make_scorer(config).numerics
    reference = resolve_reference(config)
    plan = settle_plan(
        config, reference=reference, tokenizer=make_tokenizer(config, reference), numerics=numerics
    )
    planned = {"shards": str(config.shards), "shards_total": len(plan.shards), "pairs_total": plan.rows}
    if is_finalized(config.shards, plan):
        return planned | {"finalized": True}
    if config.launcher == "slurm":
        from dpo_opt.precompute.slurm import launch_array

        return planned | launch_array(config)
    from dpo_opt.precompute.ray_workers import run_workers

    run_workers(config, score_as_worker)
    manifest = finalize(config.shards)
    return planned | manifest.model_dump(include={"kept", "dropped", "truncated", "tokens"})


def score_as_worker(config: PrecomputeConfig) -> int:
    """One worker, in a process of its own."""
    return work(config, scorer=make_scorer(config))
