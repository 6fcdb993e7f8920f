"""A file of another kind than its name says, or rows in another wrapping: the advice makes data of it."""

import bz2
import gzip
import json
import lzma
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.config import CheckConfig, DataConfig
from dpo_opt.precompute.read.datasets import BadRow, read_pairs, scan_pairs
from dpo_opt.schemas.audit_record import Problem
from dpo_opt.schemas.errors import DataError

ROW = {"prompt": "How?", "chosen": "So.", "rejected": "No."}
LINE = json.dumps(ROW).encode() + b"\n"


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ROW]), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inside.jsonl", LINE)


def refused(path: Path) -> DataError:
    try:
        (found,) = scan_pairs(DataConfig(data=[str(path)]))
    except DataError as error:
        return error
    assert isinstance(found, BadRow)
    return found.error


def checked(path: Path) -> list[Problem]:
    return audit(CheckConfig(data=[str(path)], processes=1)).problems


KINDS: dict[str, tuple[bytes | Callable[[Path], None], str, str]] = {
    "lines.txt": (LINE, "its name ends in .jsonl", ".jsonl"),
    "array.txt": (b"[" + LINE.strip() + b"]", "its name ends in .json", ".json"),
    "packed.jsonl": (gzip.compress(LINE), "its name ends in .jsonl.gz", ".jsonl.gz"),
    "table.json": (parquet, "its name ends in .parquet", ".parquet"),
    "packed.parquet": (gzip.compress(LINE), "its name ends in .jsonl.gz", ".jsonl.gz"),
    "table.csv.gz": (parquet, "its name ends in .parquet", ".parquet"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_told_its_name(name: str, tmp_path: Path) -> None:
    content, fix, end = KINDS[name]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    error = refused(path)
    assert error.kind == "unreadable_file"
    assert str(error.fix).startswith("rename the file")
    assert fix in str(error.fix)
    renamed = path.rename(tmp_path / f"renamed{end}")
    (pair,) = read_pairs(DataConfig(data=[str(renamed)]))
    assert (pair.prompt, pair.chosen, pair.rejected) == tuple(ROW.values())


def semicolons(rows: int) -> bytes:
    return b"prompt;chosen;rejected\n" + rows * b'"How; why?";So.;No.\n'


COMMANDS: dict[str, tuple[bytes, str]] = {
    "packed.jsonl.bz2": (bz2.compress(LINE), "bunzip2 -c "),
    "packed.jsonl.xz": (lzma.compress(LINE), "unxz -c "),
    "packed.jsonl": (bz2.compress(LINE), "bunzip2 -c "),
    "table.csv": (semicolons(1), "python -c "),
    "tabs.csv": (b"prompt\tchosen\trejected\nHow?\tSo.\tNo.\n", "python -c "),
    "pretty.json": (json.dumps(ROW, indent=2).encode(), "python -c "),
    "nested.jsonl": (json.dumps({"id": 1, "data": ROW}).encode(), "python -c "),
    "wrapped.json": (json.dumps({"version": 1, "data": [ROW]}).encode(), "python -c "),
    "twice.json": (json.dumps({"features": [], "rows": [{"row_idx": 0, "row": ROW}]}).encode(), "python -c "),
    "all.json": (json.dumps({"rows": [{"row": ROW}]}, indent=1).encode(), "python -c "),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_that_is_named_makes_data_of_the_file(name: str, tmp_path: Path) -> None:
    content, begins = COMMANDS[name]
    path = tmp_path / name
    path.write_bytes(content)
    seen = set()
    while True:
        error = refused(path)
        assert (error.what not in seen, error.why is not None) == (True, True)
        seen.add(error.what)
        fix = str(error.fix).replace("FILE", str(path))
        assert fix.startswith(begins)
        new = tmp_path / f"new-{len(seen)}{'.csv' if 'NEW.csv' in fix else '.jsonl'}"
        command = fix.replace("NEW.jsonl", str(new)).replace("NEW.csv", str(new))
        subprocess.run(["bash", "-ec", command], check=True)
        (found,) = scan_pairs(DataConfig(data=[str(new)]))
        if not isinstance(found, BadRow):
            break
        path = new
    assert (found.chosen, found.rejected) == ("So.", "No.")


def test_check_says_it_of_each_file(tmp_path: Path) -> None:
    zipped(tmp_path / "pairs.zip")
    (tmp_path / "latin.csv").write_bytes("prompt,chosen,rejected\nMüller?,So.,No.\n".encode("latin-1"))
    (tmp_path / "nested.jsonl").write_text(json.dumps({"data": ROW}))
    for name, way in {"pairs.zip": "unzip ", "latin.csv": "iconv ", "nested.jsonl": "python -c "}.items():
        (problem,) = (p for p in checked(tmp_path / name) if p.kind in ("unreadable_file", "wrapped"))
        assert way in problem.examples[0].detail
        assert not problem.fix.startswith("copy or download")


def test_a_file_that_is_cut_off_is_still_to_be_copied_again(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(100 * LINE)[:-9])
    *_, error = checked(path)
    assert "copy or download the file again" in error.examples[0].detail


@pytest.mark.parametrize("row", [{"data": {"chosen": "So."}}, {"data": [1]}, {"a'b": ROW}, {"meta": [{}]}])
def test_what_is_no_wrapped_pair_lacks_a_key(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    assert refused(path).kind == "missing_key"
