"""``FILE.py:NAME``: a user's function is loaded where it is named, and what it returns is checked."""

import hashlib
from pathlib import Path

import pytest

from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.user_function import load_user_function

PROMPTS, COMPLETIONS = ["a", "b"], ["one", "three"]


def written(folder: Path, body: str) -> str:
    file = folder / "my reward.py"
    file.write_text(body)
    return f"{file}:rate"


def returning(folder: Path, expression: str) -> str:
    return written(folder, f"def rate(prompts, completions):\n    return {expression}\n")


@pytest.mark.parametrize(
    "expression",
    [
        "[len(c) for c in completions]",
        "(len(c) for c in completions)",
        "__import__('numpy').array([len(c) for c in completions], dtype='float32')",
    ],
)
def test_numbers_come_back_in_order(tmp_path: Path, expression: str) -> None:
    rate = load_user_function(returning(tmp_path, expression))
    assert rate(PROMPTS, COMPLETIONS) == [3.0, 5.0]
    assert rate.sha256 == hashlib.sha256((tmp_path / "my reward.py").read_bytes()).hexdigest()


def test_it_sees_both_lists_as_text(tmp_path: Path) -> None:
    rate = load_user_function(returning(tmp_path, "[len(p + c) for p, c in zip(prompts, completions)]"))
    assert rate(tuple(PROMPTS), tuple(COMPLETIONS)) == [4.0, 6.0]


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("[1.0]", "1 numbers for 2 completions"),
        ("[1.0, float('nan')]", "nan for completion 1"),
        ("[float('inf'), 1]", "inf for completion 0"),
        ("[1.0, None]", "a NoneType for completion 1"),
        ("['high', 1]", "a str for completion 0"),
        ("None", "TypeError"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_anything_but_one_finite_number_each_is_refused(tmp_path: Path, expression: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_user_function(returning(tmp_path, expression))(PROMPTS, COMPLETIONS)


def test_an_error_names_the_line_of_the_users_file(tmp_path: Path) -> None:
    named = written(tmp_path, "import json\n\ndef rate(prompts, completions):\n    return json.loads('{')\n")
    with pytest.raises(DataError, match=r"my reward\.py:4: the function raised JSONDecodeError"):
        load_user_function(named)(PROMPTS, COMPLETIONS)


def test_the_line_is_named_where_the_path_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "def rate(prompts, completions):\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"my reward\.py:2: the function raised ZeroDivisionError"):
        load_user_function("my reward.py:rate")(PROMPTS, COMPLETIONS)


def test_code_that_exits_does_not_end_the_command_in_silence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"my reward\.py:1: the file cannot be loaded: SystemExit"):
        load_user_function(written(tmp_path, "raise SystemExit(0)"))
    with pytest.raises(DataError, match=r"my reward\.py:2: the function raised SystemExit"):
        load_user_function(written(tmp_path, "def rate(*texts):\n    raise SystemExit(0)\n"))(
            PROMPTS, COMPLETIONS
        )


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def other(): ...", "it has no function rate"),
        ("rate = 3", "it has no function rate"),
        ("x =", r"my reward\.py:1: the file cannot be loaded: SyntaxError"),
        ("\nimport no_such_package", r"my reward\.py:2: .*no_such_package"),
    ],
)
def test_a_file_without_the_function_is_refused(tmp_path: Path, body: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_user_function(written(tmp_path, body))


@pytest.mark.parametrize("named", ["rate", "reward.py", "reward.py:", "reward.txt:rate", "reward.py:a b"])
def test_another_form_is_refused(named: str) -> None:
    with pytest.raises(ConfigError, match=r"pass FILE\.py:NAME"):
        load_user_function(named)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_user_function("missing.py:rate")


def test_a_file_named_like_a_package_does_not_replace_it(tmp_path: Path) -> None:
    import json

    (tmp_path / "json.py").write_text("def rate(prompts, completions):\n    return [0.0] * len(prompts)\n")
    assert load_user_function(f"{tmp_path / 'json.py'}:rate")(PROMPTS, COMPLETIONS) == [0.0, 0.0]
    assert json.dumps({}) == "{}"
