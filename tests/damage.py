"""Files of preference data that are damaged, each with what must be said about it."""

import datetime
import decimal
import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dpo_opt.precompute.read.datasets import BadRow, parse_block
from dpo_opt.schemas.pairs import PreferencePair

Row = dict[str, Any]
Content = bytes | Callable[[Path], None]


class Damage(NamedTuple):
    """One damaged input.

    ``row``: some rows are bad, and all others are read. ``file``: it cannot be read, or not to its end.
    ``kept``: the damage is in a text, which is shown and kept as it is.
    """

    kind: str
    name: str
    file: str
    content: Content
    says: str
    """Part of the message; of an example's place or detail where the row is kept."""
    problem: str
    """What ``dpo-opt check`` counts it as."""
    scope: Literal["row", "file", "kept"] = "row"
    form: str = "text"
    good: tuple[int, ...] = (0, 1, 3)
    """Numbers of the rows that are as ``GOOD[form]`` makes them."""
    bad: int = 1
    place: str = ""
    """What follows the file's name in the place of the first bad row."""
    kept: Row | None = None

    def write(self, folder: Path) -> Path:
        path = folder / self.file
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        return path


def _said(role: str, content: Any, **others: Any) -> Row:
    return {"role": role, "content": content, **others}


def _text(i: int) -> Row:
    return {"prompt": f"Frage {i} für dich?", "chosen": f" yes ❄ {i}", "rejected": f" no {i}", "source": "s"}


def _chat(i: int) -> Row:
    return {
        "prompt": [_said("user", f"question {i}")],
        "chosen": [_said("assistant", f"yes {i}")],
        "rejected": [_said("assistant", f"no {i}")],
    }


def _conversation(i: int, answer: str) -> list[Row]:
    return [_said("user", f"q {i}"), _said("assistant", answer)]


GOOD: dict[str, Callable[[int], Row]] = {
    "text": _text,
    "chat": _chat,
    "implicit": lambda i: {"chosen": f"Question {i}: ice? Cold.", "rejected": f"Question {i}: ice? Hot."},
    "shp": lambda i: {"history": f"q {i}", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1},
    "labelled": lambda i: {"prompt": f"q {i}", "response_a": "x", "response_b": "y", "preference": "a"},
    "safety": lambda i: {"prompt": f"q {i}", "response_0": "x", "response_1": "y", "better_response_id": 1},
    "graded": lambda i: {"prompt": f"q {i}", "response1": "x", "response2": "y", "overall_preference": -2},
    "arena": lambda i: {
        "conversation_a": _conversation(i, "x"),
        "conversation_b": _conversation(i, "y"),
        "winner": "model_a",
    },
    "ranked": lambda i: {"prompt": f"q {i}", "completions": ["x", "y"], "scores": [2, 1]},
    "battle": lambda i: {
        **{"prompt": f'["q {i}"]', "response_a": '["x"]', "response_b": '["y"]'},
        **{"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
    },
    "vertex": lambda i: {
        "system_instruction": {"parts": [{"text": "s"}]},
        "contents": [{"role": "user", "parts": [{"text": f"q {i}"}]}],
        "completions": [
            {"score": score, "completion": {"role": "model", "parts": [{"text": text}]}}
            for score, text in ((1, "x"), (0, "y"))
        ],
    },
    "openai": lambda i: {
        "input": {"messages": [_said("user", f"q {i}")], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [_said("assistant", "x")],
        "non_preferred_output": [_said("assistant", "y")],
    },
    "sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"q {i}"}],
        "chosen": {"from": "gpt", "value": "x"},
        "rejected": {"from": "gpt", "value": "y"},
        "system": "s",
        "images": [],
    },
    "asked": lambda i: {
        "conversations": [{"from": "human", "value": f"q {i}"}],
        "chosen": "x",
        "rejected": "y",
    },
    "swift": lambda i: {"messages": _conversation(i, "x"), "rejected_response": "y", "images": []},
    "swift messages": lambda i: {
        "messages": _conversation(i, "x"),
        "rejected_messages": _conversation(i, "y"),
    },
    "orca": lambda i: {"system": "s", "question": f"q {i}", "chosen": "x", "rejected": "y"},
    "image": lambda i: {"question": f"q {i}", "chosen": "x", "rejected": "y", "image": None},
    "alpaca": lambda i: {
        **{"instruction": f"q {i}", "input": "w", "system": "s", "history": [["q", "a"]]},
        **{"chosen": "x", "rejected": "y"},
    },
    "text beside messages": lambda i: {**_chat(i), "prompt": f"question {i}"},
}
"""A good row of every form, by its number; each makes one pair."""


def to_line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def lines(form: str = "text", numbers: Iterable[int] = range(4)) -> bytes:
    """Good rows."""
    return b"".join(json.dumps(GOOD[form](i), ensure_ascii=False).encode() + b"\n" for i in numbers)


def parquet(table: pa.Table | list[Row], **options: Any) -> bytes:
    """A table's file."""
    buffer = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), buffer, **options)
    return buffer.getvalue()


def damages() -> list[Damage]:
    """The whole corpus; names differ."""
    return [
        *_bad_lines(),
        *_bad_objects(),
        *_bad_encodings(),
        *_bad_arrays(),
        *_bad_compression(),
        *_bad_csv(),
        *_bad_tables(),
        *_bad_arrow(),
        *_bad_table_rows(),
        *_bad_table_columns(),
        *_bad_files(),
        *_kept(),
    ]


# --- lines that are no JSON object -------------------------------------------------------------------------


def _line(kind: str, name: str, text: bytes, says: str, problem: str = "json", bad: int = 1) -> Damage:
    content = lines(numbers=(0, 1)) + text + b"\n" + lines(numbers=(2 + bad,))
    return Damage(kind, name, "data.jsonl", content, says, problem, good=(0, 1, 2 + bad), bad=bad, place=":3")


def _bad_lines() -> Iterator[Damage]:
    good = json.dumps(_text(2), ensure_ascii=False).encode()
    for cut in range(1, len(good), 7):
        half = not good[:cut].isascii() and (good[cut] & 0xC0) == 0x80
        says, problem = ("not valid UTF-8", "encoding") if half else ("not valid JSON at column", "json")
        yield _line("line cut off", f"line cut at {cut}", good[:cut], says, problem)
    yield _line("missing comma", "missing comma", good.replace(b", ", b" "), "Expecting ',' delimiter")
    yield _line("missing colon", "missing colon", good.replace(b": ", b" "), "Expecting ':' delimiter")
    yield _line("single quotes", "single quotes", b"{'prompt': 'a'}", "enclosed in double quotes")
    yield _line("Python literals", "Python None", b'{"prompt": None}', "Expecting value")
    yield _line("Python literals", "Python True", b'{"prompt": True}', "Expecting value")
    yield _line("trailing comma", "trailing comma", good[:-1] + b",}", "not valid JSON")
    yield _line("comment", "comment after", good + b" // note", "Extra data")
    yield _line("comment", "comment line", b"# prompts of May", "Expecting value")
    yield _line("two objects on one line", "two objects", good + good, "Extra data")
    yield _line("two objects on one line", "two objects and a comma", good + b"," + good, "Extra data")
    yield _line("comma after the object", "comma after", good + b",", "Extra data")
    yield _line("raw control character", "raw tab in a string", b'{"prompt": "a\tb"}', "Invalid control")
    yield _line("bad escape", "bad escape", rb'{"prompt": "C:\path"}', "Invalid \\escape")
    yield _line("bad escape", "cut escape", rb'{"prompt": "\u00"}', "Invalid \\uXXXX escape")
    for other in (b"null", b"3", b'"text"', b"true", b"[]", b"[" + good + b"]"):
        says = "where a JSON object is expected"
        yield _line("not an object", f"the value {other[:6]!r}", other, says, "not_an_object")
    yield _line("log line", "log line", b"2024-05-01 INFO wrote 12 rows", "not valid JSON")
    yield _line("conflict marker", "conflict marker", b"<<<<<<< HEAD", "Expecting value")
    yield _line("web page", "web page", b"<!DOCTYPE html>", "Expecting value")
    nested = b"[" * 200 + b"]" * 200
    yield _line("deep nesting", "lists", b'{"a": ' + nested + b"}", "nested too deeply", "nesting")
    nested = b"[" * 100_000 + b"]" * 100_000
    yield _line("deep nesting", "very many lists", b'{"a": ' + nested + b"}", "nested too deeply", "nesting")
    nested = b'{"a":' * 5000 + b"1" + b"}" * 5000
    yield _line("deep nesting", "objects", nested, "nested too deeply", "nesting")
    yield _line("deep nesting", "lists that never end", b'{"a": ' + b"[" * 500_000, "nested too", "nesting")
    for constant in (b"NaN", b"Infinity", b"-Infinity"):
        text = good[:-1] + b', "score": ' + constant + b"}"
        yield _line("NaN and infinity", constant.decode(), text, "is not a JSON value", "number")
    digits = b'{"weight": ' + b"9" * 5000 + b"}"
    yield _line("huge integer", "5,000 digits", digits, "not readable as JSON", "number")
    twice = good[:-1] + b', "prompt": "b"}'
    yield _line("key twice", "prompt twice", twice, 'the key "prompt" appears twice', "duplicate_key")
    twice = b'{"chosen": [{"role": "a", "role": "b", "content": "c"}], "rejected": []}'
    yield _line("key twice", "role twice", twice, 'the key "role" appears twice', "duplicate_key")
    twice = good[:-1] + rb', "\ud800": 1, "\ud800": 2}'
    yield _line("key twice", "half a character twice", twice, '"\\ud800" appears twice', "duplicate_key")
    hole = b"\0" * 4096
    yield _line("hole of zeros", "hole of zeros", hole, "a null byte at byte 1 ", "null_byte")
    yield _line("hole of zeros", "hole in a line", good[:20] + hole + good[40:], "a null byte", "null_byte")
    yield _line("pretty-printed", "pretty-printed", json.dumps(_text(2), indent=1).encode(), "JSON", bad=6)
    returns = good + b"\r" + good
    yield _line("CR line ends", "two rows and CR", returns, "Extra data")


# --- objects that are no pair ------------------------------------------------------------------------------

_CONTAINERS: list[tuple[str, str, Callable[[list[Row]], bytes]]] = [
    ("data.jsonl", ":3", lambda rows: b"".join(map(to_line, rows))),
    ("data.json", ":element 3", lambda rows: json.dumps(rows, indent=1).encode()),
    ("data.jsonl.gz", ":3", lambda rows: gzip.compress(b"".join(map(to_line, rows)))),
    ("data.jsonl.zst", ":3", lambda rows: zstandard.compress(b"".join(map(to_line, rows)))),
    ("data.json.gz", ":element 3", lambda rows: gzip.compress(json.dumps(rows).encode())),
]


def _bad_objects() -> Iterator[Damage]:
    for n, (kind, form, row, says, problem) in enumerate(_objects()):
        good = GOOD[form]
        file, place, write = _CONTAINERS[n % len(_CONTAINERS)]
        content = write([good(0), good(1), row, good(3)])
        yield Damage(kind, f"{kind} {n}", file, content, says, problem, form=form, place=place)


def _without(row: Row, *keys: str) -> Row:
    return {key: value for key, value in row.items() if key not in keys}


def _objects() -> Iterator[tuple[str, str, Row, str, str]]:
    """(kind, form of the rows around it, row, message, problem)."""
    text, chat, implicit = _text(2), _chat(2), GOOD["implicit"](2)
    user, answer = chat["prompt"][0], chat["chosen"][0]

    def chats(kind: str, changes: Row, says: str, problem: str = "message") -> Any:
        return kind, "chat", {**chat, **changes}, says, problem

    for key in ("prompt", "chosen", "rejected"):
        for value in (None, 3, 0.5, True, {"text": "a"}):
            yield f"wrong type of {key}", "text", {**text, key: value}, f'"{key}" is ', "type"
    for key in ("chosen", "rejected"):
        yield "empty completion", "text", {**text, key: ""}, f'"{key}" is empty', "empty"
        yield "missing key", "text", _without(text, key), f'the key "{key}" is missing', "missing_key"
    yield "missing key", "text", {}, "(found: none)", "missing_key"
    row = {"completion": "q a", "label": True}
    yield "unpaired feedback", "text", row, "this is feedback of one completion and a label", "unpaired"
    row = {"prompt": "q", "completion": "a", "label": True}
    yield "another kind", "text", row, "this row holds unpaired", "other_form"
    row = {"prompt": "q", "a": "x", "b": "y", "best.responses": ["a"]}
    yield "annotations", "text", row, "these are records that Argilla exported", "annotations"
    yield "misspelt key", "text", {**_without(text, "chosen"), "choosen": "a"}, "(found: ", "missing_key"
    yield "misspelt key", "text", {k.title(): v for k, v in text.items()}, "(found: Prompt", "missing_key"
    for value in (7, ["s"], {"name": "s"}, False):
        yield "wrong type of source", "text", {**text, "source": value}, '"source" is ', "type"
    for key in ("weight", "margin"):
        for value in ("1", [1], {}, True):
            yield f"wrong type of {key}", "text", {**text, key: value}, f'"{key}" is ', "number"
        yield "huge number", "text", {**text, key: 10**400}, f'"{key}" is inf', "number"
        yield "huge number", "text", {**text, key: 1e300}, f'"{key}" is inf', "number"
    yield "negative weight", "text", {**text, "weight": -1}, '"weight" is -1', "number"
    yield "wrong score", "text", {**text, "score_chosen": "9", "score_rejected": 1}, "a string", "number"
    for value in ("[", 3, {"a": 1}, ["search"], "NaN", '[{"a": 1, "a": 2}]', '[{"a": NaN}]', "[" * 5000):
        yield chats("malformed tools", {"tools": value}, '"tools" is ', "tools")
    yield "tools beside text", "text", {**text, "tools": [{"name": "f"}]}, "beside plain text", "tools"
    for value in ("{", 3, [1], '{"a": NaN}'):
        says = '"chat_template_kwargs" is '
        yield chats("malformed template settings", {"chat_template_kwargs": value}, says, "tools")
    for part in (
        {"tools": [{"name": "\ud83d"}]},
        {"tools": '[{"name": "\\udc00"}]'},
        {"chat_template_kwargs": {"\ud83d": 1}},
        {"chosen": [_said("assistant", "", tool_calls=[{"name": "\ud83d"}])]},
        {"chosen": [_said("assistant", "cut \ud83d")]},
        {"prompt": [_said("user", "\udc00 cut")]},
        {"prompt": [_said("user\ud83d", "q")]},
        {"source": "\ud83d"},
    ):
        yield chats("half a character", part, "half a character", "surrogate")
    for key in ("prompt", "chosen", "rejected", "source"):
        yield "half a character", "text", {**text, key: "a \ud83d"}, f'"{key}" contains half', "surrogate"
    row = {**_without(text, "chosen"), "\ud800": 1}
    yield "half a character", "text", row, "\\ud800", "missing_key"

    yield "text and messages in a row", "text", {**text, "chosen": chat["chosen"]}, "is a list", "mixed_row"
    yield "text and messages in a row", "chat", {**chat, "rejected": " no"}, "is a string", "mixed_row"
    yield "forms between rows", "text", chat, "this row holds messages with", "other_form"
    yield "forms between rows", "chat", text, "this row holds text with", "other_form"
    yield "forms between rows", "text", implicit, "this row holds text without", "other_form"
    yield "forms between rows", "ranked", GOOD["labelled"](2), "this row holds labelled", "other_form"

    yield chats("empty list", {"prompt": []}, '"prompt" is an empty list', "empty")
    yield chats("empty list", {"chosen": []}, '"chosen" is empty', "empty")
    yield chats("empty completion", {"rejected": [_said("assistant", "")]}, '"rejected" is empty', "empty")
    yield chats("message without role", {"chosen": [{"content": "a"}]}, 'lacks "role"')
    yield chats("message without content", {"chosen": [{"role": "assistant"}]}, 'lacks "content"')
    yield chats("null in a message", {"chosen": [_said("assistant", None)]}, '"content" in message 1')
    yield chats("null in a message", {"chosen": [{"role": None, "content": "a"}]}, '"role" in message 1')
    yield chats("message of another type", {"chosen": ["yes"]}, 'message 1 of "chosen" is a string')
    yield chats("message of another type", {"chosen": [None]}, 'message 1 of "chosen" is null')
    yield chats("message of another type", {"chosen": [[answer]]}, 'message 1 of "chosen" is a list')
    yield chats("unknown message key", {"chosen": [{**answer, "weight": 0}]}, 'the key "weight"')
    yield chats("unknown message key", {"chosen": [{**answer, "\ud800": 0}]}, 'the key "\\ud800"')
    sharegpt = {"chosen": [{"from": "gpt", "value": "a"}]}
    yield chats("ShareGPT messages", sharegpt, '(it has "from" and "value")')
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "https://a/b"}}]
    says = 'part 2 of "content" in message 1 of "prompt" is of the type "image_url"'
    yield chats("content parts", {"prompt": [_said("user", parts)]}, says)
    for part, says in (
        ("a", "is a string"),
        ({"text": "a"}, 'is without a "type"'),
        ({"type": "text", "text": None}, "is null"),
        ({"type": "text", "text": 3}, "is a number"),
        ({"type": "text", "text": "a", "cache_control": {}}, 'the key "cache_control"'),
    ):
        yield chats("content parts", {"chosen": [_said("assistant", [part])]}, says)
    half = [{"type": "text", "text": "a \ud83d"}]
    yield chats("half a character", {"prompt": [_said("user", half)]}, "half a character", "surrogate")
    for role in ("user", "system", "human", "developer"):
        says = f'"chosen" begins with a message of the role "{role}"'
        yield chats("roles out of order", {"chosen": [_said(role, "a"), answer]}, says, "role_order")
    for calls in ("search", [1], {"name": "f"}, 3):
        message = _said("assistant", "a", tool_calls=calls)
        yield chats("malformed tool calls", {"chosen": [message]}, '"tool_calls" in message 1')
    says = "is no message of the conversation"
    row = {
        "prompt": "another question",
        "chosen": [user, answer],
        "rejected": [user, _said("assistant", "b")],
    }
    yield "prompt that the messages contradict", "chat", row, says, "prompt_mismatch"

    for sides in (("Yes", "No"), (" Yes", " No"), ("a", "a")):
        row = {"chosen": sides[0], "rejected": sides[1]}
        yield "nothing in common", "implicit", row, "begin differently", "no_common_prompt"
    for key in ("question", "input", "query", "context"):
        says = f'there is no "prompt", but the key "{key}"'
        yield "prompt under another key", "implicit", {**implicit, key: "Why?"}, says, "missing_key"

    shp, labelled, ranked = GOOD["shp"](2), GOOD["labelled"](2), GOOD["ranked"](2)
    for label in (2, "yes", None, True, 0.5, [1]):
        yield "bad SHP label", "shp", {**shp, "labels": label}, '"labels" is ', "label"
        row = {**GOOD["safety"](2), "better_response_id": label}
        yield "bad safety label", "safety", row, '"better_response_id" is ', "label"
    yield (
        "wrong type in a shape",
        "shp",
        {**shp, "history": 5},
        '"content" in message 1 of "prompt"',
        "message",
    )
    for label in ("c", "", None, 1, ["a"]):
        yield "bad preference", "labelled", {**labelled, "preference": label}, '"preference" is ', "label"
    for label in ("tie", "Both"):
        yield "tie", "labelled", {**labelled, "preference": label}, "no completion is preferred", "tie"
    yield "tie", "arena", {**GOOD["arena"](2), "winner": "tie (bothbad)"}, "no completion is", "tie"
    yield "wrapped pair", "text", {"data": text}, 'the pair stands inside the object "data"', "wrapped"
    yield "wrapped rows", "text", {"rows": [text]}, 'the rows stand in the list "rows"', "wrapped"
    two = {**labelled, "winner": "b"}
    yield "two labels", "labelled", two, '"preference" and "winner" say different things', "two_sources"
    yield "tie", "graded", {**GOOD["graded"](2), "overall_preference": 0}, "no completion is", "tie"
    yield "tie", "ranked", {**ranked, "scores": [1, 1]}, "no completion is preferred", "tie"
    battle, vertex = GOOD["battle"](2), GOOD["vertex"](2)
    row = {**battle, "winner_model_a": 0, "winner_tie": 1}
    yield "tie", "battle", row, "no completion is preferred", "tie"
    row = {**vertex, "completions": [{**c, "score": 1} for c in vertex["completions"]]}
    yield "tie", "vertex", row, "no completion is preferred", "tie"
    for vote in (2, "1", None, 0):
        yield "bad vote", "battle", {**battle, "winner_model_a": vote}, '"winner_model_a" is ', "label"
    for form in ("sharegpt", "swift"):
        row = {**GOOD[form](2), "images": ["a.png"]}
        yield "images beside text", form, row, '"images" is not empty', "prompt_column"
    row = {**GOOD["image"](2), "image": "a.png"}
    yield "images beside text", "image", row, '"image" is not empty', "prompt_column"
    for key in ("system", "history", "input", "question", "videos"):
        row = {**GOOD["text"](2), key: "a text that the prompt lacks"}
        yield "column of the prompt", "text", row, f'"{key}" is not empty', "prompt_column"
    for grade in (4, -9, 1.5, "3", None):
        row = {**GOOD["graded"](2), "overall_preference": grade}
        yield "bad grade", "graded", row, '"overall_preference" is ', "label"
    for changes, says in (
        ({"completions": ["x"]}, "is not a list of at least two completions"),
        ({"completions": "x, y"}, "is not a list of at least two completions"),
        ({"completions": None}, "is not a list of at least two completions"),
        ({"completions": [{"score": 1}, {"score": 2}], "scores": [1, 2]}, "has none of the keys"),
        ({"completions": [str(i) for i in range(3000)], "scores": list(range(3000))}, "is the most"),
        ({"scores": [1, 2, 3]}, '"scores" has 3 values for 2 completions'),
        ({"scores": []}, '"scores" has 0 values for 2 completions'),
        ({"scores": ["9", "8"]}, '"scores" holds a string'),
        ({"scores": [None, 1]}, '"scores" holds null'),
        ({"scores": None}, "has neither ranks nor scores"),
    ):
        yield "bad ranking", "ranked", {**ranked, **changes}, says, "shape"
    says = 'there is no "prompt"'
    yield "bad ranking", "ranked", {**_without(ranked, "prompt")}, says, "shape"


# --- other encodings ---------------------------------------------------------------------------------------


def _bad_encodings() -> Iterator[Damage]:
    for codec in ("latin-1", "windows-1252", "iso8859-15", "mac-roman"):
        text = '{"prompt": "Käse für 5", "chosen": "a", "rejected": "b"}'.encode(codec)
        yield _line("8-bit encoding", codec, text, "not valid UTF-8 at byte 14", "encoding")
    text = '{"prompt": "“Quoted”", "chosen": "a", "rejected": "b"}'.encode("windows-1252")
    yield _line("8-bit encoding", "curly quotes", text, "not valid UTF-8 at byte 13", "encoding")
    for name, sequence in (
        ("half a character", b"\xe2\x9d"),
        ("continuation alone", b"\x84"),
        ("overlong slash", b"\xc0\xaf"),
        ("overlong null", b"\xc0\x80"),
        ("encoded surrogate", b"\xed\xa0\xbd"),
        ("beyond Unicode", b"\xf4\x90\x80\x80"),
        ("byte FF", b"\xff"),
    ):
        text = b'{"prompt": "' + sequence + b'", "chosen": "a", "rejected": "b"}'
        yield _line("malformed UTF-8", name, text, "not valid UTF-8 at byte 13", "encoding")
    mark = b'\xef\xbb\xbf{"prompt": "a", "chosen": "a", "rejected": "b"}'
    yield _line("byte order mark inside", "byte order mark inside", mark, "Unexpected UTF-8 BOM")
    rows = b"".join(to_line(_text(i)) for i in range(4)).decode()  # ASCII
    for codec, mark, says, problem in (
        ("utf-16-le", b"\xff\xfe", "the file is UTF-16", "encoding"),
        ("utf-16-be", b"\xfe\xff", "the file is UTF-16", "encoding"),
        ("utf-16-le", b"", "a null byte", "null_byte"),
        ("utf-16-be", b"", "a null byte", "null_byte"),
        ("utf-32-le", b"\xff\xfe\0\0", "the file is UTF-32", "encoding"),
        ("utf-32-be", b"\0\0\xfe\xff", "the file is UTF-32", "encoding"),
    ):
        for file in ("data.jsonl", "data.json"):
            data = mark + (rows if file == "data.jsonl" else rows.replace("\n", " ")).encode(codec)
            bad = 5 if file == "data.jsonl" and codec.endswith("le") else rows.count("\n")
            yield Damage(
                f"{codec[:6]} {'with' if mark else 'without'} mark",
                f"{codec} {file} {len(mark)}",
                file,
                data,
                says,
                problem,
                good=(),
                bad=bad if file == "data.jsonl" else 1,
                place=":1",
            )
    data = lines().replace(b"\n", b"\r")
    yield Damage("CR line ends", "CR alone", "data.jsonl", data, "Extra data", "json", good=(), place=":1")


# --- arrays ------------------------------------------------------------------------------------------------


def _bad_arrays() -> Iterator[Damage]:
    rows = [_text(i) for i in range(4)]
    whole = json.dumps(rows, ensure_ascii=False).encode()

    def array(kind: str, name: str, data: bytes, says: str, file: str = "data.json") -> Damage:
        return Damage(kind, f"{kind}: {name}", file, data, says, "unreadable_file", scope="file")

    for cut in range(1, len(whole), 29):
        yield array("array cut off", f"array cut at {cut}", whole[:cut], "not readable as JSON from here")
    says = "there is something after the end of the array"
    for name, rest in (
        ("text", b"x"),
        ("another array", whole),
        ("half a character", b"\xc3"),
        ("text after 3 MiB of spaces", b" " * 3 * 2**20 + b"x"),
        ("a comma", b","),
    ):
        yield array("array followed by more", name, whole + rest, says)
    packed = gzip.compress(whole + b"]")
    yield array("array followed by more", "packed", packed, says, "data.json.gz")
    says = "no comma and no end of the array follows"
    yield array("array without comma", "without comma", whole.replace(b"}, {", b"} {", 1), says)
    early = b'[{"a": 1} {"a": 2}' + b" " * 70 * 2**20
    yield array(
        "array without comma", "early in a long file", zstandard.compress(early), says, "data.json.zst"
    )
    yield array("array with two commas", "two commas", whole.replace(b"}, {", b"},, {", 1), "Expecting value")
    yield array("array with a comment", "comment", whole.replace(b"}, {", b"}, // a\n {", 1), "Expecting")
    yield array("array with quotes", "single quotes", b"[{'prompt': 'a'}]", "double quotes")
    yield array("array with a hole", "hole", whole[:150] + b"\0" * 600 + whole[300:], "not readable as JSON")
    yield array("array with deep nesting", "deep", b"[" * 100_000, "from here (maximum recursion depth")
    large = b'[{"prompt": "' + b"a" * 80 * 2**20 + b'"}]'
    says = "the element is longer than 64 MiB"
    yield array("element of 80 MiB", "large element", zstandard.compress(large), says, "data.json.zst")
    yield array("empty array", "empty array", b"[]", "the file has no rows")
    for value in (None, 3, "text", [], [rows[2]], True, 0.5):
        data = json.dumps([rows[0], rows[1], value, rows[3]]).encode()
        yield Damage(
            "array of other things",
            f"element {value!r}"[:20],
            "data.json",
            data,
            "where a JSON object is expected",
            "not_an_object",
            place=":element 3",
        )
    for kind, element, says, problem in (
        ("NaN and infinity", '{"score": NaN}', "NaN is not a JSON value", "number"),
        ("huge integer", '{"score": ' + "9" * 5000 + "}", "not readable as JSON", "number"),
        ("key twice", '{"a": 1, "a": 2}', 'the key "a" appears twice', "duplicate_key"),
        ("deep nesting", '{"a": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply", "nesting"),
        ("8-bit encoding", '{"a": "\udce4"}', "not valid UTF-8", "encoding"),
    ):
        elements = [json.dumps(rows[0]), json.dumps(rows[1]), element, json.dumps(rows[3])]
        data = f"[{', '.join(elements)}]".encode("utf-8", errors="surrogateescape")
        yield Damage(kind, f"{kind} in an array", "data.json", data, says, problem, place=":element 3")
    data = json.dumps({"data": rows}).encode()
    yield Damage(
        "array under a key",
        "under a key",
        "data.json",
        data,
        'the rows stand in the list "data" of one object',
        "wrapped",
        good=(),
        place=":1",
    )


# --- compression -------------------------------------------------------------------------------------------


def _bad_compression() -> Iterator[Damage]:
    plain = b"".join(to_line({**_text(i), "source": f"{i * 7919 % 1000}"}) for i in range(60))
    packed = {
        "gz": gzip.compress(plain, mtime=0),
        "zst": zstandard.ZstdCompressor(write_checksum=True).compress(plain),
    }

    def file(kind: str, name: str, suffix: str, data: bytes, says: str = "cannot be read after") -> Damage:
        name = f"{kind}: {name}"
        return Damage(kind, name, f"data.jsonl.{suffix}", data, says, "unreadable_file", scope="file")

    for suffix, data in packed.items():
        for cut in range(1, len(data), len(data) // 9):
            yield file(f"{suffix} cut off", f"at {cut}", suffix, data[:cut])
        for end in (1, 4, 8):
            yield file(f"{suffix} cut off", f"{end} before the end", suffix, data[:-end])
        for name, rest in (("text", b"garbage"), ("zeros", b"\0" * 512), ("a magic number", data[:3])):
            yield file(f"{suffix} followed by more", name, suffix, data + rest)
        flipped = bytearray(data)
        flipped[-6 if suffix == "gz" else -2] ^= 1
        yield file(f"{suffix} with a wrong checksum", "checksum", suffix, bytes(flipped))
        yield file(f"{suffix} of nothing", "empty", suffix, b"", "the file has no rows")
        yield file("wrong magic", f"text as {suffix}", suffix, plain)
        yield file("wrong magic", f"zip as {suffix}", suffix, _zip(plain))
    yield file("wrong magic", "gzip as zst", "zst", packed["gz"])
    yield file("wrong magic", "zst as gzip", "gz", packed["zst"])
    says = "the file is gzip, whatever its name says"
    yield Damage(
        "compressed without its suffix",
        "gzip as jsonl",
        "data.jsonl",
        packed["gz"],
        says,
        "unreadable_file",
        scope="file",
    )
    frame = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30)
    ).compressobj()
    huge_window = frame.compress(plain) + frame.flush()
    yield file("zst that needs too much memory", "window", "zst", huge_window)
    bomb = b'{"prompt": "' + b"a" * 70 * 2**20
    says = "the line is longer than 64 MiB"
    yield file("compressed bomb", "gz", "gz", gzip.compress(bomb, 1), says)
    yield file("compressed bomb", "zst", "zst", zstandard.compress(bomb), says)
    yield file("line longer than 64 MiB", "zeros", "zst", zstandard.compress(b"\0" * 70 * 2**20), says)


def _zip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", data)
    return buffer.getvalue()


# --- CSV ---------------------------------------------------------------------------------------------------


def _bad_csv() -> Iterator[Damage]:
    def line(cells: Iterable[object], delimiter: str = ",") -> bytes:
        quoted = ('"' + str(cell).replace('"', '""') + '"' for cell in cells)
        return (delimiter.join(quoted) + "\n").encode()

    def table(bad: bytes, delimiter: str = ",") -> bytes:
        rows = [line(_text(i).values(), delimiter) for i in range(4)]
        return b"".join([line(_text(0), delimiter), *rows[:2], bad, *rows[3:]])

    text = _text(2)
    for key in ("chosen", "rejected"):
        for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
            content = table(line({**text, key: ""}.values(), delimiter), delimiter)
            says, file = f'"{key}" is empty', f"data.{suffix}"
            yield Damage("empty cell", f"{key} in {suffix}", file, content, says, "empty", place=":row 3")
    for weight in ("one", "1,5", "nan", "-1", "1e999"):
        rows = [line([*_text(i).values(), weight if i == 2 else 1]) for i in range(4)]
        content = b"".join([line([*text, "weight"]), *rows])
        name = f"cell {weight}"
        yield Damage("weight in CSV", name, "data.csv", content, "", "number", place=":row 3")
    good = line(text.values())
    unreadable = "not readable as CSV ("
    for kind, bad, says in (
        ("ragged row", line([*text.values(), "more"]), "the row has 5 cells, but the header has 4"),
        ("ragged row", good + b"half a row\n", "the row has 1 cell, but the header has 4"),
        ("quote in CSV", good[:-2] + b"\n", unreadable),
        ("quote in CSV", b'"a" b,c,d,e\n', unreadable),
        ("quote in CSV", rb'"a \"b\"",c,d,e' + b"\n", unreadable),
        ("encoding of CSV", b"d\xfcrfen,b,c,d\n", "a cell that is not valid UTF-8"),
        ("hole in CSV", b"a,b," + b"\0" * 4096 + b"d\n", "a null byte in a cell"),
    ):
        name = f"{kind}: {bad[-30:]!r}"
        yield Damage(kind, name, "data.csv", table(bad), says, "unreadable_file", scope="file")
    whole = gzip.compress(table(good))
    says = "cannot be read after this ("
    yield Damage("CSV cut off", "gzip", "data.csv.gz", whole[:-9], says, "unreadable_file", scope="file")
    content = table(good).decode().encode("utf-16")
    says = "a null byte in a cell"
    yield Damage("encoding of CSV", "UTF-16", "data.csv", content, says, "unreadable_file", scope="file")
    content = line([*text, "chosen"]) + line([*text.values(), "a"])
    says = '"chosen" appears twice'
    yield Damage("column twice", "CSV column twice", "data.csv", content, says, "duplicate_key", scope="file")
    says = "no column of the table"
    yield Damage(
        "table without columns", "CSV without columns", "data.csv", good, says, "missing_key", scope="file"
    )


# --- tables ------------------------------------------------------------------------------------------------


def _table(kind: str, name: str, data: bytes, says: str, problem: str = "unreadable_file") -> Damage:
    return Damage(kind, f"{kind}: {name}", "data.parquet", data, says, problem, scope="file")


def _bad_tables() -> Iterator[Damage]:
    rows = [{**_text(i), "weight": 1.0} for i in range(40)]
    whole = parquet(rows, compression="none", write_page_checksum=True, row_group_size=16)
    unreadable = "not readable as Parquet ("
    for cut in [*range(1, len(whole), len(whole) // 9), len(whole) - 1, len(whole) - 4, len(whole) - 8]:
        yield _table("table cut off", f"at {cut}", whole[:cut], unreadable)
    for n in range(3):
        flipped = bytearray(whole)
        flipped[whole.index(f"Frage {n * 7 + 2} ".encode()) + 2] ^= 4
        yield _table("table with a flipped byte", str(n), bytes(flipped), unreadable)
    zeros = bytearray(whole)
    zeros[200:260] = bytes(60)
    yield _table("table with a hole", "zeros", bytes(zeros), unreadable)
    length = len(whole) - 8
    for name, footer in (
        ("too long", 2**31 - 1),
        ("zero", 0),
        ("beyond the file", len(whole) + 1),
        ("one", 1),
    ):
        data = whole[:length] + footer.to_bytes(4, "little") + b"PAR1"
        yield _table("table with a wrong footer", name, data, unreadable)
    yield _table("table with a wrong footer", "magic", whole[:-4] + b"PARX", unreadable)
    yield _table("table with a wrong footer", "encrypted", whole[:-4] + b"PARE", unreadable)
    yield _table("table followed by more", "text", whole + b"\n", unreadable)
    yield _table("table twice", "half", whole[: length // 2] + whole[length // 2 + 9 :], unreadable)
    named = parquet(pa.table({"chosen": ["a"], "rejected": ["b"], "promptx": ["c"]}), store_schema=False)
    yield _table("table with a wrong footer", "name", named.replace(b"promptx", b"prom\xfftx"), unreadable)
    pair = {"chosen": ["a"], "rejected": ["b"]}
    for name, data in (
        ("text", lines()),
        ("nothing", b""),
        ("csv", b"chosen,rejected\na,b\n"),
        ("pickle", pickle.dumps(pair)),
        ("zip", _zip(lines())),
        ("gzip", gzip.compress(whole)),
        ("arrow", arrow(pa.table(pair))),
        ("magic", b"PAR1PAR1"),
    ):
        yield _table("another format as table", name, data, unreadable)
    deep: pa.Array = pa.array(["a"])
    for _ in range(60):
        deep = pa.ListArray.from_arrays([0, 1], deep)
    yield _table("table with deep nesting", "lists", parquet(pa.table({**pair, "tools": deep})), "too deeply")
    empty = pa.table({key: pa.array([], pa.string()) for key in ("prompt", "chosen", "rejected")})
    yield _table("table without rows", "no rows", parquet(empty), "the file has no rows")
    no_columns = pa.table({"text": ["a"], "label": [1]})
    yield _table(
        "table without columns", "others", parquet(no_columns), "no column of the table", "missing_key"
    )
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["chosen", "rejected", "chosen"])
    yield _table("column twice", "chosen", parquet(twice), '"chosen" appears twice', "duplicate_key")


def arrow(table: pa.Table, new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    """A table's file, or its stream."""
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _bad_arrow() -> Iterator[Damage]:
    rows = pa.Table.from_pylist([_text(0), _text(1), {**_text(2), "chosen": None}, _text(3)])
    good = pa.Table.from_pylist([_text(i) for i in range(4)])
    other = pa.table({"text": ["a"]})
    says = "not readable as Arrow ("
    for kind, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        name, place = f"null in an Arrow {kind}", ":record batch 0, row 2"
        yield Damage(
            "null in a table", name, "data.arrow", arrow(rows, new), '"chosen" is null', "type", place=place
        )
        whole = arrow(good, new)
        half = len(whole) // 2
        for what, data, message, problem in (
            ("cut off", whole[:half], says, "unreadable_file"),
            ("cut at its end", whole[:-8], says, "unreadable_file"),
            ("with a hole", whole[: half - 200] + b"\0" * 400 + whole[half + 200 :], says, "unreadable_file"),
            ("with more", whole + b"more", says, "unreadable_file"),
            ("without rows", arrow(good.slice(0, 0), new), "the file has no rows", "unreadable_file"),
            ("without columns", arrow(other, new), "no column of the table", "missing_key"),
        ):
            name = f"Arrow {kind} {what}"
            yield Damage(f"Arrow {what}", name, "data.arrow", data, message, problem, scope="file")
    for name, data in (
        ("text", lines()),
        ("nothing", b""),
        ("Parquet", parquet(good)),
        ("magic", b"ARROW1\0\0"),
    ):
        kind = "another format as Arrow"
        yield Damage(kind, f"{kind}: {name}", "data.arrow", data, says, "unreadable_file", scope="file")


def _bad_table_rows() -> Iterator[Damage]:
    def table(kind: str, data: bytes, says: str, problem: str, form: str = "text") -> Damage:
        place = ":row group 0, row 2"
        return Damage(kind, f"{kind} {says}", "data.parquet", data, says, problem, form=form, place=place)

    text, chat = ([GOOD[form](i) for i in range(4)] for form in ("text", "chat"))
    for key in ("prompt", "chosen", "rejected"):
        rows = [*text[:2], {**text[2], key: None}, text[3]]
        yield table("null in a table", parquet(rows), f'"{key}" is null', "type")
    yield table("null row", parquet([*text[:2], dict.fromkeys(text[2]), text[3]]), '"chosen" is null', "type")
    latin = pa.array([row["chosen"].encode() if i != 2 else b"caf\xe9" for i, row in enumerate(text)])
    columns = pa.Table.from_pylist(text)
    columns = columns.set_column(1, "chosen", latin.view(pa.string()))
    yield table("table with other text", parquet(columns), "not valid UTF-8 at its byte 4", "encoding")
    for key, value in (("prompt", None), ("chosen", []), ("rejected", None)):
        rows = [*chat[:2], {**chat[2], key: value}, chat[3]]
        problem = "empty" if value == [] else "type"
        yield table("null messages in a table", parquet(rows), f'"{key}" is ', problem, "chat")
    for message in ({"role": "assistant", "content": None}, {"role": None, "content": "a"}, None):
        rows = [*chat[:2], {**chat[2], "chosen": [message]}, chat[3]]
        says = "is null" if message is None else f'lacks "{"role" if message["content"] else "content"}"'
        yield table("null messages in a table", parquet(rows), says, "message", "chat")
    numbers = pa.Table.from_pylist(text)
    for value in (float("nan"), float("inf"), float("-inf"), -1.0, 1e300):
        column = pa.array([1.0, 1.0, value, 1.0])
        shown = "inf" if value == 1e300 else f"{value:g}"
        data = parquet(numbers.append_column("weight", column))
        yield table(f"weight {value:g} in a table", data, f'"weight" is {shown}', "number")
    data = parquet(numbers.append_column("margin", pa.array([None, 1.0, float("nan"), 0.5])))
    yield table("margin in a table", data, '"margin" is nan', "number")
    ranked = pa.Table.from_pylist([{**GOOD["ranked"](i), "scores": [2.0, 1.0]} for i in range(4)])
    for bad, says in ((float("nan"), "holds nan"), (float("inf"), "holds inf"), (None, "holds null")):
        scores = pa.array([[2.0, 1.0], [2.0, 1.0], [bad, 1.0], [2.0, 1.0]])
        data = parquet(ranked.set_column(2, "scores", scores))
        yield table("bad ranking", data, f'"scores" {says}', "shape", "ranked")
    days = pa.array([0, 0, 2**31 - 1, 0], pa.int32()).view(pa.date32())
    kwargs = pa.StructArray.from_arrays([days], ["day"], mask=pa.array([True, True, False, True]))
    data = parquet(pa.Table.from_pylist(chat).append_column("chat_template_kwargs", kwargs))
    says = '"chat_template_kwargs" holds a value that cannot be read'
    yield table("date beyond the calendar", data, says, "type", "chat")


def _bad_table_columns() -> Iterator[Damage]:
    """A column of another type: every row is bad."""

    def column(kind: str, key: str, values: pa.Array, says: str, problem: str, form: str = "text") -> Damage:
        table = pa.Table.from_pylist([GOOD[form](i) for i in range(len(values))])
        if key in table.column_names:
            table = table.drop_columns([key])
        return Damage(
            kind,
            f"{kind}: {key} {values.type}",
            "data.parquet",
            parquet(table.append_column(key, values)),
            says,
            problem,
            good=(),
            bad=len(values),
            place=":row group 0, row 0",
        )

    kind = "column of another type"
    yield column(kind, "chosen", pa.array([1, 2]), '"chosen" is a number', "type")
    yield column(kind, "chosen", pa.array([0.5, 2.5]), '"chosen" is a number', "type")
    yield column(kind, "chosen", pa.array([True, False]), '"chosen" is a boolean', "type")
    yield column(kind, "chosen", pa.array([b"a", b"b"]), '"chosen" is binary data', "type")
    yield column(kind, "chosen", pa.nulls(2), '"chosen" is null', "type")
    yield column(kind, "prompt", pa.array([datetime.date(2024, 5, 1)] * 2), "type date", "type")
    yield column(kind, "prompt", pa.array([datetime.datetime(2024, 5, 1)] * 2), "type datetime", "type")
    yield column(kind, "prompt", pa.array([decimal.Decimal("1.5")] * 2), "type Decimal", "type")
    yield column(kind, "rejected", pa.array([{"text": "a"}] * 2), '"rejected" is an object', "type")
    yield column(kind, "rejected", pa.array([["a"], ["b"]]), '"rejected" is a string', "message")
    yield column(kind, "source", pa.array([1, 2]), '"source" is a number', "type")
    yield column(kind, "weight", pa.array(["1", "2"]), '"weight" is a string', "number")
    yield column(kind, "weight", pa.array([decimal.Decimal("-1.5")] * 2), '"weight" is -1.5', "number")
    # A map is read as an object.
    lacking = pa.array([[("role", "user")]] * 2, pa.map_(pa.string(), pa.string()))
    yield column(kind, "prompt", lacking, 'lacks "content"', "message", "chat")
    far = pa.array([2**60], pa.int64())
    for unit in (pa.timestamp("us"), pa.timestamp("ms"), pa.duration("ms"), pa.time64("us")):
        says = '"margin" holds a value that cannot be read'
        yield column("date beyond the calendar", "margin", far.view(unit), says, "type")
    zone = far.view(pa.timestamp("us", "Nowhere/Land"))
    yield column("unknown time zone", "margin", zone, '"margin" holds a value that cannot', "type")
    names = ["role", "content", "role"]
    twice = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["a"]), pa.array(["b"])], names)
    messages = pa.ListArray.from_arrays([0, 1], twice)
    yield column("key twice", "prompt", messages, '"prompt" holds a value that cannot', "type", "chat")
    for value in (datetime.date(2024, 5, 1), b"a", decimal.Decimal("1.5"), float("nan")):
        says = '"tools" holds what JSON cannot'
        yield column("tools that are no JSON", "tools", pa.array([[{"a": value}]]), says, "tools", "chat")
        says = '"chat_template_kwargs" holds what JSON cannot'
        settings = pa.array([{"a": value}])
        yield column("settings that are no JSON", "chat_template_kwargs", settings, says, "tools", "chat")


# --- files and folders -------------------------------------------------------------------------------------


def _bad_files() -> Iterator[Damage]:
    def file(kind: str, name: str, content: Content, says: str, problem: str = "unreadable_file") -> Damage:
        return Damage(kind, f"{kind}: {name}", name, content, says, problem, scope="file")

    for name in ("data.jsonl", "data.json"):
        yield file("empty file", name, b"", "the file has no rows")
        yield file("blank file", f"blank.{name}", b"\xef\xbb\xbf\n \t\r\n", "the file has no rows")
    for name in ("data.xlsx", "data.txt", "data.feather", "data.pkl", "data.JSONL", "data.jsonl.bz2", "data"):
        yield file("unknown suffix", name, lines(), "the file name does not say what the file holds")
    for name in ("pipe.jsonl", "pipe.json", "pipe.jsonl.gz", "pipe.parquet"):
        yield file("pipe", name, os.mkfifo, "not a regular file")
    for name in ("/dev/zero", "/dev/null", "/dev/random"):
        device = f"{Path(name).name}.jsonl"
        yield file("device", device, _link_to(name), "not a regular file")
    yield file("broken link", "broken.jsonl", _link_to("nowhere"), "there is no such file", "no_such_file")
    yield file("broken link", "loop.jsonl", _link_to("loop.jsonl"), "there is no such file", "no_such_file")

    def folder(kind: str, name: str, says: str, problem: str, **content: Content) -> Damage:
        def write(path: Path) -> None:
            path.mkdir()
            for part, data in content.items():
                place = path / part.replace("__", ".")
                if callable(data):
                    data(place)
                else:
                    place.write_bytes(data)

        return file(kind, name, write, says, problem)

    good = lines()
    says = "the folder holds no file that ends in"
    yield folder("folder without data", "empty", says, "no_such_file")
    yield folder("folder without data", "README", says, "no_such_file", README__md=b"# Pairs")
    yield folder("folder without data", "data.jsonl.d", says, "no_such_file", info__txt=b"a")
    says = "the file's name does not say what it holds"
    for part in ("more__xlsx", "more__feather", "more__bin", "more", "more__jsonl__part"):
        name = f"folder with {part}"
        yield folder("folder with other files", name, says, "no_such_file", a__jsonl=good, **{part: good})
    name = "folder with a linked folder"
    yield folder("folder with a link", name, says, "no_such_file", a__jsonl=good, more=_link_to("../"))
    says, problem = "cannot be read after this (No such file", "unreadable_file"
    link = _link_to("nowhere")
    yield folder("folder with a link", "folder with a link", says, problem, a__jsonl=good, b__jsonl=link)
    says = "not a regular file"
    yield folder("folder with a pipe", "folder with a pipe", says, problem, a__jsonl=good, b__jsonl=os.mkfifo)
    says = "the file has no rows"
    yield folder("folder with an empty file", "folder of two", says, problem, a__jsonl=good, b__jsonl=b"")


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


# --- texts that are kept -----------------------------------------------------------------------------------


def _kept() -> Iterator[Damage]:
    text, chat = _text(2), _chat(2)
    turns = [_said("user", "a"), _said("assistant", ""), _said("user", "b")]
    for n, (kind, form, row, problem) in enumerate(
        [
            ("null character in a text", "text", {**text, "chosen": "a\0b"}, "control_character"),
            ("null character in a text", "chat", {**chat, "chosen": [_said("a", "\0")]}, "control_character"),
            ("escape character in a text", "text", {**text, "prompt": "\x1b[31mred"}, "control_character"),
            ("blank completion", "text", {**text, "rejected": " \n"}, "blank_completion"),
            ("equal completions", "text", {**text, "rejected": text["chosen"]}, "identical_completions"),
            ("empty turn", "chat", {**chat, "prompt": turns}, "empty_turn"),
            ("repeated row", "text", _text(1), "duplicate"),
            ("row both ways round", "text", _swapped(_text(1)), "contradictory"),
        ]
    ):
        file, place, write = _CONTAINERS[n % len(_CONTAINERS)]
        place = place.replace("3", "2") if problem == "contradictory" else place
        content = write([GOOD[form](0), GOOD[form](1), row, GOOD[form](3)])
        yield Damage(
            kind, f"{kind} {n}", file, content, "", problem, "kept", form, (0, 1, 3), 0, place, kept=row
        )
    crlf = lines().replace(b"\n", b"\r\n")
    swapped = _swapped(_text(1))
    yield Damage(
        "CRLF line ends",
        "CRLF",
        "data.jsonl",
        crlf + b"\r\n" + to_line(swapped),
        "",
        "contradictory",
        "kept",
        "text",
        (0, 1, 2, 3),
        0,
        ":2",
        kept=swapped,
    )


def _swapped(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def said(found: Iterable[PreferencePair | BadRow]) -> list[Any]:
    """What a reading found, comparable."""
    return [(i.error.where, i.error.what) if isinstance(i, BadRow) else i for i in found]


def parsed(task: Any) -> list[Any]:
    """One block's rows; here, where another process can import it from."""
    return said(parse_block(*task))
