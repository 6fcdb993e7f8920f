"""What a run would do and need, said before it starts."""

from typing import Any

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.schemas.models import parameter_count
from dpo_opt.schemas.pairs import Numerics

# Two ids and two log-probs of 4 bytes per completion token, prompts once, before compression.
_BYTES_PER_TOKEN = 6


def plan_precompute(config: PrecomputeConfig, numerics: Numerics) -> dict[str, Any]:
    """Rows, shards, disk and engine of a precompute run; reads all data, writes nothing."""
    from dpo_opt.precompute.plan import make_plan
    from dpo_opt.precompute.reference import make_tokenizer, resolve_reference

    reference = resolve_reference(config)
    tokenizer = make_tokenizer(config, reference)
    planned = make_plan(config, reference=reference, tokenizer=tokenizer, numerics=numerics)
    rows = planned.plan.rows
    return {
        "rows": rows,
        "shards": len(planned.plan.shards),
        "disk_at_most_gb": round(rows * 2 * reference.max_length * _BYTES_PER_TOKEN / 1e9, 3),
        "max_length": reference.max_length,
        "truncation": config.truncation,
        "columns": sorted(planned.columns),
        "bad_rows_skipped": [str(bad.error.where) for bad in planned.bad_rows],
        **numerics._asdict(),
    }


def plan_train(config: TrainConfig) -> dict[str, Any]:
    """Pairs, steps and memory of a training run; loads no weights, writes nothing."""
    from dpo_opt.optimize.loop import prepare

    prepared = prepare(config)
    parameters = parameter_count(prepared.model_folder)
    moments = 2 if config.optim == "adamw" else 1
    gigabyte = 4 * parameters / 1e9
    return {
        "pairs_train": prepared.stream.train_size,
        "pairs_eval": len(prepared.stream.eval_positions),
        "steps": prepared.total_steps,
        "parameters": parameters,
        "memory_gb": {
            "policy weights (fp32)": round(gigabyte, 3),
            "gradients": round(gigabyte, 3),
            "optimizer state": round(moments * gigabyte, 3),
            "reference model": "0 (cached)",
            "an online reference would add": round(gigabyte / 2, 3),
        },
    }
