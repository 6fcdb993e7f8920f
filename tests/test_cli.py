import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from bit_flips import flip
from command_line import invoke
from fakes import preference_rows, write_jsonl

import dpo_opt
import dpo_opt.commands
import dpo_opt.precompute
from dpo_opt import launch, scoring_forecast
from dpo_opt.cli import main
from dpo_opt.schemas.manifest import MANIFEST, PLAN, load_manifest
from dpo_opt.schemas.pair_logps import dtype_of_logps

ROWS = preference_rows(12)
HEAVY = ("torch", "vllm", "polars", "matplotlib", "transformers")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, files with their bytes."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")
    }


def refused(exit_code: int, *arguments: object, unchanged: Path) -> str:
    """The message of a command that must fail and write nothing."""
    before = snapshot(unchanged)
    result = invoke(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert snapshot(unchanged) == before
    return str(result.stderr)


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards, scored by the command."""
    base = tmp_path_factory.mktemp("cli")
    data = write_jsonl(base / "data.jsonl", ROWS)
    arguments = ["precompute", "--model", tiny_model, "--data", data, "--shards", base / "shards"]
    result = invoke(*arguments, "--backend", "hf", "--pairs-per-shard", 5, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "shards": str(base / "shards"),
        "rows": 12,
        "kept": 12,
        "dropped": {},
        "truncated": 0,
        "prompts_truncated": 0,
        "tokens": load_manifest(base / "shards").tokens,
        "engine": "transformers",
        "reuse_check": None,
    }
    return base / "shards"


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


# What is said of bad input, and that it leaves nothing behind ---------------------------------------------

GOOD = b'{"prompt": "a", "chosen": " b", "rejected": " c"}\n'
BAD_DATA: dict[str, tuple[bytes, str, str]] = {
    "malformed": (GOOD + b'{"prompt": "a", "cho\n', ":2", "not valid JSON"),
    "missing_key": (GOOD + GOOD + b'{"prompt": "a", "chosen": "b"}\n', ":3", '"rejected" is missing'),
    "null": (b'{"prompt": "a", "chosen": null, "rejected": "c"}\n', ":1", '"chosen" is null'),
    "number": (b'{"prompt": 5, "chosen": "b", "rejected": "c"}\n', ":1", '"prompt" is a number'),
    "empty_completion": (GOOD + b'{"prompt": "a", "chosen": "b", "rejected": ""}\n', ":2", "is empty"),
    "not_utf8": (GOOD + b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}\n', ":2", "not valid UTF-8"),
    "empty_file": (b"", "", "the file has no rows"),
    "blank_lines": (b"\n\n", "", "the file has no rows"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_named_by_its_line_and_nothing_is_written(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    content, line, message = BAD_DATA[name]
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    arguments = ["precompute", "--model", tiny_model, "--data", data, "--shards", tmp_path / "shards"]
    for extra in ([], ["--dry-run"]):
        shown = refused(3, *arguments, "--backend", "hf", *extra, unchanged=tmp_path)
        assert shown.startswith(f"error: {data}{line}: ")
        assert message in shown
        assert "  fix: " in shown


def precompute_arguments(model: object, folder: Path) -> list[object]:
    data = write_jsonl(folder / "data.jsonl", ROWS)
    arguments = ["precompute", "--model", model, "--data", data, "--shards", folder / "shards"]
    return [*arguments, "--backend", "hf"]


BAD_SETTINGS: dict[str, tuple[list[str], int, str]] = {
    "no_room": (["--max-length", "2"], 3, "12 prompt_fills_max_length"),
    "beyond_context": (["--max-length", "300"], 2, "beyond the model's context of 256"),
    "negative": (["--max-length", "-1"], 2, "greater than 0"),
    "not_a_number": (["--max-length", "long"], 2, "not a valid integer"),
    "choice": (["--truncation", "middle"], 2, "keep_start"),
    "no_file": (["--data", "nowhere.jsonl"], 3, "there is no such file"),
    "no_model": (["--model", "./nowhere"], 2, "there is no model folder './nowhere'"),
    "no_config": (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    "unknown_flag": (["--pairs_per_shrad", "3"], 2, "--pairs-per-shard"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_and_nothing_is_written(name: str, tiny_model: Path, tmp_path: Path) -> None:
    extra, exit_code, message = BAD_SETTINGS[name]
    arguments = precompute_arguments(tiny_model, tmp_path)
    assert message in refused(exit_code, *arguments, *extra, unchanged=tmp_path)


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    assert "--data is missing" in refused(2, "precompute", unchanged=tmp_path)


def test_the_config_file_gives_settings_and_flags_win(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {tiny_model}\ndata: {data}\nbackend: hf\nmax_length: 100\nshards: unused\n")
    arguments = ["precompute", "--config", config, "--shards", tmp_path / "shards", "--max_length", 99]
    result = invoke(*arguments, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["rows"], plan["shards"], plan["max_length"], plan["engine"]) == (12, 1, 99, "transformers")
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl", "run.yaml"}

    config.write_text(config.read_text() + "max_lenght: 5\n")
    shown = refused(2, *arguments, unchanged=tmp_path)
    assert f"{config}: unknown setting 'max_lenght'" in shown
    assert "did you mean 'max_length'?" in shown


def test_a_folder_of_another_run_is_refused(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = precompute_arguments(tiny_model, tmp_path)
    shown = refused(4, *arguments, "--pairs-per-shard", 5, "--max-length", 77, unchanged=tmp_path)
    assert f"error: {shards}: the cached log-probs were not computed for this run" in shown
    assert next(line.split() for line in shown.splitlines() if "max_length" in line)[1:] == ["256", "77"]
    # The same command again is no other run.
    assert invoke(*arguments, "--pairs-per-shard", 5).exit_code == 0


def test_shards_inside_the_data_are_refused_and_nothing_is_written(tiny_model: Path, tmp_path: Path) -> None:
    arguments = precompute_arguments(tiny_model, tmp_path)
    for extra in ([], ["--dry-run"]):
        shown = refused(2, *arguments, "--data", tmp_path, *extra, unchanged=tmp_path)
        assert f"--shards {tmp_path}/shards stands inside --data {tmp_path}" in shown
    convert = ["convert", tmp_path, "--output", tmp_path / "clean"]
    assert f"--output {tmp_path}/clean stands inside" in refused(2, *convert, unchanged=tmp_path)


def test_splits_that_are_merged_are_said(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "pairs"
    base.mkdir()
    for split in ("train", "test"):
        write_jsonl(base / f"{split}.jsonl", ROWS[:2])
    arguments = [*precompute_arguments(tiny_model, tmp_path), "--dry-run", "--data"]
    line = f"{base} is read with all of its splits (test: --data {base}/test.jsonl, "
    assert invoke(*arguments, base).stderr.startswith(f"{line}train: --data {base}/train.jsonl)")
    assert "splits" not in invoke(*arguments, base, "--worker-index", 1, "--num-workers", 2).stderr
    assert "splits" not in invoke(*arguments, base / "test.jsonl").stderr
    shown = json.loads(invoke("check", base, "--json").stdout)
    (found,) = [problem for problem in shown["problems"] if problem["kind"] == "merged_splits"]
    assert found["examples"][0]["where"] == str(base)
    assert found["examples"][0]["detail"].startswith(f"test: --data {base}/test.jsonl, train: ")


def another_length(folder: Path) -> list[object]:
    return ["--max-length", 77]


def other_rows(folder: Path) -> list[object]:
    write_jsonl(folder / "data.jsonl", [*ROWS[:5], {**ROWS[5], "chosen": " Else."}, *ROWS[6:]])
    return []


def more_rows(folder: Path) -> list[object]:
    write_jsonl(folder / "data.jsonl", preference_rows(len(ROWS) + 1))
    return []


def fewer_pairs_per_shard(folder: Path) -> list[object]:
    return ["--pairs-per-shard", 4]


def no_plan(folder: Path) -> list[object]:
    (folder / "shards" / "plan.json").unlink()
    (folder / "shards" / "manifest.json").unlink()
    return []


def damaged_plan(folder: Path) -> list[object]:
    (folder / "shards" / "plan.json").write_text("{")
    return []


@pytest.mark.parametrize(
    "change", [another_length, other_rows, more_rows, fewer_pairs_per_shard, no_plan, damaged_plan]
)
def test_a_dry_run_refuses_the_folders_that_the_run_would(
    shards: Path, tiny_model: Path, tmp_path: Path, change: Callable[[Path], list[object]]
) -> None:
    arguments = [*precompute_arguments(tiny_model, tmp_path), "--pairs-per-shard", 5]
    planned = json.loads(invoke(*arguments, "--dry-run", "--json").stdout)
    assert (planned["shards"], planned["shards_scored"]) == (3, 3)
    arguments += change(tmp_path)
    said = {
        word: refused(3 if "plan" in change.__name__ else 4, *arguments, *word, unchanged=tmp_path)
        for word in (("--dry-run",), ())
    }
    assert said["--dry-run",] == said[()]


def test_a_dry_run_says_what_an_added_day_would_take(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = [*precompute_arguments(tiny_model, tmp_path), "--pairs-per-shard", 5, "--append", "--dry-run"]
    more_rows(tmp_path)
    planned = json.loads(invoke(*arguments, "--json").stdout)
    assert (planned["rows"], planned["shards"], planned["shards_scored"]) == (13, 4, 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tiny_model: Path, tmp_path: Path) -> None:
    arguments = precompute_arguments(tiny_model, tmp_path)
    (tmp_path / "shards").mkdir(mode=0o500)
    assert "Permission denied" in refused(1, *arguments, unchanged=tmp_path)


def test_a_file_in_the_place_of_a_folder_is_named(tiny_model: Path, tmp_path: Path) -> None:
    arguments = precompute_arguments(tiny_model, tmp_path)
    (tmp_path / "shards").write_text("")
    shown = refused(1, *arguments, unchanged=tmp_path)
    assert str(tmp_path / "shards") in shown
    assert "Not a directory" in shown


# Reading shards -------------------------------------------------------------------------------------------


def test_status_counts(shards: Path) -> None:
    shown = json.loads(invoke("status", "--shards", shards, "--json").stdout)
    (worker,) = shown.pop("workers")
    assert (worker["host"], worker["worker"], worker["pairs"]) == (socket.gethostname(), None, 12)
    assert shown.pop("pairs_per_second") > 0
    assert shown.pop("seconds_since_commit") >= 0
    assert shown == {
        "shards_total": 3,
        "shards_committed": 3,
        "unpaired": False,
        "pairs_total": 12,
        "pairs_kept": 12,
        "pairs_dropped": 0,
        "dropped": {},
        "share_done": 1.0,
        "seconds_left": None,
        "finalized": True,
        "lost": [],
        "next": None,
    }
    lines = invoke("status", "--shards", shards).stdout.splitlines()
    said = {line.partition("  ")[0]: line for line in lines}
    assert said["shards_committed"].endswith("  3")
    assert said["share_done"].endswith("  100.0%")
    assert re.search(r": 12 pairs in 3 shards, [\d.e+]+ pairs/s, last commit .* ago$", said["workers"])
    assert "time_left" not in said


def test_a_hosts_name_steers_no_terminal_and_fakes_no_line(shards: Path) -> None:
    (shards / "manifest.json").unlink()
    for path in (shards / "commits").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "host": "\x1b[31ma\nfinalized  True"}))
    lines = invoke("status", "--shards", shards).stdout.splitlines()
    assert [line for line in lines if line.startswith("finalized")] == ["finalized         False"]
    assert "\x1b" not in "".join(lines)


def test_a_dry_run_of_gc_says_what_it_would_remove(shards: Path) -> None:
    left = [f"commits/.0000{i}.00000000.tmp" for i in range(3)]
    for name in left:
        (shards / name).write_text("four")
        os.utime(shards / name, (0, 0))
    before = snapshot(shards)
    words = invoke("gc", "--shards", shards, "--dry-run").output
    assert [line.split(maxsplit=1) for line in words.splitlines()] == [
        ["would_remove", "3"],
        ["bytes", "12"],
        ["files", ", ".join(left)],
    ]
    found = json.loads(invoke("gc", "--shards", shards, "--dry-run", "--json").stdout)
    assert found == {"would_remove": 3, "bytes": 12, "files": left}
    assert snapshot(shards) == before
    assert json.loads(invoke("gc", "--shards", shards, "--json").stdout) == {"removed": 3, "bytes": 12}
    assert json.loads(invoke("gc", "--shards", shards, "--dry-run", "--json").stdout)["would_remove"] == 0
    assert invoke("gc", "--shards", shards, "--dry-run").output.split()[-2:] == ["files", "none"]


def test_finalize_writes_the_manifest(shards: Path, tmp_path: Path) -> None:
    whole = (shards / MANIFEST).read_bytes()
    (shards / MANIFEST).unlink()
    shown = json.loads(invoke("finalize", "--shards", shards, "--json").stdout)
    assert (shown["rows"], shown["kept"]) == (12, 12)
    assert (shards / MANIFEST).read_bytes() == whole
    (shards / MANIFEST).unlink()
    next((shards / "commits").glob("00001-*")).unlink()
    message = refused(3, "finalize", "--shards", shards, unchanged=tmp_path)
    assert "1 of 3 shards is not scored yet (1)" in message


def test_verify_says_what_is_wrong(shards: Path, tiny_model: Path) -> None:
    good = invoke("verify", "--shards", shards, "--json")
    assert good.exit_code == 0
    found = json.loads(good.stdout)
    assert (found["integrity"], found["parity"]) == ({"ok": True, "problems": []}, None)
    with_model = invoke("verify", "--shards", shards, "--model", tiny_model, "--pairs", 4, "--json")
    assert json.loads(with_model.stdout)["parity"]["ok"] is True

    damaged = shards / load_manifest(shards).shards[1].file
    flip(damaged)
    bad = invoke("verify", "--shards", shards, "--json")
    assert bad.exit_code == 3
    (problem,) = json.loads(bad.stdout)["integrity"]["problems"]
    assert str(damaged) in problem
    assert "1 problem" in bad.stderr


def test_verify_refuses_another_model(shards: Path, other_model: Path, tmp_path: Path) -> None:
    shown = refused(4, "verify", "--shards", shards, "--model", other_model, unchanged=tmp_path)
    assert "weights" in shown


# Every command that reads shards, with a place for its output.
READERS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "status": lambda shards, model, out: ["status", "--shards", shards],
    "finalize": lambda shards, model, out: ["finalize", "--shards", shards],
    "verify": lambda shards, model, out: ["verify", "--shards", shards],
    "train": lambda shards, model, out: ["train", "--shards", shards, "--model", model, "--output-dir", out],
    "score": lambda shards, model, out: ["score", "--shards", shards, "--model", model, "--output", out],
}


@pytest.mark.parametrize("command", READERS)
def test_a_folder_without_shards_is_refused(command: str, tiny_model: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        arguments = READERS[command](folder, tiny_model, tmp_path / "out")
        shown = refused(3, *arguments, unchanged=tmp_path)
        assert shown.startswith(f"error: {folder}: there is no ")
        assert "dpo-opt precompute" in shown


@pytest.mark.parametrize("command", ["verify", "train", "score"])
def test_a_file_of_pairs_is_never_advised_as_a_folder_of_shards(
    command: str, tiny_model: Path, tmp_path: Path
) -> None:
    pairs = write_jsonl(tmp_path / "my pairs.jsonl", ROWS)
    shown = refused(3, *READERS[command](pairs, tiny_model, tmp_path / "out"), unchanged=tmp_path)
    assert f"--data '{pairs}' --shards SHARDS" in shown


@pytest.mark.parametrize("command", ["verify", "train", "score"])
def test_a_folder_that_is_not_finished_is_refused(
    command: str, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (shards / MANIFEST).unlink()
    shown = refused(3, *READERS[command](shards, tiny_model, tmp_path / "out"), unchanged=tmp_path)
    assert f"fix: dpo-opt finalize --shards {shards}" in shown


@pytest.mark.parametrize(
    ("command", "file"),
    [
        *(("train", file) for file in ("shard", "index", "manifest")),
        ("score", "shard"),
        ("score", "manifest"),
    ],
)
def test_a_flipped_byte_stops_who_reads_it(
    command: str, file: str, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    paths = {
        "shard": shards / load_manifest(shards).shards[0].file,
        "index": shards / "index.parquet",
        "manifest": shards / MANIFEST,
    }
    flip(paths[file])
    shown = refused(3, *READERS[command](shards, tiny_model, tmp_path / "out"), unchanged=tmp_path)
    assert str(paths[file]) in shown


def train_arguments(shards: Path, model: Path, out: Path) -> list[object]:
    return [*READERS["train"](shards, model, out), "--batch-size", 4]


def test_training_from_another_model_is_refused(
    shards: Path, other_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shown = refused(4, *train_arguments(shards, other_model, tmp_path / "run"), unchanged=tmp_path)
    assert "weights" in shown
    assert "same: schema_version, model_config_digest, tokenizer" in shown
    truncated = Path(shutil.copytree(tiny_model, tmp_path / "truncated"))
    (truncated / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:-9])
    shown = refused(2, *train_arguments(shards, truncated, tmp_path / "run"), unchanged=tmp_path)
    assert "truncated or damaged" in shown


BAD_TRAINING: dict[str, tuple[list[str], str]] = {
    "beta": (["--beta", "0"], "--beta 0.0: Input should be greater than 0"),
    "loss": (["--loss-type", "none"], "'none'"),
    "smoothing": (["--label_smoothing", "0.5"], "less than 0.5"),
    "losses": (
        ["--loss-type", "ipo", "nca-pair", "--loss-weights", "1"],
        "has 1 and --loss-type 2: ipo nca_pair",
    ),
    "no margins": (["--loss_type", "odpo", "sft"], "the loss reads margins, and the data has none"),
    "split": (["--eval-split", "1"], "less than 1"),
    "model": (["--model", "/no/where"], "there is no model folder '/no/where'"),
}


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_training_settings_are_refused(name: str, shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    extra, message = BAD_TRAINING[name]
    arguments = train_arguments(shards, tiny_model, tmp_path / "run")
    assert message in refused(2, *arguments, *extra, unchanged=tmp_path)


def test_a_used_output_folder_is_refused(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    shown = refused(2, *train_arguments(shards, tiny_model, tmp_path / "run"), unchanged=tmp_path)
    assert f"the output folder {tmp_path / 'run'} is already in use" in shown


def test_a_run_is_trained_scored_and_described(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = train_arguments(shards, tiny_model, tmp_path / "run")
    planned = invoke(*arguments, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["steps"] == 3
    assert not (tmp_path / "run").exists()

    trained = invoke(*arguments, "--learning_rate", "1e-3", "--json")
    assert trained.exit_code == 0, trained.output
    result = json.loads(trained.stdout)
    assert result["steps"] == 3
    assert result["parity"]["ok"] is True
    assert (tmp_path / "run" / "config.resolved.yaml").is_file()

    scored = invoke(
        "score", "--shards", shards, "--model", result["final"], "--output", tmp_path / "s", "--json"
    )
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout) == {"output": str(tmp_path / "s"), "pairs": 12}
    assert pq.read_table(tmp_path / "s")["row"].to_pylist() == list(range(12))


def test_a_checkpoint_is_scored_in_the_dtype_of_the_reference(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    rounded = shutil.copytree(tiny_model, tmp_path / "rounded")
    config = json.loads((rounded / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    for options, dtype in ([], "float32"), (["--dtype", "bfloat16"], "bfloat16"):
        output = tmp_path / f"{dtype}.parquet"
        scored = invoke("score", "--shards", shards, "--model", rounded, "--output", output, *options)
        assert scored.exit_code == 0, scored.output
        assert dtype_of_logps(output) == dtype


@pytest.mark.parametrize(
    ("saved", "trained", "scored_in"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float32", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
    ],
)
def test_a_float32_checkpoint_is_not_rounded_to_the_dtype_of_the_reference(
    tiny_model: Path, tmp_path: Path, saved: str, trained: str | None, scored_in: str
) -> None:
    assert invoke(*precompute_arguments(tiny_model, tmp_path), "--dtype", "bfloat16").exit_code == 0
    model = shutil.copytree(tiny_model, tmp_path / "run" / "final")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": saved}))
    if trained is not None:
        state = {"global_step": 3, "epoch": 1.0, "dtype": trained}
        (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state))
    output = tmp_path / "final.parquet"
    scored = invoke("score", "--shards", tmp_path / "shards", "--model", model, "--output", output)
    assert scored.exit_code == 0, scored.output
    assert dtype_of_logps(output) == scored_in


def read_table(text: str) -> dict[str, list[str]]:
    """The first cell of every line to the others."""
    cells = [re.split(r"  +", line) for line in text.splitlines()]
    return {first: others for first, *others in cells}


def test_a_person_reads_tables_with_units(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", preference_rows(20)[14:])
    evaluated = tmp_path / "other"
    score_more = [
        "precompute",
        "--model",
        tiny_model,
        "--data",
        more,
        "--shards",
        evaluated,
        "--backend",
        "hf",
    ]
    assert invoke(*score_more).exit_code == 0
    run = tmp_path / "run"
    arguments = [*train_arguments(shards, tiny_model, run), "--eval-split", 0.6, "--logging-steps", 2]
    trained = invoke(*arguments, "--eval-shards", evaluated)
    assert trained.exit_code == 0, trained.output
    shown = trained.stdout
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    measured = next(line for line in reversed(history) if "eval_loss" in line)
    last = next(line for line in reversed(history) if "loss" in line)
    said = read_table(shown)
    assert said["model"] == [str(run / "final")]
    assert said["parity"][0].startswith("ok: cached log-probs differ from the policy's own by ")
    held_out, added, in_last_step = map(int, said["pairs"])
    assert (added, in_last_step) == (6, (12 - held_out) % 4 or 4)
    assert said["mean over pairs"] == ["held out", "other", "last 1 step"]
    losses = [measured["eval_loss"], measured["eval_other_loss"], last["loss"]]
    assert said["loss"] == [f"{loss:.4f}" for loss in losses]
    assert said["log-prob of chosen, nats"][0] == f"{measured['eval_logps/chosen']:.2f}"
    assert "nothing was held out" not in shown
    assert "rounding" not in shown
    rounded = [*train_arguments(shards, tiny_model, tmp_path / "all"), "--save-dtype", "bfloat16"]
    again = invoke(*rounded).stdout
    assert "nothing was held out: --eval-split" in again
    assert "saved in bfloat16, trained in float32: rounding loses the smallest updates" in again

    scored = tmp_path / "scores.parquet"
    shown = invoke("score", "--shards", shards, "--model", tiny_model, "--output", scored).stdout
    logps = pq.read_table(scored)["chosen_logps"].to_pylist()
    assert read_table(shown)["log-prob of a completion, nats"][0] == f"{sum(logps) / 12:.2f}"
    assert read_table(shown)["pairs"] == [f"12, under {tiny_model}"]


def test_precompute_says_what_became_of_the_rows(tiny_model: Path, tmp_path: Path) -> None:
    arguments = precompute_arguments(tiny_model, tmp_path)
    write_jsonl(tmp_path / "data.jsonl", [*ROWS, {**ROWS[0], "rejected": ROWS[0]["chosen"]}])
    said = read_table(invoke(*arguments).stdout)
    assert said["pairs"] == ["12 kept of 13 rows"]
    assert said["left out"] == ["1 identical_completions (listed in dropped/)"]
    assert said["tokens"][0].startswith(f"{load_manifest(tmp_path / 'shards').tokens:,}; ")


def test_kl_of_a_model_from_itself_is_nothing(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = [
        "kl",
        "--model",
        tiny_model,
        "--reference",
        tiny_model,
        "--prompts",
        shards,
        "--backend",
        "hf",
    ]
    small = ["--num-prompts", 3, "--num-samples", 2, "--output", tmp_path / "kl.parquet"]
    result = invoke(*arguments, *small, "--max-new-tokens", 8, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (entry,) = found["kl"]
    assert entry["output"] == str(tmp_path / "kl.parquet")
    assert (entry["rb_sequence"]["value"], entry["k1_sequence"]["value"]) == (0, 0)
    samples = pq.read_table(tmp_path / "kl.parquet").to_pylist()
    assert len(samples) == 6
    for sample in samples:
        assert sample["policy_token_logps"] == sample["ref_token_logps"]
    (tmp_path / "kl.parquet").unlink()
    long = refused(2, *arguments, *small, "--max-new-tokens", 250, unchanged=tmp_path)
    assert "the model's context has 256" in long


# The program itself ---------------------------------------------------------------------------------------


def python(code: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


LIGHT = """
import sys
from dpo_opt.cli import main
try:
    main(sys.argv[1:], prog_name="dpo-opt")
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *(name for name in sys.modules if "." not in name))
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["precompute", "-h"], ["kl", "--help"], ["env"], ["status"]],
)
def test_a_light_command_loads_nothing_heavy(arguments: list[str], made: Path) -> None:
    given = [*arguments, "--shards", str(made)] if arguments == ["status"] else arguments
    result = python(LIGHT, *given)
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split("loaded:")[1].split()
    assert "click" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_the_list_of_commands_imports_none_of_them() -> None:
    result = python(LIGHT, "--help")
    loaded = result.stdout.split("loaded:")[1].split()
    assert [name for name in (*HEAVY, "pydantic", "numpy", "pyarrow", "rich", "yaml") if name in loaded] == []


def test_the_summary_of_each_command_fits_its_line() -> None:
    shown = invoke("--help").output
    assert "verify" in shown
    assert "..." not in shown.partition("Commands:")[2]


def test_a_new_command_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greet_all.py").write_text(
        '"""Greet whoever reads this."""\n\nimport click\n\n\n@click.command(help=__doc__)\n'
        '@click.option("--first-name")\ndef command(first_name: str) -> None:\n    click.echo(first_name)\n'
    )
    monkeypatch.setattr(dpo_opt.commands, "__path__", [*dpo_opt.commands.__path__, str(tmp_path)])
    assert "  greet-all   Greet whoever reads this.\n" in invoke("--help").output
    assert invoke("greet-all", "--first_name", "Anna_B").output == "Anna_B\n"
    assert "Usage: main greet-all" in invoke("greet-all", "--help").output
    monkeypatch.undo()
    assert "greet-all" not in main.commands
    assert invoke("greet-all").exit_code == 2


def test_every_command_has_help() -> None:
    shown = " ".join(invoke("--help").output.split())
    assert len(main.commands) >= 9
    for name, command in main.commands.items():
        assert f" {name} {command.get_short_help_str(30).removesuffix('...')}" in shown
        assert command.help
        assert "Usage: " in invoke(name, "--help").output


def test_the_version_is_shown() -> None:
    assert invoke("--version").output == f"dpo-opt, version {dpo_opt.__version__}\n"


def test_env_names_every_package() -> None:
    shown = json.loads(invoke("env", "--json").stdout)
    assert shown["dpo-opt"] == dpo_opt.__version__
    assert {"python", "torch", "vllm", "pyarrow"} <= set(shown)


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("torch", ["train", "--shards", "s", "--model", "m", "--output-dir", "o"], "train"),
        ("polars", ["report", "run"], "analysis"),
    ],
)
def test_a_missing_extra_is_named(package: str, arguments: list[str], extra: str) -> None:
    code = "import sys; sys.modules[sys.argv[1]] = None; from dpo_opt.cli import main; main(sys.argv[2:])"
    result = python(code, package, *arguments)
    assert result.returncode == 2
    assert result.stderr == f"error: {package} is not installed\n  fix: pip install 'dpo-opt[{extra}]'\n"


HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
SLOW_SCORER = """
import os, signal, sys, time
import dpo_opt.scorers
from fakes import ScriptedScorer

# Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

def wait(calls):
    os.write(1, b"scoring\\n")  # a bar takes over sys.stdout
    if calls == 1:
        time.sleep(60)

dpo_opt.scorers.make_scorer = lambda config: ScriptedScorer(before_call=wait)
from dpo_opt.cli import main
main(sys.argv[1:])
"""


def test_a_launched_worker_names_settings_that_stay(
    shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shards / "manifest.json").unlink()
    next((shards / "commits").iterdir()).unlink()
    settings = tmp_path / "soon-gone.yaml"
    settings.write_text((shards / "precompute.yaml").read_text())
    words = ["precompute", "--config", settings, "--shards", shards]
    words += ["--worker-index", 0, "--num-workers", 2]

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpo_opt.optimize.transformers_scorer.HfScorer.token_logps", interrupt)
    monkeypatch.setattr(sys, "argv", ["dpo-opt", *map(str, words)])
    result = invoke(*words)
    assert result.exit_code == 130
    assert f"  fix: dpo-opt precompute --config {shards}/precompute.yaml --shards {shards}\n" in result.stderr


def test_counts_in_what_commands_print_agree_with_what_they_count() -> None:
    """A number before a noun comes from ``counted``, which knows of one: no `1 pairs`."""
    nouns = "pairs|rows|shards|steps|tokens|prompts|completions|samples|sequences|workers|files|runs"
    nouns += "|log-probs|answers|cells|values|GPUs|nodes|other files|scored shards"
    alone = re.compile(rf"\{{(?!counted\()[^{{}}:]*(?::,)?\}} (?:{nouns})\b")
    commands = sorted(Path(dpo_opt.commands.__file__).parent.glob("*.py"))
    stage = sorted(Path(dpo_opt.precompute.__file__).parent.rglob("*.py"))
    assert alone.search('f"{pair_count:,} pairs"')
    assert min(len(commands), len(stage)) > 15
    found = [
        (file.name, at[0])
        for file in (*commands, *stage, *(Path(module.__file__) for module in (launch, scoring_forecast)))
        for at in alone.finditer(file.read_text())
    ]
    # Each of these is said of several alone.
    assert set(found) == {
        ("failing_sequences.py", "{len(self.left_out)} sequences"),
        ("ranked_shapes.py", "{len(completions)} completions"),
        ("length_bias.py", "{bias.unequal_pairs:,} pairs"),
        ("openings.py", "{alike[i]:,} prompts"),
    }


def test_an_interrupted_training_says_what_goes_on(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    from dpo_opt.optimize import gradients

    forward, calls = gradients.forward_pairs, []

    def interrupt(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:  # before the first update there is no run to go on with
            raise KeyboardInterrupt
        return forward(*arguments, **named)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gradients, "forward_pairs", interrupt)
        result = invoke(*train_arguments(shards, tiny_model, tmp_path / "my run"), "--logging-steps", 1)
    assert result.exit_code == 130
    (fix,) = re.findall(r"^  fix: dpo-opt (.*)$", result.stderr, flags=re.MULTILINE)
    assert "--resume" in fix
    result = invoke(*shlex.split(fix))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("terminal", [True, False])
def test_an_interrupted_command_exits_130_and_can_go_on(
    terminal: bool, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "my folder"
    folder.mkdir()
    arguments = [*precompute_arguments(tiny_model, folder), "--pairs-per-shard", 5]
    screen, keyboard = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SCORER, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=keyboard,
        text=True,
    )
    os.close(keyboard)
    with ThreadPoolExecutor() as pool, process:
        shown = pool.submit(read_to_the_end, screen)
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["scoring\n"] * 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    error = shown.result()
    assert "error: interrupted" in error
    assert "Traceback" not in error
    # A terminal wraps lines and ends them its own way.
    (said,) = re.findall(r"fix: (dpo-opt .*)", error)
    assert shlex.split(said) == ["dpo-opt", *map(str, arguments)]
    # A bar hides the cursor; it must come back.
    assert (HIDE_CURSOR in error) == terminal
    assert error.rfind(SHOW_CURSOR) >= error.rfind(HIDE_CURSOR)
    status = json.loads(invoke("status", "--shards", folder / "shards", "--json").stdout)
    assert (status["shards_committed"], status["finalized"]) == (1, False)


def read_to_the_end(descriptor: int) -> str:
    found = b""
    # A terminal whose other side is closed is an error, not an end.
    with contextlib.suppress(OSError):
        while part := os.read(descriptor, 10_000):
            found += part
    os.close(descriptor)
    return found.decode()


@pytest.mark.vllm
def test_the_program_scores_with_vllm(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [*precompute_arguments(tiny_model, tmp_path)[:-1], "vllm", "--json"]
    # Without what this process set: the program prepares the engine's surroundings itself.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "OMP_", "TORCH_"))}
    result = subprocess.run(
        [sys.executable, "-m", "dpo_opt", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    # Engines print; the result is all there is on stdout.
    assert json.loads(result.stdout)["engine"] == "vllm"
    # Prompts were computed once for two completions, and that was compared with computing them anew.
    assert json.loads(result.stdout)["reuse_check"]["tokens"] > 50
    assert json.loads(result.stdout)["reuse_check"]["max"] < 1e-3
    assert json.loads((tmp_path / "shards" / PLAN).read_text())["fingerprint"]["engine"] == "vllm"
    verified = invoke("verify", "--shards", tmp_path / "shards", "--model", tiny_model, "--json")
    assert verified.exit_code == 0, verified.output
    parity: dict[str, Any] = json.loads(verified.stdout)["parity"]
    assert parity["max"] < 5e-3
