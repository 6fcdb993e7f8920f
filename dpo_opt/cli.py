"""The command line: one command per stage, heavy imports inside the bodies.

``--help`` and ``status`` must answer at once, so nothing here imports torch, vllm or polars at the top.
"""

import errno
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from dpo_opt import __version__
from dpo_opt.console import watched
from dpo_opt.data_cli import check, convert, preview
from dpo_opt.kl_config import KLConfig
from dpo_opt.merge_config import MergeConfig
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.options import LocationType, configured
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.results import json_option, show, status_in_words
from dpo_opt.schemas.errors import ConfigError, DpoOptError, Interrupted, quoted
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import MANIFEST, PLAN, resume_command
from dpo_opt.schemas.safe_text import printable

_INTERRUPTED = 130
_AGAIN = "run the same command again: what was finished before is kept"
_NOT_ALLOWED = ("this user may not do there what the command must", "ls -ld {path}")
_NO_ROOM = ("what was being written could not be written whole", f"free some space there, then {_AGAIN}")
# What a system says of a path, which its user can mend: why it stops the command, and what to do.
_PATH_ERRORS = {
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.ENOTDIR: ("a file stands where a folder is needed", "ls -ld {path}, then pass another path"),
    errno.EISDIR: ("a folder stands where a file is needed", "ls -ld {path}, then pass another path"),
    errno.EEXIST: ("what is there would be replaced", "pass another path, or move that one away"),
    errno.ENAMETOOLONG: ("the file system has no names of that length", "pass a shorter path"),
    errno.ELOOP: ("following links there never ends", "ls -l {path}, then remove the link"),
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: ("the file system has no files of that size", "pass a path on another file system"),
    errno.EIO: ("the disk or its server failed", f"see what `dmesg | tail` says of it, then {_AGAIN}"),
    errno.ESTALE: (
        "the server of that file system no longer knows the file",
        f"mount it anew, then {_AGAIN}",
    ),
    errno.ETIMEDOUT: ("the server of that file system does not answer", f"see that it is up, then {_AGAIN}"),
    errno.ENOTCONN: ("the server of that file system is gone", f"mount it anew, then {_AGAIN}"),
    errno.EMFILE: (
        "the process may not open as many files",
        "ulimit -n 65536, then run the same command again",
    ),
}
# Raised by a file that is open, too, which does not say what it is called.
_WITHOUT_A_NAME = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EFBIG}
_EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "safetensors": "train",
    "peft": "peft",
    "polars": "analysis",
    "matplotlib": "analysis",
    "jinja2": "analysis",
}


class _Explained(click.ClickException):
    """A DpoOptError as click shows it: the message, no traceback, its exit code."""

    def __init__(self, error: DpoOptError) -> None:
        super().__init__(str(error))
        # click declares it for the class; here it differs by error.
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {printable(self.message)}", file=file or sys.stderr)


class _Command(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_with_dashes(argument) for argument in args])


class _Commands(click.Group):
    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DpoOptError as error:
            raise _Explained(error) from error
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRAS:
                raise
            missing = ConfigError(
                f"{package} is not installed", fix=f"pip install 'dpo-opt[{_EXTRAS[package]}]'"
            )
            raise _Explained(missing) from error
        except OSError as error:
            explained = _of_path(error)
            if explained is None:
                raise
            raise _Explained(explained) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)


def _of_path(error: OSError) -> DpoOptError | None:
    """A path that cannot be read or written is the user's to mend; the rest is a bug to report."""
    if error.errno == errno.ENOENT and "temporary directory" in str(error.strerror):
        return DpoOptError(
            "no folder for temporary files can be written",
            where=os.environ.get("TMPDIR"),
            why="files are finished there before they are put where they belong",
            fix="free some space there, or set TMPDIR to a folder that can be written",
        )
    if error.errno not in _PATH_ERRORS or (error.filename is None and error.errno not in _WITHOUT_A_NAME):
        return None
    why, fix = _PATH_ERRORS[error.errno]
    where = None if error.filename is None else str(error.filename)
    fix = fix.format(path=quoted(where))
    if where is not None and error.errno in (errno.EACCES, errno.EROFS):
        why, fix = _not_allowed(Path(where).absolute(), read_only=error.errno == errno.EROFS)
    return DpoOptError(str(error.strerror), where=where, why=why, fix=fix)


def _not_allowed(path: Path, *, read_only: bool) -> tuple[str, str]:
    """Why a path must be read or written, and what lets it be.

    What is written has a private name at first, so the folder is named in which it was to be.

    Args:
        path: Absolute; may not exist.
        read_only: Its file system takes nothing, whatever the modes are.
    """
    # Not `Path.exists`, which raises where a folder may not be entered.
    folder = next(parent for parent in path.parents if os.access(parent, os.F_OK))
    for closed, mode in ((folder, os.X_OK), (path, os.R_OK)):
        if os.access(closed, os.F_OK) and not os.access(closed, mode):
            return "the command reads what is there", f"chmod u+rX {quoted(closed)}"
    for shards in (folder, *folder.parents):
        if any(os.access(shards / name, os.F_OK) for name in (PLAN, MANIFEST)):
            if read_only:
                fix = f"cp -rL {quoted(shards)} COPY, then pass --shards COPY"
            else:
                fix = f"chmod -R u+w {quoted(shards)}"
            return "this command changes the folder; what only reads it needs no leave to write", fix
    elsewhere = "pass a path that can be written"
    return (
        "the command writes there",
        elsewhere if read_only else f"chmod u+w {quoted(folder)}, or {elsewhere}",
    )


def _with_dashes(argument: str) -> str:
    """TRL's users type --learning_rate; values, such as keep_start, stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


_dry_run = click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
_shards = click.option(
    "--shards", type=LocationType(), required=True, help="Folder of reference shards, or its s3:// URL."
)


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
)
@click.version_option(__version__, prog_name="dpo-opt")
def main() -> None:
    """Score preference pairs once under the reference, then train with only the policy in memory."""


for _command in (check, preview, convert):
    main.add_command(_command)


@main.command()
@configured(PrecomputeConfig)
@_dry_run
@json_option
def precompute(config: PrecomputeConfig, dry_run: bool, as_json: bool) -> None:
    """Score every pair once under the reference and write Parquet shards."""
    from dpo_opt.launch import launch, take_place
    from dpo_opt.preemption import preemptible
    from dpo_opt.scorers import make_scorer, reuse_check

    config = take_place(config)
    scorer = make_scorer(config)
    if not config.worker_index:  # of several workers one says it
        _say_merged_splits(config)
    if dry_run:
        from dpo_opt.dry_run import plan_precompute

        show(plan_precompute(config, scorer.numerics), as_json)
        return
    # The same command, with this run's settings; a launcher's worker has them in a file that goes with it.
    again = shlex.join(["dpo-opt", *sys.argv[1:]])
    with preemptible(resume_command(config.shards) if "--worker-index" in sys.argv else again):
        if config.launched:
            show(launch(config, progress=watched()), as_json)
            return
        from dpo_opt.precompute.run import precompute as run
        from dpo_opt.precompute.run import work

        if config.worker_index is not None:
            scored = work(config, scorer=scorer, progress=watched())
            result: dict[str, Any] = {"worker": config.worker_index, "scored_shards": scored}
        else:
            manifest = run(config, scorer=scorer, progress=watched())
            result = manifest.model_dump(include={"rows", "kept", "dropped", "truncated", "tokens"})
            result["engine"] = manifest.fingerprint.engine
    show({"shards": str(config.shards), **result, "reuse_check": reuse_check(scorer)}, as_json)


def _say_merged_splits(config: PrecomputeConfig) -> None:
    from dpo_opt.precompute.read.sources import find_sources, merged_splits

    for source in find_sources(config):
        splits = merged_splits(source)
        if splits:
            own = ", ".join(f"{split}: --data {quoted(name)}" for split, name in splits.items())
            click.echo(printable(f"{source.name} is read with all of its splits ({own})"), err=True)


@main.command()
@_shards
@json_option
def status(shards: AnyPath, as_json: bool) -> None:
    """Show how far a folder is, how fast it fills, and who last committed to it."""
    from dpo_opt.precompute.shards.finalize import status as read_status

    found = read_status(shards)
    show(found.model_dump() if as_json else status_in_words(found), as_json)


@main.command()
@_shards
@json_option
def finalize(shards: AnyPath, as_json: bool) -> None:
    """Check that all shards are there and write the manifest."""
    from dpo_opt.precompute.shards.finalize import finalize as run

    manifest = run(shards)
    show(manifest.model_dump(include={"rows", "kept", "dropped", "truncated", "tokens"}), as_json)


@main.command()
@_shards
@_dry_run
@json_option
def repair(shards: AnyPath, dry_run: bool, as_json: bool) -> None:
    """Heal damaged or lost files: exactly those shards are scored again that need it."""
    from dpo_opt.precompute.shards.repair import repair as run

    found = run(shards, dry_run=dry_run, progress=watched())
    if as_json:
        show(found.model_dump(), as_json)
        return
    rebuilt = "would_rebuild" if dry_run else "rebuilt"
    words = found.model_dump() | {"rebuilt": list(map(quoted, found.rebuilt))}
    show({rebuilt if name == "rebuilt" else name: value for name, value in words.items()}, as_json)


@main.command()
@_shards
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Hours for which nobody may have written to a file; longer than any worker takes for a shard.",
)
@_dry_run
@json_option
def gc(shards: AnyPath, older_than: float, dry_run: bool, as_json: bool) -> None:
    """Remove what killed and repeated attempts left behind."""
    from dpo_opt.folder_notes import listed
    from dpo_opt.precompute.shards.gc import find_garbage, remove_garbage

    garbage = find_garbage(shards, older_than_hours=older_than, look_only=dry_run)
    if not dry_run:
        remove_garbage(garbage)
    found: dict[str, Any] = {"would_remove" if dry_run else "removed": len(garbage.files)}
    found["bytes"] = garbage.size
    if dry_run:
        names = [str(path)[len(str(shards)) + 1 :] for path in garbage.files]
        found["files"] = names if as_json or not names else listed(names)
    show(found, as_json)


@main.command()
@_shards
@click.option("--model", help="Also compare the cached log-probs with this model's own.")
@click.option(
    "--pairs",
    "num_pairs",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Pairs to compare, spread over all shards.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Compute dtype of the comparison. auto: as training would take.",
)
@json_option
def verify(shards: AnyPath, model: str | None, num_pairs: int, dtype: str, as_json: bool) -> None:
    """Check every byte and row of a folder; with --model also that the numbers are that model's.

    The verdict is kept in the folder as verify.json.
    """
    from dpo_opt.verify import verify as run
    from dpo_opt.verify_text import lines

    verdict = run(shards, model=model, num_pairs=num_pairs, dtype=dtype)
    if as_json:
        show(verdict.as_dict(), as_json)
    else:
        for line in lines(verdict):
            click.echo(line)
    verdict.require_ok()


@main.command()
@configured(TrainConfig)
@_dry_run
@json_option
def train(config: TrainConfig, dry_run: bool, as_json: bool) -> None:
    """Train a policy on cached reference log-probs; no reference model in memory."""
    if dry_run:
        from dpo_opt.dry_run import lines, plan_train

        plan = plan_train(config)
        if as_json:
            show(plan, as_json)
        else:
            click.echo("\n".join(lines(plan)))
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


@main.command()
@configured(MergeConfig)
@json_option
def merge(config: MergeConfig, as_json: bool) -> None:
    """Merge a LoRA adapter into its base: a model to score, serve or train like any other."""
    from dpo_opt.merge import merge as run

    show(run(config, progress=watched()), as_json)


@main.command()
@_shards
@click.option("--model", required=True, help="Checkpoint to score.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Parquet file to write.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of the model. auto: as its checkpoint declares.",
)
@json_option
def score(shards: AnyPath, model: str, output: Path, dtype: str, as_json: bool) -> None:
    """Log-probs of every pair under any checkpoint, as a table for the analysis."""
    from dpo_opt.optimize.score_folder import score_shards

    count = score_shards(shards, model=model, output=output, dtype=dtype, progress=watched())
    show({"output": str(output), "pairs": count}, as_json)


@main.command()
@configured(KLConfig)
@json_option
def kl(config: KLConfig, as_json: bool) -> None:
    """KL divergence of a policy from a reference, on completions sampled from the policy."""
    from dpo_opt.kl import measure_kl

    show(measure_kl(config, progress=watched()), as_json)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="HTML file to write; summary.json goes beside it.",
)
@json_option
def report(runs: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Write one self-contained HTML page about one or more training runs."""
    from dpo_opt.analysis import report as write_report

    write_report(runs, output)
    show({"report": str(output), "summary": str(output.with_name("summary.json"))}, as_json)


@main.command()
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("demo-run"),
    show_default=True,
    help="Folder for everything the demo makes.",
)
def demo(output_dir: Path) -> None:
    """Teach a small real model to write kinder film reviews, in a few minutes on a CPU."""
    from dpo_opt.demo import demo as run

    run(output_dir)


@main.command()
@json_option
def env(as_json: bool) -> None:
    """Versions of everything that matters, for bug reports."""
    from dpo_opt.environment import describe

    show(describe(), as_json)
