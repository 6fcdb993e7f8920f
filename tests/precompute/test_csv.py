"""CSV and TSV say what the same rows say as JSON Lines, or are refused with the row."""

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read import csv_rows
from dpo_opt.precompute.read.datasets import BadRow, read_pairs, scan_pairs
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

Row = dict[str, Any]
TEXTS = [
    "plain",
    "a, b",
    'she said "no"',
    "two\nlines",
    "tab\there",
    "\r\n",
    " ",
    "dü ❄ 𝄞",
    '"',
    "[1]",
    "{}",
    "1",
    "NaN",
]


def to_csv(rows: list[Row], delimiter: str = ",", **options: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def scan(path: Path, **settings: Any) -> list[PreferencePair | BadRow]:
    return list(scan_pairs(DataConfig(data=[str(path)], **settings)))


def pairs_of(path: Path, content: bytes, **settings: Any) -> list[PreferencePair]:
    """The pairs, without where they stand."""
    path.write_bytes(content)
    found = scan(path, **settings)
    assert not any(isinstance(item, BadRow) for item in found), found
    return [item._replace(where="") for item in found if not isinstance(item, BadRow)]


def pairs_of_lines(tmp_path: Path, rows: list[Row], **settings: Any) -> list[PreferencePair]:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return pairs_of(tmp_path / "rows.jsonl", lines.encode(), **settings)


def refusal(path: Path, content: bytes) -> DataError:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        scan(path)
    return caught.value


def text_rows(count: int = 40) -> list[Row]:
    choice = random.Random(count).choice
    return [
        {"prompt": choice(TEXTS), "chosen": f"{choice(TEXTS)}+", "rejected": choice(TEXTS)}
        for _ in range(count)
    ]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".csv.zst", ".tsv.gz", ".tsv.zst"])
def test_the_pairs_are_those_of_json_lines(tmp_path: Path, suffix: str, quoting: Any) -> None:
    rows = text_rows()
    content = to_csv(rows, "\t" if suffix.startswith(".tsv") else ",", quoting=quoting)
    content = (
        {"z": gzip.compress, "t": zstandard.compress}.get(suffix[-1], bytes)(content)
        if suffix.count(".") > 1
        else content
    )
    assert pairs_of(tmp_path / f"rows{suffix}", content) == pairs_of_lines(tmp_path, rows)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_a_byte_order_mark_and_blank_lines_say_nothing(tmp_path: Path, end: str) -> None:
    rows = [{"prompt": "p", "chosen": "c", "rejected": f"r{i}"} for i in range(3)]
    content = b"\xef\xbb\xbf" + to_csv(rows, lineterminator=end + end)
    path = tmp_path / "rows.csv"
    assert pairs_of(path, content) == pairs_of_lines(tmp_path, rows)
    assert [item.where for item in scan(path) if isinstance(item, PreferencePair)] == [
        f"{path}:row {number}" for number in (1, 2, 3)
    ]


def test_numbers_are_read_where_numbers_are_meant_and_nowhere_else(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "1",
            "chosen": "2",
            "rejected": "3.0",
            "id": "007",
            "source": "5",
            "weight": weight,
            "margin": 2,
        }
        for weight in (1, 0.25, 1e-3, 0)
    ]
    assert pairs_of(tmp_path / "rows.csv", to_csv(rows)) == pairs_of_lines(tmp_path, rows)
    renamed = [{"prompt": "p", "chosen": "c", "rejected": "r", "w": 0.5}]
    column = {"weight": "w"}
    found = pairs_of(tmp_path / "rows.csv", to_csv(renamed), column=column)
    assert found == pairs_of_lines(tmp_path, renamed, column=column)


@pytest.mark.parametrize(
    "row",
    [
        {"history": "q", "human_ref_A": "x", "human_ref_B": "y", "labels": 0},
        {"prompt": "q", "response_0": "x", "response_1": "y", "better_response_id": 1},
        {"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": -2},
        {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "b"},
        {
            **{"prompt": '["q"]', "response_a": '["x"]', "response_b": '["y"]'},
            **{"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        },
        {"prompt": "q", "chosen": "x", "rejected": "y", "score_chosen": 3.5, "score_rejected": 2},
        {"system": "", "question": "q", "chosen": "x", "rejected": "y"},
        {"chosen": "A question: yes", "rejected": "A question: no"},
    ],
)
def test_published_forms_are_read_as_from_json_lines(tmp_path: Path, row: Row) -> None:
    rows = [row, row]
    assert pairs_of(tmp_path / "rows.csv", to_csv(rows)) == pairs_of_lines(tmp_path, rows)


def test_an_empty_cell_is_no_value_where_none_is_needed_and_an_empty_text_elsewhere(tmp_path: Path) -> None:
    row = {"prompt": "", "chosen": "c", "rejected": "r"}
    empty = dict.fromkeys(["source", "id", "weight", "margin", "tools", "chat_template_kwargs"], "")
    assert pairs_of(tmp_path / "rows.csv", to_csv([row | empty])) == pairs_of_lines(tmp_path, [row])
    path = tmp_path / "bad.csv"
    path.write_bytes(to_csv([row, {**row, "chosen": ""}, row]))
    good, bad, other = scan(path)
    assert isinstance(bad, BadRow)
    assert (bad.row, bad.error.what, bad.error.where) == (1, '"chosen" is empty', f"{path}:row 2")
    assert not isinstance(good, BadRow)
    assert not isinstance(other, BadRow)


@pytest.mark.parametrize(
    "weight", ["1,5", " 1", "1_000", "nan", "inf", "0x10", "one", "1e999", "-1", "9" * 5000]
)
def test_a_weight_that_is_no_number_is_a_bad_row(tmp_path: Path, weight: str) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "weight": "1"}
    path = tmp_path / "rows.csv"
    path.write_bytes(to_csv([row, {**row, "weight": weight}, row]))
    bad = [item for item in scan(path) if isinstance(item, BadRow)]
    assert [(item.row, item.error.kind, item.error.where) for item in bad] == [(1, "number", f"{path}:row 2")]


GOOD = b"prompt,chosen,rejected\np,c,r\n"


@pytest.mark.parametrize(
    ("content", "place", "says"),
    [
        (GOOD + b"p,c\n", ":row 2", "the row has 2 cells, but the header has 3"),
        (GOOD + b"p,c,r,\n" + GOOD, ":row 2", "the row has 4 cells, but the header has 3"),
        (GOOD + b'p,c,"r\np,c,r\n', ":row 2", "not readable as CSV (unexpected end of data)"),
        (GOOD + b'p,"c" d,r\n', ":row 2", "not readable as CSV"),
        (GOOD + b'p,"c \\"d\\"",r\n', ":row 2", "not readable as CSV"),
        (GOOD + "p,é,r\n".encode("latin-1"), ":row 2", "a cell that is not valid UTF-8"),
        (GOOD + b"p,c\0,r\n", ":row 2", "a null byte in a cell"),
        (GOOD.decode().encode("utf-16"), ":header", "a null byte in a cell"),
        (GOOD.decode().encode("utf-16-le"), ":header", "a null byte in a cell"),
        (b"prompt,chosen,rejected,chosen\np,c,r,c\n", "", 'the column "chosen" appears twice'),
        (b"p,c,r\np,c,r\n", "", "no column of the table is one of a preference pair (found: p, c, r)"),
        (GOOD.replace(b",", b";"), ":header", 'the cells are separated by ";"'),
        (GOOD.replace(b",", b"\t"), ":header", 'the cells are separated by "\\t"'),
        (b"text\np;c\n", "", "no column of the table is one of a preference pair (found: text)"),
        (b"prompt,chosen,rejected\n", "", "the file has no rows"),
        (b"", "", "the file has no rows"),
        (b"\r\n\r\n", "", "the file has no rows"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_with_its_row(
    tmp_path: Path, content: bytes, place: str, says: str
) -> None:
    path = tmp_path / "rows.csv"
    error = refusal(path, content)
    assert error.what.startswith(says)
    assert error.where == f"{path}{place}"
    assert error.fix


def test_the_rows_before_the_damage_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(GOOD + b"p,c\n")
    found = scan_pairs(DataConfig(data=[str(path)]))
    assert isinstance(next(found), PreferencePair)
    with pytest.raises(DataError, match="the row has 2 cells"):
        next(found)


@pytest.mark.parametrize(
    "messages", ['[{"role": "user", "content": "q"}]', "[{'content': 'q', 'role': 'user'}]"]
)
def test_messages_as_text_are_not_trained_on_as_text(tmp_path: Path, messages: str) -> None:
    error = refusal(tmp_path / "rows.csv", to_csv([{"chosen": messages, "rejected": messages}]))
    assert error.what == 'the column "chosen" holds messages as text'
    assert "JSON Lines or Parquet" in str(error.fix)


def test_a_long_text_is_read(tmp_path: Path) -> None:
    rows = [{"prompt": "p\n" * 200_000, "chosen": "c", "rejected": "r"}]
    assert pairs_of(tmp_path / "rows.csv", to_csv(rows)) == pairs_of_lines(tmp_path, rows)


@pytest.mark.parametrize("long", [b"a" * 1001, b'"' + b"a\n" * 501])
def test_a_row_beyond_any_pair_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bytes
) -> None:
    monkeypatch.setattr(csv_rows, "LONGEST_ROW", 1000)
    limit = csv.field_size_limit(1000)
    try:
        error = refusal(tmp_path / "rows.csv", GOOD + b"p,c," + long)
    finally:
        csv.field_size_limit(limit)
    assert "is longer than 64 MiB" in error.what
    assert error.where == f"{tmp_path}/rows.csv:row 2"


def test_a_damaged_archive_is_refused_after_its_last_rows(tmp_path: Path) -> None:
    whole = gzip.compress(to_csv(text_rows(2000)))
    assert refusal(tmp_path / "rows.csv.gz", whole[: len(whole) // 2]).what.startswith("cannot be read after")


def test_only_columns_of_a_pair_are_read(tmp_path: Path) -> None:
    rows = [{"": "0", "prompt": "p", "chosen": "c", "rejected": "r", "note": "[{'role': 'x'}]"}]
    plain = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    assert pairs_of(tmp_path / "rows.csv", to_csv(rows)) == pairs_of_lines(tmp_path, plain)


@pytest.mark.parametrize(
    ("header", "cells", "prompt"),
    [
        ("prompt,chosen,rejected,history,images", 'q,a,b,[],"[]"', "q"),
        ("instruction,chosen,rejected,history", 'q,a,b,"[[""x"", ""y""]]"', ["x", "y", "q"]),
        ("prompt,completions,ranks", 'q,"[""b"", ""a""]","[2, 1]"', "q"),
        ("history,human_ref_A,human_ref_B,labels", "[q] Why?,a,b,1", ["[q] Why?"]),
        ("prompt,response_1,response_2,preference_strength", "q,a,b,-2.0", "q"),
    ],
)
def test_lists_as_json_text_in_a_cell_are_lists(header: str, cells: str, prompt: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n{cells}\n")
    (pair,) = read_pairs(DataConfig(data=[str(tmp_path / "a.csv")]))
    found = [message["content"] for message in pair.prompt] if isinstance(prompt, list) else pair.prompt
    assert found == prompt
