import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import FINGERPRINT

from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shards import (
    DROPPED_SCHEMA,
    SHARD_SCHEMA,
    DroppedRow,
    inconsistent_columns,
    read_row_groups,
    write_dropped,
    write_shard,
    write_table,
)


def make_pairs(count: int, *, seed: int = 0) -> list[ScoredPair]:
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(0, 150_000, rng.integers(1, 20)).astype(np.int32)

    pairs = []
    for row in range(count):
        prompt, chosen, rejected = ids(), ids(), ids()
        # None, every other token, and the last alone.
        mask = [None, np.arange(len(chosen))[::-1] % 2 == 0, np.arange(len(chosen)) == len(chosen) - 1][
            row % 3
        ]
        pairs.append(
            ScoredPair(
                row=10 + 2 * row,
                source=["web", None, "Bücher"][row % 3],
                prompt_ids=prompt,
                chosen_ids=chosen,
                rejected_ids=rejected,
                chosen_truncated=row % 2 == 0,
                rejected_truncated=row % 5 == 0,
                chosen_mask=mask,
                ref_chosen_token_logps=-rng.exponential(2, len(chosen)).astype(np.float32),
                ref_rejected_token_logps=-rng.exponential(2, len(rejected)).astype(np.float32),
            )
        )
    return pairs


def values(pair: ScoredPair) -> dict[str, object]:
    """Every field as plain Python, arrays with their dtype."""
    return {
        name: (str(value.dtype), value.tolist()) if isinstance(value, np.ndarray) else value
        for name in pair.__dataclass_fields__
        for value in [getattr(pair, name)]
    }


def test_the_pairs_of_these_tests_are_not_all_alike() -> None:
    pairs = make_pairs(300)
    assert len({p.pair_id for p in pairs}) == 300
    assert {p.source for p in pairs} == {"web", None, "Bücher"}
    assert len({len(p.prompt_ids) for p in pairs}) > 10


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 300])
def test_what_is_written_is_read(tmp_path: Path, count: int) -> None:
    pairs = make_pairs(count)
    path = tmp_path / "data" / "00000-a.parquet"
    write_shard(path, pairs, fingerprint=FINGERPRINT, shard=7)
    groups = list(read_row_groups(path))
    assert [values(p) for group in groups for p in group] == [values(p) for p in pairs]
    assert [len(group) for group in groups if group] == [min(128, count - i) for i in range(0, count, 128)]


def test_row_groups_are_read_one_by_one_in_the_order_asked_for(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", make_pairs(300), fingerprint=FINGERPRINT, shard=0)
    groups = read_row_groups(tmp_path / "a.parquet", row_groups=[2, 0])
    assert [[p.row for p in group] for group in groups] == [
        list(range(10 + 2 * 256, 10 + 2 * 300, 2)),
        list(range(10, 10 + 2 * 128, 2)),
    ]


def test_a_foreign_reader_finds_what_the_format_says(tmp_path: Path) -> None:
    pairs = make_pairs(5)
    write_shard(tmp_path / "a.parquet", pairs, fingerprint=FINGERPRINT, shard=7)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.remove_metadata().equals(SHARD_SCHEMA)
    metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    assert metadata["dpo_opt.schema_version"] == "1"
    assert metadata["dpo_opt.shard"] == "7"
    assert json.loads(metadata["dpo_opt.fingerprint"]) == FINGERPRINT.model_dump()
    for stored, pair in zip(table.to_pylist(), pairs, strict=True):
        assert stored["pair_id"] == pair.pair_id
        assert stored["prompt_id"] == pair.prompt_id
        assert (stored["prompt_length"], stored["chosen_length"], stored["rejected_length"]) == (
            len(pair.prompt_ids),
            len(pair.chosen_ids),
            len(pair.rejected_ids),
        )
        for side in ("chosen", "rejected"):
            logps = stored[f"ref_{side}_token_logps"]
            mask = stored[f"{side}_mask"] or [True] * len(logps)
            right = sum(value for value, counts in zip(logps, mask, strict=True) if counts)
            assert stored[f"ref_{side}_logps"] == pytest.approx(right)
    assert [None if pair.chosen_mask is None else pair.chosen_counted for pair in pairs[:3]] == [
        None,
        (len(pairs[1].chosen_ids) + 1) // 2,
        1,
    ]


def test_the_same_pairs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, make_pairs(200), fingerprint=FINGERPRINT, shard=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_changed_page_is_noticed_without_the_files_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, make_pairs(50), fingerprint=FINGERPRINT, shard=0)
    column = pq.ParquetFile(path).metadata.row_group(0).column(SHARD_SCHEMA.names.index("ref_chosen_logps"))
    whole = bytearray(path.read_bytes())
    # The last byte of the column's data lies inside a page.
    whole[column.data_page_offset + column.total_compressed_size - 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match="not readable as a shard") as caught:
        list(read_row_groups(path))
    assert caught.value.where == str(path)


def test_a_flipped_bit_of_a_page_never_gives_other_pairs(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pairs = make_pairs(30)
    write_shard(path, pairs, fingerprint=FINGERPRINT, shard=0)
    whole = path.read_bytes()
    columns = pq.ParquetFile(path).metadata.row_group(0)
    rng = random.Random(0)
    refused = 0
    for i in range(columns.num_columns):
        column = columns.column(i)
        first = column.dictionary_page_offset or column.data_page_offset
        for _ in range(10):
            damaged = bytearray(whole)
            damaged[first + rng.randrange(column.total_compressed_size)] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                found = [values(p) for group in read_row_groups(path) for p in group]
            except DataError:
                refused += 1
            else:
                assert found == [values(p) for p in pairs]
    assert refused > 100


@pytest.mark.parametrize("keep", [0, 1, 4, 100, -1, -8])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, make_pairs(50), fingerprint=FINGERPRINT, shard=0)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="not readable as a shard") as caught:
        list(read_row_groups(path))
    assert caught.value.where == str(path)
    assert caught.value.fix


def test_another_version_and_a_missing_column_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, make_pairs(2), fingerprint=FINGERPRINT, shard=0)
    table = pq.read_table(path)
    write_table(path, table.replace_schema_metadata({"dpo_opt.schema_version": "3"}))
    with pytest.raises(DataError, match="schema version 3, this program reads 1, 2"):
        list(read_row_groups(path))
    write_table(path, table.replace_schema_metadata({}))
    with pytest.raises(DataError, match="schema version none"):
        list(read_row_groups(path))
    write_table(path, table.drop_columns(["prompt_ids", "source"]))
    with pytest.raises(DataError, match="lacks the columns source, prompt_ids"):
        list(read_row_groups(path))


@pytest.mark.parametrize("count", [0, 3])
def test_dropped_rows_are_kept_with_their_reason(tmp_path: Path, count: int) -> None:
    rows = [DroppedRow(4 * i, [None, "web"][i % 2], "empty_prompt", f"data.jsonl:{i}") for i in range(count)]
    write_dropped(tmp_path / "a", rows)
    table = pq.read_table(tmp_path / "a")
    assert table.schema.equals(DROPPED_SCHEMA)
    assert [DroppedRow(**row) for row in table.to_pylist()] == rows


def test_what_we_write_is_consistent(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", make_pairs(300), fingerprint=FINGERPRINT, shard=0)
    assert list(inconsistent_columns(tmp_path / "a")) == []


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        ("pair_id", pa.array(["0" * 32] * 300)),
        ("prompt_id", pa.array(["0" * 32] * 300)),
        ("ref_chosen_logps", pa.array([0.5] * 300)),
        ("ref_rejected_logps", pa.array([float("nan")] * 300)),
        ("prompt_length", pa.array([0] * 300, pa.int32())),
        ("chosen_length", pa.array([0] * 300, pa.int32())),
        ("rejected_length", pa.array([0] * 300, pa.int32())),
    ],
)
def test_a_column_that_does_not_follow_from_the_ids_is_found(
    tmp_path: Path, column: str, wrong: pa.Array
) -> None:
    path = tmp_path / "a"
    write_shard(path, make_pairs(300), fingerprint=FINGERPRINT, shard=0)
    table = pq.read_table(path)
    right = table[column].combine_chunks()
    mixed = pa.concat_arrays([right[:200], wrong[200:201], right[201:]])
    write_table(path, table.set_column(table.schema.get_field_index(column), table.field(column), mixed))
    assert list(inconsistent_columns(path)) == [(10 + 2 * 200, column)]


def test_a_mask_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_shard(path, make_pairs(3), fingerprint=FINGERPRINT, shard=0)
    table = pq.read_table(path)
    length = table["rejected_length"][1].as_py()
    at = table.schema.get_field_index("rejected_mask")
    for mask in ([True] * (length + 1), [False] * length):
        masks = pa.array([None, mask, None], pa.list_(pa.bool_()))
        write_table(path, table.set_column(at, table.field(at), masks))
        with pytest.raises(DataError, match=f"a rejected_mask of {len(mask)} tokens"):
            list(read_row_groups(path))


def test_shards_from_before_masks_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a"
    pairs = [dataclasses.replace(pair, chosen_mask=None) for pair in make_pairs(3)]
    write_shard(path, pairs, fingerprint=FINGERPRINT, shard=0)
    write_table(path, pq.read_table(path).drop_columns(["chosen_mask", "rejected_mask"]))
    assert [values(pair) for group in read_row_groups(path) for pair in group] == list(map(values, pairs))
    assert list(inconsistent_columns(path)) == []


def test_log_probs_are_split_by_bytes_and_nothing_else_is(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard.parquet", make_pairs(20), fingerprint=FINGERPRINT, shard=0)
    group = pq.ParquetFile(tmp_path / "shard.parquet").metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    split = {c.path_in_schema for c in columns if "BYTE_STREAM_SPLIT" in c.encodings}
    assert split == {
        "ref_chosen_token_logps.list.element",
        "ref_rejected_token_logps.list.element",
        "ref_chosen_logps",
        "ref_rejected_logps",
    }
    with_dictionary = {c.path_in_schema for c in columns if c.has_dictionary_page}
    assert {"prompt_ids.list.element", "prompt_id", "row"} <= with_dictionary
    assert not with_dictionary & split
