"""A folder of shards in an object store behaves as one on a disk: the same workers, records and readers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl
from object_store import s3_client, serve_s3, using_store

from dpo_opt.analysis import scan_shards
from dpo_opt.cli import main
from dpo_opt.precompute.commits import finalize, status
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.gc import find_garbage, remove_garbage
from dpo_opt.precompute.run import precompute, work
from dpo_opt.schemas.errors import DataError, DpoOptError
from dpo_opt.schemas.locations import location, read_all, sizes
from dpo_opt.schemas.manifest import ShardFolder, load_manifest

pytestmark = pytest.mark.filterwarnings("ignore:.*s3fs.*")

Configs = Callable[..., PrecomputeConfig]
ROWS = preference_rows(11)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve_s3("shards") as url:
        yield url


@pytest.fixture
def store(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty folder; what is fetched from it is cached in this test's own folder."""
    monkeypatch.setenv("DPO_OPT_CACHE", str(tmp_path / "cache"))
    with using_store(server):
        yield f"s3://shards/{tmp_path.name}"


@pytest.fixture
def config_of(tiny_model: Path, tmp_path: Path, store: str) -> Configs:
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)

    def config(**settings: Any) -> PrecomputeConfig:
        values = {"model": str(tiny_model), "data": data, "shards": store, "pairs_per_shard": 3}
        return PrecomputeConfig.model_validate(values | settings)

    return config


def values(config: PrecomputeConfig) -> list[tuple[int, str, list[float]]]:
    pairs = ShardFolder.open(config.shards).pairs()
    return [(p.row, p.pair_id, p.ref_chosen_token_logps.tolist()) for p in pairs]


def test_a_stores_folder_holds_what_a_disks_does(config_of: Configs, tmp_path: Path) -> None:
    there, here = config_of(), config_of(shards=tmp_path / "shards")
    manifests = [precompute(config, scorer=ScriptedScorer()) for config in (there, here)]
    assert values(there) == values(here)
    differing = {"attempt", "file", "dropped_file", "bytes", "sha256"}
    first, second = (
        [{k: v for k, v in shard.model_dump().items() if k not in differing} for shard in m.shards]
        for m in manifests
    )
    assert first == second
    assert manifests[0].tokenizer_sha256 == manifests[1].tokenizer_sha256
    assert (there.shards / "plan.json").read_bytes() == (here.shards / "plan.json").read_bytes()
    np.testing.assert_array_equal(
        *(scan_shards(c.shards).collect()["ref_chosen_logps"].to_numpy() for c in (there, here))
    )


def test_several_workers_fill_it_and_see_each_others_commits_at_once(config_of: Configs) -> None:
    seen = []

    def look(_: int) -> None:
        seen.append(status(config_of().shards).shards_committed)

    scored = [
        work(config_of(worker_index=i, num_workers=2), scorer=ScriptedScorer(before_call=look))
        for i in range(2)
    ]
    # Listings are never cached: the first worker takes over the second one's share, which has nothing left.
    assert (scored, seen) == ([4, 0], [0, 1, 2, 3])
    assert finalize(config_of().shards).kept == len(ROWS)
    assert finalize(config_of().shards) == load_manifest(config_of().shards)


def test_missing_shards_are_named_with_a_command_that_reads_its_settings_from_the_store(
    config_of: Configs, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Killed(BaseException):
        pass

    def kill_in_the_third(call: int) -> None:
        if call == 2:
            raise Killed

    with pytest.raises(Killed):
        precompute(config_of(), scorer=ScriptedScorer(before_call=kill_in_the_third))
    with pytest.raises(DataError, match="2 of 4 shards are not scored yet") as caught:
        finalize(config_of().shards)
    assert caught.value.fix == f"dpo-opt precompute --config {store}/precompute.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["precompute", "--config", f"{store}/precompute.yaml", "--backend", "hf"])
    assert ended.value.code == 4, capsys.readouterr()
    precompute(config_of(), scorer=ScriptedScorer())
    assert [pair[0] for pair in values(config_of())] == list(range(11))


def test_objects_are_put_whole_and_nothing_else_is_left(config_of: Configs, server: str, store: str) -> None:
    precompute(config_of(), scorer=ScriptedScorer())
    found = s3_client(server).list_objects_v2(
        Bucket="shards", Prefix=store.removeprefix("s3://shards/") + "/"
    )
    names = [item["Key"].removeprefix(store.removeprefix("s3://shards/") + "/") for item in found["Contents"]]
    folders = {"data", "commits", "tokenizer"}
    top = {name for name in names if name.partition("/")[0] not in folders}
    assert top == {"plan.json", "precompute.yaml", "weights.json", "index.parquet", "manifest.json"}
    assert sum(name.startswith("data/") for name in names) == 8
    uploads = s3_client(server).list_multipart_uploads(Bucket="shards")
    assert uploads.get("Uploads", []) == []


def test_garbage_of_a_lost_attempt_is_found_and_removed(config_of: Configs, store: str) -> None:
    precompute(config_of(), scorer=ScriptedScorer())
    lost = location(f"{store}/data/00001-0badc0de.parquet")
    lost.write_bytes(b"half")
    location(f"{store}/data/notes.txt").write_text("mine")
    assert find_garbage(config_of().shards, older_than_hours=1).files == []
    garbage = find_garbage(config_of().shards, older_than_hours=0)
    assert [str(path) for path in garbage.files] == [str(lost)]
    remove_garbage(garbage)
    assert not lost.exists()
    assert "notes.txt" in sizes(location(f"{store}/data"))
    assert len(values(config_of())) == 11


def test_a_changed_object_is_refused_by_its_url_and_never_taken_from_the_cache(
    config_of: Configs, store: str
) -> None:
    manifest = precompute(config_of(), scorer=ScriptedScorer())
    whole = values(config_of())
    file = location(f"{store}/{manifest.shards[1].file}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    # The cache holds the right bytes under their hash, and serves them.
    file.write_bytes(bytes(data))
    assert values(config_of()) == whole
    for cached in Path(os.environ["DPO_OPT_CACHE"]).rglob("*.parquet"):
        cached.write_bytes(b"damaged")
    with pytest.raises(DataError, match="the bytes changed") as caught:
        values(config_of())
    assert caught.value.where == str(file)


def test_a_stores_refusal_is_explained(
    config_of: Configs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DpoOptError) as caught:
        precompute(config_of(shards="s3://nobodys-bucket/shards"), scorer=ScriptedScorer())
    assert (caught.value.where or "").startswith("s3://nobodys-bucket/shards")
    assert caught.value.what.startswith("the store refuses or does not answer (")
    assert main_exit("status", "--shards", "s3://nobodys-bucket/shards") in (1, 3)
    assert main_exit("status", "--shards", "nonsense://a/b") == 2
    assert "Traceback" not in capsys.readouterr().err


def main_exit(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_status_and_readers_work_from_the_command_line(
    config_of: Configs, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    precompute(config_of(), scorer=ScriptedScorer())
    assert main_exit("status", "--shards", store, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shards_committed"], found["pairs_kept"], found["finalized"]) == (4, 11, True)
    assert main_exit("verify", "--shards", store, "--json") == 0
    assert json.loads(capsys.readouterr().out)["integrity"] == {"ok": True, "problems": []}


WORKER = """
import sys, time
from fakes import ScriptedScorer
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import work
work(
    PrecomputeConfig.model_validate_json(sys.argv[1]),
    scorer=ScriptedScorer(before_call=lambda _: time.sleep(0.2)),
)
"""


def test_killed_workers_lose_nothing(config_of: Configs, store: str) -> None:
    config = config_of(pairs_per_shard=1)
    command = [sys.executable, "-c", WORKER]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    rng = np.random.default_rng(0)
    for _ in range(3):
        workers = [
            subprocess.Popen(
                [*command, config.model_copy(update={"worker_index": i, "num_workers": 2}).model_dump_json()],
                env=environment,
            )
            for i in range(2)
        ]
        deadline = time.monotonic() + 60
        before = len(sizes(location(f"{store}/commits")))
        while len(sizes(location(f"{store}/commits"))) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(float(rng.uniform(0, 0.4)))
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
    assert status(config.shards).shards_committed > 0
    precompute(config, scorer=ScriptedScorer())
    assert [pair[0] for pair in values(config)] == list(range(11))
    names = [name for name in sizes(location(f"{store}/commits")) if name.endswith(".json")]
    for text in read_all(location(f"{store}/commits"), names):
        json.loads(text)  # no commit is ever half there
