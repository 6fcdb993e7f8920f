import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import work
from dpo_opt.precompute.shards import weights_memo
from dpo_opt.precompute.shards.weights_memo import (
    WEIGHTS,
    known_weights_digest,
    remember_weights,
    weight_files,
)
from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.weights import weights_digest

Hashed = list[Path]


def repr_of(text: str) -> str:
    return repr(text[:20])


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    """Folders whose weights were read."""
    folders: Hashed = []

    def digest(folder: Path) -> str:
        folders.append(folder)
        return weights_digest(folder)

    monkeypatch.setattr(weights_memo, "weights_digest", digest)
    return folders


@pytest.fixture
def worker(model: Path, tmp_path: Path) -> Callable[[int], int]:
    """Runs one of two workers of a folder."""
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(6))
    settings: dict[str, Any] = {"model": str(model), "data": data, "shards": tmp_path / "shards"}

    def run(index: int) -> int:
        config = PrecomputeConfig.model_validate({**settings, "worker_index": index, "num_workers": 2})
        return work(config, scorer=ScriptedScorer())

    return run


def other_bytes(path: Path) -> None:
    """Change one weight, and neither size nor name."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_worker_does_not_read_what_the_planner_read(
    worker: Callable[[int], int], model: Path, tmp_path: Path, hashed: Hashed
) -> None:
    worker(0)
    assert hashed == [model]
    memo = json.loads((tmp_path / "shards" / WEIGHTS).read_text())
    assert memo["weights"] == weights_digest(model)
    worker(1)
    assert hashed == [model]


def test_changed_weights_are_read_and_refused(
    worker: Callable[[int], int], model: Path, hashed: Hashed
) -> None:
    worker(0)
    file = model / "model.safetensors"
    before = file.stat()
    other_bytes(file)
    after = file.stat()
    assert (after.st_size, after.st_ino) == (before.st_size, before.st_ino)
    assert after.st_mtime_ns != before.st_mtime_ns
    with pytest.raises(FingerprintError, match="weights "):
        worker(1)
    assert hashed == [model] * 2


def test_touched_weights_are_read_and_accepted(
    worker: Callable[[int], int], model: Path, hashed: Hashed
) -> None:
    worker(0)
    os.utime(model / "model.safetensors")
    worker(1)
    assert hashed == [model] * 2


def test_weights_that_change_while_they_are_hashed_are_not_remembered(
    worker: Callable[[int], int], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = weights_digest

    def digest(folder: Path) -> str:
        found = real(folder)
        other_bytes(folder / "model.safetensors")
        monkeypatch.setattr(weights_memo, "weights_digest", real)
        return found

    monkeypatch.setattr(weights_memo, "weights_digest", digest)
    with pytest.raises(FingerprintError, match="weights changed after they were fingerprinted"):
        worker(0)
    # Nothing was scored under the plan that was refused: the folder is planned again, for what is there now.
    worker(1)
    plan = json.loads((tmp_path / "shards" / "plan.json").read_text())
    assert plan["fingerprint"]["weights"] == real(model)


@pytest.mark.parametrize("change", ["another path", "another inode", "an index"])
def test_other_files_are_read(model: Path, tmp_path: Path, hashed: Hashed, change: str) -> None:
    remember_weights(tmp_path, digest="d", files=weight_files(model))
    assert known_weights_digest(model, tmp_path) == "d"
    file = model / "model.safetensors"
    if change == "another path":
        model = model.rename(tmp_path / "moved")
    elif change == "another inode":
        shutil.copy2(file, tmp_path / "copy")
        (tmp_path / "copy").replace(file)
    else:
        from safetensors.numpy import load_file

        index = {"weight_map": dict.fromkeys(load_file(file), file.name)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert known_weights_digest(model, tmp_path) == weights_digest(model)
    assert hashed == [model]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weights": "d"}', "\x00", "[" * 200_000], ids=repr_of
)
def test_a_memo_that_says_nothing_is_as_good_as_none(model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / WEIGHTS).write_text(text)
    assert known_weights_digest(model, tmp_path) == weights_digest(model)
    remember_weights(tmp_path, digest="d", files=weight_files(model))
    assert known_weights_digest(model, tmp_path) == "d"


def test_weights_that_are_edited_with_all_but_the_change_time_kept_are_read_again(
    model: Path, tmp_path: Path
) -> None:
    remember_weights(tmp_path, digest="d", files=weight_files(model))
    assert known_weights_digest(model, tmp_path) == "d"
    path = model / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as handle:
        handle.seek(-3, os.SEEK_END)
        handle.write(b"\x01")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    kept = ("st_size", "st_mtime_ns", "st_ino")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]
    assert known_weights_digest(model, tmp_path) == weights_digest(model)


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_a_model_that_is_replaced_while_the_engine_loads_it_is_refused(
    model: Path, tmp_path: Path, changed: str
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(6))
    config = PrecomputeConfig(model=str(model), data=[str(data)], shards=tmp_path / "shards")
    right = (model / changed).read_bytes()

    def replace(_: int) -> None:
        if changed == "config.json":
            settings = json.loads(right)
            (model / changed).write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
        else:
            other_bytes(model / changed)

    with pytest.raises(FingerprintError, match="changed after they were fingerprinted"):
        work(config, scorer=ScriptedScorer(before_call=replace))
    assert list((tmp_path / "shards" / "commits").glob("0*.json")) == []
    # As the fix says.
    (model / changed).write_bytes(right)
    assert work(config, scorer=ScriptedScorer()) == 1


def test_weights_that_are_only_touched_while_a_job_runs_stop_nothing(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(6))
    config = PrecomputeConfig(model=str(model), data=[str(data)], shards=tmp_path / "shards")
    touch = ScriptedScorer(before_call=lambda _: (model / "model.safetensors").touch())
    assert work(config, scorer=touch) == 1
