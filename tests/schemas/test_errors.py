import pickle

import pytest

from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, FingerprintError

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
