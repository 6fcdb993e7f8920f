"""Arrow files and saved datasets say what the same rows say as JSON Lines."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from messages import said

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.datasets import BadRow, scan_pairs
from dpo_opt.precompute.read.files import read_blocks
from dpo_opt.precompute.read.sources import find_sources, merged_splits
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

Row = dict[str, Any]
WRITERS = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}
each_kind = pytest.mark.parametrize("kind", WRITERS)


def chat(i: int) -> Row:
    tools = [{"name": "f"}] if i % 2 else None
    return {
        "prompt": [said("user", f"q {i} ❄")],
        "chosen": [said("assistant", f"yes {i}")],
        "rejected": [said("assistant", f"no {i}")],
        "weight": i / 4,
        "tools": tools,
    }


def text(i: int) -> Row:
    return {"prompt": f"q {i} ❄", "chosen": f"yes {i}", "rejected": f"no {i}"}


def arrow(rows: list[Row] | pa.Table, kind: str = "stream", batch: int = 10) -> bytes:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    buffer = io.BytesIO()
    with WRITERS[kind](buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return buffer.getvalue()


def scan(path: Path, **settings: Any) -> list[PreferencePair | BadRow]:
    return list(scan_pairs(DataConfig(data=[str(path)], **settings)))


def pairs_of(path: Path, **settings: Any) -> list[PreferencePair]:
    """The pairs, without where they stand."""
    found = scan(path, **settings)
    assert not any(isinstance(item, BadRow) for item in found), found
    return [item._replace(where="") for item in found if not isinstance(item, BadRow)]


def pairs_of_lines(tmp_path: Path, rows: list[Row], **settings: Any) -> list[PreferencePair]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pairs_of(path, **settings)


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        scan(path)
    return caught.value


@each_kind
@pytest.mark.parametrize("form", [text, chat])
def test_the_pairs_are_those_of_json_lines(tmp_path: Path, kind: str, form: Any) -> None:
    rows = [form(i) for i in range(300)]
    path = tmp_path / "rows.arrow"
    path.write_bytes(arrow(rows, kind, batch=290))
    assert pairs_of(path) == pairs_of_lines(tmp_path, rows)
    places = [item.where for item in scan(path) if isinstance(item, PreferencePair)]
    assert places[289:291] == [f"{path}:record batch 0, row 289", f"{path}:record batch 1, row 0"]


@each_kind
def test_columns_that_no_pair_has_are_never_loaded(tmp_path: Path, kind: str) -> None:
    rows = [{"extra": "x" * 1000, "q": f"q {i}", **text(i)} for i in range(20)]
    path = tmp_path / "rows.arrow"
    path.write_bytes(arrow(rows, kind))
    names = [
        block.batch.schema.names for block in read_blocks(str(path), column={}) if hasattr(block, "batch")
    ]
    assert names == [["prompt", "chosen", "rejected"]] * 2
    column = {"prompt": "q"}
    assert pairs_of(path, column=column) == pairs_of_lines(tmp_path, rows, column=column)


def test_a_block_takes_no_other_rows_of_its_batch_with_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    path.write_bytes(arrow([{**text(i), "prompt": "x" * 1000} for i in range(2000)], batch=2000))
    blocks = list(read_blocks(str(path), column={}))
    assert [len(block) for block in blocks] == [256] * 7 + [208]
    assert max(len(pickle.dumps(block)) for block in blocks) < 2 * 256 * 1000


@each_kind
@pytest.mark.parametrize("column", [pa.array([b"a", b"\xff"]), pa.array([b"\xc3", b"a"])])
def test_texts_that_are_not_utf8_are_refused(tmp_path: Path, kind: str, column: pa.Array) -> None:
    path = tmp_path / "rows.arrow"
    broken = pa.StringArray.from_buffers(2, column.buffers()[1], column.buffers()[2])
    fine = pa.array(["a", "b"])
    path.write_bytes(arrow(pa.table({"prompt": fine, "chosen": broken, "rejected": fine}), kind))
    assert "Invalid UTF8" in refusal(path).what


@each_kind
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    whole = arrow([text(i) for i in range(20)], kind)
    path = tmp_path / "rows.arrow"
    for length in range(0, len(whole), 8):
        path.write_bytes(whole[:length])
        assert refusal(path).what.startswith("not readable as Arrow (")


def test_what_follows_a_stream_is_not_left_out_in_silence(tmp_path: Path) -> None:
    whole = arrow([text(i) for i in range(20)])
    path = tmp_path / "rows.arrow"
    path.write_bytes(whole + whole)
    assert refusal(path).what == "not readable as Arrow (there is something after its end)"


# Saved datasets -------------------------------------------------------------------------------------------


def save(folder: Path, *parts: list[Row]) -> Path:
    """A folder as ``datasets`` 5.2 saves it; the test below compares them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        (folder / name).write_bytes(arrow(rows))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_dataset_that_datasets_saved_is_its_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [chat(i) for i in range(25)]
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(folder, num_shards=3)
    # A later map leaves its result beside the rows.
    datasets.load_from_disk(folder).map(lambda row: {"weight": 9.0})
    assert list(folder.glob("cache-*.arrow"))
    assert pairs_of(folder) == pairs_of_lines(tmp_path, rows)
    own = save(tmp_path / "own", rows[:9], rows[9:17], rows[17:])
    assert pairs_of(own) == pairs_of(folder)
    assert {file.name for file in own.iterdir()} < {file.name for file in folder.iterdir()}


def test_the_files_are_those_of_the_state_in_its_order(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", [text(0)], [text(1)])
    (folder / "cache-1.arrow").write_bytes(arrow([text(7)]))
    (folder / "more.jsonl").write_text(json.dumps(text(2)))
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert pairs_of(folder) == pairs_of_lines(tmp_path, [text(1), text(0), text(2)])


def test_splits_of_a_saved_dict_are_named_with_how_to_take_each(tmp_path: Path) -> None:
    base = tmp_path / "saved"
    save(base / "train", [text(0)], [text(1)])
    save(base / "test", [text(2)])
    (base / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert pairs_of(base) == pairs_of_lines(tmp_path, [text(2), text(0), text(1)])
    assert pairs_of(base / "train") == pairs_of_lines(tmp_path, [text(0), text(1)])
    (source,) = find_sources(DataConfig(data=[str(base)]))
    splits = merged_splits(source)
    assert sorted(splits) == ["test", "train"]
    assert pairs_of(Path(splits["train"])) == pairs_of(base / "train")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("{", "not readable as the record of a saved dataset"),
        ("[]", "not readable as the record of a saved dataset"),
        ('{"_data_files": [1]}', "not readable as the record of a saved dataset"),
        ('{"_data_files": null}', "not readable as the record of a saved dataset"),
        ('{"_data_files": [{"filename": "other.arrow"}]}', 'file "other.arrow" is not there'),
        ('{"_data_files": [{"filename": "../other.arrow"}]}', 'file "../other.arrow" is not there'),
        ('{"_data_files": [{"filename": ["a"]}]}', "is not there"),
        (
            '{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}',
            "saved with a list of the rows that count",
        ),
    ],
)
def test_a_record_that_cannot_be_followed_is_refused(tmp_path: Path, state: str, says: str) -> None:
    folder = save(tmp_path / "saved", [text(0)])
    (tmp_path / "other.arrow").write_bytes(arrow([text(1)]))
    (folder / "state.json").write_text(state)
    error = refusal(folder)
    assert says in error.what
    assert error.where == f"{folder}/state.json"
