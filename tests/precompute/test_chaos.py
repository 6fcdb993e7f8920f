"""Workers that are killed at any moment, planners and finalizers that run at once, and clocks that are wrong.

``DPO_OPT_CHAOS_ROUNDS`` sets the number of rounds; `make prove` runs a hundred.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.gc import find_garbage, remove_garbage
from dpo_opt.precompute.shards.status import status
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import COMMITS, DATA, DROPPED, MANIFEST, load_manifest
from dpo_opt.schemas.pairs import TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder

ROUNDS = int(os.environ.get("DPO_OPT_CHAOS_ROUNDS", "25"))
WORKERS = 2
PAIRS_PER_SHARD = 4

# One process that has imported everything forks the workers: an import takes longer than a worker lives.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
from fakes import ScriptedScorer
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import work
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer

model, data, shards, rounds, workers, size = sys.argv[1:]
load_tokenizer(Path(model))
rng = random.Random(0)

def live(index, folder, before_call):
    config = PrecomputeConfig(
        model=model, data=[data], shards=folder, pairs_per_shard=int(size),
        worker_index=index, num_workers=int(workers),
    )
    work(config, scorer=ScriptedScorer(before_call=before_call))

class Enough(BaseException):
    pass

def enough(calls):
    if calls == 1:
        raise Enough

def seconds_to_a_commit(folder):
    began = time.monotonic()
    try:
        live(0, Path(shards + folder), enough)
    except Enough:
        return time.monotonic() - began

# As long as this machine takes, once all is imported, to commit a shard with a plan to make and without, and
# up to three times as long: two run at once, and deaths should come while there is something to lose.
seconds_to_a_commit("-imports")
to_plan, to_begin = seconds_to_a_commit("-measured"), seconds_to_a_commit("-measured")

killed = 0
for _ in range(int(rounds)):
    longest = 3 * (to_begin if Path(shards, "plan.json").exists() else to_plan)
    children = []
    for index in range(int(workers)):
        pid = os.fork()
        if pid == 0:
            try:
                live(index, Path(shards), lambda calls: time.sleep(0.02))
            finally:
                os._exit(0)
        children.append((pid, time.monotonic() + rng.uniform(0.0, longest)))
    for pid, until in sorted(children, key=lambda child: child[1]):
        time.sleep(max(0.0, until - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
print(killed)
"""


def config_of(model: Path, data: Path, shards: Path, **settings: int) -> PrecomputeConfig:
    return PrecomputeConfig(
        model=str(model), data=[str(data)], shards=shards, pairs_per_shard=PAIRS_PER_SHARD, **settings
    )


def pairs_of(shards: Path) -> list[tuple[object, ...]]:
    """Every stored pair, with its values' bytes."""
    return [
        (p.row, p.pair_id, p.source, p.ref_chosen_token_logps.tobytes(), p.ref_rejected_token_logps.tobytes())
        for p in ShardFolder.open(shards).pairs()
    ]


@pytest.mark.slow
def test_killed_workers_leave_every_pair_exactly_once(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(24 * ROUNDS))
    undisturbed = config_of(tiny_model, data, tmp_path / "undisturbed")
    precompute(undisturbed, scorer=ScriptedScorer())
    config = config_of(tiny_model, data, tmp_path / "shards")
    arguments = [tiny_model, data, config.shards, ROUNDS, WORKERS, PAIRS_PER_SHARD]
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    killed = int(driver.stdout)
    survived = status(config.shards)
    print(
        f"{ROUNDS} rounds of {WORKERS} workers, {killed} killed, "
        f"{survived.shards_committed} of {survived.shards_total} shards committed by the dead"
    )
    assert killed > ROUNDS, "too few workers lived long enough to be killed"
    assert survived.shards_committed > 0, "nothing was ever committed"
    assert not survived.finalized

    attempts = Counter(path.name.partition("-")[0] for path in (config.shards / COMMITS).glob("*.json"))
    twice = sum(attempts.values()) - len(attempts)
    manifest = precompute(config, scorer=ScriptedScorer())
    assert manifest.kept + sum(manifest.dropped.values()) == manifest.rows == 24 * ROUNDS
    assert pairs_of(config.shards) == pairs_of(undisturbed.shards)
    assert [(c.start, c.stop) for c in manifest.shards] == [
        (start, start + PAIRS_PER_SHARD) for start in range(0, manifest.rows, PAIRS_PER_SHARD)
    ]

    for folder in (COMMITS, DATA, DROPPED):
        names = [path.name for path in (config.shards / folder).iterdir() if not path.name.startswith(".")]
        assert len(names) == len(manifest.shards), folder
    garbage = find_garbage(config.shards, older_than_hours=0)
    print(f"{twice} shards scored twice, {len(garbage.files)} private files of the dead")
    remove_garbage(garbage)
    assert not list(config.shards.rglob("*.tmp"))
    assert pairs_of(config.shards) == pairs_of(undisturbed.shards)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> PrecomputeConfig:
    return config_of(
        tiny_model, write_jsonl(tmp_path / "data.jsonl", preference_rows(12)), tmp_path / "shards"
    )


def test_a_worker_killed_between_data_and_commit_leaves_nothing_to_read(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("dpo_opt.precompute.shards.commits.write_text", die)
        with pytest.raises(Killed):
            precompute(config, scorer=ScriptedScorer())
    (left,) = (config.shards / DATA).iterdir()
    assert status(config.shards).shards_committed == 0
    assert precompute(config, scorer=ScriptedScorer()).kept == 12
    assert not left.exists()
    assert find_garbage(config.shards, older_than_hours=0).files == []


def test_workers_share_the_shards_and_help_each_other(config: PrecomputeConfig) -> None:
    def worker(index: int, count: int) -> PrecomputeConfig:
        return config.model_copy(update={"worker_index": index, "num_workers": count})

    scorer = ScriptedScorer()
    assert work(worker(2, 3), scorer=scorer) == 3, "a worker alone does the others' shards too"
    assert not (config.shards / MANIFEST).exists()
    assert work(worker(0, 3), scorer=scorer) == 0
    assert finalize(config.shards).kept == 12
    asked = {sequence.key for sequence in scorer.calls[0]}
    (shard,) = ShardFolder.open(config.shards).row_groups(2)
    assert asked == {
        TokenSequence(pair.prompt_ids, ids).key
        for pair in shard
        for ids in (pair.chosen_ids, pair.rejected_ids)
    }, "it begins with its own share"


def test_two_finalizers_write_one_manifest(config: PrecomputeConfig) -> None:
    work(config.model_copy(update={"worker_index": 0, "num_workers": 1}), scorer=ScriptedScorer())
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(finalize(config.shards).index_sha256)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(list(ShardFolder.open(config.shards).pairs())) == 12


def test_wrong_clocks_change_nothing(config: PrecomputeConfig) -> None:
    work(config.model_copy(update={"worker_index": 0, "num_workers": 1}), scorer=ScriptedScorer())
    for number, path in enumerate(sorted(config.shards.rglob("*.*"))):
        moment = (4e9, 1.0)[number % 2]
        os.utime(path, (moment, moment))
    assert status(config.shards).shards_committed == 3
    assert finalize(config.shards).kept == 12
    assert find_garbage(config.shards, older_than_hours=24).files == []


def test_an_attempt_that_finishes_after_finalize_changes_nothing(
    config: PrecomputeConfig, tmp_path: Path
) -> None:
    manifest = precompute(config, scorer=ScriptedScorer())
    other = config.model_copy(update={"shards": tmp_path / "late"})
    precompute(other, scorer=ScriptedScorer())
    before = (config.shards / MANIFEST).read_bytes()
    own = {path for path in config.shards.rglob("*") if path.is_file()}
    for folder in (DATA, DROPPED, COMMITS):
        for path in (other.shards / folder).iterdir():
            shutil.copy(path, config.shards / folder / path.name)
    garbage = find_garbage(config.shards, older_than_hours=0)
    assert len(garbage.files) == 9
    assert finalize(config.shards) == manifest
    assert (config.shards / MANIFEST).read_bytes() == before
    assert {path for path in config.shards.rglob("*") if path.is_file()} == own
    assert load_manifest(config.shards) == manifest
    assert len(list(ShardFolder.open(config.shards).pairs())) == 12


def test_gc_leaves_young_files_and_strangers_files(config: PrecomputeConfig) -> None:
    precompute(config, scorer=ScriptedScorer())
    slow = config.shards / DATA / "00001-deadbeef.parquet"
    private = config.shards / DATA / ".00001-deadbeef.parquet.0123abcd.tmp"
    strangers = [config.shards / DATA / name for name in ("notes.txt", "00001-backup.parquet")]
    for path in (slow, private, *strangers):
        path.write_bytes(b"x")
    assert find_garbage(config.shards, older_than_hours=1).files == []
    for path in (slow, private, *strangers):
        os.utime(path, (0, 0))
    assert set(find_garbage(config.shards, older_than_hours=1).files) == {slow, private}
    remove_garbage(find_garbage(config.shards, older_than_hours=1))
    assert all(path.exists() for path in strangers)
    assert not slow.exists()


def test_gc_before_finalize_keeps_every_committed_attempt(config: PrecomputeConfig, tmp_path: Path) -> None:
    worker = config.model_copy(update={"worker_index": 0, "num_workers": 1})
    work(worker, scorer=ScriptedScorer())
    other = worker.model_copy(update={"shards": tmp_path / "again"})
    work(other, scorer=ScriptedScorer())
    for folder in (DATA, DROPPED, COMMITS):
        for path in (other.shards / folder).iterdir():
            shutil.copy(path, config.shards / folder / path.name)
    assert find_garbage(config.shards, older_than_hours=0).files == []
    assert finalize(config.shards).kept == 12


def test_a_commit_of_another_run_does_not_count(
    config: PrecomputeConfig, tiny_model: Path, tmp_path: Path
) -> None:
    rows = preference_rows(12)
    rows[5]["chosen"] = " Something else."
    other = config_of(tiny_model, write_jsonl(tmp_path / "other.jsonl", rows), tmp_path / "other")
    precompute(other, scorer=ScriptedScorer())
    worker = config.model_copy(update={"worker_index": 0, "num_workers": 1})
    work(worker, scorer=ScriptedScorer())
    (mine,) = (config.shards / COMMITS).glob("00001-*.json")
    mine.unlink()
    for folder in (DATA, DROPPED, COMMITS):
        for path in (other.shards / folder).glob("00001-*"):
            shutil.copy(path, config.shards / folder / path.name)
    assert status(config.shards).shards_committed == 2
    with pytest.raises(DataError, match="1 of 3 shards is not scored yet") as caught:
        finalize(config.shards)
    settings = config.shards / "precompute.yaml"
    assert caught.value.fix == f"dpo-opt precompute --config {settings} --shards {config.shards}"
    assert work(worker, scorer=ScriptedScorer()) == 1
    assert finalize(config.shards).kept == 12


def test_the_command_to_go_on_with_is_complete(config: PrecomputeConfig) -> None:
    work(config.model_copy(update={"worker_index": 0, "num_workers": 2}), scorer=ScriptedScorer())
    import yaml

    settings = yaml.safe_load((config.shards / "precompute.yaml").read_text())
    assert PrecomputeConfig.model_validate(settings) == config
    json.dumps(settings)


def test_a_full_disk_stops_the_worker_and_loses_nothing(tiny_model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small tmpfs")
    try:
        data = write_jsonl(tmp_path / "data.jsonl", preference_rows(400))
        config = config_of(tiny_model, data, small / "shards")
        with pytest.raises(Exception, match="the disk is full") as caught:
            precompute(config, scorer=ScriptedScorer())
        assert "free some space" in str(caught.value)
        done = status(config.shards)
        assert 0 < done.shards_committed < done.shards_total
        assert not list(config.shards.rglob("*.tmp"))
        roomy = shutil.copytree(config.shards, tmp_path / "roomy")
        manifest = precompute(config.model_copy(update={"shards": roomy}), scorer=ScriptedScorer())
        assert manifest.kept == 400
        assert np.isfinite([p.ref_chosen_logps for p in ShardFolder.open(roomy).pairs()]).all()
    finally:
        # Lazily: a traceback may still hold a file.
        subprocess.run(["umount", "--lazy", str(small)], check=True)
