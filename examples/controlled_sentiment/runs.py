"""Trains the runs of every method, and finds their policies.

The losses of pairs are trained here, by the same function as `dpo-opt train`. One process of TRL trains all
PPO runs of a seed. What is finished is not trained again.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from folders import HERE, Work, run_python
from libraries import require_ppo
from settings import OFFLINE, ONLINE, MethodName

from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize import train as train_on_pairs
from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.schemas.storage import write_text


class Run(NamedTuple):
    """One training run."""

    method: MethodName
    knob: float | None
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and tables."""
        knob = "" if self.knob is None else f"_knob={self.knob:g}"
        return f"{self.method}{knob}_rate={self.learning_rate:g}"


class Policy(NamedTuple):
    """One checkpoint of a run."""

    run: Run
    step: int
    folder: Path


def train(work: Work, seed: int, runs: Sequence[Run]) -> None:
    """Train all runs of a seed that are not finished."""
    left = [run for run in runs if not _finished(work, run)]
    for run in left:
        if run.method in OFFLINE:
            print(f"$ train {run.name} of seed {seed}", flush=True)
            train_on_pairs(_config(work, run))
    online = [run for run in left if run.method in ONLINE]
    if online:
        _ppo(work, seed, online)


def policies(work: Work, run: Run) -> list[Policy]:
    """The checkpoints of a finished run, in the order of their steps."""
    folder = _folder(work, run)
    if run.method in ONLINE:
        total = work.experiment.ppo.steps
    else:
        total, folder = work.experiment.offline.steps, folder / "checkpoints"
    every = total // work.experiment.checkpoints
    return [Policy(run, step, folder / f"step-{step:08}") for step in range(every, total + 1, every)]


def _config(work: Work, run: Run) -> TrainConfig:
    """The settings of a run on pairs."""
    of_method: dict[str, dict[str, Any]] = {
        "dpo": {"loss_type": "sigmoid", "beta": run.knob},
        "preferred_ft": {"loss_type": "sft"},
        "unlikelihood": {"loss_type": "unlikelihood", "unlikelihood_alpha": run.knob},
    }
    offline = work.experiment.offline
    return TrainConfig.model_validate(
        {
            **of_method[run.method],
            "shards": str(work.of_seed(run.seed) / "shards"),
            "model": work.model,
            "output_dir": _folder(work, run),
            "learning_rate": run.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0.1,
            "sample_by": "prompt",
            "batch_size": offline.batch_size,
            "max_steps": offline.steps,
            "save_steps": offline.steps // work.experiment.checkpoints,
            "save_total_limit": max(2, work.experiment.checkpoints),
            "save_minutes": None,
            "seed": run.seed,
            "resume": True,
        }
    )


def _folder(work: Work, run: Run) -> Path:
    return work.of_seed(run.seed) / "runs" / run.name


def _finished(work: Work, run: Run) -> bool:
    if run.method in ONLINE:
        return _folder(work, run).is_dir()
    return RunFolder(_folder(work, run), writes=False).finished_step() is not None


def _ppo(work: Work, seed: int, runs: Sequence[Run]) -> None:
    """Hand the runs to ppo.py.

    Raises:
        ConfigError: The folder with TRL's PPO is not given.
    """
    library = require_ppo(work.ppo_library)
    folder = work.of_seed(seed)
    jobs = {
        "model": work.model,
        "prompts": str(work.prompts("train")),
        "samples": str(folder / "samples"),
        "max_new_tokens": work.experiment.max_new_tokens,
        "checkpoints": work.experiment.checkpoints,
        "settings": work.experiment.ppo.model_dump(mode="json"),
        "runs": [
            {
                "output": str(_folder(work, run)),
                "target_kl": run.knob,
                "learning_rate": run.learning_rate,
                "seed": run.seed,
                "reward_function": work.reward if run.method == "ppo_gt" else None,
                "reward_model": None if run.method == "ppo_gt" else str(folder / "reward_model"),
            }
            for run in runs
        ],
    }
    file = folder / "ppo.json"
    write_text(file, json.dumps(jobs, indent=1))
    run_python(work, HERE / "ppo.py", file, shown=f"ppo.py {file}", library=library)
