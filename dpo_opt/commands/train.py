"""Train a policy on cached reference log-probs; no reference model in memory."""

import os
from typing import Any

import click

from dpo_opt.console import watched
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.options import configured, dry_run_option, json_option
from dpo_opt.results import show
from dpo_opt.schemas.errors import Interrupted


@click.command(help=__doc__)
@configured(TrainConfig)
@dry_run_option
@json_option
def command(config: TrainConfig, dry_run: bool, as_json: bool) -> None:
    if dry_run:
        from dpo_opt.dry_run import plan_train

        plan = plan_train(config)
        if as_json:
            show(plan, as_json)
        else:
            click.echo("\n".join(planned_lines(plan)))
        return
    from dpo_opt.optimize.loop import train as run
    from dpo_opt.optimize.processes.distributed import world_from_environment
    from dpo_opt.optimize.run_folder import CONFIG, resume_command

    try:
        result = run(config, progress=watched())
    except KeyboardInterrupt as error:
        if not (config.output_dir / CONFIG).is_file():
            raise  # nothing has begun
        raise Interrupted(
            "interrupted",
            why="what came after the latest checkpoint is made again, bit for bit",
            fix=resume_command(config.output_dir),
        ) from error
    if not world_from_environment(os.environ).first:
        return  # one of several processes says it for all
    parity = None if result.parity is None else result.parity._asdict()
    show(
        {"final": str(result.final), "steps": result.steps, "parity": parity, **result.last_metrics}, as_json
    )


def planned_lines(plan: dict[str, Any]) -> list[str]:
    """The plan of a training run for a person: what it will do, then its memory as a table."""
    memory = plan["memory_gb"]
    pair = plan["longest_pair"]
    remarks = {
        "weights": f"{plan['parameters']:,} parameters, {plan['trained']:,} trained",
        "activations": f"{plan['micro_batch_tokens']} token rows per micro-batch, on {plan['device']}",
        "head": "its fp32 gradient, summed over tiles",
        "total": "without Python, its libraries and what the allocator wastes",
    }
    table = [
        f"  {name:<16} {'not known' if memory[name] is None else f'{memory[name]:.3f} GB':>12}"
        f"   {remarks.get(name, '')}".rstrip()
        for name in ("weights", "gradients", "optimizer state", "activations", "head", "total")
    ]
    return [
        f"pairs        {plan['pairs_train']:,} to train on, {plan['pairs_eval']:,} held out",
        f"steps        {plan['steps']:,}",
        f"longest pair row {pair['row']}: prompt {pair['prompt']}, chosen {pair['chosen']}, "
        f"rejected {pair['rejected']} tokens",
        "memory at the peak of a step:",
        *table,
        f"  reference model: 0 GB, cached (online it would cost "
        f"{memory['an online reference would add']:.3f} GB)",
    ]
