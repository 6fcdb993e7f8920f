"""A folder of shards in an object store behaves as one on a disk: the same workers, records and readers."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NUMERICS, ScriptedScorer, preference_rows, write_jsonl
from object_store import s3_client, serve_s3, using_store

from dpo_opt.analysis import scan_shards
from dpo_opt.cli import main
from dpo_opt.dry_run import plan_precompute
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.commits import is_committed
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.gc import find_garbage, remove_garbage
from dpo_opt.precompute.shards.make_plan import make_plan
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.shards.status import status
from dpo_opt.precompute.shards.write_plan import adopt_plan, settle_plan
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.workers.assignment import Worker, shards_for
from dpo_opt.schemas import storage
from dpo_opt.schemas.errors import DataError, DpoOptError, FingerprintError
from dpo_opt.schemas.locations import (
    fetch,
    is_file,
    location,
    on_this_machine,
    read_all,
    remove,
    sizes,
    stored_files,
)
from dpo_opt.schemas.manifest import TOKENIZER, load_manifest
from dpo_opt.schemas.shard_folder import ShardFolder, check_file
from dpo_opt.schemas.storage import file_names, sha256_file, sha256_folder, write_text

s3fs = pytest.importorskip("s3fs")

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
    differing = {"attempt", "file", "dropped_file", "bytes", "sha256", "finished", "seconds"}
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
    config_of: Configs, store: str, capsys: pytest.CaptureFixture[str]
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
    assert caught.value.fix == f"dpo-opt precompute --config {store}/precompute.yaml --shards {store}"
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
    folders = {"data", "dropped", "commits", "tokenizer"}
    top = {name for name in names if name.partition("/")[0] not in folders}
    beside = {"precompute.yaml", "model_config.json", "weights.json"}
    assert top == {"plan.json", "index.parquet", "manifest.json", *beside}
    assert [sum(name.startswith(f"{folder}/") for name in names) for folder in ("data", "dropped")] == [4, 4]
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


def test_a_stores_refusal_is_explained(config_of: Configs, capsys: pytest.CaptureFixture[str]) -> None:
    missing = "s3://nobodys-bucket/shards"
    config = config_of(shards=missing)
    for call in (
        lambda: precompute(config, scorer=ScriptedScorer()),
        lambda: plan_precompute(config, NUMERICS),
    ):
        with pytest.raises(DpoOptError, match="the store has no bucket s3://nobodys-bucket") as caught:
            call()
        assert (caught.value.where or "").startswith(missing)
        assert (caught.value.exit_code, caught.value.why is None, caught.value.fix is None) == (
            1,
            False,
            False,
        )
    commands = ("status", "verify", "finalize", "repair", "gc")
    for command in commands:
        assert main_exit(command, "--shards", missing) == 1, command
    assert capsys.readouterr().err.count("the store has no bucket s3://nobodys-bucket") == len(commands)
    assert main_exit("status", "--shards", "nonsense://a/b") == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "ask",
    [
        is_file,
        sizes,
        remove,
        stored_files,
        lambda path: sizes(path, prefix="a"),
        lambda path: read_all(path, ["a"]),
        lambda path: fetch(path, Path("x")),
        lambda path: fetch(path, Path("x"), names=["a"]),
        lambda path: write_text(path, "a"),
        lambda path: write_text(path, "a", replace=False),
    ],
)
def test_a_bucket_that_is_missing_is_no_empty_folder(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Any], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DpoOptError, match="the store has no bucket s3://nobodys-bucket"):
        ask(location("s3://nobodys-bucket/shards"))


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


def test_objects_that_only_mark_a_folder_are_no_files(config_of: Configs, server: str, store: str) -> None:
    """A store's console makes them where somebody creates a folder there."""
    config = config_of()
    precompute(config, scorer=ScriptedScorer())
    bucket, _, inside = store.removeprefix("s3://").partition("/")
    expected = file_names(config.shards), sha256_folder(config.shards / "tokenizer")
    for key in (f"{inside}/", f"{inside}/data/", f"{inside}/tokenizer/", f"{inside}/tokenizer/more/"):
        s3_client(server).put_object(Bucket=bucket, Key=key, Body=b"")
    assert (file_names(config.shards), sha256_folder(config.shards / "tokenizer")) == expected
    assert main_exit("verify", "--shards", store) == 0


LEAVING = ["../../{}/OWNED", "../OWNED", "sub/../../OWNED", "//OWNED", "C:\\OWNED", "..\\OWNED"]


@pytest.mark.parametrize("name", LEAVING)
def test_an_object_that_somebody_put_beside_the_tokenizer_is_never_written_here(
    config_of: Configs, server: str, store: str, tmp_path: Path, name: str
) -> None:
    """Its key leaves the folder; every reader of the bucket would otherwise write it on its own machine."""
    config = config_of()
    precompute(config, scorer=ScriptedScorer())
    bucket, _, inside = store.removeprefix("s3://").partition("/")
    key = f"{inside}/tokenizer/{name.format(tmp_path.name)}"
    s3_client(server).put_object(Bucket=bucket, Key=key, Body=b"theirs")
    listed = [item["Key"] for item in s3_client(server).list_objects_v2(Bucket=bucket)["Contents"]]
    assert key in listed, "then this test shows nothing"
    # What the manifest names is fetched, and nothing else is looked at.
    with ShardFolder.open(config.shards).tokenizer() as here:
        fetched = sorted(path.name for path in here.rglob("*"))
        assert fetched == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    # Whoever has no names, as in a folder from before they were written, refuses the listing.
    for fetch_all in (sha256_folder, lambda path: on_this_machine(path).__enter__()):
        with pytest.raises(DataError, match="does not stay inside the folder"):
            fetch_all(config.shards / "tokenizer")
    assert main_exit("verify", "--shards", store) == 3
    assert not [path for path in tmp_path.rglob("*") if "OWNED" in path.name]


def test_a_manifest_that_names_a_tokenizer_file_elsewhere_is_refused(config_of: Configs) -> None:
    config = config_of()
    precompute(config, scorer=ScriptedScorer())
    body = json.loads((config.shards / "manifest.json").read_text())
    del body["sha256"]
    body["tokenizer_files"].append("../../OWNED")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (config.shards / "manifest.json").write_text(json.dumps(body))
    with (
        pytest.raises(DataError, match=r"'\.\./\.\./OWNED' does not stay inside"),
        ShardFolder.open(config.shards).tokenizer(),
    ):
        pass


def test_an_object_that_was_added_to_the_tokenizer_is_not_fetched_and_named_by_verify(
    config_of: Configs, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of()
    precompute(config, scorer=ScriptedScorer())
    (config.shards / "tokenizer" / "added_tokens.json").write_text("{}")
    with ShardFolder.open(config.shards).tokenizer() as here:
        assert not (here / "added_tokens.json").exists()
    assert main_exit("verify", "--shards", store) == 3
    assert "is new among added_tokens.json" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["bucket", "odd name"])
def test_any_url_is_a_folder_like_any_other(
    config_of: Configs, server: str, store: str, tmp_path: Path, folder: str
) -> None:
    """A whole bucket, and a name with everything that means something to shells, URLs and patterns."""
    bucket = f"b-{abs(hash(store))}"
    s3_client(server).create_bucket(Bucket=bucket)
    url = f"s3://{bucket}" if folder == "bucket" else f"s3://{bucket}/a b/ü%20#x[1]*?/"
    config = config_of(shards=url)
    precompute(
        config_of(shards=url, data=write_jsonl(tmp_path / "few.jsonl", ROWS[:4])), scorer=ScriptedScorer()
    )
    precompute(config_of(shards=url, append=True), scorer=ScriptedScorer())
    assert [pair[0] for pair in values(config)] == list(range(11))
    assert status(config.shards).finalized
    lost = config.shards / "data" / "00001-0badc0de.parquet"
    lost.write_bytes(b"half")
    garbage = find_garbage(config.shards, older_than_hours=0)
    assert sorted(path.name for path in garbage.files) == ["00001-0badc0de.parquet", "index.parquet"]
    remove_garbage(garbage)
    assert [pair[0] for pair in values(config)] == list(range(11))
    keys = [item["Key"] for item in s3_client(server).list_objects_v2(Bucket=bucket)["Contents"]]
    inside = "" if folder == "bucket" else "a b/ü%20#x[1]*?/"
    assert f"{inside}index-11.parquet" in keys
    assert all(key.startswith(inside) for key in keys)


def test_a_plan_is_never_replaced_by_one_that_was_made_from_other_data(
    config_of: Configs, tmp_path: Path, tiny_model: Path, store: str
) -> None:
    made = []
    for i in range(2):
        config = config_of(data=write_jsonl(tmp_path / f"data-{i}.jsonl", ROWS[i:]))
        reference = resolve_reference(config)
        tokenizer = make_tokenizer(config, reference)
        made.append((config, make_plan(config, reference=reference, tokenizer=tokenizer, numerics=NUMERICS)))

    def slow(path: Path) -> None:
        """Another planner comes and goes while this one is at it."""
        load_tokenizer(tiny_model).save_pretrained(path)
        with pytest.raises(FingerprintError, match="run the same command again"):
            adopt_plan(*made[0], load_tokenizer(tiny_model).save_pretrained)

    assert adopt_plan(*made[1], slow) == made[1][1].plan
    assert read_plan(location(store)) == made[1][1].plan


def test_a_kill_while_planning_is_healed_by_the_same_command(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    settings = {"reference": resolve_reference(config), "numerics": NUMERICS}
    tokenizer = make_tokenizer(config, settings["reference"])
    put, left = storage.put_file, 3

    def put_some(*args: Any, **others: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        put(*args, **others)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_file", put_some)
        with pytest.raises(KeyboardInterrupt):
            settle_plan(config, tokenizer=tokenizer, **settings)
    whole = config_of(shards=f"{config.shards}-whole")
    for one in (config, whole):
        settle_plan(one, tokenizer=tokenizer, **settings)
    assert sha256_folder(config.shards / TOKENIZER) == sha256_folder(whole.shards / TOKENIZER)
    assert not is_file(config.shards / "plan.json.claim")


def test_several_fill_the_cache_at_once(config_of: Configs, tmp_path: Path) -> None:
    shards = config_of().shards
    commit = precompute(config_of(), scorer=ScriptedScorer()).shards[0]
    with ThreadPoolExecutor(8) as pool:
        (kept,) = set(pool.map(lambda _: check_file(shards, commit.file, commit.sha256), range(16)))
    assert sha256_file(kept) == commit.sha256
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [kept]


def test_looking_at_a_folder_takes_few_requests(config_of: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3

    async def count(self: Any, method: str, *args: Any, **others: Any) -> Any:
        requests[method] += 1
        return await call(self, method, *args, **others)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", count)

    def counted(look: Callable[[], object]) -> Counter[str]:
        requests.clear()
        look()
        return Counter(requests)

    shards = config_of().shards
    config = config_of(pairs_per_shard=1)
    precompute(config, scorer=ScriptedScorer())
    plan = read_plan(shards)
    # Whatever the number of shards: the plan and the manifest are read, and no commit.
    assert counted(lambda: status(shards))["get_object"] <= 4
    assert counted(lambda: finalize(shards))["get_object"] <= 4
    assert counted(lambda: is_committed(shards, plan.shards[0], plan)).total() <= 3
    assert counted(lambda: list(shards_for(Worker(0, 1), plan, shards))).total() <= 5
    remove(shards / "manifest.json")
    assert counted(lambda: is_committed(shards, plan.shards[0], plan)).total() <= 3
    # Each commit once, and listings.
    assert counted(lambda: status(shards)).total() <= len(plan.shards) + 10
    assert counted(lambda: list(shards_for(Worker(0, 1), plan, shards))).total() <= len(plan.shards) + 5
    # Each shard's commit, data and dropped rows once; index, the tokenizer's files, the plan three times.
    assert counted(lambda: finalize(shards)).total() <= 3 * len(plan.shards) + 44


@pytest.fixture(params=[403, 503])
def refusing(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a store that answers everything with this code."""
    name = {403: "AccessDenied", 503: "ServiceUnavailable"}[request.param]
    body = f"<Error><Code>{name}</Code><Message>Not now</Message></Error>".encode()

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(request.param)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as refuser:
        threading.Thread(target=refuser.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{refuser.server_port}"
        refuser.shutdown()


@pytest.mark.parametrize("command", ["status", "finalize", "gc", "verify"])
def test_a_refusal_is_never_taken_for_an_empty_folder(
    refusing: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with using_store(refusing):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        assert main_exit(command, "--shards", "s3://bucket/shards") == 1
    said = capsys.readouterr().err
    assert "the store refuses or does not answer (" in said
    assert "s3://bucket/shards" in said
    assert "hunter2" not in said


def test_a_record_that_is_empty_is_damaged_and_not_the_stores_fault(config_of: Configs, store: str) -> None:
    precompute(config_of(), scorer=ScriptedScorer())
    for name in ("manifest.json", "plan.json"):
        location(f"{store}/{name}").write_bytes(b"")
        with pytest.raises(DataError) as caught:
            finalize(location(store))
        assert (caught.value.where or "").endswith("manifest.json" if name == "manifest.json" else name)


def test_missing_credentials_are_named(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with using_store(server):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert main_exit("status", "--shards", "s3://shards/x") == 1
    assert "credentials" in capsys.readouterr().err


WORKER = """
import sys, time
from fakes import NUMERICS, ScriptedScorer
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
    # Both plan, at once.
    workers = [
        subprocess.Popen(
            [*command, config.model_copy(update={"worker_index": i, "num_workers": 2}).model_dump_json()],
            env=environment,
        )
        for i in range(2)
    ]
    deadline = time.monotonic() + 60
    for worker in workers:
        before = len(sizes(location(f"{store}/commits")))
        while len(sizes(location(f"{store}/commits"))) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert status(config.shards).shards_committed > 0
    precompute(config, scorer=ScriptedScorer())
    assert [pair[0] for pair in values(config)] == list(range(11))
    names = [name for name in sizes(location(f"{store}/commits")) if name.endswith(".json")]
    for text in read_all(location(f"{store}/commits"), names).values():
        json.loads(text)  # no commit is ever half there
