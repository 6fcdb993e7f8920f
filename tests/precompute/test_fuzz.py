"""Whatever is read, it is read as it stands, or refused with its place: no other exception, nothing lost."""

import csv
import functools
import gzip
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import zstandard
from damage import GOOD, arrow, lines, parquet, parsed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.check.problems import BAD_ROWS
from dpo_opt.precompute.check.written_forms import written_rows
from dpo_opt.precompute.config import CheckConfig, DataConfig, WrittenForm
from dpo_opt.precompute.read import files
from dpo_opt.precompute.read.datasets import BadRow, row_content, scan_blocks, scan_pairs
from dpo_opt.precompute.read.parallel import map_in_order
from dpo_opt.precompute.read.rows import to_pairs
from dpo_opt.precompute.read.shape_parts import AROUND_KEYS
from dpo_opt.precompute.read.shapes import SHAPES, keys_to_read
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

pytestmark = pytest.mark.timeout(120)

Row = dict[str, Any]
Found = list[PreferencePair | BadRow]


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        derandomize=True,
        print_blob=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


KEYS = sorted(keys_to_read(set(), set()).union(*(shape.keys | shape.also for shape in SHAPES)))
ANY_TEXT = st.text(max_size=12)  # lone surrogates among them
GOOD_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NUMBERS = st.integers() | st.floats() | st.just(10**400)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", ""])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": ROLES | ANY_TEXT | st.none(),
            "content": ANY_TEXT | st.none() | st.integers(),
            "tool_calls": st.recursive(
                ANY_TEXT | NUMBERS,
                lambda v: st.lists(v, max_size=2) | st.dictionaries(ANY_TEXT, v, max_size=2),
            ),
            "name": ANY_TEXT,
            "weight": NUMBERS,
        },
    ),
    max_size=3,
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT | MESSAGES | st.sampled_from(["a", "b", "tie", "model_a"]),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(ANY_TEXT, value, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(KEYS) | ANY_TEXT, VALUES, max_size=6)
# Near what is good, so that more than the first check is reached.
NEARLY_GOOD = st.builds(
    lambda form, changes, dropped: {
        k: v for k, v in {**GOOD[form](0), **changes}.items() if k not in dropped
    },
    st.sampled_from(sorted(GOOD)),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
    st.sets(st.sampled_from(KEYS), max_size=1),
)


@contextmanager
def written(data: bytes, suffix: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data{suffix}"
        path.write_bytes(data)
        yield path


def scan(path: Path) -> Found:
    """All that is found; every error is checked to be one that is explained."""
    found: Found = []
    try:
        for item in scan_pairs(DataConfig(data=[str(path)])):
            found.append(item)
    except DataError as error:
        assert_explained(error, path)
    for item in found:
        if isinstance(item, BadRow):
            assert_explained(item.error, path)
        else:
            row_content(item)
    assert [item.row for item in found] == list(range(len(found)))
    return found


def assert_explained(error: DataError, path: Path) -> None:
    assert error.kind in BAD_ROWS
    assert error.where is not None
    assert error.where.startswith(str(path))
    assert error.what
    assert error.fix
    str(error).encode("utf-8")


def good(found: Found) -> list[tuple[Any, ...]]:
    assert not any(isinstance(item, BadRow) for item in found)
    return [(p.prompt, p.chosen, p.rejected, p.source) for p in found if isinstance(p, PreferencePair)]


@examples(500)
@given(st.lists(OBJECTS | NEARLY_GOOD, min_size=1, max_size=3), st.booleans())
def test_any_objects_are_pairs_or_bad_rows(rows: list[Row], array: bool) -> None:
    data = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
    with written(data.encode(), ".json" if array else ".jsonl") as path:
        found = scan(path)
        assert len(found) >= len(rows)
        report = audit(CheckConfig(data=[str(path)], processes=1))
        report.model_dump_json()
        assert report.pairs == sum(isinstance(item, PreferencePair) for item in found)
        assert report.data[0].bad_rows == len(found) - report.pairs


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The paths to all values within a row."""
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, member in members:
        yield (key,)
        yield from ((key, *rest) for rest in places(member))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


INSIDE = [(form, path) for form in sorted(GOOD) for path in places(GOOD[form](0))]


@examples(1500)
@given(st.sampled_from(INSIDE), VALUES)
def test_any_value_within_a_row_of_any_form_is_pairs_or_refused(
    place: tuple[str, tuple[Any, ...]], value: Any
) -> None:
    form, path = place
    try:
        pairs, _ = to_pairs(changed(GOOD[form](0), path, value), where="data.jsonl:1")
    except DataError as error:
        assert_explained(error, Path("data.jsonl"))
    else:
        assert pairs
        for pair in pairs:
            row_content(pair)


TEXTS_INSIDE = [
    (form, path)
    for form, path in INSIDE
    if isinstance(functools.reduce(lambda value, key: value[key], path, GOOD[form](0)), str)
]


@examples(300)
@given(st.sampled_from(TEXTS_INSIDE), st.text("xyz", min_size=5, max_size=9))
def test_a_text_of_any_form_is_part_of_its_pair_or_refused(
    place: tuple[str, tuple[Any, ...]], text: str
) -> None:
    form, path = place
    try:
        (pair,), _ = to_pairs(changed(GOOD[form](0), path, text), where="data.jsonl:1")
    except DataError as error:
        assert_explained(error, Path("data.jsonl"))
    else:
        assert text in json.dumps(row_content(pair).decode()), (form, path)


@pytest.mark.parametrize("form", sorted(GOOD))
def test_what_stands_around_a_pair_is_part_of_its_prompt_or_refused(form: str) -> None:
    values: list[Any] = ["What else?", ["What else?"], {"text": "What else?"}, [["What else?", "Nothing."]]]
    for key, value in itertools.product(sorted(AROUND_KEYS), values):
        row = {**GOOD[form](0), key: value}
        try:
            (pair,), _ = to_pairs(row, where="data.jsonl:1")
        except DataError as error:
            assert_explained(error, Path("data.jsonl"))
        else:
            assert "What else?" in json.dumps(pair.prompt)


WITH_TOOLS = st.fixed_dictionaries(
    {"role": ROLES, "content": GOOD_TEXT},
    optional={"tool_calls": MESSAGES, "name": ANY_TEXT, "reasoning_content": GOOD_TEXT},
)
CONVERSATIONS = st.lists(WITH_TOOLS, min_size=1, max_size=4)


@examples(300)
@given(CONVERSATIONS, CONVERSATIONS, CONVERSATIONS, st.sampled_from(get_args(WrittenForm)))
def test_what_is_written_in_a_format_is_read_as_the_same_pair(
    prompt: Any, chosen: Any, rejected: Any, form: WrittenForm
) -> None:
    try:
        ((pair,), _) = to_pairs({"prompt": prompt, "chosen": chosen, "rejected": rejected}, where="")
        rows = written_rows(pair, form)
    except DataError:
        return
    read = [one for row in rows for one in to_pairs(json.loads(json.dumps(row)), where="")[0]]
    if form == "unpaired":
        assert [(one.prompt, one.chosen, one.label) for one in read] == [
            (pair.prompt, pair.chosen, True),
            (pair.prompt, pair.rejected, False),
        ]
    else:
        assert read == [pair]


JSON_PARTS = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\u", b"\\ud83d", b"1e999", b"NaN", b" "),
        *(b"\n", b"\r\n", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3"),
        *(b'"prompt": "a"', b'"chosen": "b"', b'"rejected": "c"'),
        *(lines(numbers=[0]), lines(numbers=[1]).rstrip()),
    ]
)
RAW = st.binary(max_size=200) | st.lists(JSON_PARTS, max_size=20).map(b"".join)
SUFFIXES = [".jsonl", ".json", ".jsonl.gz", ".json.zst", ".parquet", ".arrow", ".csv", ".tsv.gz"]


@examples(800)
@given(RAW, st.sampled_from(SUFFIXES), st.booleans())
def test_any_bytes_are_rows_or_refused(data: bytes, suffix: str, packed: bool) -> None:
    """``scan`` asserts it: rows are counted in order, and every error is one that is explained."""
    if packed:
        data = {".gz": gzip.compress, "zst": zstandard.compress}.get(suffix[-3:], bytes)(data)
    with written(data, suffix) as path:
        scan(path)


def to_csv(rows: list[Row], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


ROWS = [{**GOOD["text"](i), "weight": i / 4} for i in range(12)]
CHATS = [GOOD["chat"](i) for i in range(12)]
VALID: list[tuple[str, bytes]] = [
    (".jsonl", lines()),
    (".json", json.dumps(ROWS, indent=1).encode()),
    (".jsonl.gz", gzip.compress(lines(numbers=range(12)), mtime=0)),
    (".jsonl.zst", zstandard.compress(lines(numbers=range(12)))),
    (".json.zst", zstandard.compress(json.dumps(CHATS).encode())),
    (".parquet", parquet(ROWS, compression="none", write_page_checksum=True)),
    (".parquet", parquet(ROWS, compression="snappy", row_group_size=5)),
    (".parquet", parquet(CHATS, compression="zstd", use_dictionary=False, data_page_version="2.0")),
    (".parquet", parquet(CHATS, compression="gzip", store_schema=False)),
    (".arrow", arrow(pa.Table.from_pylist(ROWS), pa.ipc.new_stream)),
    (".arrow", arrow(pa.Table.from_pylist(CHATS))),
    (".csv", to_csv(ROWS)),
    (".tsv.gz", gzip.compress(to_csv(ROWS, "\t"), mtime=0)),
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove", "repeat", "zeros"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=3,
)


def edited(data: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    for edit, share, byte in edits:
        i = int(share * len(data))
        match edit:
            case "flip":
                data = data[:i] + bytes([data[i] ^ byte]) + data[i + 1 :] if data else data
            case "cut":
                data = data[:i]
            case "insert":
                data = data[:i] + bytes([byte]) + data[i:]
            case "remove":
                data = data[:i] + data[i + byte :]
            case "repeat":
                data = data[:i] + data[i : i + byte] + data[i:]
            case "zeros":
                data = data[:i] + bytes(len(data[i : i + byte])) + data[i + byte :]
    return data


@examples(1500)
@given(st.sampled_from(VALID), EDITS)
def test_a_valid_file_that_was_damaged_is_rows_or_refused(
    valid: tuple[str, bytes], edits: list[tuple[str, float, int]]
) -> None:
    """As ``scan`` asserts it."""
    suffix, data = valid
    with written(edited(data, edits), suffix) as path:
        scan(path)


@examples(1000)
@given(
    st.sampled_from([(end, data) for end, data in VALID if end == ".parquet"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 255),
)
def test_a_table_whose_description_was_damaged_loses_no_row_in_silence(
    valid: tuple[str, bytes], share: float, byte: int
) -> None:
    suffix, data = valid
    size = int.from_bytes(data[-8:-4], "little")
    place = len(data) - 8 - size + int(share * size)
    with written(data[:place] + bytes([data[place] ^ byte]) + data[place + 1 :], suffix) as path:
        refused = False
        try:
            count = sum(1 for _ in scan_pairs(DataConfig(data=[str(path)])))
        except DataError as error:
            assert_explained(error, path)
            refused = True
        assert refused or count == 12


TEXT_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": GOOD_TEXT,
            "chosen": GOOD_TEXT.filter(bool),
            "rejected": GOOD_TEXT.filter(bool),
            "source": st.none() | GOOD_TEXT,
        }
    ),
    min_size=1,
    max_size=5,
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": GOOD_TEXT})
ANSWER = st.fixed_dictionaries({"role": st.just("assistant"), "content": GOOD_TEXT.filter(bool)})
CHAT_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.lists(TURN, min_size=1, max_size=3),
            "chosen": st.lists(ANSWER, min_size=1, max_size=2),
            "rejected": st.lists(ANSWER, min_size=1, max_size=2),
            "source": st.none(),
        }
    ),
    min_size=1,
    max_size=3,
)


def as_lines(rows: list[Row], *, ascii_only: bool = False) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()


WRITERS: list[tuple[str, Callable[[list[Row]], bytes]]] = [
    (".jsonl", as_lines),
    (".jsonl", lambda rows: as_lines(rows, ascii_only=True).replace(b"\n", b"\r\n\r\n")),
    (".jsonl.gz", lambda rows: gzip.compress(as_lines(rows))),
    (".json", lambda rows: json.dumps(rows, ensure_ascii=False, indent=2).encode()),
    (".json.zst", lambda rows: zstandard.compress(json.dumps(rows).encode())),
    (".parquet", lambda rows: parquet(rows, row_group_size=2)),
    (".parquet", lambda rows: parquet(rows, use_dictionary=False, compression="none")),
    (".arrow", lambda rows: arrow(pa.Table.from_pylist(rows))),
    (".arrow", lambda rows: arrow(pa.Table.from_pylist(rows), pa.ipc.new_stream)),
]


@examples(200)
@given(TEXT_ROWS | CHAT_ROWS)
def test_what_is_written_in_any_format_is_what_is_read(rows: list[Row]) -> None:
    expected = [(row["prompt"], row["chosen"], row["rejected"], row["source"]) for row in rows]
    for suffix, write in WRITERS:
        with written(write(rows), suffix) as path:
            assert good(scan(path)) == expected


@examples(300)
@given(TEXT_ROWS.filter(lambda rows: b"\0" not in to_csv(rows)))
def test_what_is_written_as_csv_is_what_is_read(rows: list[Row]) -> None:
    # An empty cell is no source.
    expected = [(row["prompt"], row["chosen"], row["rejected"], row["source"] or None) for row in rows]
    for suffix, content in (
        (".csv", to_csv(rows)),
        (".tsv", to_csv(rows, "\t")),
        (".csv.gz", gzip.compress(to_csv(rows))),
    ):
        with written(content, suffix) as path:
            assert good(scan(path)) == expected


MIXED = [
    GOOD["text"](0),
    {"chosen": 3},
    {},
    GOOD["text"](1),
    {"prompt": "❄" * 40, "chosen": [[]], "rejected": "x"},
]
ANY_SPLIT: list[tuple[str, bytes]] = [
    (".jsonl", as_lines(MIXED) + b"\n\nno json\n" + as_lines(MIXED)),
    (".jsonl", as_lines(MIXED).replace(b"\n", b"\r\n") + b"\n\xff\n\0\n" + as_lines(MIXED)),
    (".json", json.dumps(MIXED, ensure_ascii=False, indent=1).encode() + b"\n \n"),
    (".json", json.dumps([*MIXED, 1234.5e2, None, "a", -12, True, [1], 0.25]).encode()),
    (".json", json.dumps(MIXED, ensure_ascii=False).encode()[:-30]),
    (".json", b"[" + as_lines(MIXED).replace(b"\n", b" ") + b"]"),
    (".json", json.dumps(MIXED).encode() + b" " * 40 + b"x"),
    (".jsonl.gz", gzip.compress(as_lines(MIXED * 3))),
    (".json.zst", zstandard.compress(json.dumps(MIXED * 3).encode())),
]


def scan_to_the_end(path: Path) -> list[Any]:
    found: list[Any] = []
    try:
        for item in scan_pairs(DataConfig(data=[str(path)])):
            found.append((item.error.where, item.error.what) if isinstance(item, BadRow) else item)
    except DataError as error:
        found.append((error.where, error.kind))
    return found


@pytest.mark.parametrize(("suffix", "data"), ANY_SPLIT, ids=range(len(ANY_SPLIT)))
def test_a_file_is_the_same_rows_however_it_is_divided_into_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, data: bytes
) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(data)
    whole = scan_to_the_end(path)
    for size in itertools.chain(range(1, 40), (64, 100, 255, 1000)):
        monkeypatch.setattr(files, "_BLOCK_BYTES", size)
        assert scan_to_the_end(path) == whole, size


@examples(200)
@given(
    st.lists(JSON_PARTS, max_size=12).map(b"".join), st.integers(3, 40), st.sampled_from([".jsonl", ".json"])
)
def test_any_bytes_are_the_same_rows_in_small_blocks(data: bytes, size: int, suffix: str) -> None:
    data = data.lstrip()
    with written(data, suffix) as path, pytest.MonkeyPatch.context() as patch:
        whole = scan_to_the_end(path)
        patch.setattr(files, "_BLOCK_BYTES", size)
        assert scan_to_the_end(path) == whole


def test_reading_on_two_processes_gives_the_same_rows_as_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 400)
    (tmp_path / "a.jsonl").write_bytes(as_lines(MIXED * 20))
    (tmp_path / "b.json").write_bytes(json.dumps(MIXED * 20).encode())
    (tmp_path / "c.parquet").write_bytes(parquet([GOOD["text"](i) for i in range(60)], row_group_size=7))
    config = DataConfig(data=[str(tmp_path)])
    one, two = (list(map_in_order(parsed, scan_blocks(config), processes=n)) for n in (1, 2))
    assert len(one) > 30
    assert one == two
    reports = [audit(CheckConfig(data=[str(tmp_path)], processes=n)) for n in (1, 2)]
    assert reports[0] == reports[1]
    assert reports[0].pairs == 140


@examples(60)
@given(TEXT_ROWS)
def test_columns_that_a_table_stores_otherwise_hold_the_same_texts(rows: list[Row]) -> None:
    names = ("prompt", "chosen", "rejected", "source")
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in names}
    expected = [tuple(row[name] for name in names) for row in rows]
    for change in (
        lambda column: column.cast(pa.large_string()),
        lambda column: column.dictionary_encode(),
        lambda column: column.cast(pa.string_view()),
    ):
        table = pa.table({name: change(column) for name, column in columns.items()})
        with written(parquet(table), ".parquet") as path:
            assert good(scan(path)) == expected
