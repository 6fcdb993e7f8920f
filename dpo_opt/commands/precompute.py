"""Score every pair once under the reference.

The log-probs of every completion token are written to Parquet shards.
"""

import sys
from typing import Any

import click

from dpo_opt.console import duration, watched
from dpo_opt.explained_errors import going_on_by
from dpo_opt.options import configured, dry_run_option, json_option
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.results import show
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import quoted
from dpo_opt.schemas.locations import location
from dpo_opt.schemas.manifest import COUNTS, load_manifest, resume_command
from dpo_opt.schemas.safe_text import printable

_NOT_AS_THEY_ARE = {"rows", "reuse_check", *COUNTS}


@click.command(help=__doc__)
@configured(PrecomputeConfig)
@dry_run_option
@json_option
def command(config: PrecomputeConfig, dry_run: bool, as_json: bool) -> None:
    from dpo_opt.launch import launch, take_place
    from dpo_opt.preemption import preemptible, same_command
    from dpo_opt.scorers import make_scorer, reuse_check

    config = take_place(config)
    scorer = make_scorer(config)
    if not config.worker_index:  # of several workers one says it
        _say_merged_splits(config)
    if dry_run:
        from dpo_opt.dry_run import plan_precompute

        plan = plan_precompute(config, scorer.numerics)
        show(plan if as_json else _planned_in_words(plan, config), as_json)
        return
    # The same command, with this run's settings; a launcher's worker has them in a file that goes with it.
    of_launcher = "--worker-index" in sys.argv
    again = resume_command(config.shards) if of_launcher else same_command()
    with preemptible(again), going_on_by(lambda: resume_command(config.shards) if of_launcher else None):
        if config.launched:
            launched = launch(config, progress=watched())
            show(launched if as_json else _in_words(launched), as_json)
            return
        from dpo_opt.precompute.run import precompute as run
        from dpo_opt.precompute.run import work

        if config.worker_index is not None:
            scored = work(config, scorer=scorer, progress=watched())
            result: dict[str, Any] = {"worker": config.worker_index, "scored_shards": scored}
        else:
            manifest = run(config, scorer=scorer, progress=watched())
            result = manifest.model_dump(include={"rows", *COUNTS})
            result["engine"] = manifest.fingerprint.engine
    result = {"shards": str(config.shards), **result, "reuse_check": reuse_check(scorer)}
    show(result if as_json else _in_words(result), as_json)


def _in_words(result: dict[str, Any]) -> dict[str, Any]:
    """A result as a person reads it: counts with what they count, and the rest as it is."""
    words = {"shards": result["shards"]} | {n: v for n, v in result.items() if n not in _NOT_AS_THEY_ARE}
    if "kept" in result:
        noun = load_manifest(location(result["shards"])).fingerprint.noun
        total = result["rows"] if "rows" in result else result["pairs_total"]
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in result["dropped"].items())
        words[f"{noun}s"] = f"{result['kept']:,} kept of {counted(total, 'row')}"
        words["left out"] = f"{dropped} (listed in dropped/)" if dropped else "none"
        # Never both of one pair: a prompt is cut where completions stay whole.
        cut = result["truncated"] + (result["prompts_truncated"] or 0)
        words["cut"] = f"{counted(cut, noun)} lost tokens to --max-length"
        sides = (
            "each of its two completions" if noun == "pair" else "its own completion and with another row's"
        )
        words["tokens"] = f"{result['tokens']:,}; a prompt counts with {sides}"
    check = result.get("reuse_check")
    if check is not None:
        words["prefix cache"] = (
            f"log-probs with it differ by {check['mean']:.2g} nats per token on average, "
            f"by {check['max']:.2g} at most (over {counted(check['tokens'], 'token')})"
        )
    return words


def _planned_in_words(plan: dict[str, Any], config: PrecomputeConfig) -> dict[str, Any]:
    """A dry run as a person reads it; what is not known is None."""
    found = plan["forecast"]
    workers, gpus, advised = found["workers"], found["gpus_per_worker"], found["advised_pairs_per_shard"]
    skipped, options = plan["bad_rows_skipped"], plan["engine_options"]
    return {
        "rows": f"{plan['rows']:,}",
        "bad rows": f"{plan['bad_rows']:,} left out, the first ones: {', '.join(skipped)}"
        if skipped
        else None,
        "columns": ", ".join(plan["columns"]) or None,
        "shards": f"{plan['shards']:,} of up to {counted(config.pairs_per_shard, 'row')}, "
        f"{plan['shards_scored']:,} of them scored",
        "tokens": f"{found['tokens']:,} in {found['sequences']:,} different sequences, at --max-length "
        f"{plan['max_length']:,} ({plan['truncation']})",
        "disk": f"at most {max(plan['disk_at_most_gb'], 0.001):g} GB",
        "engine": f"{plan['engine']} {plan['engine_version']} in {plan['dtype']} ({plan['strategy']})"
        + (f", {options}" if options != "{}" else ""),
        "GPUs": f"{workers * gpus}, for {counted(workers, 'worker')} with {gpus} each"
        if config.launched
        else None,
        "memory": f"{found['weights_gb_per_gpu']:.3g} GB of each GPU for the weights "
        f"({found['parameters']:,} parameters), beside the engine's cache",
        "time": f"{found['gpu_hours']:.3g} GPU hours, {duration(3600 * found['hours'])} in all and "
        f"{duration(found['seconds_per_shard'])} for a shard, without loading the model",
        "": f"(assumed: {found['assumption'].partition(';')[0]})",
        "warning": [*plan["odd_ends"], *found["warnings"]] or None,
        "advice": None if advised is None else f"--pairs-per-shard {advised}",
    }


def _say_merged_splits(config: PrecomputeConfig) -> None:
    from dpo_opt.precompute.read.sources import find_sources, merged_splits

    for source in find_sources(config):
        splits = merged_splits(source)
        if splits:
            own = ", ".join(f"{split}: --data {quoted(name)}" for split, name in splits.items())
            click.echo(printable(f"{source.name} is read with all of its splits ({own})"), err=True)
