"""Reads a run folder that training wrote: its config, metrics and parity, and where its shards are.

Runs may be unfinished, resumed, or still being written. This file handles that.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dpo_opt.schemas.errors import ConfigError, DataError, quoted
from dpo_opt.schemas.locations import AnyPath, location
from dpo_opt.schemas.manifest import MANIFEST
from dpo_opt.schemas.plain_data import json_of, yaml_of

CONFIG = "config.resolved.yaml"
METRICS = "metrics.jsonl"
PARITY = "parity.json"
FINAL = "final"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run, opened."""

    path: Path
    shards: AnyPath
    """The folder of reference shards it trained on."""
    config: Mapping[str, object]
    train: pl.DataFrame
    """One row per logged step: ``step`` and every logged number, by its name in metrics.jsonl."""
    evals: pl.DataFrame
    """The same for evaluations; names keep their ``eval_``."""
    parity: Mapping[str, float] | None
    """Comparison of cached and recomputed reference log-probs, measured before the first step."""

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def beta(self) -> float:
        value = self.config.get("beta")
        if not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ConfigError(
                f"beta is {value!r:.50}, not a number above 0",
                where=str(self.path / CONFIG),
                why="rewards are beta times a log-ratio",
                fix="write the beta there that the run was trained with",
            )
        return float(value)

    @property
    def finished(self) -> bool:
        """Whether training came to its end: ``final/`` is the last thing that it writes."""
        return (self.path / FINAL).is_dir()

    @property
    def saved(self) -> Path | None:
        """The model that the run saved last; None if it has none yet."""
        if self.finished:
            return self.path / FINAL
        return max((self.path / "checkpoints").glob("step-*"), default=None)

    @property
    def margin_noise(self) -> float | None:
        """By how much a pair's log-prob margin differs between two right ways to compute it: sd, in nats.

        None if it was not measured.
        """
        measured = self.parity or {}
        return max((measured[n] for n in ("margin_sd", "floor_margin_sd") if n in measured), default=None)

    @property
    def resume_command(self) -> str:
        """The command that goes on with a run that is not finished."""
        return _command("train", config=self.path / CONFIG) + " --resume"

    @property
    def score_command(self) -> str:
        """The command whose output the report reads from ``scores/``."""
        model = self.saved or self.path / FINAL
        output = self.path / "scores" / f"{model.name}.parquet"
        score = _command("score", shards=self.shards, model=model, output=output)
        return score if self.saved else f"{self.resume_command} && {score}"

    @property
    def kl_command(self) -> str:
        """The command whose output the report reads from ``kl/``."""
        held_out = self.config.get("eval_split") or self.config.get("eval_shards")
        return f"dpo-opt kl {quoted(self.path)}" + ("" if held_out else f" --prompts {quoted(self.shards)}")

    @property
    def pairs_command(self) -> str:
        """The command that writes every pair with its final numbers."""
        return f"dpo-opt report {quoted(self.path)} --pairs {quoted(f'{self.name}.pairs.parquet')}"

    def tables(self, folder: str) -> list[Path]:
        """The finished Parquet files of one of the run's folders; none if there is no such folder."""
        return sorted(p for p in (self.path / folder).glob("*.parquet") if not p.name.startswith("."))


def shards_of_run(path: Path) -> AnyPath:
    """The folder of reference shards that a run trained on.

    Raises:
        ConfigError: It is not a run folder, or its shards are not found.
    """
    return _find_shards(path, read_run_config(path))


def open_run(path: Path | str) -> Run:
    """Open a run folder.

    Raises:
        ConfigError: It is not a run folder, or its shards are not found.
        DataError: One of its files is damaged.
    """
    path = Path(path)
    config = read_run_config(path)
    train, evals = _read_metrics(path / METRICS)
    return Run(
        path=path,
        shards=_find_shards(path, config),
        config=config,
        train=train,
        evals=evals,
        parity=_read_parity(path / PARITY),
    )


def last_entry(metrics: pl.DataFrame) -> dict[str, float]:
    """The last row of a metrics frame, without its nulls."""
    if not len(metrics):
        return {}
    return {name: value for name, value in metrics.row(-1, named=True).items() if value is not None}


def losses_in_words(recorded: object) -> str | None:
    """A run's ``loss_type`` as its settings record it; several as their sum."""
    if recorded is None:
        return None
    return " + ".join(map(str, recorded)) if isinstance(recorded, list) else str(recorded)


def _command(name: str, **options: object) -> str:
    words = [f"dpo-opt {name}", *(f"--{k} {quoted(v)}" for k, v in options.items())]
    return " ".join(words)


def read_run_config(path: Path) -> Mapping[str, object]:
    """The settings that a run was made with.

    Raises:
        ConfigError: It is not a run folder, or names no shards.
        DataError: The file is damaged.
    """
    file = path / CONFIG
    if not file.is_file():
        raise ConfigError(
            f"there is no {CONFIG}" if path.is_dir() else "there is no such folder",
            where=str(path),
            why="this is not a folder that training wrote",
            fix="pass the folder that `dpo-opt train` had as its --output-dir",
        )
    try:
        config = yaml_of(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            "not readable as YAML",
            where=str(file),
            why="it names the run's shards and its beta",
            fix="mend the file; `dpo-opt train --dry-run` with the run's options shows what stood there",
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("shards"), str):
        raise ConfigError(
            "the run's configuration names no shards",
            where=str(file),
            why="without the reference log-probs there is nothing to compare the policy with",
            fix="add a line with the folder of shards that the run was trained on: `shards: FOLDER`",
        )
    return config


def _find_shards(path: Path, config: Mapping[str, object]) -> AnyPath:
    named = str(config["shards"])
    stated = location(named)
    # Paths in the config are as the user typed them, so relative ones start at the folder of the command.
    places = [stated] if stated.is_absolute() else [stated, path.absolute().parent / stated]
    for place in places:
        if (place / MANIFEST).is_file():
            return place
    raise ConfigError(
        f"the shards {quoted(stated)} were not found (looked at {', '.join(map(quoted, places))})",
        where=str(path / CONFIG),
        why="without the reference log-probs there is nothing to compare the policy with",
        fix="run the report from the folder in which training was started, or move the shards back",
    )


def _read_metrics(file: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    entries = []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json_of(line)
        except ValueError as error:
            # A last line without a newline is still being written, or a crash cut it off.
            if number == len(lines):
                break
            raise _broken_line("not a JSON object", file, number) from error
        if not isinstance(entry, dict) or not _is_step(entry.get("step")):
            raise _broken_line("an entry without a step", file, number)
        if any("\ud800" <= character <= "\udfff" for name in entry for character in name):
            raise _broken_line("a name that is no text", file, number)
        entries.append(entry)
    evals = [e for e in entries if any(name.startswith("eval_") for name in e)]
    return _metrics_frame([e for e in entries if "loss" in e]), _metrics_frame(evals)


def _is_step(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


def _broken_line(what: str, file: Path, number: int) -> DataError:
    return DataError(
        what,
        where=f"{file}:{number}",
        why="the curves and the last values are drawn from these lines",
        fix=f"sed -i.bak {number}d {quoted(file)}, which leaves out this one and keeps the file as it was",
    )


def _metrics_frame(entries: list[dict[str, object]]) -> pl.DataFrame:
    names = dict.fromkeys(k for e in entries for k, v in e.items() if isinstance(v, int | float))
    columns = {n: [v if isinstance(v := e.get(n), int | float) else None for e in entries] for n in names}
    frame = pl.DataFrame(columns, schema_overrides=dict.fromkeys(names, pl.Float64), strict=False)
    if not len(frame):
        return pl.DataFrame(schema={"step": pl.Int64})
    # A resumed run writes the steps since its last checkpoint again; the later values count.
    return frame.cast({"step": pl.Int64}).unique("step", keep="last").sort("step")


def _read_parity(file: Path) -> Mapping[str, float] | None:
    if not file.is_file():
        return None
    try:
        parity = json_of(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken_parity(file) from error
    if not isinstance(parity, dict):
        raise _broken_parity(file)
    return {k: v for k, v in parity.items() if isinstance(v, int | float)}


def _broken_parity(file: Path) -> DataError:
    return DataError(
        "not a JSON object",
        where=str(file),
        why="it says which log-ratios are of the size of rounding",
        fix=f"rm {quoted(file)}; nothing is then called rounding",
    )
