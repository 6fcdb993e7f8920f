import numpy as np
import polars as pl
import pytest

from dpo_opt.analysis.load import scan_pair_logps, scan_shards
from dpo_opt.analysis.slices import by_slice, copy_reference, pair_ids, shard_slices, with_reference
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pair_logps import write_pair_logps


@pytest.fixture
def tables(tmp_path, shards_writer, texts, fake_policy, monkeypatch):
    """Four slices, and a table of two states whose rows are in random order, divided in parts of 30 rows."""
    monkeypatch.setattr("dpo_opt.analysis.slices._SLICE_ROWS", 20)
    monkeypatch.setattr("dpo_opt.analysis.slices._ROWS_AT_ONCE", 30)
    pairs = shards_writer(tmp_path / "shards", texts(80), pairs_per_shard=20)
    policy, order = fake_policy(pairs), np.random.default_rng(0).permutation(80)
    rows = [r for step in (1, 2) for r in policy.rows(order, step=step, steps=2, phase="train")]
    write_pair_logps(tmp_path / "logps.parquet", [rows])
    return pairs, scan_pair_logps(tmp_path / "logps.parquet"), shard_slices(tmp_path / "shards")


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("state", [None, pl.col("step") == 2])
def test_every_row_is_in_the_part_of_its_slice(tables, tmp_path, divided, state):
    _, table, slices = tables
    folder = tmp_path / "divided" if divided else None
    parts = [part.collect() for part in by_slice(table, slices, folder, state=state)]
    assert [set(part["row"]) for part in parts] == [set(range(n, n + 20)) for n in (0, 20, 40, 60)]
    whole = table.filter(True if state is None else state).collect()
    found = pl.concat(parts).sort("row", "step")
    names = [name for name in found.columns if name != "pair"]
    assert found.select(names).equals(whole.select(names).sort("row", "step"))
    assert folder is None or not folder.exists()


def test_a_slice_without_rows_has_an_empty_part(tables, tmp_path):
    _, table, slices = tables
    only = table.filter(pl.col("row").is_between(20, 39))
    assert [len(p.collect()) for p in by_slice(only, slices, tmp_path / "d")] == [0, 40, 0, 0]
    assert [len(p.collect()) for p in by_slice(table.head(0), slices, tmp_path / "d")] == [0, 0, 0, 0]


def test_a_copied_reference_is_that_of_the_shards(tables, tmp_path):
    _, _, slices = tables
    (tmp_path / "copies").mkdir()
    for part, copied in zip(slices, copy_reference(slices, tmp_path / "copies"), strict=True):
        assert copied.copied is not None
        assert copied.reference.collect().equals(part.reference.collect())
    # Read again from the shards themselves.
    whole = scan_shards(tmp_path / "shards").select("row", "ref_chosen_logps").collect()
    copies = pl.concat([s.reference.select("row", "ref_chosen_logps").collect() for s in slices])
    assert copies.equals(whole)


@pytest.mark.parametrize(
    ("change", "state"), [({"row": 500}, "no such row"), ({"pair_id": "x"}, "another pair")]
)
def test_rows_of_other_shards_are_refused(tables, change, state):
    _, table, slices = tables
    name, value = next(iter(change.items()))
    wrong = table.with_columns(pl.when(pl.col("row") == 79).then(pl.lit(value)).otherwise(name).alias(name))
    *_, (part, rows) = zip(slices, by_slice(wrong, slices), strict=True)
    with pytest.raises(DataError, match=state) as refused:
        with_reference(rows, part.reference, where="RUN/scores")
    assert refused.value.where == "RUN/scores"


def test_ids_are_found_in_any_slice(tables):
    pairs, _, slices = tables
    assert pair_ids(slices, [61, 3, 22]) == {row: pairs[row].pair_id for row in (3, 22, 61)}
    assert pair_ids(slices, []) == {}
