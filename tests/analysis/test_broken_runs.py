"""A run whose files other programs or a crash have changed: each is refused with its file and a way on."""

import polars as pl
import pytest

from dpo_opt.analysis import diagnose, report
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA

NEEDED = [field.name for field in PAIR_LOGPS_SCHEMA if not field.nullable]


@pytest.fixture
def run(tmp_path, shards_writer, run_writer, texts):
    pairs = shards_writer(tmp_path / "shards", texts(30))
    return run_writer(tmp_path / "run", tmp_path / "shards", pairs, steps=4, eval_every=2)


def refusals(run):
    found = []
    for call in (lambda: report([run], run.parent / "report.html"), lambda: diagnose(run)):
        with pytest.raises(DpoOptError) as refused:
            call()
        assert refused.value.fix
        assert refused.value.why
        found.append(refused.value)
    assert not (run.parent / "report.html").exists()
    return found


@pytest.mark.parametrize("folder", ["pair_logps", "scores"])
@pytest.mark.parametrize("column", NEEDED)
@pytest.mark.parametrize("how_many", ["one", "all", "all, without a type"])
def test_a_column_without_values_is_named_with_its_file(run, folder, column, how_many):
    file = sorted((run / folder).iterdir())[-1]
    table = pl.read_parquet(file)
    kind = pl.Null if how_many == "all, without a type" else table.schema[column]
    nulls = pl.lit(None, dtype=kind)
    if how_many == "one":
        nulls = pl.when(pl.int_range(pl.len()) != 3).then(pl.col(column))
    table.with_columns(nulls.alias(column)).write_parquet(file)
    for error in refusals(run):
        assert error.where == str(file)
        assert column in error.what


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("metrics.jsonl", lambda file: file.write_text("{broken\n" + file.read_text())),
        ("metrics.jsonl", lambda file: file.write_text('{"loss": 1}\n' + file.read_text())),
        ("metrics.jsonl", lambda file: file.write_text('{"step": 1' + "0" * 30 + "}\n" + file.read_text())),
        ("metrics.jsonl", lambda file: file.write_text('{"step": 1, "\\ud800": 1}\n' + file.read_text())),
        ("pair_logps/00001.parquet", cut_in_half),
        ("scores/final.parquet", cut_in_half),
        ("scores/final.parquet", lambda f: pl.read_parquet(f).drop("chosen_length").write_parquet(f)),
        ("config.resolved.yaml", lambda file: file.write_text("beta: 0.1\n")),
        ("config.resolved.yaml", lambda file: file.write_text("a: [")),
        ("config.resolved.yaml", lambda file: file.write_text(f"{file.read_text()}\nbeta: x\n")),
        ("config.resolved.yaml", lambda file: file.write_text(f"{file.read_text()}\nbeta: .nan\n")),
        ("config.resolved.yaml", lambda file: file.write_text(f"{file.read_text()}\nbeta: 1{'0' * 400}\n")),
        ("parity.json", lambda file: file.write_text("[]")),
        ("parity.json", cut_in_half),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(run, name, damage):
    damage(run / name)
    for error in refusals(run):
        assert error.where.startswith(str(run / name))


def test_the_fix_of_a_broken_line_mends_it(run):
    metrics = run / "metrics.jsonl"
    metrics.write_text("{broken\n" + metrics.read_text())
    assert refusals(run)[0].fix.startswith("sed -i.bak 1d ")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[1:]))
    report([run], run.parent / "report.html")
