"""No damaged input ends in a traceback, hangs, or loses a good row without a word."""

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from command_line import invoke
from damage import GOOD, Damage, damages, lines, to_line

from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.check.convert import convert
from dpo_opt.precompute.check.problems import BAD_ROWS, FOUND
from dpo_opt.precompute.config import CheckConfig, ConvertConfig, DataConfig
from dpo_opt.precompute.read.datasets import BadRow, row_content, scan_pairs
from dpo_opt.schemas.audit_record import Audit, Problem
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

pytestmark = pytest.mark.timeout(30)

CASES = damages()
ROWS, FILES, KEPT = ([case for case in CASES if case.scope == scope] for scope in ("row", "file", "kept"))
# One of every kind goes through the command line.
SAMPLE = list({case.kind: case for case in CASES}.values())

Read = tuple[list[PreferencePair], list[BadRow]]


def by_name(case: Damage) -> str:
    return case.name


each_row = pytest.mark.parametrize("case", ROWS, ids=by_name)
each_file = pytest.mark.parametrize("case", FILES, ids=by_name)
each_kept = pytest.mark.parametrize("case", KEPT, ids=by_name)


def scan(path: Path) -> Read:
    items = list(scan_pairs(DataConfig(data=[str(path)])))
    return [i for i in items if not isinstance(i, BadRow)], [i for i in items if isinstance(i, BadRow)]


def contents(pairs: list[PreferencePair]) -> list[bytes]:
    return [row_content(pair) for pair in pairs]


def expected(case: Damage, folder: Path) -> list[bytes]:
    """What the rows say that are not damaged, read from a file of nothing else."""
    count = len(case.good) + (case.kept is not None)
    rows = [GOOD[case.form](i) for i in case.good]
    if case.kept is not None:
        rows = [GOOD[case.form](i) if i in case.good else case.kept for i in range(count)]
    clean = folder / "clean.jsonl"
    clean.write_bytes(b"".join(map(to_line, rows)))
    pairs, bad = scan(clean) if rows else ([], [])
    assert (len(pairs), bad) == (count, [])
    return contents(pairs)


def audited(path: Path) -> Audit:
    return audit(CheckConfig(data=[str(path)], processes=1))


def found(report: Audit, case: Damage) -> Problem:
    (problem,) = [problem for problem in report.problems if problem.kind == case.problem]
    return problem


def assert_explained(error: DataError, path: Path) -> None:
    assert error.where is not None
    assert error.where.startswith(str(path))
    assert error.what
    assert error.fix
    assert len(str(error)) < 1000 + 3 * len(str(path))


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(CASES) >= 300
    assert len({case.kind for case in CASES}) >= 90
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.problem for case in ROWS} >= BAD_ROWS.keys() - {
        "unreadable_file",
        "no_chat_template",
        "template",
        "template_mismatch",
        "template_loss",
        "turns",
        "vocabulary",
        "indivisible_text",
    }


@each_row
def test_a_bad_row_is_told_and_every_other_row_is_read(tmp_path: Path, case: Damage) -> None:
    path = case.write(tmp_path)
    pairs, bad = scan(path)
    assert tuple(pair.row for pair in pairs) == case.good
    assert contents(pairs) == expected(case, tmp_path)
    assert len(bad) == case.bad
    assert sorted([*case.good, *(item.row for item in bad)]) == list(range(len(pairs) + len(bad)))
    for item in bad:
        assert_explained(item.error, path)
        assert item.error.kind in BAD_ROWS
    first = bad[0].error
    assert first.kind == case.problem
    assert case.says in first.what
    assert first.where == f"{path}{case.place}"


@each_row
def test_an_audit_counts_the_bad_rows(tmp_path: Path, case: Damage) -> None:
    path = case.write(tmp_path)
    report = audited(path)
    assert report.refused
    assert (report.pairs, report.data[0].bad_rows) == (len(case.good), case.bad)
    example = found(report, case).examples[0]
    assert example.where == f"{path}{case.place}"
    assert case.says in example.detail


@each_row
def test_skipping_leaves_out_the_bad_rows_and_no_other(tmp_path: Path, case: Damage) -> None:
    path, output = case.write(tmp_path), tmp_path / "converted"
    config = ConvertConfig(data=[str(path)], output=output, processes=1, on_bad_row="skip")
    if not case.good:
        with pytest.raises(DataError, match="no pair is left to train on"):
            convert(config)
        assert not output.exists()
        return
    converted = convert(config)
    assert (converted.train, converted.removed) == (len(case.good), {"bad_row": case.bad})
    pairs, bad = scan(output / "train.jsonl")
    assert (contents(pairs), bad) == (expected(case, tmp_path), [])
    removed = [json.loads(line) for line in (output / "_removed.jsonl").read_bytes().splitlines()]
    assert removed[0]["where"] == f"{path}{case.place}"
    assert case.says in removed[0]["detail"]


@each_file
def test_a_file_that_cannot_be_read_is_told_by_its_name(tmp_path: Path, case: Damage) -> None:
    path = case.write(tmp_path)
    with pytest.raises(DataError) as caught:
        scan(path)
    assert_explained(caught.value, path)
    assert caught.value.kind == case.problem
    assert case.says in caught.value.what


@each_file
def test_an_audit_lists_a_file_that_cannot_be_read(tmp_path: Path, case: Damage) -> None:
    path = case.write(tmp_path)
    if case.problem == "no_such_file":
        with pytest.raises(DataError) as caught:
            audited(path)
        assert case.says in caught.value.what
        return
    report = audited(path)
    assert report.refused
    example = found(report, case).examples[0]
    assert example.where.startswith(str(path))
    assert case.says in example.detail


@each_file
def test_skipping_bad_rows_does_not_skip_a_file(tmp_path: Path, case: Damage) -> None:
    path, output = case.write(tmp_path), tmp_path / "converted"
    with pytest.raises(DataError) as caught:
        convert(ConvertConfig(data=[str(path)], output=output, processes=1, on_bad_row="skip"))
    assert case.says in caught.value.what
    assert not output.exists()


@each_kept
def test_a_suspicious_text_is_shown_and_kept_as_it_is(tmp_path: Path, case: Damage) -> None:
    path = case.write(tmp_path)
    pairs, bad = scan(path)
    assert (contents(pairs), bad) == (expected(case, tmp_path), [])
    report = audited(path)
    assert case.problem in FOUND
    assert not report.refused
    assert found(report, case).examples[0].where == f"{path}{case.place}"


@pytest.mark.parametrize("case", SAMPLE, ids=by_name)
def test_the_commands_end_with_an_exit_code_and_no_traceback(tmp_path: Path, case: Damage) -> None:
    path = str(case.write(tmp_path))
    code = 0 if case.scope == "kept" else 3
    checked = invoke("check", path, "--processes", "1", "--json")
    assert checked.exit_code == code
    if case.problem == "no_such_file":
        assert case.says in checked.output
    else:
        assert case.problem in {problem["kind"] for problem in json.loads(checked.stdout)["problems"]}
    shown = invoke("check", path, "--processes", "1")
    assert shown.exit_code == code
    assert "\0" not in shown.output
    output = str(tmp_path / "converted")
    strict = invoke("convert", path, "--output", output, "--processes", "1", "--on-bad-row", "error")
    assert strict.exit_code == code
    if code:
        assert case.says[:20] in strict.output
        skipped = invoke("convert", path, "--output", output, "--processes", "1")
        assert skipped.exit_code == (0 if case.good and case.scope == "row" else 3)


@pytest.mark.parametrize("name", [case.name for case in (ROWS[0], FILES[0])])
def test_the_program_itself_ends_with_the_exit_code_of_data(tmp_path: Path, name: str) -> None:
    path = next(case for case in CASES if case.name == name).write(tmp_path)
    command = [sys.executable, "-m", "dpo_opt", "check", str(path), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=25, check=False)
    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr
    assert json.loads(ended.stdout)["problems"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "the name of the data is empty"),
        ("a" * 5000 + ".jsonl", "cannot be listed"),
        ("~nobody-of-this-name/a.jsonl", "cannot be listed"),
        ("**.jsonl", "cannot be listed"),
        ("*.nothing", "nothing matches"),
        ("a\0b.jsonl", "there is no such file"),
        ("nothing.jsonl", "there is no such file"),
        ('{"prompt": "a"}', "there is no such file"),
        ("zip://a::b", "not a URL that can be read"),
    ],
)
def test_a_name_that_is_no_name_of_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").write_bytes(lines())
    result = invoke("check", "--", name) if "\0" not in name else None
    if result is not None:
        assert result.exit_code in (2, 3)
        assert says in result.output
    with pytest.raises(ValueError, match=says):
        list(scan_pairs(DataConfig(data=[name])))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_what_this_user_may_not_read_is_told(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl").write_bytes(lines())
    locked.chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be listed"):
            scan(tmp_path)
    finally:
        locked.chmod(0o700)
    (tmp_path / "b.jsonl").chmod(0)
    with pytest.raises(DataError, match="cannot be read after this"):
        scan(tmp_path / "b.jsonl")


def test_a_glob_that_meets_a_broken_link_is_told_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    (tmp_path / "c.jsonl").mkdir()
    with pytest.raises(DataError, match="No such file") as caught:
        scan(tmp_path / "*.jsonl")
    assert caught.value.where == f"{tmp_path}/b.jsonl"


def test_a_bad_file_among_good_ones_takes_none_of_their_rows(tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    report = audited(tmp_path)
    assert report.pairs == 8
    assert Counter(p.kind for p in report.problems if p.severity == "error") == {"unreadable_file": 1}


def test_a_table_whose_counts_contradict_each_other_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    rows = [GOOD["text"](i) for i in range(77)]
    pq.write_table(pa.Table.from_pylist(rows), path, store_schema=False, compression="none")
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    place = whole.index(b"\x16\x9a\x01", footer)  # the file's number of rows: 77 as a Thrift integer
    path.write_bytes(whole[:place] + b"\x16\x9c\x01" + whole[place + 3 :])
    with pytest.raises(DataError, match="77 of its 78 rows can be read"):
        scan(path)


MEASURE = """
import itertools, sys
from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.datasets import scan_pairs
from dpo_opt.schemas.errors import DataError
try:
    print(sum(1 for _ in itertools.islice(scan_pairs(DataConfig(data=[sys.argv[1]])), int(sys.argv[2]))))
except DataError as error:
    print(error.what)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) // 1024)  # ru_maxrss would begin with that of the parent
"""


def measured(path: Path, rows: int) -> tuple[str, int]:
    """What reading the first rows says, and its peak memory in MiB."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(path), str(rows)]
    said, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return said, int(peak)


def test_a_value_that_a_thousand_rows_share_is_not_in_memory_a_thousand_times(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["x" * 30_000_000])
    answers = {"chosen": [f"yes {i}" for i in range(1000)], "rejected": ["no"] * 1000}
    table = pa.table({"prompt": shared, **answers})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False)
    assert path.stat().st_size < 100_000
    said, peak = measured(path, 12)
    assert said == "12"
    assert peak < 900


def test_a_message_that_many_share_within_a_row_is_refused_before_memory_is_full(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    rows, turns = 20, 100
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows * turns, pa.int32()), ["x" * 2_000_000])
    message = pa.StructArray.from_arrays([pa.array(["user"] * rows * turns), text], ["role", "content"])
    prompt = pa.ListArray.from_arrays(list(range(0, rows * turns + 1, turns)), message)
    answer = pa.array([[{"role": "assistant", "content": "x"}]] * rows)
    table = pa.table({"prompt": prompt, "chosen": answer, "rejected": answer})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False)
    said, peak = measured(path, rows)
    assert said == "the row is longer than 64 MiB"
    assert peak < 900  # all rows together are 4 GB


@pytest.mark.parametrize("form", ["line", "array"])
def test_a_row_of_300_mb_is_refused_before_it_is_in_memory_whole(tmp_path: Path, form: str) -> None:
    assert_long_row_is_refused(tmp_path, form, mebibytes=300)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["line", "array"])
def test_a_row_of_1_gb_is_refused_before_it_is_in_memory_whole(tmp_path: Path, form: str) -> None:
    assert_long_row_is_refused(tmp_path, form, mebibytes=1024)


def assert_long_row_is_refused(tmp_path: Path, form: str, *, mebibytes: int) -> None:
    path = tmp_path / ("data.jsonl.zst" if form == "line" else "data.json.zst")
    with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
        stream.write(b'{"prompt": "' if form == "line" else b'[{"prompt": "')
        for _ in range(mebibytes):
            stream.write(b"a" * 2**20)
    assert path.stat().st_size < 200_000
    said, peak = measured(path, 10)
    assert said == f"the {'line' if form == 'line' else 'element'} is longer than 64 MiB"
    assert peak < 500


def test_a_sparse_file_of_1_gb_is_refused_before_it_is_in_memory_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as stream:
        stream.write(lines())
        stream.truncate(2**30)
    said, peak = measured(path, 10)
    assert said == "the line is longer than 64 MiB"
    assert peak < 500
