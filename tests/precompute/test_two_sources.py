"""A part of a pair that a row gives twice: what agrees is read, what differs is refused by both names."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from fakes import write_jsonl
from messages import said
from one_row import read, written

from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

Row = dict[str, Any]


def turn(speaker: str, value: str, **more: object) -> Row:
    return {"from": speaker, "value": value, **more}


def parts(text: str) -> Row:
    return {"parts": [{"text": text}]}


USER, SO, NO = said("user", "How?"), said("assistant", "So."), said("assistant", "No.")
CHAT = {"prompt": [USER], "chosen": [SO], "rejected": [NO]}
OPENAI = {"input": {"messages": [USER]}, "preferred_output": [SO], "non_preferred_output": [NO]}
SHAREGPT = {"chosen": turn("gpt", "So."), "rejected": turn("gpt", "No.")}
LABELLED = {"prompt": "How?", "response_a": "So.", "response_b": "No."}
TOOL = {"type": "function", "function": {"name": "f"}}
OTHER_TOOL = {"type": "function", "function": {"name": "g"}}
VERTEX = {
    "contents": [{"role": "user", **parts("How?")}],
    "completions": [
        {"completion": {"role": "model", **parts(text)}, "score": score}
        for text, score in (("So.", 1), ("No.", 0))
    ],
}
SHP = {"history": "How?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 1}

# What both say, then the row that contradicts itself, then the two names.
TWICE: list[tuple[Row, Row, tuple[str, str]]] = [
    (
        {"messages": [USER, SO], "rejected_response": "No.", "rejected_messages": [USER, NO]},
        {"messages": [USER, SO], "rejected_response": "No.", "rejected_messages": [USER, SO]},
        ("rejected_response", "rejected_messages"),
    ),
    (
        {**LABELLED, "preference": "a", "winner": "response_a"},
        {**LABELLED, "preference": "a", "winner": "b"},
        ("preference", "winner"),
    ),
    (
        {**VERTEX, "system_instruction": parts("Be kind."), "systemInstruction": parts("Be kind.")},
        {**VERTEX, "system_instruction": parts("Be kind."), "systemInstruction": parts("Be rude.")},
        ("system_instruction", "systemInstruction"),
    ),
    (
        {**OPENAI, "input": {"messages": [USER], "tools": [TOOL]}, "tools": [TOOL]},
        {**OPENAI, "input": {"messages": [USER], "tools": [TOOL]}, "tools": [OTHER_TOOL]},
        ("input.tools", "tools"),
    ),
    (
        {**SHAREGPT, "conversations": [turn("human", "How?")], "messages": [USER]},
        {**SHAREGPT, "conversations": [turn("human", "How?")], "messages": [said("user", "Why?")]},
        ("conversations", "messages"),
    ),
    (
        {**CHAT, "system": "Be kind.", "system_message": "Be kind."},
        {**CHAT, "system": "Be kind.", "system_message": "Be rude."},
        ("system", "system_message"),
    ),
    (
        {"prompt": "How?", "completions": ["So.", "No."], "ranks": [1, 2], "scores": [9, 3]},
        {"prompt": "How?", "completions": ["So.", "No."], "ranks": [1, 2], "scores": [3, 9]},
        ("ranks", "scores"),
    ),
]
IDS = [" and ".join(names) for *_, names in TWICE]


def texts(pair: PreferencePair | DataError) -> tuple[object, object]:
    assert isinstance(pair, PreferencePair), pair
    sides = (pair.chosen, pair.rejected)
    chosen, rejected = (side if isinstance(side, str) else side[-1]["content"] for side in sides)
    return chosen, rejected


@pytest.mark.parametrize(("same", "other", "names"), TWICE, ids=IDS)
def test_what_is_said_twice_is_read_where_it_agrees_and_else_refused(
    same: Row, other: Row, names: tuple[str, str], tmp_path: Path
) -> None:
    for path in written(tmp_path, same):
        assert texts(read(path)) == ("So.", "No.")
    for path in written(tmp_path, other):
        error = read(path)
        assert isinstance(error, DataError)
        assert error.what == '"{}" and "{}" say different things'.format(*names)
        assert (error.kind, error.why is not None) == ("two_sources", True)
        # The way out that it names leads on.
        words = shlex.split(str(error.fix))
        ignored = words[words.index("--ignore-column") + 1]
        assert ignored == names[1]
        assert texts(read(path, ignore_column=[ignored])) == ("So.", "No.")


@pytest.mark.parametrize(("same", "other", "names"), TWICE, ids=IDS)
def test_the_one_that_is_null_says_nothing(
    same: Row, other: Row, names: tuple[str, str], tmp_path: Path
) -> None:
    """A table has every column in every row."""
    for name in names:
        inner = name.removeprefix("input.")
        row = same | ({name: None} if inner == name else {"input": {"messages": [USER], inner: None}})
        assert texts(read(write_jsonl(tmp_path / "a.jsonl", [row]))) == ("So.", "No.")


def test_tools_beside_input_are_read(tmp_path: Path) -> None:
    row = {**OPENAI, "input": {"messages": [USER], "tools": None, "functions": None}, "tools": [TOOL]}
    for path in written(tmp_path, row):
        found = read(path)
        assert isinstance(found, PreferencePair)
        assert found.tools == [TOOL]


def test_functions_that_are_there_are_refused(tmp_path: Path) -> None:
    found = read(
        write_jsonl(tmp_path / "a.jsonl", [{**OPENAI, "input": {"messages": [USER], "functions": [TOOL]}}])
    )
    assert isinstance(found, DataError)
    assert 'the key "functions"' in found.what


@pytest.mark.parametrize(
    ("beside", "key"),
    [
        ({"role": "user", "content": "How?"}, None),
        ({"role": "human", "content": None}, None),
        ({"content": "Why?"}, "content"),
        ({"role": "system"}, "role"),
    ],
)
def test_a_message_of_both_spellings_says_one_thing(beside: Row, key: str | None, tmp_path: Path) -> None:
    row = {**SHAREGPT, "conversations": [turn("human", "How?", **beside)]}
    found = read(write_jsonl(tmp_path / "a.jsonl", [row]))
    if key is None:
        assert isinstance(found, PreferencePair), found
        assert found.prompt == [USER]
    else:
        assert isinstance(found, DataError)
        says = f'message 1 of "conversations" has "from" and "value", and another "{key}" beside them'
        assert found.what == says


def test_a_message_whose_from_and_value_are_null_is_the_other_spelling(tmp_path: Path) -> None:
    row = {**SHAREGPT, "conversations": [turn("human", "How?"), {**NO, "from": None, "value": None}, USER]}
    for path in written(tmp_path, row):
        found = read(path)
        assert isinstance(found, PreferencePair), found
        assert found.prompt == [USER, NO, USER]


def test_lists_that_rank_some_alike_agree(tmp_path: Path) -> None:
    row = {"prompt": "How?", "completions": ["So.", "No."], "ranks": [1, 2], "scores": [5, 5]}
    assert texts(read(write_jsonl(tmp_path / "a.jsonl", [row]))) == ("So.", "No.")
    unranked = {**row, "scores": [None, 9]}
    assert texts(read(write_jsonl(tmp_path / "a.jsonl", [unranked]))) == ("So.", "No.")


@pytest.mark.parametrize(
    "form", [OPENAI, {"history": "How?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 1}]
)
def test_a_prompt_beside_a_form_that_has_its_own_counts_as_one(form: Row, tmp_path: Path) -> None:
    for path in written(tmp_path, {**form, "prompt": "How?"}):
        assert texts(read(path)) == ("So.", "No.")
    for path in written(tmp_path, {**form, "prompt": "Why?"}):
        error = read(path)
        assert isinstance(error, DataError)
        assert (error.kind, error.what) == ("prompt_column", '"prompt" is not empty')
        assert texts(read(path, ignore_column=["prompt"])) == ("So.", "No.")
