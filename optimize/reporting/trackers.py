"""The four trackers that a run may report to, each behind the same three things: open, log, close.

A library is imported only where it was asked for. Where data goes, and with which account, its own
environment variables say; nothing here reads or keeps a key.
"""

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dpo_opt.schemas.errors import ConfigError

_PROJECT = "dpo-opt"


class About(NamedTuple):
    """Of the run that is reported."""

    folder: Path
    id: str
    """8 hex digits, the same when the run is resumed."""
    settings: Mapping[str, Any]
    """As the run's folder records them."""
    first_step: int
    """Of the first line that will be logged: what an earlier process logged from there on is void."""

    @property
    def name(self) -> str:
        """What the run is called: its folder's name, and its id, since folders of two runs may share one."""
        return f"{self.folder.resolve().name}-{self.id}"


class Tracker(Protocol):
    """A run that is open in a tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of a step. Steps do not fall; a step may have several calls with other names."""
        ...

    def close(self, *, finished: bool) -> None:
        """Write what is held. ``finished`` is False where the run ended before its last step."""
        ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``, for ``tensorboard --logdir``."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(about.folder / "tensorboard"), purge_step=about.first_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, whose local files are in ``RUN/wandb``."""

    def __init__(self, about: About) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=about.folder,
            id=about.id,
            name=about.name,
            resume="allow",
            config=dict(about.settings),
            # Metrics and settings alone: neither the terminal's lines nor code. Nobody answers a prompt here.
            settings=wandb.Settings(console="off", save_code=False, disable_git=True, login_timeout=30),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    """A run of Trackio, in its local database or where its environment variables say."""

    def __init__(self, about: About) -> None:
        import trackio

        with _results_apart():
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
                name=about.name,
                resume="allow",
                config=dict(about.settings),
                embed=False,
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, finished: bool) -> None:
        with _results_apart():
            self._run.finish()


def _results_apart() -> contextlib.AbstractContextManager[object]:
    """Lines that a library prints go to stderr: stdout holds the command's result."""
    return contextlib.redirect_stdout(sys.stderr)


class Mlflow:
    """A run of MLflow, at ``MLFLOW_TRACKING_URI``; its tag ``dpo_opt.run`` finds it again."""

    def __init__(self, about: About) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([number], f"tags.`dpo_opt.run` = '{about.id}'")
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"dpo_opt.run": about.id}
        self._run = self._client.create_run(number, tags=tags, run_name=about.name).info.run_id
        params = [Param(key, str(value)) for key, value in about.settings.items()]
        self._client.log_batch(self._run, params=params)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=values)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run, status="FINISHED" if finished else "FAILED")


TRACKERS: Mapping[str, Callable[[About], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}
"""By the name that ``--report-to`` takes, which is also that of the package to import and to install."""


def require_installed(names: Sequence[str]) -> None:
    """Refuse a tracker whose library is missing, before anything is computed.

    Raises:
        ConfigError: It is not installed.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--report-to {' '.join(missing)}: not installed",
            why="nothing would be reported",
            fix=f"pip install {' '.join(missing)}",
        )
