"""What a run would do and need, said before it starts."""

import contextlib
from typing import Any

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.schemas.pairs import Numerics

# Two ids and two log-probs of 4 bytes per completion token, prompts once, before compression.
_BYTES_PER_TOKEN = 6


def plan_precompute(config: PrecomputeConfig, numerics: Numerics) -> dict[str, Any]:
    """Rows, shards, disk, engine and time of a precompute run; reads data and folder whole, writes nothing.

    Raises:
        DpoOptError: The run could not start, or the folder belongs to another one; see ``settle_plan``.
    """
    from dpo_opt.precompute.check.first_pairs import odd_ends
    from dpo_opt.precompute.read.sources import refuse_inside
    from dpo_opt.precompute.shards.commits import committed
    from dpo_opt.precompute.shards.make_plan import make_plan
    from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
    from dpo_opt.precompute.shards.write_plan import require_place
    from dpo_opt.scoring_forecast import forecast_scoring

    refuse_inside(config, config.shards, option="--shards")
    reference = resolve_reference(config)
    tokenizer = make_tokenizer(config, reference)
    planned = make_plan(
        config, reference=reference, tokenizer=tokenizer, numerics=numerics, tokenize_all=True
    )
    _, plan = require_place(config, planned)
    rows, scored = plan.rows, len(committed(config.shards, plan))
    forecast = forecast_scoring(config, reference, shards=len(plan.shards), shards_scored=scored)
    return {
        "rows": rows,
        "shards": len(plan.shards),
        "shards_scored": scored,
        "disk_at_most_gb": round(rows * 2 * reference.max_length * _BYTES_PER_TOKEN / 1e9, 3),
        "max_length": reference.max_length,
        "truncation": config.truncation,
        "columns": sorted(planned.columns),
        "odd_ends": odd_ends(config, tokenizer, reference.folder),
        "bad_rows": planned.bad_row_count,
        "bad_rows_skipped": [str(bad.error.where) for bad in planned.bad_rows],
        **numerics._asdict(),
        "forecast": forecast._asdict(),
    }


def plan_train(config: TrainConfig, gpus: str | None = None) -> dict[str, Any]:
    """Pairs, steps and memory of a training run; loads no weights, writes nothing.

    Args:
        config: The run.
        gpus: The GPUs to forecast its memory on (see ``parse_gpus``); None: this machine, one process.

    Raises:
        DpoOptError: The run could not start; see ``optimize.prepare.prepare``.
    """
    import torch

    from dpo_opt.optimize.forward.policy import default_device
    from dpo_opt.optimize.memory.advice import advise, fits
    from dpo_opt.optimize.memory.budget import least_budget, longest_pair, run_device
    from dpo_opt.optimize.memory.count import count_memory
    from dpo_opt.optimize.memory.gpus import parse_gpus
    from dpo_opt.optimize.prepare import prepare
    from dpo_opt.optimize.processes.distributed import World

    cards = None if gpus is None else parse_gpus(gpus)
    prepared = prepare(config)
    device = cards.device if cards else run_device(World(0, 1, 0, default_device(), None))
    longest = longest_pair(prepared.folder)
    rows = config.micro_batch_tokens or least_budget(longest, torch.device(device.type))
    with contextlib.closing(prepared.stream.steps(seed=config.seed, size=config.batch_size)) as steps:
        pairs = [longest, *next(steps)[1:]]
    memory = count_memory(
        config,
        prepared.model_folder,
        pairs,
        rows=rows,
        device=device,
        processes=cards.number if cards else 1,
    )
    forecast: dict[str, Any] | None = None
    if cards is not None:
        others = [] if fits(memory, cards) else advise(config, prepared.model_folder, pairs, cards)
        forecast = {
            "name": cards.name,
            "number": cards.number,
            "usable_gb": _gb(cards.usable),
            "fits": fits(memory, cards),
            "changes": [
                {"options": found.change, "total_gb": _gb(found.memory.total), "fits": found.fits}
                for found in others
            ],
        }
    return {
        "pairs_train": prepared.stream.train_size,
        "pairs_eval": len(prepared.stream.eval_positions),
        "steps": prepared.total_steps,
        "parameters": memory.parameters,
        "trained": memory.trained,
        "device": device.type,
        "micro_batch_tokens": rows,
        "longest_pair": {
            "row": longest.row,
            "prompt": len(longest.prompt_ids),
            "chosen": len(longest.chosen_ids),
            "rejected": len(longest.rejected_ids),
        },
        "memory_gb": {
            "weights": _gb(memory.weights),
            "gradients": _gb(memory.gradients),
            "optimizer state": _gb(memory.optimizer),
            "activations": None if memory.activations is None else _gb(memory.activations),
            "head": _gb(memory.head),
            "copy of a save": _gb(memory.save),
            "total": _gb(memory.total + (memory.save if device.type == "cpu" else 0)),
            "reference model": 0.0,
            "an online reference would add": _gb(memory.online_reference),
        },
        "gpus": forecast,
    }


def _gb(count: int) -> float:
    return round(count / 1e9, 6)
