"""A run that is refused before anything is scored leaves a folder that can be planned anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import NUMERICS, ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.dry_run import plan_precompute
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.refused_plan import REFUSED
from dpo_opt.schemas.errors import ConfigError, FingerprintError, Preempted
from dpo_opt.schemas.manifest import COMMITS, MANIFEST, PLAN
from dpo_opt.schemas.sidecars import COLUMNS
from dpo_opt.schemas.storage import sha256_folder

HALF = NUMERICS._replace(dtype="float16")
Configs = Callable[..., PrecomputeConfig]


@pytest.fixture
def config_of(tiny_model: Path, tmp_path: Path) -> Configs:
    rows = [row | {"weight": 0.5} for row in preference_rows(8)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)

    def config(shards: str = "shards", **changes: Any) -> PrecomputeConfig:
        settings = {"model": str(tiny_model), "data": [str(data)], "shards": tmp_path / shards}
        return PrecomputeConfig.model_validate(settings | {"pairs_per_shard": 4} | changes)

    return config


def refuse_after(calls: int, error: BaseException | None = None) -> Callable[[int], None]:
    def refuse(done: int) -> None:
        if done == calls:
            raise error or ConfigError("the logits are not finite in float16")

    return refuse


def refused(config: PrecomputeConfig, *, after: int = 0) -> None:
    with pytest.raises(ConfigError, match="not finite in float16"):
        precompute(config, scorer=ScriptedScorer(numerics=HALF, before_call=refuse_after(after)))
    assert (config.shards / PLAN).is_file()


def content(shards: Path) -> dict[str, str]:
    """What belongs to a plan, by name."""
    return {
        name: sha256_folder(shards / name) if (shards / name).is_dir() else (shards / name).read_text()
        for name in (PLAN, "tokenizer", COLUMNS, "model_config.json")
    }


@pytest.mark.parametrize(
    ("scores", "changes"),
    [
        pytest.param(precompute, {}, id="the same settings, another dtype"),
        pytest.param(precompute, {"max_length": 64, "pairs_per_shard": 3}, id="other settings"),
        pytest.param(precompute, {"data_share": [0.6]}, id="other rows"),
        pytest.param(work, {"worker_index": 0, "num_workers": 1}, id="a worker"),
    ],
)
def test_after_a_refusal_the_folder_is_planned_anew(
    config_of: Configs, scores: Callable[..., object], changes: dict[str, Any]
) -> None:
    refused(config_of())
    rows = plan_precompute(config_of(**changes), NUMERICS)["rows"]
    scores(config_of(**changes), scorer=ScriptedScorer())
    scores(config_of("alone", **changes), scorer=ScriptedScorer())
    shards, alone = (config_of(name).shards for name in ("shards", "alone"))
    assert content(shards) == content(alone)
    assert not (shards / REFUSED).exists()
    assert (shards / MANIFEST).exists() == (scores is precompute)
    assert rows == plan_precompute(config_of("alone", **changes), NUMERICS)["rows"]


def test_the_model_may_be_mended(config_of: Configs, other_model: Path) -> None:
    refused(config_of())
    precompute(config_of(model=str(other_model)), scorer=ScriptedScorer())
    precompute(config_of("alone", model=str(other_model)), scorer=ScriptedScorer())
    assert content(config_of().shards) == content(config_of("alone").shards)


def test_the_refused_run_itself_may_go_on(config_of: Configs) -> None:
    refused(config_of())
    planned = (config_of().shards / PLAN).read_text()
    assert precompute(config_of(), scorer=ScriptedScorer(numerics=HALF)).kept == 8
    assert (config_of().shards / PLAN).read_text() == planned


def test_the_last_of_several_workers_to_leave_makes_way(config_of: Configs) -> None:
    """One that is stopped meanwhile notes nothing."""
    mark = config_of().shards / COMMITS / ".00001.00000000.tmp"
    mark.parent.mkdir(parents=True)
    mark.write_text("[]")
    refused(config_of())
    with pytest.raises(FingerprintError, match="not computed for this run"):
        precompute(config_of(), scorer=ScriptedScorer())
    mark.unlink()
    assert precompute(config_of(), scorer=ScriptedScorer()).kept == 8


def test_a_plan_stands_while_a_shard_of_it_is_scored_or_being_scored(config_of: Configs) -> None:
    refused(config_of(), after=1)
    with pytest.raises(FingerprintError, match="not computed for this run"):
        precompute(config_of(), scorer=ScriptedScorer())
    refused(config_of("other"))
    # Another worker begins after the refusal.
    (config_of("other").shards / COMMITS / ".00001.00000000.tmp").write_text("[]")
    with pytest.raises(FingerprintError, match="not computed for this run"):
        precompute(config_of("other"), scorer=ScriptedScorer())


@pytest.mark.parametrize("error", [Preempted("the machine is needed"), KeyboardInterrupt()])
def test_a_plan_stands_that_was_not_refused(config_of: Configs, error: BaseException) -> None:
    """Its run goes on as soon as it may; workers of the same plan may be waiting meanwhile."""
    with pytest.raises(type(error)):
        precompute(config_of(), scorer=ScriptedScorer(numerics=HALF, before_call=refuse_after(0, error)))
    with pytest.raises(FingerprintError, match="not computed for this run"):
        precompute(config_of(), scorer=ScriptedScorer())


class Killed(BaseException):
    """As kill -9 would: nothing is cleaned up that a handler could."""


@pytest.mark.parametrize("step", range(1, 7))
def test_a_kill_while_the_plan_is_replaced_is_healed_by_the_same_command(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """At every file that is removed."""
    from dpo_opt.precompute.shards import refused_plan

    refused(config_of())
    remove, left = refused_plan.remove, [step]

    def killed(path: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(refused_plan, "remove", killed)
        with pytest.raises(Killed):
            precompute(config_of(max_length=64), scorer=ScriptedScorer())
    precompute(config_of(max_length=64), scorer=ScriptedScorer())
    precompute(config_of("alone", max_length=64), scorer=ScriptedScorer())
    assert content(config_of().shards) == content(config_of("alone").shards)
    assert not list(config_of().shards.glob("*.claim"))


def test_of_two_other_runs_the_first_has_the_folder(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes when the first has claimed the folder, and has not removed the old plan yet."""
    from dpo_opt.precompute.shards import write_plan

    refused(config_of())
    take_back = write_plan.take_back

    def take_back_late(shards: Path, *, first: str) -> None:
        monkeypatch.setattr(write_plan, "take_back", take_back)
        with pytest.raises(FingerprintError, match="not computed for this run"):
            precompute(config_of(max_length=32), scorer=ScriptedScorer())
        take_back(shards, first=first)

    monkeypatch.setattr(write_plan, "take_back", take_back_late)
    assert precompute(config_of(max_length=64), scorer=ScriptedScorer()).fingerprint.max_length == 64
