"""The DPO paper's controlled-sentiment experiment (Rafailov et al. 2023, section 6.1) with its baselines.

    python run.py --size tiny --model MODEL --ppo-library FOLDER --output FOLDER

Each finished step is kept: the same command continues where it was stopped.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import click
from best_of_n import best_of_n
from folders import Work, begin
from libraries import require_libraries
from points import Point, measure, measure_reference
from preferences import make_preferences
from prompts import write_prompts
from results import write_results
from reward_model import train_reward_model
from runs import Run, policies, train
from settings import MethodName, read_experiment
from sft import fine_tune

from dpo_opt.schemas.errors import ConfigError, DpoOptError
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.storage import write_text
from dpo_opt.user_function import UserFunction, load_user_function

_FILE = click.Path(path_type=Path, exists=True)


@click.command(help=__doc__)
@click.option("--size", default="tiny", show_default=True, help="tiny, small, paper, or a file of that form.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for everything.")
@click.option("--model", help="Language model in place of that of the size: a folder, or a Hub name.")
@click.option("--reviews", type=_FILE, help="Of small: folder or zip file with a *.pos and a *.neg.")
@click.option("--ppo-library", type=_FILE, help="Folder of packages with TRL's PPO (ppo-requirements.txt).")
def main(size: str, output: Path, model: str | None, reviews: Path | None, ppo_library: Path | None) -> None:
    """Run the experiment, or what is left of it."""
    try:
        work = _begun(size, output, model, reviews, ppo_library)
        run(work)
    except DpoOptError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def run(work: Work) -> None:
    """All steps in their order."""
    experiment = work.experiment
    reward = reward_of(work)
    corpus = work.environment.get("REVIEWS")
    write_prompts(work.folder / "prompts", experiment, corpus=None if corpus is None else Path(corpus))
    if experiment.reviews is not None:
        fine_tune(work)
    for seed in experiment.seeds:
        make_preferences(work, seed)
        if experiment.needs_reward_model:
            train_reward_model(work, seed)
    rates = choose_learning_rates(work, reward)
    points: list[Point] = []
    for seed in experiment.seeds:
        runs = [
            Run(method, knob, rate, seed)
            for method, rate in rates.items()
            for knob in experiment.knobs(method)
        ]
        train(work, seed, runs)
        points += _measured(work, seed, runs, reward)
    write_results(work.folder, points, experiment, {str(name): rate for name, rate in rates.items()})
    click.echo((work.folder / "results.md").read_text(encoding="utf-8"))


def reward_of(work: Work) -> UserFunction:
    """The ground truth, loaded with what the experiment's commands find in their environment."""
    os.environ.update(work.environment)
    return load_user_function(work.reward)


def choose_learning_rates(work: Work, reward: UserFunction) -> dict[MethodName, float]:
    """The learning rate of each trained method whose last policy has the highest validation reward.

    Tried with the first seed and the first value of the method's knob.
    """
    experiment, file = work.experiment, work.folder / "learning_rates.json"
    seed = experiment.seeds[0]
    trials = [
        Run(method, experiment.knobs(method)[0], rate, seed)
        for method, tried in experiment.methods.items()
        for rate in tried.learning_rates
    ]
    train(work, seed, trials)
    found: dict[MethodName, dict[float, float]] = {}
    for trial in trials:
        point = measure(work, policies(work, trial)[-1], "validation", reward)
        found.setdefault(trial.method, {})[trial.learning_rate] = float(point.reward.mean())
    write_text(file, json.dumps(found, indent=1) + "\n")
    return {method: max(rewards, key=rewards.__getitem__) for method, rewards in found.items()}


def _measured(work: Work, seed: int, runs: Sequence[Run], reward: UserFunction) -> list[Point]:
    """The points of one repetition, the reference first."""
    reference, samples = measure_reference(work, seed, reward)
    found = [reference]
    found += [measure(work, policy, "held_out", reward) for each in runs for policy in policies(work, each)]
    if best := work.experiment.methods.get("best_of_n"):
        found += best_of_n(samples, work.of_seed(seed) / "reward_model", best.knobs, seed=seed)
    return found


def _begun(
    size: str, output: Path, model: str | None, reviews: Path | None, ppo_library: Path | None
) -> Work:
    """What the options say, checked before anything is trained.

    Raises:
        ConfigError: They do not go together, or the folder was begun with others.
    """
    experiment, file = read_experiment(size, model=model)
    script, _, function = experiment.reward.rpartition(":")
    environment: dict[str, str] = {}
    if experiment.reviews is not None and experiment.reviews.classifier_share and reviews is None:
        raise ConfigError("this size learns its reward from reviews", fix="pass --reviews with the corpus")
    if experiment.reviews is not None and reviews is not None:
        environment = {
            "REVIEWS": str(reviews.absolute()),
            "CLASSIFIER_SHARE": str(experiment.reviews.classifier_share),
        }
    work = Work(
        experiment,
        output.absolute(),
        f"{(file.parent / script).resolve()}:{function}",
        environment,
        None if ppo_library is None else ppo_library.absolute(),
    )
    if not (work.folder / "experiment.yaml").is_file():
        require_libraries(experiment, work.ppo_library)
        find_model(str(experiment.model))
    begin(work.folder, experiment, environment)
    return work


if __name__ == "__main__":
    main()
