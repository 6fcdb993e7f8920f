"""What goes wrong in a job's life, each time mended by what the product printed, and nothing scored twice."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bit_flips import flip
from click.testing import CliRunner, Result
from fakes import NUMERICS, ScriptedScorer, preference_rows, write_jsonl

import dpo_opt.scorers
from dpo_opt.cli import main
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.manifest import COMMITS, DATA, MANIFEST, load_manifest
from dpo_opt.schemas.pairs import LogpArray, TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder

ROWS = preference_rows(14)  # 5 shards of 3 rows, the last of 2
SHARDS = 5


class Job:
    """One folder and the command that fills it; every shard that is scored is counted."""

    def __init__(self, base: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self.shards, self.monkeypatch = base, base / "shards", monkeypatch
        self.data = write_jsonl(base / "data.jsonl", ROWS)
        self.scored = 0
        self.stop_at: int | None = None
        settings = ["--backend", "hf", "--dtype", "float32", "--pairs-per-shard", 3]
        self.command = [
            "precompute",
            "--model",
            model,
            "--data",
            self.data,
            "--shards",
            self.shards,
            *settings,
        ]
        real = HfScorer.token_logps

        def counted(scorer: HfScorer, sequences: list[TokenSequence]) -> list[LogpArray]:
            if self.scored == self.stop_at:
                raise KeyboardInterrupt
            self.scored += 1
            return real(scorer, sequences)

        monkeypatch.setattr(HfScorer, "token_logps", counted)

    def run(self, *words: object) -> Result:
        typed = list(map(str, words))
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["dpo-opt", *typed])
            return CliRunner().invoke(main, typed)

    def ends(self, *words: object) -> dict[str, Any]:
        result = self.run(*words, "--json")
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def fix_of(self, code: int, *words: object) -> str:
        """The remedy that a refused command prints."""
        result = self.run(*words)
        assert result.exit_code == code, result.output
        (fix,) = re.findall(r"^  fix: (.*)$", result.stderr, flags=re.MULTILINE)
        return str(fix)

    def records(self) -> set[str]:
        """Every finished attempt; each is a shard that was scored once."""
        return {path.name for path in (self.shards / COMMITS).glob("[0-9]*.json")}

    def pairs(self) -> list[tuple[int, str, list[float]]]:
        """All that training reads, after everything was checked."""
        assert self.run("verify", "--shards", self.shards).exit_code == 0
        opened = ShardFolder.open(self.shards)
        return [(p.row, p.pair_id, p.ref_chosen_token_logps.tolist()) for p in opened.pairs()]


def words_of(command: str) -> list[str]:
    """A printed command as what follows the program's name."""
    program, *words = shlex.split(command)
    assert program == "dpo-opt"
    return words


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, tiny_model, monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        own = Job(tmp_path_factory.mktemp("undisturbed"), tiny_model, monkeypatch)
        own.ends(*own.command)
        return own.pairs()


def test_a_bad_row_in_the_last_shard(job: Job, undisturbed: Any) -> None:
    rows = job.data.read_text()
    job.data.write_text(rows + '{"prompt": "Why?", "chosen": " So.", "rejected": ""}\n')
    assert job.fix_of(3, *job.command).startswith("correct or remove the row")
    assert job.scored == 0
    job.data.write_text(rows)
    job.ends(*job.command)
    assert job.scored == SHARDS
    assert job.pairs() == undisturbed


def test_a_row_in_the_last_shard_that_the_template_refuses(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = model / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    job = Job(tmp_path, model, monkeypatch)
    rows = [in_messages("user", i) for i in range(13)]
    write_jsonl(job.data, [*rows, in_messages("system", 13)])
    fix = job.fix_of(3, *job.command)
    assert fix.startswith("pass --on-bad-row skip")
    assert job.scored == 0
    result = job.ends(*job.command, "--on-bad-row", "skip")
    assert (result["kept"], result["dropped"]) == (13, {"bad_row:template": 1})
    assert job.scored == SHARDS
    assert [row for row, *_ in job.pairs()] == list(range(13))


def in_messages(role: str, number: int) -> dict[str, object]:
    prompt = [{"role": role, "content": "Be kind."}, {"role": "user", "content": f"Question {number}?"}]
    return {
        "prompt": prompt if role == "system" else prompt[1:],
        "chosen": [{"role": "assistant", "content": f"Answer {number}."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }


def test_out_of_memory_and_then_smaller_batches(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings of an engine, of which the one that is used here has none."""
    calls: list[int] = []

    def scorer(config: object) -> ScriptedScorer:
        seqs = sequences_of(config)

        def remember(done: int) -> None:
            if seqs == 64 and len(calls) == 2:
                raise RuntimeError("CUDA out of memory")
            calls.append(seqs)

        options = json.dumps({"max_num_seqs": seqs}, separators=(",", ":"))
        return ScriptedScorer(numerics=NUMERICS._replace(engine_options=options), before_call=remember)

    def sequences_of(config: Any) -> int:
        return int(config.engine_option[0].partition("=")[2])

    monkeypatch.setattr(dpo_opt.scorers, "make_scorer", scorer)
    fix = job.fix_of(1, *job.command, "--engine-option", "max_num_seqs=64")
    assert "settings and memory" in fix
    kept = job.records()
    assert len(kept) == 2
    job.ends(*job.command, "--engine-option", "max_num_seqs=32")
    assert calls == [64, 64, 32, 32, 32]
    assert kept < job.records()
    assert len(job.pairs()) == len(ROWS)


@pytest.mark.parametrize("is_final", [False, True])
def test_a_damaged_shard(job: Job, undisturbed: Any, is_final: bool) -> None:
    job.ends(*job.command)
    damaged = job.shards / load_manifest(job.shards).shards[2].file
    before = job.records()
    if is_final:
        flip(damaged)
        fix = job.fix_of(3, "verify", "--shards", job.shards).partition(";")[0]
    else:
        (job.shards / MANIFEST).unlink()
        flip(damaged)
        fix = job.fix_of(3, "finalize", "--shards", job.shards)
    healed = job.ends(*words_of(fix))
    assert healed["shards_to_score"] == [2]
    job.ends(*words_of(healed["next"]))
    assert job.scored == SHARDS + 1
    assert len(before & job.records()) == SHARDS - 1
    assert not damaged.exists()
    assert job.pairs() == undisturbed


def test_a_moved_folder(job: Job, undisturbed: Any) -> None:
    job.stop_at = 3
    assert words_of(job.fix_of(130, *job.command)) == list(map(str, job.command))
    job.stop_at = None
    old, job.shards = job.shards, job.shards.rename(job.base / "a place with spaces")
    fix = job.fix_of(3, "finalize", "--shards", job.shards)
    job.ends(*words_of(fix))
    assert not old.exists()
    assert job.scored == SHARDS
    assert job.pairs() == undisturbed


def test_an_added_day(job: Job, undisturbed: Any) -> None:
    job.ends(*job.command)
    before = job.records()
    write_jsonl(job.data, preference_rows(len(ROWS) + 3))
    fix = job.fix_of(4, *job.command)
    assert fix.startswith("pass --append")
    job.ends(*job.command, "--append")
    assert job.scored == SHARDS + 1
    assert before < job.records()
    pairs = job.pairs()
    assert pairs[: len(ROWS)] == undisturbed
    assert len(pairs) == len(ROWS) + 3


@pytest.mark.slow
def test_a_killed_login_node(job: Job, undisturbed: Any) -> None:
    write_jsonl(job.data, preference_rows(150))
    command = [*map(str, job.command), "--num-workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_opt", *command],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until_begun = time.monotonic() + 120
        while not job.records():
            assert time.monotonic() < until_begun
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(3)  # its workers end with it
    before = job.records()
    assert 0 < len(before) < 50
    result = job.ends(*command)
    assert before < job.records()
    assert len(job.records()) == 50
    assert sum(result["scored_shards"]) <= 50 - len(before) + 1  # two may have taken the last one
    assert job.pairs()[:14] == undisturbed
    assert {path.name.partition("-")[0] for path in (job.shards / DATA).iterdir()} == {
        f"{i:05d}" for i in range(50)
    }
