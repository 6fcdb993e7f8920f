"""Opens a run folder that training wrote: its settings, metrics and parity, and where its shards are.

Runs may be unfinished, resumed, or still being written.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dpo_opt.analysis.run_records import read_metrics, read_parity
from dpo_opt.analysis.run_settings import read_run_config
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.locations import AnyPath, location
from dpo_opt.schemas.manifest import MANIFEST
from dpo_opt.schemas.run_layout import CONFIG, FINAL, METRICS, PARITY, SCORES, whole_checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run, opened."""

    path: Path
    name: str
    """What it is called where several runs are shown."""
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
    def beta(self) -> float:
        value = self.config.get("beta")
        if value is None:
            raise ConfigError(
                "the run's configuration has no beta",
                where=str(self.path / CONFIG),
                why="rewards are beta times a log-ratio",
                fix="add a line with the beta that the run was trained with, such as `beta: 0.1`",
            )
        return float(value)  # type: ignore[arg-type]

    @property
    def finished(self) -> bool:
        """Whether training came to its end: ``final/`` is the last thing that it writes."""
        return (self.path / FINAL).is_dir()

    @property
    def saved(self) -> Path | None:
        """The model that the run saved last; None if it has none yet."""
        if self.finished:
            return self.path / FINAL
        return next(reversed(whole_checkpoints(self.path)), None)

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
        output = self.path / SCORES / f"{model.name}.parquet"
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
        file = f"{self.path.absolute().name}.pairs.parquet"
        return f"dpo-opt report {quoted(self.path)} --pairs {quoted(file)}"

    def tables(self, folder: str) -> list[Path]:
        """The finished Parquet files of one of the run's folders; none if there is no such folder."""
        return finished_tables(self.path / folder)


def finished_tables(folder: Path) -> list[Path]:
    """The Parquet files of a folder; none if there is no such folder.

    Files whose names start with a dot are still being written, and are left out. So are folders.
    """
    return sorted(p for p in folder.glob("*.parquet") if not p.name.startswith(".") and not p.is_dir())


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Names of folders, each with as many of the folders above it as tell it from others of its name."""
    parts = [folder.absolute().parts for folder in folders]
    return ["/".join(own[-_depth(own, set(parts) - {own}) :]) for own in parts]


def _depth(own: tuple[str, ...], others: Collection[tuple[str, ...]]) -> int:
    """How many of the last parts of a path no other path has, or all of them."""
    depths = range(1, len(own))
    return next((n for n in depths if all(other[-n:] != own[-n:] for other in others)), len(own))


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
    train, evals = read_metrics(path / METRICS)
    return Run(
        path=path,
        name=path.absolute().name,
        shards=_find_shards(path, config),
        config=config,
        train=train,
        evals=evals,
        parity=read_parity(path / PARITY),
    )


def last_entry(metrics: pl.DataFrame) -> dict[str, float]:
    """The last row of a metrics frame, without its nulls."""
    if not len(metrics):
        return {}
    return {name: value for name, value in metrics.row(-1, named=True).items() if value is not None}


def _command(name: str, **options: object) -> str:
    words = [f"dpo-opt {name}", *(f"--{k} {quoted(v)}" for k, v in options.items())]
    return " ".join(words)


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
