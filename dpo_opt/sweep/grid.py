"""The runs of a sweep: every combination of a grid, or a list, each with a folder of its own.

A sweep's folder has ``sweep.yaml``, which maps the name of each run to its settings. A run is known by its
settings: a grid that is made larger finds the runs that are there, and adds the others.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_opt.complete_fix import complete_fix
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.read_settings import make_settings, read_settings, require_known
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, first_line, quoted
from dpo_opt.schemas.plain_data import yaml_of
from dpo_opt.schemas.storage import write_text

RUNS = "runs"
CONFIGS = "configs"
SWEEP = "sweep.yaml"
_GRID, _LIST = "grid", "runs"
# A sweep sets these itself.
_OWN = {"output_dir", "resume"}
_MOST_IN_NAME = 100


class SweepRun(NamedTuple):
    """One run of a sweep."""

    name: str
    """The name of its folder below ``runs/``."""
    config: TrainConfig


def read_grid(file: Path, given: Mapping[str, Any], *, sweep: Path) -> list[TrainConfig]:
    """The settings of each run that a grid's file asks for, in its order.

    Args:
        file: YAML with any setting of ``dpo-opt train``, which then holds for every run, and either ``grid``,
            a mapping of settings to lists of values, or ``runs``, a list of mappings.
        given: Settings that hold for every run and win over the file's.
        sweep: The sweep's folder; ``output_dir`` of each run is in it.

    Raises:
        ConfigError: The file is not of this form, a setting is refused, or two runs are the same.
    """
    known = [name for name in TrainConfig.model_fields if name not in _OWN]
    values = read_settings(file, [*known, _GRID, _LIST])
    varied = list(_varied(values.pop(_GRID, None), values.pop(_LIST, None), file))
    for settings in varied:
        for name in settings:
            require_known(name, known, where=str(file))
            if given.get(name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is given, and the grid varies {name}",
                    where=str(file),
                    why="one of the two would have no effect",
                    fix=f"leave out one: the option, or {name} in the file",
                )
    common = values | {name: value for name, value in given.items() if value is not None}
    configs: list[TrainConfig] = []
    for settings in varied:
        where = dict.fromkeys({**values, **settings}.keys() - given.keys(), str(file))
        with naming(_words(settings)):
            config = make_settings(TrainConfig, {**common, **settings, "output_dir": sweep}, where=where)
        if config in configs:
            raise ConfigError(
                f"two runs have the same settings: {_words(settings)}",
                where=str(file),
                why="the second would repeat the first",
                fix="leave one out, or give them two seeds",
            )
        configs.append(config)
    return configs


def _varied(grid: object, listed: object, file: Path) -> Iterator[dict[str, Any]]:
    """What differs between the runs, for each run.

    Raises:
        ConfigError: There is neither a grid nor a list, or both, or one is not of its form.
    """
    example = "for example\n    grid:\n      beta: [0.05, 0.1]\n      seed: [1, 2]"
    if (grid is None) == (listed is None):
        raise ConfigError(
            "there are both 'grid' and 'runs'" if grid is not None else "there is neither 'grid' nor 'runs'",
            where=str(file),
            why="it says which settings differ between the runs",
            fix=example if grid is None else "keep one of them",
        )
    if grid is not None:
        lists = isinstance(grid, dict) and all(isinstance(v, list) and v for v in grid.values())
        if not isinstance(grid, dict) or not grid or not lists:
            raise ConfigError(
                "'grid' is not a mapping of settings to lists of values", where=str(file), fix=example
            )
        yield from (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
        return
    if not isinstance(listed, list) or not listed or not all(isinstance(run, dict) for run in listed):
        raise ConfigError(
            "'runs' is not a list of mappings",
            where=str(file),
            fix="for example\n    runs:\n      - {beta: 0.1, seed: 1}\n      - {beta: 0.5, seed: 1}",
        )
    yield from listed


@contextlib.contextmanager
def naming(run: str, config: TrainConfig | None = None) -> Iterator[None]:
    """Name a run in the error that the block raises, and in its fix what the run's settings name."""
    try:
        yield
    except DpoOptError as error:
        error.what = f"run {quoted(run)}: {error.what}"
        if config is not None and error.fix is not None:
            error.fix = complete_fix(error.fix, config)
        raise


def record_runs(sweep: Path, runs: Sequence[SweepRun]) -> None:
    """Write ``sweep.yaml``: the runs that it has already, and these."""
    known = {run.name: settings_of(run.config) for run in [*recorded_runs(sweep), *runs]}
    write_text(sweep / SWEEP, yaml.safe_dump(known, sort_keys=False))


def write_config(sweep: Path, run: SweepRun) -> Path:
    """Write the configuration that a run is started with; returns the file."""
    file = sweep / CONFIGS / f"{run.name}.yaml"
    write_text(file, yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
    return file


def named_runs(sweep: Path, configs: Sequence[TrainConfig]) -> list[SweepRun]:
    """Give each configuration its run: the one that ``sweep.yaml`` has with these settings, or a new one.

    Args:
        sweep: The sweep's folder.
        configs: As ``read_grid`` gives them.

    Returns:
        A run for each configuration, in the same order.

    Raises:
        DataError: ``sweep.yaml`` is damaged.
    """
    runs = {run.name: settings_of(run.config) for run in recorded_runs(sweep)}
    found = []
    varied = varied_settings([settings_of(config) for config in configs])
    for config in configs:
        settings = settings_of(config)
        name = next((name for name, known in runs.items() if known == settings), None)
        if name is None:
            name = _free_name(_words({key: settings[key] for key in varied}), runs)
            runs[name] = settings
        found.append(_run(sweep, name, settings))
    return found


def recorded_runs(sweep: Path) -> list[SweepRun]:
    """The runs that ``sweep.yaml`` has; none where there is no such file.

    Raises:
        DataError: It is damaged.
    """
    file = sweep / SWEEP
    if not file.is_file():
        return []
    try:
        runs = yaml_of(file.read_text(encoding="utf-8"))
        if not isinstance(runs, dict) or any(name != _plain(str(name)) for name in runs):
            raise ValueError("not a mapping of names to settings")
        return [_run(sweep, name, settings) for name, settings in runs.items()]
    except (ValueError, TypeError) as error:
        raise DataError(
            f"unreadable ({first_line(error)})",
            where=str(file),
            why="it says which runs this sweep has",
            fix=f"mv {quoted(file)} {quoted(f'{file}.damaged')}, then "
            f"dpo-opt sweep --config GRID.yaml --output-dir {quoted(sweep)} with the grid that it began "
            "with: it writes the file again, and repeats no finished run",
        ) from error


def run_folders(path: Path) -> list[Path]:
    """The folders of a sweep's runs, as far as they have begun; of another folder itself.

    Raises:
        DataError: ``sweep.yaml`` is damaged.
    """
    if not (path / SWEEP).is_file():
        return [path]
    return [run.config.output_dir for run in recorded_runs(path) if run.config.output_dir.is_dir()]


def varied_settings(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that differ between runs, in the order of ``TrainConfig``."""
    if not all_settings:
        return []
    return [name for name in all_settings[0] if any(s[name] != all_settings[0][name] for s in all_settings)]


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Every setting of a run but its folder, as YAML and JSON write them."""
    return config.model_dump(mode="json", exclude=_OWN)


def _run(sweep: Path, name: str, settings: Mapping[str, Any]) -> SweepRun:
    config = TrainConfig.model_validate({**settings, "output_dir": sweep / RUNS / name, "resume": True})
    return SweepRun(name, config)


def _free_name(words: str, taken: Mapping[str, object]) -> str:
    name = _plain(words[:_MOST_IN_NAME]) or "run"
    return next(
        free for i in itertools.count(1) for free in [name if i == 1 else f"{name}-{i}"] if free not in taken
    )


def _words(settings: Mapping[str, Any]) -> str:
    words = (
        (name, "+".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in settings.items()
    )
    return "_".join(f"{name}={value}" for name, value in words)


def _plain(words: str) -> str:
    """Words as the name of a folder: a setting's value may be anything, and is never a path here."""
    return re.sub(r"[^A-Za-z0-9=_+.-]+", "-", words).strip(".-")
