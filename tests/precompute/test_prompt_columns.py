"""What stands around a pair and belongs to its prompt is read by a stated rule, or refused by name."""

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import write_jsonl
from messages import said
from one_row import read, written

from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.config import CheckConfig, DataConfig
from dpo_opt.precompute.read.datasets import BadRow, read_pairs, read_prompts, row_digest, scan_pairs
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

Row = dict[str, Any]


USER, SYSTEM = said("user", "How?"), said("system", "Be kind.")
SO, NO = [said("assistant", "So.")], [said("assistant", "No.")]
SIDES = {"chosen": "So.", "rejected": "No."}
TEXT = {"prompt": "How?", **SIDES}
CHAT = {"prompt": [USER], "chosen": SO, "rejected": NO}
WHOLE = {"chosen": [USER, *SO], "rejected": [USER, *NO]}
RANKED = {"completions": ["No.", "So."], "ranks": [2, 1]}


def settings_of(fix: str) -> dict[str, Any]:
    """The first way out that an error names, as settings."""
    words = shlex.split(fix.split("; ")[0].replace(",", " "))
    options: dict[str, Any] = {"column": {}, "ignore_column": []}
    for option, value in itertools.pairwise(words):
        if option == "--column" and not re.search(rf"(leave|instead of) --column {value}", fix):
            part, name = value.split("=")
            options["column"][part] = name
        if option == "--ignore-column":
            options["ignore_column"].append(value)
    return options


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({**CHAT, "system": "Be kind."}, {}, ([SYSTEM, USER], SO, NO)),
        ({**CHAT, "system_prompt": "Be kind.", "system": ""}, {}, ([SYSTEM, USER], SO, NO)),
        ({**CHAT, "system_message": "Be kind."}, {}, ([SYSTEM, USER], SO, NO)),
        ({**CHAT, "prompt": USER, "system": "Be kind."}, {}, ([SYSTEM, USER], SO, NO)),
        ({**CHAT, "prompt": "How?", "system": "Be kind."}, {}, ([SYSTEM, USER], SO, NO)),
        ({**CHAT, "prompt": [SYSTEM, USER], "system": "Be kind."}, {}, ([SYSTEM, USER], SO, NO)),
        ({**WHOLE, "system": "Be kind."}, {}, ([SYSTEM, USER], SO, NO)),
        ({**WHOLE, "prompt": "How?", "system": "Be kind."}, {}, ([SYSTEM, USER], SO, NO)),
        ({**TEXT, "prompt": "Be kind. How?", "system": "Be kind."}, {}, ("Be kind. How?", "So.", "No.")),
        ({**TEXT, "question": "How?", "context": " "}, {}, ("How?", "So.", "No.")),
        ({**TEXT, "prompt": "A page. How?", "document": "A page."}, {}, ("A page. How?", "So.", "No.")),
        ({**TEXT, "documents": [], "knowledge": None, "img_path": ""}, {}, ("How?", "So.", "No.")),
        ({**CHAT, "question": "How?", "images": [], "audio": None}, {}, ([USER], SO, NO)),
        ({**CHAT, "images": [None], "image": {"bytes": None, "path": ""}}, {}, ([USER], SO, NO)),
        ({**CHAT, "messages": [USER, *SO]}, {}, ([USER], SO, NO)),
        ({**WHOLE, "prompt": "How?", "messages": [USER, *SO]}, {}, ([USER], SO, NO)),
        ({**TEXT, "conversations": [{"from": "human", "value": "How?"}]}, {}, ("How?", "So.", "No.")),
        ({**CHAT, "images": ["a.png"]}, {"ignore_column": ["images"]}, ([USER], SO, NO)),
        ({"instruction": "Do", "input": "it", **RANKED}, {}, ("Do\nit", "So.", "No.")),
        (
            {"instruction": "Do", "input": "it", **SIDES},
            {"column": {"prompt": "instruction"}},
            ("Do\nit", "So.", "No."),
        ),
    ],
)
def test_what_belongs_to_a_prompt_is_part_of_it(
    row: Row, options: Any, expected: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    for path in written(tmp_path, row):
        found = read(path, **options)
        assert isinstance(found, PreferencePair), found
        assert (found.prompt, found.chosen, found.rejected) == expected


REFUSED = [
    ({**TEXT, "system": "Be kind."}, {}, "system", [SYSTEM, USER]),
    ({**TEXT, "system_prompt": "Be kind."}, {}, "system_prompt", [SYSTEM, USER]),
    ({"query": "How?", **SIDES, "system": "Be kind."}, {"prompt": "query"}, "system", [SYSTEM, USER]),
    ({"question": "How?", **SIDES, "system": "Be kind."}, {"prompt": "question"}, "system", [SYSTEM, USER]),
    (
        {"instruction": "How?", **SIDES, "system": "Be kind."},
        {"prompt": "instruction"},
        "system",
        [SYSTEM, USER],
    ),
    (
        {"instruction": "How?", **SIDES, "history": [["Hi", "Hello!"]]},
        {"prompt": "instruction"},
        "history",
        [said("user", "Hi"), said("assistant", "Hello!"), USER],
    ),
    ({**TEXT, "history": [["Hi", "Hello!"]]}, {}, "history", "How?"),
    ({**CHAT, "history": [["Hi", "Hello!"]]}, {}, "history", [USER]),
    ({**TEXT, "input": "The cat sleeps."}, {}, "input", "How?"),
    ({**TEXT, "question": "Why?"}, {}, "question", "How?"),
    ({**CHAT, "context": "A long page."}, {}, "context", [USER]),
    ({**CHAT, "documents": [{"title": "A", "text": "A long page."}]}, {}, "documents", [USER]),
    ({**TEXT, "knowledge": "A long page."}, {}, "knowledge", "How?"),
    ({"instruction": "How?", **SIDES, "document": "A long page."}, {}, "document", [USER]),
    (
        {"instruction": "How?", **SIDES, "document": "A long page."},
        {"prompt": "instruction"},
        "document",
        None,
    ),
    ({"prompt": "How?", **RANKED, "document": "A long page."}, {}, "document", "How?"),
    ({**TEXT, "system_message": "Be kind."}, {}, "system_message", [SYSTEM, USER]),
    ({"messages": [USER, *SO], "rejected_response": "No.", "prompt": "Why?"}, {}, "prompt", [USER]),
    ({**CHAT, "prompt": [said("system", "Be rude."), USER], "system": "Be kind."}, {}, "system", None),
    ({**CHAT, "system": ["Be kind."]}, {}, "system", [USER]),
    ({"prompt": "How?", **RANKED, "system": "Be kind."}, {}, "system", "How?"),
    ({"question": "How?", **RANKED, "context": "A page."}, {}, "context", "How?"),
    *(
        ({**CHAT, key: value}, {}, key, [USER])
        for key, value in {
            **{"image": "a.png", "images": ["a.png"], "video": {"path": "a.mp4"}, "videos": [{"url": "u"}]},
            **{"audio": {"bytes": b"b"}, "audios": ["a.wav"], "img_path": "a.png", "image_url": "u"},
            **{"rejected_images": ["a.png"], "video_path": "a.mp4", "image_urls": ["u"], "image_file": "a"},
            **{"img": "a.png", "picture": "a.png", "pixel_values": [[0.5]], "media": ["a.png"]},
            **{"chat_history": [["Hi", "Yo"]], "conversation_history": "Hi"},
        }.items()
    ),
    ({"prompt": "How?", **RANKED, "images": ["a.png"]}, {}, "images", "How?"),
]


@pytest.mark.parametrize(("row", "column", "key", "prompt"), REFUSED)
def test_a_column_that_nothing_would_read_is_refused_and_the_advice_leads_on(
    row: Row, column: dict[str, str], key: str, prompt: Any, tmp_path: Path
) -> None:
    is_text = key != "audio"  # which holds bytes, that JSON has not
    for path in written(tmp_path, row) if is_text else written(tmp_path, {**row, key: {"bytes": "b"}}):
        error = read(path, column=column)
        assert isinstance(error, DataError)
        assert error.what == f'"{key}" is not empty'
        assert (error.kind, error.where is not None, error.why is not None) == ("prompt_column", True, True)
        found = read(path, **settings_of(str(error.fix)))
        assert isinstance(found, PreferencePair), found
        if prompt is not None:
            assert found.prompt == prompt
        ignored = read(path, column=column, ignore_column=[key])
        assert isinstance(ignored, PreferencePair)


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("row", [TEXT, CHAT, {"prompt": "How?", **RANKED}, {"instruction": "How?", **SIDES}])
def test_a_conversation_that_says_more_than_the_pair_is_refused(row: Row, key: str, tmp_path: Path) -> None:
    more = [said("user", "I am five."), said("assistant", "I see.")]
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, key: more}])
    error = read(path)
    assert isinstance(error, DataError)
    assert (error.kind, error.what) == ("prompt_column", f'"{key}" is not empty')
    assert isinstance(read(path, **settings_of(str(error.fix))), PreferencePair)


TALE = "A cat sat on a mat, and the mat was warm."


@pytest.mark.parametrize(
    ("part", "whole", "is_part"),
    [
        ("cat", "What is a cat?", False),
        ("be nice", "do not be nice", False),
        ("be nice", "be nice, or not", False),
        ("Be nice", "Be nice to no one.", False),
        ("Be nice.", "Be nice. Be brief.", True),
        ("cat", "Concatenate: cat", True),
        ("cat", "Word: cat\nTask: rhyme", True),
        ("cat", "Translate <b>cat</b>", True),
        (TALE, f"Sum up {TALE} in a word", True),
        (" ", "How?", True),
    ],
)
def test_a_column_is_said_by_a_prompt_that_has_it_as_a_part_of_its_own(
    part: str, whole: str, is_part: bool, tmp_path: Path
) -> None:
    rows = [
        {**TEXT, "prompt": whole, "context": part},
        {"question": whole, "input": part, **RANKED},
        {**CHAT, "prompt": [said("system", whole), USER], "system": part},
        {**TEXT, "prompt": whole, "system": part},
    ]
    for number, row in enumerate(rows):
        found = read(write_jsonl(tmp_path / f"{number}.jsonl", [row]))
        assert isinstance(found, PreferencePair) is is_part, row


def test_tools_of_one_side_are_refused_unless_they_are_those_of_the_row(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    error = read(write_jsonl(tmp_path / "a.jsonl", [{**CHAT, "chosen_tools": tools}]))
    assert isinstance(error, DataError)
    assert error.what == '"chosen_tools" is not empty'
    found = read(write_jsonl(tmp_path / "b.jsonl", [{**CHAT, "chosen_tools": tools, "tools": tools}]))
    assert isinstance(found, PreferencePair)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"conversations": [{"from": "human", "value": "How?"}], "chosen": SO[0], "rejected": NO[0]},
            ([USER], SO, NO),
        ),
        ({"instruction": "How?", **SIDES}, ([USER], SO, NO)),
        ({"instruction": "How?", "system": "Be kind.", **WHOLE}, ([SYSTEM, USER], SO, NO)),
    ],
)
def test_a_row_of_another_form_may_have_an_empty_prompt(
    row: Row, expected: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    for path in written(tmp_path, {**row, "prompt": None}):
        found = read(path)
        assert isinstance(found, PreferencePair), found
        assert (found.prompt, found.chosen, found.rejected) == expected
    error = read(write_jsonl(tmp_path / "b.jsonl", [{**SIDES, "prompt": None}]))
    assert isinstance(error, DataError)
    assert error.what == '"prompt" is null'


def test_a_prompt_alone_may_have_its_whole_conversation_beside_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "How?", "messages": [USER, *SO]}])
    (found,) = read_prompts(DataConfig(data=[str(path)]))
    assert found.prompt == "How?"


def test_tools_under_another_name_are_refused_unless_tools_are_the_same(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for path in written(tmp_path, {**CHAT, "functions": tools}):
        error = read(path)
        assert isinstance(error, DataError)
        assert (error.what, error.kind) == ('"functions" is not empty', "prompt_column")
        assert str(error.fix).startswith('rename it to "tools"')
        assert isinstance(read(path, ignore_column=["functions"]), PreferencePair)
    for row in ({**CHAT, "functions": tools, "tools": tools}, {**CHAT, "functions": [{}]}):
        assert isinstance(read(write_jsonl(tmp_path / "same.jsonl", [row])), PreferencePair)


def test_the_question_beside_a_document_is_not_lost_where_the_document_is_the_prompt(tmp_path: Path) -> None:
    row = {"instruction": "How?", **SIDES, "document": "A page."}
    for path in written(tmp_path, row):
        error = read(path, column={"prompt": "document"})
        assert isinstance(error, DataError)
        assert error.what == '"instruction" is not empty'
        assert str(error.fix).startswith("write it into the prompt")


def test_a_row_without_prompt_is_told_the_setting_that_reads_its_system_prompt_too(tmp_path: Path) -> None:
    row = {"system": "Be kind.", "input": "How?", **SIDES}
    error = read(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert isinstance(error, DataError)
    assert error.fix == "pass --column question=input, or --ignore-column input"
    for path in written(tmp_path, row):
        found = read(path, column={"question": "input"})
        assert isinstance(found, PreferencePair)
        assert found.prompt == [SYSTEM, USER]


def test_check_says_of_each_row_what_reads_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**TEXT, "system": "Be kind."}, {**TEXT, "images": ["a.png"]}])
    (problem,) = (
        p for p in audit(CheckConfig(data=[str(path)], processes=1)).problems if p.kind == "prompt_column"
    )
    assert (problem.severity, problem.count) == ("error", 2)
    details = [example.detail for example in problem.examples]
    assert "--column question=prompt" in details[0]
    assert "--ignore-column images" in details[1]


def test_an_empty_column_leaves_the_digest_of_a_bad_row_as_it_was(tmp_path: Path) -> None:
    bad = {"prompt": "How?", "chosen": "", "rejected": "No."}

    def digest(row: Row) -> bytes:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        (found,) = scan_pairs(DataConfig(data=[str(tmp_path / "a.parquet")]))
        assert isinstance(found, BadRow)
        return row_digest(found)

    assert digest({**bad, "system": None, "images": []}) == digest(bad)
    # Early versions did not load these.
    assert digest({**bad, "document": "", "chosen_score": 2.0, "img_path": None}) == digest(bad)
    bare = {key: value for key, value in bad.items() if key != "prompt"}
    assert digest({**bare, "conversations": None}) == digest(bare)


def test_an_ignored_column_is_not_even_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({**{k: [v] for k, v in TEXT.items()}, "images": [["a.png"]]}), path)
    data = path.read_bytes()
    at = data.index(b"a.png")
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])  # a page that cannot be read as text
    (found,) = read_pairs(DataConfig(data=[str(path)], ignore_column=["images"]))
    assert json.dumps([found.prompt, found.chosen, found.rejected]) == json.dumps(["How?", "So.", "No."])
