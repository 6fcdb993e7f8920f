"""A run whose files other programs or a crash have changed: each is refused with its file and a way on.

Every file that the report or the diagnosis reads is damaged in every way that its form allows.
"""

import json
import shlex
import shutil

import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml

from dpo_opt.analysis import diagnose, kl_of_run, report
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA
from dpo_opt.schemas.run_layout import checkpoint_steps

NEEDED = [field.name for field in PAIR_LOGPS_SCHEMA if not field.nullable]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards_writer, run_writer, texts):
    folder = tmp_path_factory.mktemp("whole")
    pairs = shards_writer(folder / "shards", texts(30))
    return run_writer(folder / "run", folder / "shards", pairs, steps=4, eval_every=2)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run."""
    return shutil.copytree(whole, tmp_path / "run")


def refusals(run):
    found = []
    pairs = run.parent / "pairs.parquet"
    for call in (lambda: report([run], run.parent / "report.html", pairs=pairs), lambda: diagnose(run)):
        with pytest.raises(DpoOptError) as refused:
            call()
        assert refused.value.fix
        assert refused.value.why
        found.append(refused.value)
    assert not (run.parent / "report.html").exists()
    assert not pairs.exists()
    return found


def mend(error):
    """Do what the first half of a fix says."""
    words = shlex.split(error.fix.partition(";")[0].partition(",")[0])
    assert words[0] in ("mv", "rm")
    shutil.move(words[1], f"{words[1]}.gone" if words[0] == "rm" else words[2])


@pytest.mark.parametrize("folder", ["pair_logps", "scores"])
@pytest.mark.parametrize("column", NEEDED)
@pytest.mark.parametrize("how_many", ["one", "one, and the footer does not say it", "all, without a type"])
def test_a_column_without_values_is_named_with_its_file(run, folder, column, how_many):
    file = sorted((run / folder).iterdir())[-1]
    table = pl.read_parquet(file)
    kind = pl.Null if how_many == "all, without a type" else table.schema[column]
    nulls = pl.lit(None, dtype=kind)
    if how_many.startswith("one"):
        nulls = pl.when(pl.int_range(pl.len()) != 3).then(pl.col(column))
    table.with_columns(nulls.alias(column)).write_parquet(file, statistics=how_many == "one")
    for error in refusals(run):
        assert error.where == str(file)
        assert column in error.what


@pytest.mark.parametrize("folder", ["pair_logps", "scores", "kl"])
def test_a_link_to_a_table_that_is_gone_is_called_so(run, folder):
    file = run / folder / "00009.parquet"
    file.symlink_to(run / "elsewhere" / "gone.parquet")
    calls = {"report": lambda: report([run], run.parent / "report.html")}
    calls |= {"kl": lambda: kl_of_run(run)} if folder == "kl" else {"diagnose": lambda: diagnose(run)}
    for call in calls.values():
        with pytest.raises(DpoOptError, match="it is a link to a file that is not there") as refused:
            call()
        assert refused.value.where == str(file)
        assert refused.value.fix.startswith(f"rm {file}, then")
        assert str(run / "elsewhere" / "gone.parquet") in refused.value.fix
    file.unlink()
    for call in calls.values():
        call()


def test_a_folder_with_the_number_of_a_step_that_no_run_reaches_is_no_checkpoint(tmp_path):
    for name in ("step-00000002", "step-0000000002-keep", f"step-{9**40}", "step-٣", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert list(checkpoint_steps(tmp_path).values()) == [2]


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


BIG, HUGE = 10**30, 10**400
NO_SETTING = ["x", [], ["x", 1], {"a": 1}, True, -1, BIG, HUGE, float("nan"), float("inf")]
SETTINGS = [
    (name, value)
    for name, fits in (("beta", [BIG]), ("loss_type", ["x"]), ("model", ["x"]), ("eval_split", []))
    for value in NO_SETTING
    if not any(value is other or value == other for other in fits)
    # A list of no loss is nothing that a page could be wrong about.
    and (name, value) != ("loss_type", [])
] + [("eval_shards", "x"), ("eval_shards", [1])]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_setting_of_another_kind_is_named(run, name, value):
    file = run / "config.resolved.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), name: value}))
    for error in refusals(run):
        assert error.where == str(file)
        assert error.what.startswith(f"{name} is ")
        assert len(error.what) < 150
        assert f"write the {name} there" in error.fix


def change_first(name, value):
    """Changes a name's value in the first object of a file."""

    def damage(file):
        first, *others = file.read_text().split("\n") if file.suffix == ".jsonl" else [file.read_text()]
        file.write_text("\n".join([json.dumps({**json.loads(first), name: value}), *others]))

    return damage


def folder_instead(file):
    file.unlink(missing_ok=True)
    file.mkdir()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("metrics.jsonl", folder_instead),
        ("metrics.jsonl", change_first("step", True)),
        ("metrics.jsonl", change_first("grad_norm", HUGE)),
        ("metrics.jsonl", change_first("loss", "x")),
        ("metrics.jsonl", change_first("loss", None)),
        ("parity.json", folder_instead),
        ("parity.json", change_first("sd", BIG)),
        ("parity.json", change_first("margin_sd", HUGE)),
        ("parity.json", change_first("tokens", float("inf"))),
    ],
)
def test_a_number_or_a_file_of_another_kind_is_named(run, name, damage):
    damage(run / name)
    for error in refusals(run):
        assert error.where.startswith(str(run / name))
    if not error.fix.startswith("sed"):
        mend(error)
        diagnose(run)


def foreign_table(file):
    pl.DataFrame({"x": [1]}).write_parquet(file)


@pytest.mark.parametrize("folder", ["pair_logps", "scores"])
@pytest.mark.parametrize("place", [foreign_table, lambda f: f.write_text("hello")])
def test_a_file_of_another_program_is_set_aside(run, folder, place):
    file = run / folder / "zz.parquet"
    place(file)
    for error in refusals(run):
        assert error.where == str(file)
    mend(error)
    diagnose(run)


@pytest.mark.parametrize("place", [foreign_table, lambda f: f.write_text("hello")])
def test_a_file_of_another_program_among_samples_is_set_aside(run, place):
    file = run / "kl" / "zz.parquet"
    place(file)
    with pytest.raises(DpoOptError) as refused:
        report([run], run.parent / "report.html")
    assert refused.value.where == str(file)
    assert refused.value.why
    mend(refused.value)
    assert len(kl_of_run(run)) == 1


def test_what_is_still_being_written_and_folders_are_left_out(run):
    (run / "kl" / ".final.parquet").write_text("")
    (run / "kl" / "zz.parquet").mkdir()
    (run / "kl" / "final.parquet").unlink()
    assert kl_of_run(run) == []


@pytest.mark.parametrize("column", ["row", "pair_id", "phase", "chosen_logps"])
@pytest.mark.parametrize("folder", ["pair_logps", "scores"])
def test_a_column_of_another_type_is_named(run, folder, column):
    file = sorted((run / folder).iterdir())[-1]
    table = pl.read_parquet(file)
    other = pl.lit(7) if table.schema[column] == pl.String else pl.lit("x")
    if column == "row":
        other = pl.col("row").cast(pl.Int32)
    table.with_columns(other.alias(column)).write_parquet(file)
    for error in refusals(run):
        assert error.where == str(file)
        assert f"{column} holds " in error.what


@pytest.mark.parametrize("folder", ["pair_logps", "scores"])
def test_the_table_whose_pages_are_damaged_is_named(run, folder):
    file = sorted((run / folder).iterdir())[-1]
    begin = pq.read_metadata(file).row_group(0).column(0).data_page_offset
    whole = bytearray(file.read_bytes())
    whole[begin : begin + 400] = bytes(400)
    file.write_bytes(whole)
    for error in refusals(run):
        assert error.where == str(file)
        assert error.fix.startswith("mv ")


@pytest.mark.parametrize("text", ["x", "{}", '{"loss": 1.0, "row": "a"}', f'{{"loss": 1.0, "row": {BIG}}}'])
def test_a_dump_that_is_none_is_named_by_the_diagnosis(run, text):
    (run / "final").rmdir()
    (run / "not-finite-step-notes.jsonl").write_text("a file of the user's")
    diagnose(run)
    dump = run / "not-finite-step-00000003.jsonl"
    dump.write_text(text)
    with pytest.raises(DpoOptError) as refused:
        diagnose(run)
    assert refused.value.where == str(dump)
    mend(refused.value)
    diagnose(run)
