import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import NUMERICS, ScriptedScorer, preference_rows, scripted_logps, write_jsonl
from model_edits import lose_a_merge

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.shards.status import status
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, FingerprintError
from dpo_opt.schemas.manifest import COMMITS, DATA, DROPPED, MANIFEST, PLAN, load_manifest
from dpo_opt.schemas.pairs import LogpArray, PreferencePair, ScoredPair, TokenizedPair
from dpo_opt.schemas.shard_folder import ShardFolder

ROWS = preference_rows(11)
ROWS[6]["rejected"] = ROWS[6]["chosen"]  # dropped
SHARDS = 4  # of 3 rows, the last of 2

Configs = Callable[..., PrecomputeConfig]


@pytest.fixture
def config_of(tiny_model: Path, tmp_path: Path) -> Configs:
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)

    def config(**settings: Any) -> PrecomputeConfig:
        values = {"model": str(tiny_model), "data": data, "shards": tmp_path / "shards", "pairs_per_shard": 3}
        return PrecomputeConfig.model_validate(values | settings)

    return config


def tokenized(config: PrecomputeConfig, rows: list[dict[str, Any]]) -> list[TokenizedPair]:
    """What is kept of some rows."""
    tokenizer = make_tokenizer(config, resolve_reference(config))
    pairs = [
        tokenizer(PreferencePair(i, r["prompt"], r["chosen"], r["rejected"], r["source"], f"row {i}"))
        for i, r in enumerate(rows)
    ]
    return [p for p in pairs if isinstance(p, TokenizedPair)]


def content(shards: Path) -> list[dict[str, Any]]:
    """Every pair of a folder as plain values."""
    return [values(p) for p in ShardFolder.open(shards).pairs()]


def values(pair: ScoredPair) -> dict[str, Any]:
    fields = {name: getattr(pair, name) for name in pair.__dataclass_fields__}
    return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in fields.items()}


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_every_pair_has_the_scorers_values(config_of: Configs) -> None:
    config = config_of()
    precompute(config, scorer=ScriptedScorer())
    expected = [
        {
            "row": p.row,
            "source": p.source,
            "prompt_ids": p.prompt_ids.tolist(),
            "chosen_ids": p.chosen_ids.tolist(),
            "rejected_ids": p.rejected_ids.tolist(),
            "chosen_truncated": False,
            "rejected_truncated": False,
            "id": None,
            "chosen_mask": None,
            "rejected_mask": None,
            "label": None,
            "ref_chosen_token_logps": scripted_logps(p.prompt_ids, p.chosen_ids).tolist(),
            "ref_rejected_token_logps": scripted_logps(p.prompt_ids, p.rejected_ids).tolist(),
        }
        for p in tokenized(config, ROWS)
    ]
    assert len(expected) == 10
    assert content(config.shards) == expected
    # Values that were all alike could be in any order.
    assert len({str(e["ref_chosen_token_logps"]) for e in expected}) == 10


def test_every_row_is_accounted_for(config_of: Configs) -> None:
    config = config_of()
    manifest = precompute(config, scorer=ScriptedScorer())
    kept = [p["row"] for p in content(config.shards)]
    left_out = [
        row
        for shard in manifest.shards
        for row in pq.read_table(config.shards / shard.dropped_file)["row"].to_pylist()
    ]
    assert left_out == [6]
    assert sorted(kept + left_out) == list(range(11))
    assert (manifest.rows, manifest.kept, manifest.dropped) == (11, 10, {"identical_completions": 1})


def test_truncated_pairs_are_counted(config_of: Configs) -> None:
    manifest = precompute(config_of(max_length=14), scorer=ScriptedScorer())
    cut = [p["chosen_truncated"] or p["rejected_truncated"] for p in content(config_of().shards)]
    assert 0 < manifest.truncated == sum(cut)
    assert all(len(p["prompt_ids"]) + len(p["chosen_ids"]) <= 14 for p in content(config_of().shards))


def test_equal_sequences_are_scored_once(config_of: Configs, tmp_path: Path) -> None:
    answers = [" one", " two", " three", " four"]
    rows = [
        {"prompt": "Count:", "chosen": a, "rejected": b, "source": None}
        for i, a in enumerate(answers)
        for b in answers[i + 1 :]
    ]
    other = [{**row, "prompt": "Say:"} for row in rows]
    mixed = [row for pair in zip(rows, other, strict=True) for row in pair]
    config = config_of(data=write_jsonl(tmp_path / "mixed.jsonl", mixed), pairs_per_shard=100)
    scorer = ScriptedScorer()
    manifest = precompute(config, scorer=scorer)
    assert manifest.kept == 12
    assert len(scorer.scored) == 8
    assert manifest.shards[0].unique_sequences == 8
    assert max(Counter(s.key for s in scorer.scored).values()) == 1
    # Completions of one prompt stand together, so that a scorer can reuse the prompt's work.
    prompts = [s.prompt_ids.tobytes() for s in scorer.scored]
    assert sum(a != b for a, b in itertools.pairwise(prompts)) == 1
    for pair in ShardFolder.open(config.shards).pairs():
        right = scripted_logps(pair.prompt_ids, pair.rejected_ids)
        assert np.array_equal(pair.ref_rejected_token_logps, right)


def test_a_finished_folder_is_not_scored_again(config_of: Configs) -> None:
    manifest = precompute(config_of(), scorer=ScriptedScorer())
    before = files(config_of().shards)
    scorer = ScriptedScorer()
    assert precompute(config_of(), scorer=scorer) == manifest
    assert scorer.calls == []
    assert files(config_of().shards) == before


class Interrupted(BaseException):
    """Like SIGKILL, nothing in the project catches it."""


@pytest.mark.parametrize("done", range(SHARDS))
def test_an_interrupted_run_goes_on_where_it_stopped(config_of: Configs, tmp_path: Path, done: int) -> None:
    undisturbed = config_of(shards=tmp_path / "undisturbed")
    precompute(undisturbed, scorer=ScriptedScorer())

    def stop(calls: int) -> None:
        if calls == done:
            raise Interrupted

    config = config_of()
    with pytest.raises(Interrupted):
        precompute(config, scorer=ScriptedScorer(before_call=stop))
    assert not (config.shards / MANIFEST).exists()
    assert status(config.shards).shards_committed == done

    scorer = ScriptedScorer()
    precompute(config, scorer=scorer)
    assert len(scorer.calls) == SHARDS - done
    assert content(config.shards) == content(undisturbed.shards)


def test_an_interruption_at_any_moment_of_writing_loses_at_most_one_shard(
    config_of: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    left = 10**9

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    undisturbed = config_of(shards=tmp_path / "undisturbed")
    precompute(undisturbed, scorer=ScriptedScorer())
    expected, synced = content(undisturbed.shards), 10**9 - left
    assert synced > 2 * (2 + 3 * SHARDS)
    for moment in range(synced):
        config = config_of(shards=tmp_path / f"shards-{moment}")
        first, second = ScriptedScorer(), ScriptedScorer()
        left = moment
        with pytest.raises(Interrupted):
            precompute(config, scorer=first)
        left = 10**9
        precompute(config, scorer=second)
        assert content(config.shards) == expected
        assert len(first.calls) + len(second.calls) <= SHARDS + 1


CHILD = """
import sys, time
from pathlib import Path
from fakes import ScriptedScorer
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute

model, data, shards, free, seconds = sys.argv[1:]

def wait(calls):
    print("scoring", flush=True)
    if calls >= int(free):
        time.sleep(float(seconds))

config = PrecomputeConfig(model=model, data=data, shards=Path(shards), pairs_per_shard=3)
precompute(config, scorer=ScriptedScorer(before_call=wait))
"""


def start_child(config: PrecomputeConfig, *, free: int, seconds: float) -> subprocess.Popen[str]:
    """A process that runs precompute; from call ``free`` on, each call takes ``seconds``."""
    arguments = [config.model, config.data[0], str(config.shards), str(free), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_loses_only_the_shard_it_was_at(config_of: Configs, tmp_path: Path) -> None:
    undisturbed = config_of(shards=tmp_path / "undisturbed")
    precompute(undisturbed, scorer=ScriptedScorer())
    config = config_of()
    with start_child(config, free=2, seconds=60) as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(3)] == ["scoring\n"] * 3
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="no manifest"):
        load_manifest(config.shards)
    assert status(config.shards).shards_committed == 2
    scorer = ScriptedScorer()
    precompute(config, scorer=scorer)
    assert len(scorer.calls) == 2
    assert content(config.shards) == content(undisturbed.shards)


def test_two_processes_fill_one_folder_together(config_of: Configs, tmp_path: Path) -> None:
    undisturbed = config_of(shards=tmp_path / "undisturbed")
    precompute(undisturbed, scorer=ScriptedScorer())
    config = config_of()
    children = [start_child(config, free=0, seconds=0.2) for _ in range(2)]
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode == 0
    assert content(config.shards) == content(undisturbed.shards)
    rows = ShardFolder.open(config.shards).index()["row"].to_pylist()
    assert len(rows) == len(set(rows)) == 10
    assert not [name for name in files(config.shards) if ".tmp" in name]


def one_nan(answers: list[LogpArray]) -> list[LogpArray]:
    answers[-1] = answers[-1].copy()
    answers[-1][-1] = np.nan
    return answers


SPOILED: dict[str, Callable[[list[LogpArray]], list[LogpArray]]] = {
    "nan": one_nan,
    "minus_infinity": lambda answers: [*answers[:-1], np.full_like(answers[-1], -np.inf)],
    "positive": lambda answers: [*answers[:-1], np.abs(answers[-1]) + 0.01],
    "one_token_short": lambda answers: [answers[0][:-1], *answers[1:]],
    "one_token_long": lambda answers: [np.append(answers[0], np.float32(-1)), *answers[1:]],
    "empty": lambda answers: [np.zeros(0, np.float32), *answers[1:]],
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_values_that_are_no_log_probs_are_not_committed(config_of: Configs, spoil: str) -> None:
    config = config_of()
    with pytest.raises(DpoOptError, match="not log-probs") as caught:
        precompute(config, scorer=ScriptedScorer(spoil=SPOILED[spoil]))
    assert caught.value.exit_code == 1
    assert "source row" in str(caught.value.where)
    assert status(config.shards).shards_committed == 0
    assert not [name for name in files(config.shards) if name.startswith(("data", "commits"))]


def test_a_missing_answer_is_not_committed(config_of: Configs) -> None:
    with pytest.raises(DpoOptError, match="5 answers for 6 sequences"):
        precompute(config_of(), scorer=ScriptedScorer(spoil=lambda answers: answers[:-1]))
    assert status(config_of().shards).shards_committed == 0


def test_rounding_above_zero_is_allowed(config_of: Configs) -> None:
    tiny = ScriptedScorer(spoil=lambda answers: [np.full_like(a, 5e-4) for a in answers])
    assert precompute(config_of(), scorer=tiny).kept == 10


def test_data_that_changes_after_planning_is_noticed(config_of: Configs) -> None:
    def interrupt(calls: int) -> None:
        if calls == 2:
            raise KeyboardInterrupt

    config = config_of()
    with pytest.raises(KeyboardInterrupt):
        precompute(config, scorer=ScriptedScorer(before_call=interrupt))
    data = Path(config.data[0])
    write_jsonl(data, [*ROWS[:7], {**ROWS[7], "chosen": " Something else"}, *ROWS[8:]])
    with pytest.raises(DataError, match="rows 6 to 9 changed") as caught:
        work(config_of(worker_index=0, num_workers=1), scorer=ScriptedScorer())
    assert caught.value.where == str(data)
    assert status(config.shards).shards_committed == 2
    with pytest.raises(FingerprintError, match="its data has 11 rows"):
        precompute(config, scorer=ScriptedScorer())
    write_jsonl(data, ROWS)
    assert precompute(config, scorer=ScriptedScorer()).kept == 10


def test_another_run_in_the_same_folder_is_refused_and_changes_nothing(
    config_of: Configs, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_of()
    precompute(config, scorer=ScriptedScorer())
    before = {name: (config.shards / name).read_bytes() for name in files(config.shards)}
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    half = ScriptedScorer(numerics=ScriptedScorer().numerics._replace(dtype="bfloat16"))
    attempts: list[tuple[PrecomputeConfig, ScriptedScorer, str]] = [
        (config_of(max_length=100), ScriptedScorer(), "max_length"),
        (config_of(model=str(model)), ScriptedScorer(), "chat_template"),
        (config_of(), half, "dtype"),
        (config_of(data=write_jsonl(tmp_path / "d.jsonl", ROWS[1:])), ScriptedScorer(), "10 rows"),
    ]
    for other, scorer, named in attempts:
        with pytest.raises(FingerprintError) as caught:
            precompute(other, scorer=scorer)
        assert named in caught.value.what
        assert caught.value.where == str(config.shards)
        assert scorer.calls == []
    assert {name: (config.shards / name).read_bytes() for name in files(config.shards)} == before


@pytest.mark.parametrize(
    "line", [b"{", b'{"prompt": "a", "chosen": "b"}', b'{"prompt": "a", "chosen": "b", "rejected": ""}']
)
def test_a_malformed_row_leaves_no_folder(config_of: Configs, line: bytes) -> None:
    config = config_of()
    with Path(config.data[0]).open("ab") as file:
        file.write(line + b"\n")
    scorer = ScriptedScorer()
    with pytest.raises(DataError) as caught:
        precompute(config, scorer=scorer)
    assert caught.value.where == f"{config.data[0]}:12"
    assert scorer.calls == []
    assert not config.shards.exists()


def test_unusable_settings_leave_no_folder(config_of: Configs) -> None:
    for settings, kind in (
        ({"max_length": 2}, DataError),
        ({"max_length": 100_000}, ConfigError),
        ({"model": "nowhere"}, ConfigError),
    ):
        config = config_of(**settings)
        with pytest.raises(kind):
            precompute(config, scorer=ScriptedScorer())
        assert not config.shards.exists()


class Counted:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.total = self.done = self.before = self.finished = 0

    def start(self, what: str, *, total: int, unit: str, done: int = 0) -> None:
        assert (what, unit) == ("scoring", "pairs")
        self.total, self.before = total, done

    def advance(self, count: int, note: str = "") -> None:
        self.done += count

    def finish(self) -> None:
        self.finished += 1

    def say(self, line: str) -> None:
        pass


def test_progress_counts_the_whole_folder(config_of: Configs) -> None:
    def stop(calls: int) -> None:
        if calls == 1:
            raise Interrupted

    first, second = Counted(), Counted()
    with pytest.raises(Interrupted):
        precompute(config_of(), scorer=ScriptedScorer(before_call=stop), progress=first)
    precompute(config_of(), scorer=ScriptedScorer(), progress=second)
    assert (first.total, first.before, first.done) == (11, 0, 3)
    assert (second.total, second.before, second.done, second.finished) == (11, 3, 8, 1)


def test_a_worker_counts_what_the_others_do(config_of: Configs, tmp_path: Path) -> None:
    """Others score all shards while it is at its first."""
    others = config_of(shards=tmp_path / "others")
    precompute(others, scorer=ScriptedScorer())
    one, seen = config_of(worker_index=0, num_workers=2), Counted()

    def meanwhile(calls: int) -> None:
        for folder in (DATA, DROPPED, COMMITS):
            shutil.copytree(others.shards / folder, one.shards / folder, dirs_exist_ok=True)

    def stop(calls: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        work(one, scorer=ScriptedScorer(before_call=stop))
    # A record that counts for nothing is no progress.
    (one.shards / COMMITS).mkdir(exist_ok=True)
    (one.shards / COMMITS / "00003-00000000.json").touch()
    assert work(one, scorer=ScriptedScorer(before_call=meanwhile), progress=seen) == 1
    assert (seen.total, seen.before, seen.done) == (11, 0, 11)


def test_a_commit_says_who_made_it_and_when(config_of: Configs) -> None:
    begun = datetime.now(UTC)
    config = config_of(worker_index=1, num_workers=2)
    work(config, scorer=ScriptedScorer(before_call=lambda calls: time.sleep(0.01)))
    for path in (config.shards / "commits").iterdir():
        record = json.loads(path.read_text())
        assert (record["host"], record["worker"]) == (socket.gethostname(), 1)
        finished = datetime.fromisoformat(record["finished"])
        assert finished.utcoffset() == timedelta(0)
        assert begun <= finished <= datetime.now(UTC)
        assert 0.01 <= record["seconds"] < 60
    found = status(config.shards)
    assert found.share_done == 1
    assert found.pairs_per_second
    assert [(w.worker, w.pairs) for w in found.workers] == [(1, 11)]
    plan = (config.shards / "plan.json").read_text()
    assert socket.gethostname() not in plan


def test_messages_are_scored_through_the_chat_template(config_of: Configs, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Hi {i}"}],
            "chosen": [{"role": "assistant", "content": "Hello"}],
            "rejected": [{"role": "assistant", "content": "Go"}],
        }
        for i in range(3)
    ]
    config = config_of(data=write_jsonl(tmp_path / "chat.jsonl", rows))
    precompute(config, scorer=ScriptedScorer())
    tokenizer = make_tokenizer(config, resolve_reference(config)).tokenizer
    for i, pair in enumerate(ShardFolder.open(config.shards).pairs()):
        text = tokenizer.decode(np.concatenate([pair.prompt_ids, pair.chosen_ids]))
        assert text == f"<s>user: Hi {i} assistant: Hello</s> "
    assert json.loads((config.shards / "plan.json").read_text())["fingerprint"]["chat_template"] != "none"


TOOL_USE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m['content'] }} {% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "up", "parameters": {}}}]


@pytest.mark.parametrize("named", [True, False])
def test_a_row_with_tools_is_rendered_by_the_template_that_the_tokenizer_has_for_them(
    config_of: Configs, tiny_model: Path, tmp_path: Path, named: bool
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
    if not named:
        (model / "chat_template.jinja").unlink()
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes"))]
    row = {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{**turns[1], "content": "No"}]}
    data = write_jsonl(tmp_path / "chat.jsonl", [{**row, "tools": TOOLS}, *([row] if named else [])])
    config = config_of(model=str(model), data=data)
    precompute(config, scorer=ScriptedScorer())
    tokenizer = make_tokenizer(config, resolve_reference(config)).tokenizer
    found = list(ShardFolder.open(config.shards).pairs())
    for pair, tools in zip(found, [TOOLS, None], strict=False):
        own = tokenizer.apply_chat_template(turns, tools=tools, return_dict=False)
        assert [*pair.prompt_ids, *pair.chosen_ids] == own
        assert ("look" in tokenizer.decode(pair.prompt_ids)) == (tools is not None)
    if not named:
        write_jsonl(data, [row])
        with pytest.raises(DataError, match="templates for rows with tools alone"):
            precompute(config_of(model=str(model), data=data, shards=tmp_path / "s"), scorer=ScriptedScorer())


def test_a_clock_in_the_template_for_tools_is_told_one_date(
    config_of: Configs, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    assert make_tokenizer(config_of(), resolve_reference(config_of())).template_date is None
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ strftime_now('%d') }}" + TOOL_USE)
    config = config_of(model=str(model))
    assert make_tokenizer(config, resolve_reference(config)).template_date is not None


# A folder without its plan, as a copy for readers is -------------------------------------------------------


@pytest.fixture
def copied(config_of: Configs) -> Path:
    """A finished folder without what no reader needs."""
    shards = Path(config_of().shards)
    precompute(config_of(), scorer=ScriptedScorer())
    shutil.rmtree(shards / COMMITS)
    for name in (PLAN, "precompute.yaml", "weights.json"):
        (shards / name).unlink()
    return shards


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def other_weights(model: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


OTHER_RUNS: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any]]] = {
    "weights": (other_weights, {}),
    "tokenizer": (lose_a_merge, {}),
    "max_length": (None, {"max_length": 100}),
}


@pytest.mark.parametrize("field", OTHER_RUNS)
def test_a_copy_without_its_plan_refuses_another_model_by_what_differs(
    field: str, copied: Path, config_of: Configs, tiny_model: Path, tmp_path: Path
) -> None:
    change, settings = OTHER_RUNS[field]
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    if change is not None:
        change(model)
    before, scorer = bytes_of(copied), ScriptedScorer()
    for others in ({}, {"worker_index": 0, "num_workers": 2}):
        with pytest.raises(FingerprintError) as caught:
            precompute(config_of(model=str(model), **settings, **others), scorer=scorer)
        assert [line.split()[0] for line in caught.value.what.splitlines()[2:-1]] == [field]
        assert caught.value.exit_code == 4
    assert bytes_of(copied) == before
    assert scorer.calls == []


def test_a_copy_without_its_plan_refuses_other_data_of_the_same_length(
    copied: Path, config_of: Configs, tmp_path: Path
) -> None:
    before = bytes_of(copied)
    data = write_jsonl(tmp_path / "other.jsonl", [*ROWS[:-1], {**ROWS[-1], "chosen": " Another."}])
    with pytest.raises(FingerprintError, match="its data has 11 rows with digest"):
        precompute(config_of(data=data), scorer=ScriptedScorer())
    with pytest.raises(FingerprintError, match="hold 3 rows, --pairs-per-shard now gives 4"):
        precompute(config_of(pairs_per_shard=4), scorer=ScriptedScorer())
    assert bytes_of(copied) == before


def test_a_copy_without_its_plan_is_finished_for_the_same_run_and_grows(
    copied: Path, config_of: Configs, tmp_path: Path
) -> None:
    before, scorer = bytes_of(copied), ScriptedScorer()
    manifest = precompute(config_of(), scorer=scorer)
    assert scorer.calls == []
    assert manifest == load_manifest(copied)
    assert {name: content for name, content in bytes_of(copied).items() if name in before} == before
    for rows in (14, 16):
        (copied / PLAN).unlink()
        for path in copied.glob("plan-*.json"):
            path.unlink()
        grown = write_jsonl(tmp_path / "grown.jsonl", [*ROWS, *preference_rows(16)[11:rows]])
        scorer = ScriptedScorer()
        assert precompute(config_of(data=grown, append=True), scorer=scorer).rows == rows
        assert len(scorer.scored) == {14: 6, 16: 4}[rows]


def test_a_manifest_of_something_else_than_the_plan_is_not_a_result_and_not_replaced(
    config_of: Configs, tmp_path: Path
) -> None:
    precompute(config_of(), scorer=ScriptedScorer())
    shards = Path(config_of().shards)
    data = write_jsonl(tmp_path / "other.jsonl", [*ROWS[:-1], {**ROWS[-1], "chosen": " Another."}])
    others = {
        "its data": (config_of(data=data, shards=tmp_path / "data"), ScriptedScorer()),
        "dtype": (
            config_of(shards=tmp_path / "dtype"),
            ScriptedScorer(numerics=NUMERICS._replace(dtype="bfloat16")),
        ),
    }
    kept = (shards / MANIFEST).read_bytes()
    for what, (config, scorer) in others.items():
        precompute(config, scorer=scorer)
        shutil.copy(config.shards / PLAN, shards / PLAN)
        shutil.copytree(config.shards / COMMITS, shards / COMMITS, dirs_exist_ok=True)
        shutil.copytree(config.shards / "data", shards / "data", dirs_exist_ok=True)
        assert not status(shards).finalized
        with pytest.raises(FingerprintError, match="the plan of 11 rows" if what == "its data" else what):
            finalize(shards)
        assert (shards / MANIFEST).read_bytes() == kept


def test_a_folder_goes_on_with_other_settings_of_memory(config_of: Configs) -> None:
    """Also one from when they were recorded."""

    def scorer(options: str, stop: int = 99) -> ScriptedScorer:
        def told(call: int) -> None:
            if call == stop:
                raise KeyboardInterrupt

        return ScriptedScorer(numerics=NUMERICS._replace(engine_options=options), before_call=told)

    with pytest.raises(KeyboardInterrupt):
        precompute(config_of(), scorer=scorer('{"max_num_seqs":64,"quantization":"fp8"}', stop=2))
    with pytest.raises(FingerprintError, match="engine_options"):
        precompute(config_of(), scorer=scorer('{"max_num_seqs":64}'))
    worker = {"worker_index": 1, "num_workers": 2}
    with pytest.raises(FingerprintError, match="engine_options"):
        work(config_of(**worker), scorer=scorer('{"max_num_seqs":64}'))
    last = scorer('{"enforce_eager":true,"quantization":"fp8"}', stop=1)
    with pytest.raises(KeyboardInterrupt):
        work(config_of(**worker), scorer=last)
    assert status(config_of().shards).shards_committed == 3
    precompute(config_of(), scorer=scorer('{"quantization":"fp8"}'))
    assert len(content(Path(config_of().shards))) == 10
