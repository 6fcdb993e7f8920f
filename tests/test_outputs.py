"""No output of a command takes the place of a file that the command did not write."""

import json
import os

import polars as pl
import pytest
from click.testing import CliRunner

from dpo_opt.cli import main
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.outputs import PARQUET_KEY, output_mark, require_own_output

COMMANDS = {
    "report": (["report", "run"], "--output"),
    "report's pairs": (["report", "run", "--output", "report.html"], "--pairs"),
    "check": (["check", "pairs.jsonl"], "--html"),
    "triage": (["triage", "--shards", "shards"], "--output"),
    "score": (["score", "--shards", "shards", "--model", "run/final"], "--output"),
    "kl": (["kl", "run"], "--output"),
    "frontier": (["frontier", "run", "--reward-column", "reward"], "--output"),
}
FOREIGN = ("run/metrics.jsonl", "run/pair_logps/00000.parquet", "shards/manifest.json", "run")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run/pair_logps", "run/final", "shards"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run" / "config.resolved.yaml").write_text("shards: shards\nbeta: 0.1\nmodel: m\n")
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    (tmp_path / "shards" / "manifest.json").write_text("{}\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    table = pl.DataFrame({"row": [1]})
    table.write_parquet(tmp_path / "run/pair_logps/00000.parquet", metadata={"dpo_opt.schema_version": "1"})
    return tmp_path


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_something_else_is_refused_before_any_work(folder, command, foreign):
    words, option = COMMANDS[command]
    before = contents(folder)
    result = CliRunner().invoke(main, [*words, option, foreign])
    assert result.exit_code == ConfigError.exit_code
    assert f"{foreign}: {option} " in result.output
    assert contents(folder) == before


def test_the_numbers_beside_a_page_are_protected_too(folder):
    (folder / "mine.summary.json").write_text('{"runs": []}\n')
    result = CliRunner().invoke(main, ["report", "run", "--output", "mine.html"])
    assert result.exit_code == ConfigError.exit_code
    assert "mine.summary.json: --output names a file" in result.output


@pytest.mark.parametrize("name", ["page.html", "table.parquet", "a long file"])
def test_a_command_knows_its_own_file_and_no_other_command_s(folder, name):
    file = folder / name
    if name == "table.parquet":
        wide = pl.DataFrame({f"column {i}": ["x" * 50] for i in range(40)})
        wide.write_parquet(file, metadata={PARQUET_KEY: output_mark("triage")})
    else:
        file.write_text(f"<meta content='{output_mark('triage')}'>" + "x" * 200_000 * (name == "a long file"))
    require_own_output(file, option="--output", command="triage")
    for other in ("report", "tri"):
        with pytest.raises(ConfigError, match="did not write"):
            require_own_output(file, option="--output", command=other)
    require_own_output(folder / "nothing there", option="--output", command="triage")


@pytest.mark.parametrize("link", [False, True])
def test_a_device_and_a_pipe_are_no_files_to_replace(folder, link):
    os.mkfifo(folder / "pipe")
    named = folder / "page.html" if link else folder / "pipe"
    if link:
        named.symlink_to(os.devnull)
    with pytest.raises(ConfigError, match="no file") as refused:
        require_own_output(named, option="--output", command="report")
    assert refused.value.fix
