"""What the paper's sentiment experiment needs is asked for before anything is trained."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from example_scripts import scripts_of

from dpo_opt.schemas.errors import ConfigError

EXAMPLE = Path(__file__).parents[1] / "examples" / "controlled_sentiment"


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    with scripts_of(EXAMPLE) as imported:
        yield imported


def test_a_part_that_nothing_can_run_is_refused_before_anything_is_trained(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    libraries = example("libraries")
    experiment, _ = example("settings").read_experiment("tiny", model="model")
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="TRL is not installed"):
        libraries.require_libraries(experiment, tmp_path)
    monkeypatch.setattr(libraries, "find_spec", lambda name: object())
    for library in (None, tmp_path):
        with pytest.raises(ConfigError, match="PPO needs a release") as caught:
            libraries.require_libraries(experiment, library)
        assert f"--ppo-library {library or 'FOLDER'}" in str(caught.value.fix)
    offline = {name: method for name, method in experiment.methods.items() if "ppo" not in name}
    libraries.require_libraries(experiment.model_copy(update={"methods": offline}), None)
    (tmp_path / "trl").mkdir()
    libraries.require_libraries(experiment, tmp_path)


def test_a_reward_finds_the_reviews_that_its_experiment_names(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "reward.py").write_text(
        "import os\n_AT = len(os.environ['REVIEWS'])\n\n\n"
        "def reward(prompts, completions):\n    return [_AT] * len(completions)\n"
    )
    experiment, _ = example("settings").read_experiment("tiny", model="model")
    named = f"{tmp_path / 'reward.py'}:reward"
    work = example("folders").Work(experiment, tmp_path, named, {"REVIEWS": "four"}, None)
    assert example("run").reward_of(work)([""], [""]) == [4.0]


def test_an_output_that_is_a_file_is_refused(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    experiment, _ = example("settings").read_experiment("tiny", model="model")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="a file, not a folder"):
        example("folders").begin(tmp_path / "file", experiment, {})
