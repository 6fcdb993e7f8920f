import json
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import Field, PositiveFloat, PositiveInt

from dpo_opt.cli import main
from dpo_opt.kl_config import KLConfig
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.options import configured
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.settings import Settings


class Cooking(Settings):
    """A configuration with a field of every kind."""

    dish: str
    """What is cooked, as in `menu`."""
    kitchen: Path = Path("home")
    """Where."""
    heat_level: PositiveFloat = 1.0
    """How hot."""
    salt: float = Field(default=0.0, ge=0)
    """Grams."""
    guests: PositiveInt | None = None
    """How many."""
    minutes: int = 0
    """How long."""
    style: Literal["slow_food", "fast_food"] = "slow_food"
    """How."""
    spicy: bool = False
    """Whether it burns."""


@click.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
@configured(Cooking)
@click.option("--loud", is_flag=True)
def cook(config: Cooking, loud: bool) -> None:
    """Cook."""
    click.echo(json.dumps({**config.model_dump(mode="json"), "loud": loud}))


DEFAULTS = {
    "dish": "soup",
    "kitchen": "home",
    "heat_level": 1.0,
    "salt": 0.0,
    "guests": None,
    "minutes": 0,
    "style": "slow_food",
    "spicy": False,
    "loud": False,
}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cook, list(arguments))


def result(*arguments: str) -> dict[str, Any]:
    found = invoke(*arguments)
    assert found.exit_code == 0, found.output
    return dict(json.loads(found.stdout))


def refusal(*arguments: str) -> ConfigError:
    found = invoke(*arguments)
    assert isinstance(found.exception, ConfigError), found.output
    assert found.exception.exit_code == 2
    return found.exception


def yaml_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_fields_are_options_with_their_defaults() -> None:
    assert result("--dish", "soup") == DEFAULTS


def test_every_kind_of_field_can_be_given() -> None:
    given = ["--dish=pie", "--kitchen=/k", "--heat-level=2.5", "--salt=1e-3", "--guests=4", "--minutes=-1"]
    assert result(*given, "--style=fast_food", "--spicy", "--loud") == {
        "dish": "pie",
        "kitchen": "/k",
        "heat_level": 2.5,
        "salt": 1e-3,
        "guests": 4,
        "minutes": -1,
        "style": "fast_food",
        "spicy": True,
        "loud": True,
    }


def test_underscores_and_hyphens_are_the_same() -> None:
    expected = {**DEFAULTS, "heat_level": 3.0, "style": "fast_food"}
    assert result("--dish=soup", "--heat_level=3", "--style=fast-food") == expected


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "dish: stew\nguests: 3\nspicy: true\nminutes: 5\n")
    expected = {**DEFAULTS, "dish": "stew", "guests": 3, "spicy": True, "minutes": 5}
    assert result("--config", file) == expected
    # Also where the flag gives the default back.
    assert result("--config", file, "--minutes=0", "--no-spicy", "--dish=soup") == {**DEFAULTS, "guests": 3}


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert result("--config", yaml_file(tmp_path, "# nothing yet\n"), "--dish=soup") == DEFAULTS


def test_yaml_numbers_that_pyyaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    import yaml

    assert yaml.safe_load("1e-6") == "1e-6"
    assert result("--config", yaml_file(tmp_path, "dish: soup\nsalt: 1e-6\n"))["salt"] == 1e-6


@pytest.mark.parametrize(
    ("key", "hint"),
    [("heat-level", "heat_level"), ("gests", "guests"), ("zzz", "known settings: dish, kitchen")],
)
def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path, key: str, hint: str) -> None:
    file = yaml_file(tmp_path, f"dish: soup\n{key}: 1\n")
    error = refusal("--config", file)
    assert error.what == f"unknown setting {key!r}"
    assert error.where == file
    assert hint in str(error.fix)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("dish: [", "not readable as YAML"),
        ("- dish\n", "not a mapping"),
        ("dish\n", "not a mapping"),
        ("dish: !!python/object/apply:os.getcwd []\n", "not readable as YAML"),
        ("1: 2\n", "unknown setting 1"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, what: str) -> None:
    file = yaml_file(tmp_path, text)
    error = refusal("--config", file)
    assert error.what.startswith(what)
    assert error.where == file


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"dish: \xff\n")
    assert "not readable as YAML" in refusal("--config", str(tmp_path / "run.yaml")).what


def test_a_refused_value_is_named_where_it_was_given(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "dish: soup\nheat_level: -2\n")
    in_file = refusal("--config", file)
    assert in_file.what == "--heat-level -2: Input should be greater than 0"
    assert in_file.where == file
    on_the_line = refusal("--config", file, "--heat-level=-3")
    assert on_the_line.what == "--heat-level -3.0: Input should be greater than 0"
    assert on_the_line.where is None


@pytest.mark.parametrize("value", ["null", "[1]", "hot"])
def test_a_value_of_the_wrong_kind_is_refused(tmp_path: Path, value: str) -> None:
    file = yaml_file(tmp_path, f"dish: soup\nheat_level: {value}\n")
    assert refusal("--config", file).what.startswith("--heat-level ")


def test_a_missing_setting_says_how_to_give_it() -> None:
    error = refusal()
    assert error.what == "--dish is missing"
    assert error.fix == "pass --dish, or set dish in --config"


def test_help_shows_defaults_as_they_are() -> None:
    text = " ".join(invoke("--help").output.split())
    # 1.0 and 0 are equal to True and False, and are no switches.
    for shown in (
        "How hot. [default: 1.0]",
        "Grams. [default: 0.0]",
        "How long. [default: 0]",
        "Whether it burns. [default: off]",
        "Where. [default: home]",
        "as in 'menu'. [required]",
    ):
        assert shown in text, text


def test_unknown_flags_are_refused_with_a_suggestion() -> None:
    found = invoke("--dish=soup", "--heatlevel=2")
    assert found.exit_code == 2
    assert "--heat-level" in found.output


@pytest.mark.parametrize("kind", [PrecomputeConfig, TrainConfig, KLConfig])
def test_every_setting_explains_itself(kind: type[Settings]) -> None:
    assert len(kind.model_fields) > 5
    for name, field in kind.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    ("command", "kind"), [("precompute", PrecomputeConfig), ("train", TrainConfig), ("kl", KLConfig)]
)
def test_every_setting_is_an_option_of_its_command(command: str, kind: type[Settings]) -> None:
    options = {name for p in main.commands[command].params for name in p.opts}
    for name in kind.model_fields:
        assert "--" + name.replace("_", "-") in options
