"""Programs that know nothing of this one read exactly the kept pairs from a finished folder's ``data/``."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import SHARD_SCHEMA


def read_with_polars(data: Path) -> list[dict[str, Any]]:
    import polars as pl

    return pl.scan_parquet(f"{data}/*.parquet").collect().to_dicts()


def read_with_duckdb(data: Path) -> list[dict[str, Any]]:
    duckdb = pytest.importorskip("duckdb")
    return duckdb.sql(f"SELECT * FROM '{data}/*.parquet'").to_arrow_table().to_pylist()


def read_with_pandas(data: Path) -> list[dict[str, Any]]:
    import numpy as np
    import pandas as pd

    rows = pd.read_parquet(data, dtype_backend="pyarrow").to_dict("records")
    return [
        {
            name: value.tolist() if isinstance(value, np.ndarray) else None if value is pd.NA else value
            for name, value in row.items()
        }
        for row in rows
    ]


def read_with_pyarrow(data: Path) -> list[dict[str, Any]]:
    import pyarrow.dataset

    return pyarrow.dataset.dataset(data).to_table().to_pylist()


def read_with_datasets(data: Path) -> list[dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    cache = str(data.parent.parent / "cache")
    found = datasets.load_dataset("parquet", data_files=f"{data}/*.parquet", split="train", cache_dir=cache)
    return found.to_list()


READERS = [read_with_polars, read_with_duckdb, read_with_pandas, read_with_pyarrow, read_with_datasets]


@pytest.fixture(scope="module")
def shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers scored all shards each, some rows are dropped, and of one shard nothing is left."""
    base = tmp_path_factory.mktemp("plain")
    rows = preference_rows(400)
    for i in random.Random(0).sample(range(400), 40):
        rows[i]["rejected"] = rows[i]["chosen"]
    for i in range(200, 250):
        rows[i]["rejected"] = rows[i]["chosen"]
    rows[7]["source"] = "somebody"
    data = write_jsonl(base / "data.jsonl", rows)
    config = PrecomputeConfig(model=str(tiny_model), data=data, shards=base / "shards", pairs_per_shard=50)
    worker = {"worker_index": 0, "num_workers": 1}
    work(config.model_copy(update=worker), scorer=ScriptedScorer())
    again = config.model_copy(update={"shards": base / "again", **worker})
    work(again, scorer=ScriptedScorer())
    for folder in ("data", "dropped", "commits"):
        for path in (again.shards / folder).iterdir():
            shutil.copy(path, config.shards / folder / path.name)
    assert len(list((config.shards / "data").iterdir())) == 16
    finalize(config.shards)
    (config.shards / "data" / ".00001-0badc0de.parquet.0123abcd.tmp").write_bytes(b"of a killed worker")
    return config.shards


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__.removeprefix("read_with_"))
def test_it_reads_the_kept_pairs_and_nothing_else(
    shards: Path, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    pairs = list(ShardFolder.open(shards).pairs())
    assert 300 < len(pairs) < 350
    found = read(shards / "data")
    assert [row["row"] for row in found] == [pair.row for pair in pairs]
    for row, pair in zip(found, pairs, strict=True):
        assert set(row) == set(SHARD_SCHEMA.names)
        for name in row:
            right = getattr(pair, name, None)
            right = right.tolist() if hasattr(right, "tolist") else right
            if name.endswith("_length"):
                right = len(getattr(pair, name.replace("_length", "_ids")))
            assert row[name] == right, name


def test_dropped_rows_are_read_by_their_own_folder(shards: Path) -> None:
    import polars as pl

    rows = pl.scan_parquet(f"{shards}/dropped/*.parquet").collect()
    kept = {pair.row for pair in ShardFolder.open(shards).pairs()}
    assert sorted(rows["row"]) == sorted(set(range(400)) - kept)


def test_the_folder_that_a_run_without_losses_leaves_is_read_too(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(5))
    config = PrecomputeConfig(model=str(tiny_model), data=data, shards=tmp_path / "shards")
    precompute(config, scorer=ScriptedScorer())
    for read in READERS:
        assert len(read(config.shards / "data")) == 5, read
    assert read_with_pyarrow(config.shards / "dropped") == []
