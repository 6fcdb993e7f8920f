import os
import pickle
import subprocess
from typing import Any

import pytest

from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, FingerprintError, first_line, quoted

KINDS = {DpoOptError: 1, ConfigError: 2, DataError: 3, FingerprintError: 4}


@pytest.mark.parametrize(("kind", "exit_code"), KINDS.items())
def test_errors_survive_pickling(kind: type[DpoOptError], exit_code: int) -> None:
    error = kind("a is 1, b is 2", where="data.jsonl:3", why="they must be equal", fix="change a")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy is not error
    assert (copy.what, copy.where, copy.why, copy.fix) == (
        "a is 1, b is 2",
        "data.jsonl:3",
        "they must be equal",
        "change a",
    )
    assert str(copy) == str(error)
    assert copy.exit_code == exit_code


def test_a_message_says_what_where_why_and_fix_in_order() -> None:
    error = DataError("the key is missing", where="data.jsonl:3", why="nothing to score", fix="add it")
    assert str(error) == "data.jsonl:3: the key is missing\n  why: nothing to score\n  fix: add it"
    assert str(DataError("the key is missing")) == "the key is missing"


@pytest.mark.parametrize("kind", [ConfigError, DataError, FingerprintError])
def test_user_errors_are_value_errors_too(kind: type[DpoOptError]) -> None:
    assert issubclass(kind, ValueError)
    assert issubclass(kind, DpoOptError)


NAMES = [
    "plain/file-1.json",
    "two words",
    "it's $HOME; `id`",
    "\x1b[31mred\x1b[0m",
    "a\n  fix: rm -r ~",
    "back\\slash'\r",
    "\u202egnp.exe",
    "Grüße ❄",
    "tab\tand\x07f",
    os.fsdecode(b"\xff.bin"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_name_is_one_word_of_a_shell_and_safe_to_show(name: str) -> None:
    word = quoted(name)
    assert word.isprintable()
    shown = subprocess.run(["bash", "-c", f"printf %s {word}"], check=True, capture_output=True).stdout
    assert shown == os.fsencode(name)


def test_a_character_that_no_file_can_be_called_by_is_quoted_too() -> None:
    assert quoted("tensor \ud83d") == "$'tensor \\xed\\xa0\\xbd'"


def test_ordinary_names_are_quoted_as_they_are() -> None:
    assert quoted("model.layers.0.self_attn.q_proj.weight") == "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", NAMES)
def test_no_message_steers_a_terminal_and_no_name_makes_a_line_of_it(name: str) -> None:
    error = DataError(f"of {quoted(name)}", where=name, why=f"for {quoted(name)}", fix=f"rm {quoted(name)}")
    lines = str(error).split("\n")
    assert len(lines) == 3
    assert all(line.replace("\t", "").isprintable() for line in lines)
    assert lines[2] == f"  fix: rm {quoted(name)}"
    assert all(
        line.isprintable() for line in str(DataError(name, why=name, fix=name)).replace("\t", "").split("\n")
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\n\n two\nthree"), "one two"),
        (ValueError(), "ValueError"),
        (KeyError("factor"), "KeyError: 'factor'"),
        (OSError(2, "not there", "\x1b[2J.json"), "[Errno 2] not there: '\\x1b[2J.json'"),
        (RuntimeError("\x1b[2Jgone"), "[2Jgone"),
        (ValueError("x" * 999), "x" * 200),
    ],
)
def test_what_a_library_says_fits_in_a_line(error: Exception, said: str) -> None:
    assert first_line(error) == said


@pytest.mark.parametrize(
    ("error", "settings", "said"),
    [
        (RuntimeError(), {"named": True}, "RuntimeError: no message"),
        (RuntimeError(), {"named": False}, "RuntimeError"),
        (KeyError("a"), {"named": False}, "'a'"),
        (ValueError("one\ntwo"), {"lines": 1, "named": True}, "ValueError: one"),
        (ValueError("one\ntwo"), {"length": 5}, "one t"),
        (
            ValueError("1 validation error\nfield\n  is wrong\nmore"),
            {"lines": 1},
            "1 validation error field is wrong",
        ),
    ],
)
def test_a_caller_may_ask_for_less_or_for_the_class(
    error: Exception, settings: dict[str, Any], said: str
) -> None:
    assert first_line(error, **settings) == said
