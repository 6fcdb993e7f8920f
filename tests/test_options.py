import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from dpo_opt.cli import main
from dpo_opt.commands.kl import KLConfig
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.options import ListsCommand, configured
from dpo_opt.precompute.config import CheckConfig, ConvertConfig, PrecomputeConfig, PreviewConfig
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
    # Values are shown as they are declared, and none but the listed ones is touched.
    assert "[slow_food|fast_food]" in invoke("--help").output
    assert "'slow_food', 'fast_food'" in invoke("--dish=soup", "--style=home_made").output
    assert result("--dish", "my_soup--2", "--kitchen=--a_b")["kitchen"] == "--a_b"


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


@pytest.mark.parametrize("setting", ["heat-level", "salt"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_no_setting_of_any_command_is_infinite_or_no_number(setting: str, value: str) -> None:
    assert refusal(f"--{setting}={value}", "--dish=soup").what.startswith(f"--{setting} {value}:")


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
        # What is given without a flag is called as its field.
        assert options & {"--" + name.replace("_", "-"), name}


@pytest.mark.parametrize("kind", [ConvertConfig, PrecomputeConfig, TrainConfig])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_are_finite_but_where_infinity_means_never(kind: type[Settings], number: float) -> None:
    numbers = {n for n, field in kind.model_fields.items() if re.search(r"\bfloat\b", str(field.annotation))}
    assert numbers
    given = {n: [number] if "list[" in str(kind.model_fields[n].annotation) else number for n in numbers}
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(given)
    refused = {error["loc"][0] for error in caught.value.errors()} & numbers
    assert numbers - refused == ({"max_grad_norm", "save_minutes"} & numbers if number == math.inf else set())


class Feast(Settings):
    """A configuration with fields that hold several things."""

    dishes: list[str] = Field(min_length=1)
    """What is served."""
    portions: list[PositiveInt] = Field(default=[])
    """How many of each."""
    seats: dict[str, str] = Field(default={})
    """Who sits where."""
    hour: int = 12
    """When."""


@click.command()
@configured(Feast, argument="dishes")
def serve(config: Feast) -> None:
    """Serve."""
    click.echo(config.model_dump_json())


@click.command()
@configured(Feast)
def serve_named(config: Feast) -> None:
    """Serve, all of it by name."""
    click.echo(config.model_dump_json())


def served(*arguments: str, command: click.Command = serve) -> dict[str, Any]:
    found = CliRunner().invoke(command, list(arguments))
    assert found.exit_code == 0, found.output
    return dict(json.loads(found.stdout))


FEAST = {"dishes": ["soup"], "portions": [], "seats": {}, "hour": 12}


def test_a_list_is_given_one_by_one_and_keeps_its_order() -> None:
    arguments = ["--dishes", "soup", "--portions", "2", "--dishes", "pie", "--portions=1", "--dishes", "soup"]
    expected = {**FEAST, "dishes": ["soup", "pie", "soup"], "portions": [2, 1]}
    assert served(*arguments, command=serve_named) == expected


def test_a_positional_field_takes_all_that_has_no_flag() -> None:
    expected = {**FEAST, "dishes": ["soup", "pie", "cake"], "hour": 3}
    assert served("soup", "pie", "--hour=3", "cake") == expected
    assert served("--hour", "3", "--", "soup", "--pie")["dishes"] == ["soup", "--pie"]
    assert "--dishes" not in CliRunner().invoke(serve, ["--help"]).output
    assert "DISHES..." in CliRunner().invoke(serve, ["--help"]).output


def test_a_mapping_is_given_entry_by_entry() -> None:
    assert served("soup", "--seats", "anna=window", "--seats=bob=door=left")["seats"] == {
        "anna": "window",
        "bob": "door=left",
    }
    assert served("soup", "--seats=anna=window", "--seats=anna=door")["seats"] == {"anna": "door"}


@pytest.mark.parametrize("value", ["anna", "=window", "anna=", "="])
def test_an_entry_without_a_key_or_a_value_is_refused(value: str) -> None:
    found = CliRunner().invoke(serve, ["soup", "--seats", value])
    assert found.exit_code == 2
    assert f"{value!r} is not of the form key=value" in found.output


def test_several_things_may_stand_in_a_file_and_flags_replace_them_whole(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "dishes: [stew, pie]\nportions: [3, 4]\nseats: {anna: window}\nhour: 1\n")
    in_file = {"dishes": ["stew", "pie"], "portions": [3, 4], "seats": {"anna": "window"}, "hour": 1}
    for command in (serve, serve_named):
        assert served("--config", file, command=command) == in_file
    assert served("--config", file, "soup") == {**in_file, "dishes": ["soup"]}
    assert served("--config", file, "--portions=9") == {**in_file, "portions": [9]}
    assert served("--config", file, "--seats", "bob=door") == {**in_file, "seats": {"bob": "door"}}


def test_a_refused_item_names_its_setting(tmp_path: Path) -> None:
    found = CliRunner().invoke(serve, ["soup", "--portions", "0"])
    assert isinstance(found.exception, ConfigError)
    assert found.exception.what == "--portions 0: Input should be greater than 0"
    assert found.exception.where is None
    file = yaml_file(tmp_path, "dishes: [soup]\nseats: [anna]\n")
    found = CliRunner().invoke(serve, ["--config", file])
    assert isinstance(found.exception, ConfigError)
    assert found.exception.what.startswith("--seats ['anna']: ")
    assert found.exception.where == file


def test_an_empty_list_in_a_file_is_not_a_missing_one(tmp_path: Path) -> None:
    found = CliRunner().invoke(serve_named, ["--config", yaml_file(tmp_path, "dishes: []\n")])
    assert isinstance(found.exception, ConfigError)
    assert found.exception.what.startswith("--dishes []: ")
    missing = CliRunner().invoke(serve_named, [])
    assert isinstance(missing.exception, ConfigError)
    assert missing.exception.what == "--dishes is missing"


def test_a_missing_positional_field_is_named_as_it_is_given() -> None:
    missing = CliRunner().invoke(serve, [])
    assert isinstance(missing.exception, ConfigError)
    assert missing.exception.what == "DISHES is missing"
    assert missing.exception.fix == "name it after the command, or set dishes in --config"


def test_help_shows_no_default_of_several_things() -> None:
    text = " ".join(CliRunner().invoke(serve_named, ["--help"]).output.split())
    assert "--seats PART=NAME Who sits where. " in text
    assert "How many of each. --" in text
    assert "What is served. [required]" in text


@pytest.mark.parametrize(
    ("command", "kind"), [("check", CheckConfig), ("preview", PreviewConfig), ("convert", ConvertConfig)]
)
def test_commands_that_look_at_data_take_it_by_place_and_all_else_by_name(
    command: str, kind: type[Settings]
) -> None:
    params = main.commands[command].params
    assert [p.name for p in params if isinstance(p, click.Argument)] == ["data"]
    options = {name for p in params if isinstance(p, click.Option) for name in p.opts}
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert ("--" + name.replace("_", "-") in options) == (name != "data")


class Menu(Settings):
    """A configuration with lists."""

    dishes: list[Literal["slow_food", "soup"]] = Field(default=["soup"])
    """What is served."""
    prices: list[float] | None = None
    """Of each dish."""
    guests: int = 1
    """How many."""


@click.command(
    cls=ListsCommand, context_settings={"token_normalize_func": lambda name: name.replace("_", "-")}
)
@configured(Menu)
def lay(config: Menu) -> None:
    """Lay the table."""
    click.echo(json.dumps(config.model_dump(mode="json")))


@pytest.mark.parametrize(
    "line",
    [
        "--dishes soup slow_food --prices 1 2.5 --guests 3",
        "--guests 3 --prices=1 2.5 --dishes soup --dishes slow-food",
        "--dishes=soup --guests 3 --dishes slow_food --prices 1 --prices 2.5",
    ],
)
def test_lists_are_given_in_one_go_or_one_by_one(line: str) -> None:
    found = CliRunner().invoke(lay, line.split())
    assert found.exit_code == 0, found.output
    expected = {"dishes": ["soup", "slow_food"], "prices": [1.0, 2.5], "guests": 3}
    assert json.loads(found.stdout) == expected


def test_only_lists_take_several_values() -> None:
    assert json.loads(CliRunner().invoke(lay, []).stdout)["dishes"] == ["soup"]
    found = CliRunner().invoke(lay, ["--dishes", "soup", "--guests", "3", "4"])
    assert found.exit_code == 2
    assert "unexpected extra argument (4)" in found.output
    found = CliRunner().invoke(lay, ["--dishes", "soup", "cake"])
    assert found.exit_code == 2
    assert "'cake' is not one of 'slow_food', 'soup'" in found.output
    assert "[default: soup]" in CliRunner().invoke(lay, ["--help"]).output
