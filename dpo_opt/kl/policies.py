"""Which policies are measured: model folders, checkpoints, all of a run's or of a sweep's runs.

A checkpoint says by where it lies which run made it, so what the run knows need not be given: the reference,
the prompts that were held out, and the folder for the results.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dpo_opt.analysis.kl import FINAL_TABLE
from dpo_opt.analysis.run_settings import read_run_config
from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.models import ADAPTER_CONFIG
from dpo_opt.schemas.run_layout import CONFIG, FINAL, KL, whole_checkpoints
from dpo_opt.sweep.grid import SWEEP, run_folders

if TYPE_CHECKING:
    from dpo_opt.commands.kl import KLConfig


class Policy(NamedTuple):
    """One policy to measure."""

    model: str
    """Its folder, or a name on the Hub."""
    base: str
    """The model that it is an adapter of, else the same."""
    reference: str
    run: Path | None
    """The folder of the run that made it."""
    step: int | None
    """Optimizer updates of that run."""
    output: Path
    """Table of its samples."""

    @property
    def adapter(self) -> Path | None:
        """Its folder, where that holds an adapter and no model."""
        return None if self.base == self.model else Path(self.model)


def find_policies(config: "KLConfig") -> list[Policy]:
    """The policies that the settings name, each once, in the order of their steps.

    Raises:
        ConfigError: None is named, a run has no model yet, or a reference or an output is not known.
        DataError: A file of a run or sweep is damaged.
    """
    named = [*config.models, *([config.model] if config.model else [])]
    if not named:
        raise ConfigError("no model is named", fix="dpo-opt kl RUN")
    found = dict.fromkeys(policy for name in named for policy in _policies(name, config))
    if config.output is not None and len(found) > 1:
        raise ConfigError(
            f"--output names one file, and there are {len(found)} models to measure",
            fix="leave --output out: each table goes into its run's folder kl/",
        )
    return list(found)


def _policies(name: str, config: "KLConfig") -> Iterator[Policy]:
    path = Path(name).expanduser()
    if (path / CONFIG).is_file() or (path / SWEEP).is_file():
        for run in run_folders(path):
            models = _models_of(run)
            if not models and run == path:
                raise ConfigError(
                    "the run has no checkpoint and no final model yet",
                    where=str(run),
                    fix="run the same command again once there is one",
                )
            yield from (_of_run(model, run, step, config) for model, step in models)
        return
    # Within the run's folder, the path as it was given does not name it.
    for place in (path, path.absolute()):
        for run in (place.parent, place.parent.parent):
            step = dict(_models_of(run, every=True)).get(place) if (run / CONFIG).is_file() else None
            if step is not None:
                yield _of_run(place, run, step, config)
                return
    _require({"--reference": config.reference, "--prompts": config.prompts, "--output": config.output}, name)
    assert config.reference is not None
    assert config.output is not None
    yield Policy(name, name, config.reference, None, None, config.output)


def _models_of(run: Path, *, every: bool = False) -> list[tuple[Path, int]]:
    """A run's checkpoints and final model with their steps, in that order.

    Args:
        run: The run's folder.
        every: Also the checkpoint of the last step, which has the final model's weights.
    """
    last = RunFolder(run).finished_step()
    found = [(folder, step) for folder, step in whole_checkpoints(run).items() if every or step != last]
    return found if last is None else [*found, (run / FINAL, last)]


def _of_run(model: Path, run: Path, step: int, config: "KLConfig") -> Policy:
    settings = read_run_config(run)
    whole = (model / "config.json").is_file() or not (model / ADAPTER_CONFIG).is_file()
    name = FINAL_TABLE if model.name == FINAL else f"{model.name}.parquet"
    return Policy(
        model=str(model),
        base=str(model) if whole else _model_of(settings, run),
        reference=config.reference or _reference_of(settings, run),
        run=run,
        step=step,
        output=config.output or run / KL / name,
    )


def _reference_of(settings: Mapping[str, object], run: Path) -> str:
    """The model that a run's policy began as, which is the reference of its loss."""
    for setting, why in (
        ("reference_differs", "its shards were scored with another model than it started from"),
        ("adapter", "it started from an adapter that is merged into its model"),
    ):
        if settings.get(setting):
            raise ConfigError(
                f"the run has {setting.replace('_', '-')} set, so it does not say its reference",
                where=str(run),
                why=why,
                fix="pass --reference with the model that the KL is to be measured from",
            )
    return _model_of(settings, run)


def _model_of(settings: Mapping[str, object], run: Path) -> str:
    model = settings.get("model")
    if not isinstance(model, str):
        raise ConfigError(
            "the run's configuration names no model",
            where=str(run / CONFIG),
            why="it is the reference, and the base of an adapter",
            fix="add a line with the model that the run began with: `model: FOLDER`",
        )
    return model


def _require(given: Mapping[str, object], model: str) -> None:
    missing: Sequence[str] = [option for option, value in given.items() if value is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given",
            where=model,
            why="it is not in the folder of a run, which would say them",
            fix=f"dpo-opt kl {quoted(model)} --reference M --prompts DIR_OR_DATA --output FILE.parquet",
        )
