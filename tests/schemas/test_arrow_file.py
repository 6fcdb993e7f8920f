"""Tables in folders whose names pyarrow would take for URLs, or could not encode."""

import ast
import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.analysis import scan_pair_logps
from dpo_opt.analysis.load import scan_kl_samples, scan_shards
from dpo_opt.cli import main
from dpo_opt.last_metrics import last_metrics
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.kl_samples import write_kl_samples
from dpo_opt.schemas.manifest import MANIFEST
from dpo_opt.schemas.pair_logps import PairLogps, write_pair_logps
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import Column, read_column, write_column

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("fresh:1", "file:x", "s3:x")
"""Relative, with a colon: the last two are beginnings of URLs that pyarrow and polars know."""

# Calls of pyarrow that take a file or the name of one.
_TAKES_A_FILE = {
    *(f"pq.{name}" for name in ("ParquetFile", "ParquetWriter", "read_table", "read_schema", "write_table")),
    *(f"pa.{name}" for name in ("OSFile", "memory_map")),
}
_ABSOLUTE = {("precompute/shards/write_index.py", "path")}
"""What ``verified_file`` gives."""


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(request.param)


def test_a_folder_of_shards_is_written_and_read(tiny_model: Path, tmp_path: Path, folder: Path) -> None:
    rows = [{**row, "weight": 2.0} for row in preference_rows(4)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    config = PrecomputeConfig(model=str(tiny_model), data=data, shards=folder, pairs_per_shard=2)
    assert precompute(config, scorer=ScriptedScorer()).kept == 4
    (folder / MANIFEST).unlink()
    assert finalize(folder).kept == 4
    opened = ShardFolder.open(folder)
    assert len(list(opened.pairs())) == len(opened.index(["row"])) == 4
    assert len(scan_shards(folder).collect()) == 4
    weights = read_column(folder, "weight", files=opened.manifest.columns, rows=np.arange(4), default=1.0)
    assert weights is not None
    assert weights.tolist() == [2.0] * 4
    for command in ("status", "verify", "repair"):
        found = CliRunner().invoke(main, [command, "--shards", str(folder)])
        assert found.exit_code == 0, found.output


def a_pair() -> PairLogps:
    return PairLogps(
        row=0,
        pair_id="a",
        step=1,
        epoch=0.0,
        phase="train",
        chosen_logps=-1.0,
        rejected_logps=-2.0,
        chosen_length=1,
        rejected_length=1,
    )


def test_tables_of_log_probs_are_written_and_read(folder: Path) -> None:
    from dpo_opt.commands.score import _lines

    for path in (folder / "sc:x.parquet", Path("sc:x.parquet"), folder / "pair_logps" / "0.parquet"):
        write_pair_logps(path, [[a_pair()]])
        assert len(scan_pair_logps(path).collect()) == 1
        assert "pairs   1, under M" in list(_lines(path, model="M", noun="pair"))
    write_kl_samples(folder / "kl.parquet", [])
    assert len(scan_kl_samples(folder / "kl.parquet").collect()) == 0
    write_column(folder, "weight", Column(array("q", [0]), array("d", [1.0])))
    state = {"global_step": 2, "log_history": [{"step": 2, "loss": 0.5}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert [last.pairs for last in last_metrics(folder)] == [1]


def test_a_name_that_is_not_utf8_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"f\xff.parquet")
    write_pair_logps(path, [[a_pair()]])
    with arrow_file(path) as raw:
        assert raw.read(4) == b"PAR1"


def named_files(path: Path) -> Iterator[tuple[str, str]]:
    """What a source file gives to pyarrow without having opened it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    bound = [node for node in nodes if isinstance(node, ast.withitem) and node.optional_vars]
    opened = {
        ast.unparse(item.optional_vars or item)
        for item in bound
        if re.match(r"arrow_file\(|open_file\(|\w+\.open\(", ast.unparse(item.context_expr))
    }
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _TAKES_A_FILE:
            given = ast.unparse(node.args[1 if "write_table" in ast.unparse(node.func) else 0])
            if given not in opened and path.name != "arrow_file.py":
                yield str(path.relative_to(ROOT)), given


def test_pyarrow_is_given_no_names() -> None:
    rooms = ("dpo_opt", "schemas", "precompute", "optimize", "analysis")
    sources = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    assert {found for path in sources for found in named_files(path)} == _ABSOLUTE
