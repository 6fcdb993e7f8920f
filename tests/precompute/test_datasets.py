import gzip
import itertools
import json
import os
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read import files
from dpo_opt.precompute.read.datasets import BadRow, read_pairs, row_content, scan_pairs
from dpo_opt.precompute.read.sources import SUFFIXES
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "pairs"
LONG = "private words " * 20

TEXT_ROWS = [
    {"prompt": "Is ice cold?", "chosen": " Yes.", "rejected": " No.", "source": "facts"},
    {"prompt": "Schnee ❄ ist", "chosen": " weiß", "rejected": " grün", "source": None},
    {"prompt": "", "chosen": "Once", "rejected": "Twice", "source": "openings"},
]
USER, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in (("user", "Hi"), ("assistant", "Hello!"), ("assistant", "Go away."))
)
MESSAGE_ROWS = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}] * 3


def pairs_of(path: Path, **rows: Any) -> Iterator[PreferencePair]:
    return read_pairs(DataConfig(data=[str(path)]), **rows)


def to_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    ".jsonl": lambda path, rows: path.write_bytes(to_lines(rows)),
    ".jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(to_lines(rows))),
    ".jsonl.zst": lambda path, rows: path.write_bytes(zstandard.compress(to_lines(rows))),
    ".parquet": write_parquet,
}


def contents(pairs: list[PreferencePair]) -> list[dict[str, Any]]:
    return [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "source": p.source} for p in pairs
    ]


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(pairs_of(path))
    error = caught.value
    assert error.exit_code == 3
    assert error.where is not None
    assert error.fix
    assert LONG[:61] not in str(error)
    return error


def refused_line(tmp_path: Path, line: bytes) -> DataError:
    """What is said about a line that follows a good one and a blank one."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n' + line + b"\n")
    error = refusal(path)
    assert error.where == f"{path}:3"
    return error


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path, TEXT_ROWS)
    pairs = list(pairs_of(path))
    assert contents(pairs) == TEXT_ROWS
    assert [p.row for p in pairs] == [0, 1, 2]


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_messages(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path, MESSAGE_ROWS)
    assert contents(list(pairs_of(path))) == [{**row, "source": None} for row in MESSAGE_ROWS]


@pytest.mark.parametrize("suffix", WRITERS)
def test_start_and_stop_select_what_a_slice_of_all_rows_would(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path, [{**TEXT_ROWS[0], "source": str(i)} for i in range(7)])
    everything = list(pairs_of(path))
    for start, stop in itertools.combinations_with_replacement(range(9), 2):
        assert list(pairs_of(path, start=start, stop=stop)) == everything[start:stop]
    assert list(pairs_of(path, start=3)) == everything[3:]


def test_a_place_is_the_physical_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    first, *others = to_lines(TEXT_ROWS).splitlines(keepends=True)
    path.write_bytes(b"\n" + first + b"  \r\n" + b"".join(others))
    assert [(p.row, p.where) for p in pairs_of(path)] == [
        (0, f"{path}:2"),
        (1, f"{path}:4"),
        (2, f"{path}:5"),
    ]


def test_a_place_in_parquet_is_the_row_group_and_its_row(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_parquet(path, TEXT_ROWS)
    assert [p.where for p in pairs_of(path)] == [
        f"{path}:row group 0, row 0",
        f"{path}:row group 0, row 1",
        f"{path}:row group 1, row 0",
    ]


def test_a_gzip_file_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(to_lines([row])) for row in TEXT_ROWS))
    assert contents(list(pairs_of(path))) == TEXT_ROWS


def test_a_byte_order_mark_and_unknown_keys_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + to_lines([{**row, "score": 3, "tags": [1]} for row in TEXT_ROWS]))
    assert contents(list(pairs_of(path))) == TEXT_ROWS


def test_categorical_and_large_strings_are_text(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    columns = {
        "prompt": pa.array(["a", "a"]).dictionary_encode(),
        "chosen": pa.array(["b", "c"], type=pa.large_string()),
        "rejected": pa.array(["d", "e"]),
        "embedding": pa.array([[0.5], [1.5]]),
    }
    pq.write_table(pa.table(columns), path)
    pairs = list(pairs_of(path))
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [("a", "b", "d"), ("a", "c", "e")]


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"prompt": "a" "chosen": "b"}', "not valid JSON at column 16 (Expecting ',' delimiter)"),
        (b'{"prompt": "a', "not valid JSON at column 12 (Unterminated string starting at)"),
        (b"[1, 2]", "a list where a JSON object is expected"),
        (b"null", "null where a JSON object is expected"),
        (b'{"prompt": "a", "chosen": "b"}', 'the key "rejected" is missing (found: prompt, chosen)'),
        (b"{}", 'the key "chosen" is missing (found: none)'),
        (json.dumps({**PAIR, "rejected": None}).encode(), '"rejected" is null'),
        (json.dumps({**PAIR, "prompt": None}).encode(), '"prompt" is null'),
        (json.dumps({**PAIR, "chosen": 3}).encode(), '"chosen" is a number'),
        (json.dumps({**PAIR, "chosen": 0.5}).encode(), '"chosen" is a number'),
        (json.dumps({**PAIR, "chosen": True}).encode(), '"chosen" is a boolean'),
        (json.dumps({**PAIR, "chosen": {"a": LONG}}).encode(), '"chosen" is an object'),
        (json.dumps({**PAIR, "chosen": ""}).encode(), '"chosen" is empty'),
        (json.dumps({**PAIR, "source": 7}).encode(), '"source" is a number'),
        (json.dumps({**PAIR, "rejected": [BAD]}).encode(), '"chosen" is a string, but "rejected" is a list'),
        (
            b'{"prompt": "a", "chosen": "b", "chosen": "c"}',
            'the key "chosen" appears twice in one object',
        ),
        (json.dumps({**PAIR, "score": float("nan")}).encode(), "NaN is not a JSON value"),
        (json.dumps({**PAIR, "score": float("-inf")}).encode(), "-Infinity is not a JSON value"),
        (
            json.dumps({**PAIR, "chosen": "cut \ud83d"}).encode(),
            '"chosen" contains half a character (a lone surrogate) at character 5',
        ),
        (
            json.dumps({**PAIR, "chosen": LONG}).encode().replace(b"private", b"priv\xe4te", 1),
            "not valid UTF-8 at byte 32 of the line",
        ),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the JSON value is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON (Exceeds the limit"),
        (json.dumps({LONG: LONG}).encode(), 'the key "chosen" is missing (found: private words'),
        (b'{"\\ud800": 1}', 'the key "chosen" is missing (found: \\ud800)'),
    ],
)
def test_a_bad_line_is_refused_with_its_place_and_what_was_found(
    tmp_path: Path, line: bytes, what: str
) -> None:
    assert refused_line(tmp_path, line).what.startswith(what)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"prompt": []}, '"prompt" is an empty list'),
        ({"chosen": []}, '"chosen" is empty'),
        ({"chosen": [{**GOOD, "content": ""}]}, '"chosen" is empty'),
        ({"chosen": ["Hello!"]}, 'message 1 of "chosen" is a string'),
        ({"chosen": [GOOD, {"role": "user"}]}, 'message 2 of "chosen" lacks "content"'),
        ({"chosen": [{"content": "Hello!"}]}, 'message 1 of "chosen" lacks "role"'),
        (
            {"prompt": [{"role": "user", "content": [LONG]}]},
            'part 1 of "content" in message 1 of "prompt" is a string',
        ),
        ({"chosen": [{**GOOD, "content": None}]}, '"content" in message 1 of "chosen" is null'),
        (
            {"chosen": [{**GOOD, "images": [LONG]}]},
            'message 1 of "chosen" has the key "images", which no chat template is given',
        ),
        ({"chosen": [{**GOOD, "content": "\ud83d"}]}, '"content" contains half a character'),
    ],
)
def test_a_bad_message_is_refused_with_its_place_and_what_was_found(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(to_lines([MESSAGE_ROWS[0], {**MESSAGE_ROWS[0], **changes}]))
    error = refusal(path)
    assert error.what.startswith(what)
    assert error.where == f"{path}:2"


def test_a_message_key_that_is_null_is_no_key(tmp_path: Path) -> None:
    # Tables hold every key in every message, so a column of calls that nobody made reads as nulls.
    path = tmp_path / "data.parquet"
    write_parquet(path, [{"prompt": [{**USER, "name": None}], "chosen": [GOOD], "rejected": [BAD]}])
    assert next(pairs_of(path)).prompt == [USER]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            'this row holds messages with "prompt", but {first} holds text with "prompt"',
        ),
        (
            {"chosen": "a b", "rejected": "a c"},
            'this row holds text without "prompt", but {first} holds text with "prompt"',
        ),
    ],
)
def test_rows_of_two_forms_are_refused_naming_both(tmp_path: Path, other: dict[str, Any], what: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(to_lines([PAIR, PAIR, other]))
    error = refusal(path)
    assert error.what == what.format(first=f"{path}:1")
    assert error.where == f"{path}:3"


def test_a_scan_goes_on_after_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"{\n" + to_lines([PAIR, {"chosen": "a b", "rejected": "a c"}, {}, PAIR]))
    found = [
        item.error.where if isinstance(item, BadRow) else item.row
        for item in scan_pairs(DataConfig(data=[str(path)]))
    ]
    assert found == [f"{path}:1", 1, f"{path}:3", f"{path}:4", 4]


def test_a_parquet_row_with_null_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_parquet(path, [PAIR, PAIR, PAIR, {**PAIR, "chosen": None}])
    error = refusal(path)
    assert (error.what, error.where) == ('"chosen" is null', f"{path}:row group 1, row 1")


def test_parquet_text_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    latin = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"chosen": latin, "rejected": pa.array(["tea"])}), path)
    error = refusal(path)
    assert error.what == "a text that is not valid UTF-8 at its byte 4"
    assert error.where == f"{path}:row group 0, row 0"


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"chosen": ["a"], "score": [1]}, 'the key "rejected" is missing (found: chosen, score)'),
        ({"chosen": ["a"], "rejected": [1]}, '"rejected" is a number'),
        ({"chosen": ["a"], "rejected": [None]}, '"rejected" is null'),
        ({"chosen": ["a"], "rejected": [["b"]]}, 'message 1 of "rejected" is a string'),
        ({"chosen": ["a"], "rejected": [[{"role": "user"}]]}, 'message 1 of "rejected" lacks'),
        ({"chosen": ["ab"], "rejected": ["ac"], "source": [1]}, '"source" is a number'),
    ],
)
def test_parquet_columns_of_another_kind_are_refused(
    tmp_path: Path, columns: dict[str, Any], what: str
) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table(columns), path)
    assert refusal(path).what.startswith(what)


def test_a_parquet_column_that_appears_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["chosen", "rejected", "chosen"])
    pq.write_table(table, path)
    assert refusal(path).what == 'the column "chosen" appears twice'


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("empty.jsonl", b"", "the file has no rows"),
        ("blank.jsonl", b"\xef\xbb\xbf\n  \n", "the file has no rows"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "the file has no rows"),
        ("cut.jsonl.gz", gzip.compress(to_lines(TEXT_ROWS), mtime=0)[:-9], "cannot be read after this ("),
        ("cut.jsonl.zst", zstandard.compress(to_lines(TEXT_ROWS))[:-3], "cannot be read after this ("),
        ("plain.jsonl.gz", to_lines(TEXT_ROWS), "cannot be read after this ("),
        ("plain.jsonl.zst", to_lines(TEXT_ROWS), "cannot be read after this ("),
        ("text.parquet", to_lines(TEXT_ROWS), "not readable as Parquet ("),
        ("empty.parquet", b"", "not readable as Parquet ("),
        ("data.xlsx", b"chosen,rejected\n", "the file name does not say what the file holds"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, name: str, data: bytes, what: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    error = refusal(path)
    assert error.where is not None
    assert error.where.startswith(str(path))
    assert error.what.startswith(what)


def test_a_compressed_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    rows = [{**PAIR, "source": str(i)} for i in range(200)]
    for suffix in (".jsonl.gz", ".jsonl.zst"):
        path = tmp_path / f"data{suffix}"
        WRITERS[suffix](path, rows)
        whole = path.read_bytes()
        for size in range(1, len(whole), 37):
            path.write_bytes(whole[:size])
            assert "cannot be read after this" in refusal(path).what


def test_a_cut_or_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    table = pa.Table.from_pylist([{**PAIR, "chosen": f"text {i}"} for i in range(500)])
    pq.write_table(table, path, write_page_checksum=True, compression="none")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "not readable as Parquet" in refusal(path).what
    path.write_bytes(whole.replace(b"text 250", b"text 999"))
    assert "not readable as Parquet" in refusal(path).what


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(
        pa.table({"chosen": pa.array([], pa.string()), "rejected": pa.array([], pa.string())}), path
    )
    assert refusal(path).what == "the file has no rows"


def test_the_accepted_file_names_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "data.xlsx"
    path.write_bytes(to_lines(TEXT_ROWS))
    assert str(refusal(path).why).startswith(f"it must end in one of {', '.join(SUFFIXES)}")


def test_a_missing_file_and_a_folder_without_data_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing.jsonl").what == "there is no such file or folder"
    assert refusal(tmp_path).what.startswith("the folder holds no file that ends in .jsonl")


def test_a_line_that_is_too_long_is_refused_without_being_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(to_lines([PAIR, {**PAIR, "chosen": LONG}]))
    monkeypatch.setattr(files, "LONGEST_ROW", 100)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 50)
    error = refusal(path)
    assert (error.what.split(" than ")[0], error.where) == ("the line is longer", f"{path}:2")


def split(tmp_path: Path, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    path = tmp_path / "data.jsonl"
    path.write_bytes(to_lines([{"chosen": chosen, "rejected": rejected}]))
    pair = next(pairs_of(path))
    return pair.prompt, pair.chosen, pair.rejected


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is grey.", ("The sky is", " blue.", " grey.")),
        ("The sky is blue.", "The sky is black.", ("The sky is bl", "ue.", "ack.")),
        ("ab", "abc", ("a", "b", "bc")),
        ("same", "same", ("sam", "e", "e")),
        # Both answers begin with " I"; it is no part of the question.
        (
            "\n\nHuman: Who?\n\nAssistant: I do.",
            "\n\nHuman: Who?\n\nAssistant: I don't.",
            ("\n\nHuman: Who?\n\nAssistant:", " I do.", " I don't."),
        ),
        (
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: E",
            ("\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:", " D", " E"),
        ),
        # One answer goes on with turns of its own: they belong to the answer.
        (
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "\n\nHuman: A\n\nAssistant: E",
            ("\n\nHuman: A\n\nAssistant:", " B\n\nHuman: C\n\nAssistant: D", " E"),
        ),
    ],
)
def test_the_prompt_inside_both_texts_is_found(
    tmp_path: Path, chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    assert split(tmp_path, chosen, rejected) == expected


def test_the_prompt_inside_both_conversations_is_found(tmp_path: Path) -> None:
    assert split(tmp_path, [USER, GOOD], [USER, BAD]) == ([USER], [GOOD], [BAD])
    assert split(tmp_path, [USER, GOOD, USER, GOOD], [USER, GOOD, USER, BAD]) == (
        [USER, GOOD, USER],
        [GOOD],
        [BAD],
    )
    assert split(tmp_path, [USER, GOOD], [USER, GOOD]) == ([USER], [GOOD], [GOOD])


@pytest.mark.parametrize(
    ("chosen", "rejected", "what"),
    [
        ("Yes", "No", 'there is no "prompt", and'),
        (" Yes", " No", 'there is no "prompt", and'),
        ("a", "a", 'there is no "prompt", and'),
        ([GOOD], [BAD], 'there is no "prompt", and'),
        (
            "\n\nHuman: A\n\nAssistant: C",
            "\n\nHuman: B\n\nAssistant: C",
            'there is no "prompt", and',
        ),
        (
            "\n\nHuman: A\n\nAssistant:",
            "\n\nHuman: A\n\nAssistant: C",
            '"chosen" is empty after the prompt that both sides share',
        ),
    ],
)
def test_rows_without_a_common_prompt_are_refused(
    tmp_path: Path, chosen: Any, rejected: Any, what: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(to_lines([{"chosen": chosen, "rejected": rejected}]))
    error = refusal(path)
    assert error.what.startswith(what)
    assert error.where == f"{path}:1"


def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    texts = {
        key: [f"{key} " + os.urandom(1500).hex() for _ in range(12_000)] for key in ("chosen", "rejected")
    }
    pq.write_table(pa.table({"prompt": ["q"] * 12_000, **texts}), path, row_group_size=12_000)
    assert path.stat().st_size > 36_000_000
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in pairs_of(path))
    assert peak < 20_000_000


def test_row_content_depends_on_content_alone(tmp_path: Path) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.parquet"
    here.write_bytes(b"\n" + to_lines(TEXT_ROWS))
    write_parquet(there, TEXT_ROWS)
    assert [row_content(p) for p in pairs_of(here)] == [row_content(p) for p in pairs_of(there)]
    assert (
        row_content(next(pairs_of(here)))
        == b'{"chosen":" Yes.","prompt":"Is ice cold?","rejected":" No.","source":"facts"}'
    )
    assert len({row_content(p) for p in pairs_of(here)}) == len(TEXT_ROWS)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published human pairs are not beside the repository")
def test_published_transcripts_split_as_their_explicit_prompts_say() -> None:
    transcripts = list(pairs_of(SHARED / "hh_harmless_base_test.jsonl.gz"))
    explicit = list(pairs_of(SHARED / "human_pairs.jsonl.gz"))
    assert (len(transcripts), len(explicit)) == (2312, 3302)
    split_by_us = {(p.prompt, p.chosen, p.rejected) for p in transcripts}
    split_by_others = {
        (p.prompt, p.chosen, p.rejected) for p in explicit if str(p.source).startswith("hh-rlhf")
    }
    assert len(split_by_others) > 2000
    assert split_by_others <= split_by_us


def test_a_map_of_a_table_is_an_object(tmp_path: Path) -> None:
    arguments = pa.map_(pa.string(), pa.list_(pa.map_(pa.string(), pa.string())))
    call = pa.struct({"function": pa.struct({"name": pa.string(), "arguments": arguments})})
    message = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(call)})
    schema = pa.schema([(key, pa.list_(message)) for key in ("prompt", "chosen", "rejected")])

    def read_back(given: list[tuple[str, Any]]) -> Any:
        calls = [{"function": {"name": "f", "arguments": given}}]
        said = {"role": "assistant", "content": "a"}
        row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{**said, "tool_calls": calls}]}
        pq.write_table(
            pa.Table.from_pylist([{**row, "rejected": [said]}], schema=schema), tmp_path / "a.parquet"
        )
        (found,) = scan_pairs(DataConfig(data=[str(tmp_path / "a.parquet")]))
        return found

    found = read_back([("cities", [[("name", "Lima")], []]), ("none", None)])
    (written,) = found.chosen[0]["tool_calls"]
    assert written["function"]["arguments"] == {"cities": [{"name": "Lima"}, {}]}
    twice = read_back([("city", None), ("city", None)])
    assert "a key twice in a map" in twice.error.what


def test_a_decimal_of_a_table_is_a_number_and_another_is_told_the_way_out(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    pq.write_table(pa.Table.from_pylist([{**row, "weight": Decimal("0.5")}]), tmp_path / "a.parquet")
    (pair,) = read_pairs(DataConfig(data=[str(tmp_path / "a.parquet")]))
    assert pair.weight == 0.5
    pq.write_table(pa.Table.from_pylist([{**row, "margin": float("nan")}]), tmp_path / "b.parquet")
    (bad,) = scan_pairs(DataConfig(data=[str(tmp_path / "b.parquet")]))
    assert isinstance(bad, BadRow)
    assert "--ignore-column margin" in str(bad.error.fix)
