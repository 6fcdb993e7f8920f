"""The commands of the examples are there with their options, as they are written."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from dpo_opt.cli import main
from dpo_opt.optimize.config import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.sh"))
_VALUES = {"seed": "1", "here": "", "other": "--reference-differs"}


def commands_of(text: str) -> list[list[str]]:
    """The words of each dpo-opt command of a shell script, with values in place of its variables."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line[line.index("dpo-opt ") :] for line in lines if re.search(r"^[^#]*\bdpo-opt ", line)]
    filled = [re.sub(r"\$\{?(\w+)\}?", lambda name: _VALUES.get(name[1], "x"), line) for line in found]
    return [shlex.split(line.partition(" > ")[0])[1:] for line in filled]


def parse(folder: Path, words: list[str]) -> None:
    name, *arguments = words
    files = [str(folder / word.lstrip("/")) if word.endswith(".yaml") else word for word in arguments]
    main.commands[name].make_context(name, files, parent=click.Context(main, info_name="dpo-opt"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_each_command_is_there_with_its_options(script: Path) -> None:
    commands = commands_of(script.read_text(encoding="utf-8"))
    assert len(commands) >= 5
    for words in commands:
        parse(script.parent, words)


def test_an_option_that_is_not_there_is_noticed() -> None:
    (words,) = commands_of(
        '  [ -e "$at/x" ] || dpo-opt sample --model "$m" \\\n    --num-sample 4 > "$log"\n'
    )
    assert words == ["sample", "--model", "x", "--num-sample", "4"]
    with pytest.raises(click.UsageError, match="--num-sample"):
        parse(EXAMPLES, words)


def test_the_sizes_hand_settings_to_train_that_it_has() -> None:
    sizes = sorted((EXAMPLES / "preference_data").glob("*.yaml"))
    assert len(sizes) == 2
    for path in sizes:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))["train"]
        TrainConfig.model_validate({"shards": "s", "model": "m", "output_dir": "o", **settings})


@pytest.mark.parametrize(
    "words", [[], ["model"], ["model", "folder", "frist"], ["m", "f", "first", "1", "2"]]
)
def test_rounds_with_other_words_say_how_they_are_called(words: list[str], tmp_path: Path) -> None:
    script = EXAMPLES / "rounds" / "run.sh"
    done = subprocess.run(
        ["sh", str(script), *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"usage: sh {script} MODEL FOLDER [policy|first] [SEED]\n"
    assert list(tmp_path.iterdir()) == []
