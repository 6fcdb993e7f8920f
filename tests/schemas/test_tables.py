from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpo_opt.schemas.kl_samples import (
    KL_SAMPLES_SCHEMA,
    KLRecord,
    KLSample,
    read_kl_record,
    write_kl_samples,
)
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA, PairLogps, write_pair_logps


def row(number: int, *, tokens: bool) -> PairLogps:
    chosen, rejected = np.array([-1.5, -0.25], np.float32), np.array([-3.0], np.float32)
    return PairLogps(
        row=number,
        pair_id=f"{number:032x}",
        step=7,
        epoch=0.5,
        phase="eval",
        checkpoint="run/final" if tokens else None,
        chosen_logps=-1.75,
        rejected_logps=-3.0,
        chosen_length=2,
        rejected_length=1,
        chosen_token_logps=chosen if tokens else None,
        rejected_token_logps=rejected if tokens else None,
    )


def test_pair_logps_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_opt.schemas.pair_logps.ROW_GROUP_ROWS", 2)
    path = tmp_path / "pair_logps" / "00000.parquet"
    write_pair_logps(path, [[row(3, tokens=True), row(1, tokens=False)], [row(2, tokens=False)]])
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 2
    table = file.read()
    assert table.schema.remove_metadata().equals(PAIR_LOGPS_SCHEMA.remove_metadata())
    assert table.schema.metadata[b"dpo_opt.schema_version"] == b"1"
    first, second, third = table.to_pylist()
    assert first == {
        "row": 3,
        "pair_id": f"{3:032x}",
        "step": 7,
        "epoch": 0.5,
        "phase": "eval",
        "checkpoint": "run/final",
        "chosen_logps": -1.75,
        "rejected_logps": -3.0,
        "chosen_length": 2,
        "rejected_length": 1,
        "chosen_token_logps": [-1.5, -0.25],
        "rejected_token_logps": [-3.0],
    }
    assert (second["row"], second["checkpoint"], second["chosen_token_logps"]) == (1, None, None)
    assert third["row"] == 2


def test_an_interrupted_segment_leaves_nothing(tmp_path: Path) -> None:
    def batches() -> object:
        yield [row(1, tokens=False)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pair_logps(tmp_path / "a.parquet", batches())
    assert list(tmp_path.iterdir()) == []


def test_no_batch_gives_an_empty_table(tmp_path: Path) -> None:
    write_pair_logps(tmp_path / "a.parquet", [])
    table = pq.read_table(tmp_path / "a.parquet")
    assert (table.num_rows, table.column_names) == (0, PAIR_LOGPS_SCHEMA.names)


def test_kl_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    sample = KLSample(
        prompt_id="p",
        sample=1,
        finished=True,
        prompt_ids=np.array([0, 5], np.int32),
        completion_ids=np.array([6, 7, 1], np.int32),
        policy_token_logps=np.array([-0.5, -1, -2], np.float32),
        ref_token_logps=np.array([-1, -1, -4], np.float32),
        policy_token_entropies=np.array([0.5, 2, 1], np.float32),
        token_kl=np.array([0, 0.25, 1], np.float32),
        prompt="<s>a",
        completion="bc",
    )
    record = KLRecord(
        policy="a", reference="b", prompts="c", num_samples=2, max_new_tokens=3, seed=0, engine="vllm",
        dtype="float32", step=7,
    )  # fmt: skip
    write_kl_samples(tmp_path / "kl.parquet", [sample, sample], record=record)
    assert read_kl_record(tmp_path / "kl.parquet") == record
    table = pq.read_table(tmp_path / "kl.parquet")
    assert table.schema.remove_metadata().equals(KL_SAMPLES_SCHEMA.remove_metadata())
    expected = {
        "prompt_id": "p",
        "sample": 1,
        "finished": True,
        "prompt_ids": [0, 5],
        "completion_ids": [6, 7, 1],
        "policy_token_logps": [-0.5, -1.0, -2.0],
        "ref_token_logps": [-1.0, -1.0, -4.0],
        "policy_token_entropies": [0.5, 2.0, 1.0],
        "token_kl": [0.0, 0.25, 1.0],
        "prompt": "<s>a",
        "completion": "bc",
    }
    assert table.to_pylist() == [expected, expected]
    bare = replace(sample, policy_token_entropies=None, token_kl=None, prompt=None, completion=None)
    write_kl_samples(tmp_path / "kl.parquet", [bare])
    assert read_kl_record(tmp_path / "kl.parquet") is None
    assert pq.read_table(tmp_path / "kl.parquet")["token_kl"].to_pylist() == [None]
