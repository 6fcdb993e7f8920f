"""Train a policy on cached reference log-probs.

No reference model is in memory.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from dpo_opt.console import watched
from dpo_opt.explained_errors import going_on_by
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.options import ListsCommand, OtherFile, configured, dry_run_option, json_option
from dpo_opt.results import say, show, table
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import ConfigError, Interrupted
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import load_manifest
from dpo_opt.schemas.models import checkpoint_dtype
from dpo_opt.schemas.run_layout import CONFIG
from dpo_opt.schemas.safe_text import printable
from dpo_opt.trl_config import read_trl_config

if TYPE_CHECKING:
    from dpo_opt.optimize.loop import TrainResult

_MEANS = (
    ("loss", "loss", "{:.4f}"),
    ("kl", "mean log-ratio of mismatched completions", "{:.3f}"),
    ("rewards/accuracies", "chosen has the higher reward", "{:.1%}"),
    ("rewards/margins", "reward of chosen minus rejected", "{:+.3f}"),
    ("rewards/chosen", "reward of chosen", "{:+.3f}"),
    ("rewards/rejected", "reward of rejected", "{:+.3f}"),
    ("logps/chosen", "log-prob of chosen, nats", "{:.2f}"),
    ("logps/rejected", "log-prob of rejected, nats", "{:.2f}"),
)


def _trl_settings(path: AnyPath) -> dict[str, Any]:
    """The settings that a file of TRL's means here; says which of it has no effect."""
    found = read_trl_config(path)
    for name, reason in found.not_taken.items():
        click.echo(printable(f"--trl-config: {name} is not taken: {reason}"), err=True)
    return found.settings


@click.command(cls=ListsCommand, help=__doc__)
@configured(
    TrainConfig,
    other=OtherFile(
        "--trl-config",
        "TRL's settings, a YAML or a DPOConfig as JSON; --config and flags win.",
        _trl_settings,
    ),
)
@dry_run_option
@click.option(
    "--gpus",
    help="With --dry-run: the GPUs to forecast for, such as 1xH100-80GB, 2xA100-40GB or 1x24GB.",
)
@json_option
def command(config: TrainConfig, dry_run: bool, gpus: str | None, as_json: bool) -> None:
    if gpus is not None and not dry_run:
        raise ConfigError(
            "--gpus works only with --dry-run",
            why="it only forecasts; a run uses the GPUs of its processes",
            fix="add --dry-run, or leave --gpus out",
        )
    if dry_run:
        from dpo_opt.dry_run import plan_train

        plan = plan_train(config, gpus)
        if as_json:
            show(plan, as_json)
        else:
            noun = load_manifest(config.shards).fingerprint.noun
            click.echo("\n".join(_planned_lines(plan, noun)))
        return
    from dpo_opt.optimize.loop import train as run
    from dpo_opt.optimize.processes.distributed import world_from_environment
    from dpo_opt.optimize.run_folder import resume_command

    def resume() -> str | None:
        """The command that continues the run; None where nothing has begun."""
        return resume_command(config.output_dir) if (config.output_dir / CONFIG).is_file() else None

    try:
        with going_on_by(lambda: None if config.resume else resume()):
            result = run(config, progress=watched())
    except KeyboardInterrupt as error:
        command = resume()
        if command is None:
            raise
        raise Interrupted(
            "interrupted",
            why="what came after the latest checkpoint is made again, bit for bit",
            fix=command,
        ) from error
    if not world_from_environment(os.environ).first:
        return  # one of several processes says it for all
    if as_json:
        parity = None if result.parity is None else result.parity._asdict()
        found = {"final": str(result.final), "steps": result.steps, "parity": parity}
        show(found | result.last_metrics, as_json)
    else:
        say(_ended_lines(config, result))


def _ended_lines(config: TrainConfig, result: "TrainResult") -> Iterator[str]:
    """Where the model is, whether the cache was its own, and how it does on what it was not trained on."""
    from dpo_opt.last_metrics import last_metrics

    last, noun = result.last_metrics, load_manifest(config.shards).fingerprint.noun
    yield f"model   {result.final}"
    saved = None if config.use_peft else checkpoint_dtype(result.final)
    if saved not in (None, config.param_dtype):
        yield (
            f"        saved in {saved}, trained in {config.param_dtype}: rounding loses the smallest updates;"
        )
        yield "        --save-dtype float32 keeps them, and dpo-opt score says what the saved model does"
    steps, tokens = counted(result.steps, "step"), counted(int(last["num_tokens"]), "token")
    yield f"run     {steps}, to epoch {last['epoch']:.4g}, {tokens}"
    parity = result.parity
    if parity is not None:
        yield (
            f"parity  {'ok' if parity.ok else 'FAILED'}: cached log-probs differ from the policy's own by "
            f"{parity.sd:.2g} nats per token (sd), by {parity.max:.2g} at most"
        )
        tokens, pairs = counted(parity.tokens, "token"), counted(parity.pairs, noun)
        yield f"        (over {tokens} of {pairs}, before the first update)"
    elif config.reference_differs:
        yield "parity  not measured: the reference is not the starting policy (--reference-differs)"
    yield ""
    groups = last_metrics(config.output_dir)
    yield from table(
        [f"mean over {noun}s", *(group.name for group in groups)],
        [
            [f"{noun}s", *(group.pairs for group in groups)],
            *(
                [words, *(form.format(group.means[name]) if name in group.means else "-" for group in groups)]
                for name, words, form in _MEANS
                if any(name in group.means for group in groups)
            ),
        ],
    )
    yield ""
    yield "reward: beta times what the policy added to the reference's log-prob of a completion"
    if len(groups) == 1:
        yield "nothing was held out: --eval-split 0.05 measures on prompts that are not trained on"


def _planned_lines(plan: dict[str, Any], noun: str) -> list[str]:
    """What a run will do, then its memory as a table; ``noun`` is what it trains on."""
    memory = plan["memory_gb"]
    pair = plan["longest_pair"]
    remarks = {
        "weights": f"{plan['parameters']:,} parameters, {plan['trained']:,} trained",
        "activations": f"{plan['micro_batch_tokens']} token rows per micro-batch, on {plan['device']}",
        "head": "logits, their derivatives and fp32 sums",
        "copy of a save": "in main memory, while a checkpoint is written in the background",
        "total": "without Python, its libraries and what the allocator wastes",
    }
    forecast = plan["gpus"]
    parts = ("weights", "gradients", "optimizer state", "activations", "head", "copy of a save", "total")
    rows = [
        [name, "not known" if memory[name] is None else f"{memory[name]:.3f} GB", remarks.get(name, "")]
        for name in parts
    ]
    return [
        f"{noun + 's':<11}  {plan['pairs_train']:,} to train on, {plan['pairs_eval']:,} held out",
        f"steps        {plan['steps']:,}",
        f"{'longest pair' if noun == 'pair' else 'longest':<12} row {pair['row']}: "
        f"prompt {pair['prompt']}, chosen {pair['chosen']}, "
        f"rejected {counted(pair['rejected'], 'token')}",
        "",
        *table(["memory at the peak of a step", "size", ""], rows),
        "",
        *(_forecast_lines(forecast, memory["activations"] is not None) if forecast else ()),
        f"reference model: 0 GB, cached (online it would cost "
        f"{memory['an online reference would add']:.3f} GB)",
    ]


def _forecast_lines(forecast: dict[str, Any], counted: bool) -> Iterator[str]:
    """Whether the run fits on the GPUs, and what would make it smaller."""
    where = f"{forecast['number']} x {forecast['name']}"
    each = "on each of " if forecast["number"] > 1 else "on "
    if not counted:
        yield f"whether it fits {each}{where} is not known: the model does not run without weights"
    elif forecast["fits"]:
        yield f"it fits {each}{where} ({forecast['usable_gb']:.1f} GB can be used)"
    else:
        yield f"it does NOT fit {each}{where} ({forecast['usable_gb']:.1f} GB can be used)"
        changes = forecast["changes"]
        rows = [
            [change["options"], f"{change['total_gb']:.3f} GB", "fits" if change["fits"] else ""]
            for change in changes
        ]
        yield ""
        yield from table(["with", "size", ""], rows)
        if not any(change["fits"] for change in changes):
            yield ""
            yield "none of these fits: use more or larger GPUs, or a smaller model"
    yield ""
