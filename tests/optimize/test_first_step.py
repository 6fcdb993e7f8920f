"""The comparison in the first step: whichever pairs show a planted defect, it is refused; nothing is left.

The other shards and single sequences are computed apart; tests/optimize/test_parity.py has the limits.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from planted_defects import CACHE, FORWARD, Scored, planted

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.first_step import FirstStep
from dpo_opt.optimize.forward.balance import forward_cost
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.micro_batches import SeeLogps
from dpo_opt.optimize.parity import Parity
from dpo_opt.optimize.parity_sample import pairs_beside
from dpo_opt.optimize.processes.distributed import World
from dpo_opt.optimize.step import Batching, forward_pairs
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.schemas.errors import FingerprintError, Preempted
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shard_folder import ShardFolder

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU, None)
Change = Callable[[list[ScoredPair]], list[ScoredPair]]


def shifted(pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
    return CACHE["values of the token before"](list(pairs))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def scored(request: pytest.FixtureRequest, tiny_model: Path, shards: Path, bf16_shards: Path) -> Scored:
    folder = shards if request.param == "float32" else bf16_shards
    return Scored(tiny_model, list(ShardFolder.open(folder).pairs()), request.param)


def plant(monkeypatch: pytest.MonkeyPatch, rows: Sequence[int], change: Change) -> None:
    """The shards hold other numbers in these rows, and their hashes are right."""
    exact = ShardFolder.row_groups

    def changed(self: ShardFolder, *args: Any, **settings: Any) -> Iterator[list[ScoredPair]]:
        for pairs in exact(self, *args, **settings):
            meant = [pair for pair in pairs if pair.row in rows]
            wrong = {pair.row: pair for pair in change(meant)} if meant else {}
            yield [wrong.get(pair.row, pair) for pair in pairs]

    monkeypatch.setattr(ShardFolder, "row_groups", changed)


def judged(scored: Scored, shards: Path, rows: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> Parity:
    """What a run that starts with these rows finds."""
    monkeypatch.setattr("dpo_opt.optimize.first_step.open_folder", lambda *_: None)
    folder = ShardFolder.open(shards)
    config = TrainConfig(shards=shards, model="model", output_dir=Path("run"))
    run: Any = SimpleNamespace(
        policy=scored.policy, prepared=SimpleNamespace(folder=folder), config=config, world=ALONE
    )
    pairs = [pair for pair in folder.pairs() if pair.row in rows]
    first = FirstStep(run, pairs)

    def forward(see: SeeLogps) -> Any:
        batching = Batching(512, forward_cost(scored.policy), ALONE)
        return forward_pairs(
            scored.policy,
            pairs,
            config,
            batching=batching,
            weights=None,
            backward=False,
            stop=StopSignals(),
            see=see,
        )

    state: Any = SimpleNamespace(parity=None)
    with torch.no_grad():
        first.results(state, forward)
    found: Parity = state.parity
    return found


STEP = (0, 3, 5, 16, 18, 21)
"""Rows of the shards 0 and 2; each shard has eight rows."""


def folder_of(scored: Scored, shards: Path, bf16_shards: Path) -> Path:
    return shards if scored.dtype == "float32" else bf16_shards


@pytest.mark.parametrize("step", [(11,), STEP, tuple(range(28))])
def test_what_is_sound_passes(
    scored: Scored, shards: Path, bf16_shards: Path, step: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = judged(scored, folder_of(scored, shards, bf16_shards), step, monkeypatch)
    assert parity.ok
    assert parity.tokens >= 700
    assert parity.pairs >= len(step)


@pytest.mark.parametrize("name", CACHE)
@pytest.mark.parametrize("rows", [STEP, tuple(range(28))], ids=["in the step", "everywhere"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_defect_of_the_cache_is_refused(
    scored: Scored,
    shards: Path,
    bf16_shards: Path,
    name: str,
    rows: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, rows, CACHE[name])
    with pytest.raises(FingerprintError):
        judged(scored, folder_of(scored, shards, bf16_shards), STEP, monkeypatch)


@pytest.mark.parametrize("name", ["sides swapped", "values of the token before", "another pair's values"])
@pytest.mark.parametrize("shard", [1, 3])
def test_a_shard_that_the_step_does_not_see_is_compared_too(
    scored: Scored, shards: Path, bf16_shards: Path, name: str, shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, range(8 * shard, 8 * shard + 8), CACHE[name])
    with pytest.raises(FingerprintError):
        judged(scored, folder_of(scored, shards, bf16_shards), STEP, monkeypatch)


@pytest.mark.parametrize("name", FORWARD)
def test_a_defect_of_the_forward_is_noticed(
    scored: Scored, shards: Path, bf16_shards: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted(name, scored.policy):
        refused = False
        try:
            judged(scored, folder_of(scored, shards, bf16_shards), STEP, monkeypatch)
        except FingerprintError:
            refused = True
        assert refused or scored.probe_objects()


# What is computed besides the step --------------------------------------------------------------------------


class OfLengths:
    """A folder of shards whose pairs have a given number of tokens on each side."""

    def __init__(self, shards: Path, *, sizes: Sequence[int], tokens: int, mask: bool = False) -> None:
        (self.pair,) = (pair for pair in ShardFolder.open(shards).pairs() if pair.row == 0)
        self.sizes, self.tokens, self.mask = sizes, tokens, mask

    def index(self, columns: Sequence[str]) -> pa.Table:
        numbers = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)
        rows = np.arange(len(numbers))
        found = {"shard": numbers, "row_group": 0 * rows, "row": rows}
        lengths = {name: np.full(len(rows), self.tokens) for name in ("chosen_length", "rejected_length")}
        return pa.table({**found, **lengths}).select(columns)

    def row_groups(self, shard: int, *, row_groups: Sequence[int]) -> Iterator[list[ScoredPair]]:
        begin = sum(self.sizes[:shard])
        yield [self.of(row) for row in range(begin, begin + self.sizes[shard])]

    def of(self, row: int) -> ScoredPair:
        ids, values = np.arange(self.tokens, dtype=np.int32), -np.arange(self.tokens, dtype=np.float32)
        mask = np.arange(self.tokens) >= self.tokens // 2 if self.mask else None
        return dataclasses.replace(
            self.pair, row=row, chosen_ids=ids, rejected_ids=ids, chosen_mask=mask, rejected_mask=mask,
            ref_chosen_token_logps=values, ref_rejected_token_logps=values,
        )  # fmt: skip

    def beside(self, rows: Sequence[int]) -> list[ScoredPair]:
        folder: Any = self
        return pairs_beside(folder, [self.of(row) for row in rows])


def test_a_step_that_shows_every_shard_is_enough(shards: Path) -> None:
    assert OfLengths(shards, sizes=[100], tokens=60).beside(range(8)) == []
    assert OfLengths(shards, sizes=[10, 10], tokens=60).beside([*range(6), 12, 13]) == []
    assert OfLengths(shards, sizes=[3], tokens=5).beside(range(3)) == []


def test_few_tokens_are_joined_by_more(shards: Path) -> None:
    found = OfLengths(shards, sizes=[50, 50], tokens=20).beside([7])
    assert 7 not in {pair.row for pair in found}
    assert 768 <= 40 + sum(pair.chosen_counted + pair.rejected_counted for pair in found) < 850
    assert len(OfLengths(shards, sizes=[50, 50], tokens=1).beside([7])) == 32


@pytest.mark.parametrize("count", [2, 31, 80])
def test_each_shard_that_the_step_hardly_shows_gives_one_pair(shards: Path, count: int) -> None:
    folder = OfLengths(shards, sizes=[300, *[9] * count], tokens=400)
    # Of the second shard, one of many.
    found = folder.beside([*range(100), 301])
    shards_of = [(pair.row - 300) // 9 for pair in found]
    assert len(shards_of) == len(set(shards_of)) == min(32, count)
    assert 301 not in {pair.row for pair in found}


@pytest.mark.parametrize("mask", [False, True])
def test_long_completions_are_cut_to_a_bounded_number_of_tokens(shards: Path, mask: bool) -> None:
    folder = OfLengths(shards, sizes=[8, *[5] * 20], tokens=3000, mask=mask)
    found = folder.beside(range(8))
    assert len(found) == 20
    for pair in found:
        whole = folder.of(pair.row)
        most = 2048 // 40
        assert pair.chosen_counted == pair.rejected_counted == most
        counting = whole.ref_chosen_token_logps[1500 if mask else 0 :]
        assert pair.ref_chosen_logps == counting[:most].sum()
        cut = len(pair.chosen_ids)
        assert cut == len(pair.ref_rejected_token_logps) == most + (1500 if mask else 0)
        np.testing.assert_array_equal(pair.chosen_ids, whole.chosen_ids[:cut])


# Whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(shards: Path, tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "shards": shards, "model": str(tiny_model), "output_dir": tmp_path / "run", "batch_size": 8,
        "max_steps": 1, "logging_steps": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"use_peft": True},
        {"dtype": "bfloat16"},
        {"eval_split": 0.3, "eval_steps": 1},
        {"micro_batch_tokens": 1},
        {"sample_by": "prompt", "loss_type": ["simpo"]},
        {"loss_type": ["aot"], "micro_batch_tokens": 1},
    ],
    ids=str,
)
def test_a_refusal_leaves_nothing(
    settings: dict[str, Any], others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, range(28), shifted)
    steps: list[int] = []
    # What an update begins with.
    monkeypatch.setattr("dpo_opt.optimize.loop.clip_gradients", lambda *_: steps.append(1))
    with pytest.raises(FingerprintError, match="the cached log-probs are not those of") as caught:
        train(TrainConfig(**{**settings, **others}))
    assert caught.value.exit_code == 4
    assert not steps
    assert not settings["output_dir"].exists()


def test_a_refused_resume_leaves_what_was_there(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_once(monkeypatch)
    with pytest.raises(Preempted, match="after step 0"):
        train(TrainConfig(**settings))
    monkeypatch.undo()
    run = settings["output_dir"]
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert {"config.resolved.yaml", "preempted.json"} == set(before)
    with monkeypatch.context() as patch:
        plant(patch, range(28), shifted)
        with pytest.raises(FingerprintError):
            train(TrainConfig(**settings, resume=True))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    result = train(TrainConfig(**settings, resume=True))
    assert result.steps == 1
    assert json.loads((run / "parity.json").read_text())["ok"] is True
    assert not (run / "preempted.json").exists()


def stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal comes before the first micro-batch."""
    check = StopSignals.check

    def stopping(signals: StopSignals, world: World, *, due: bool = False) -> bool:
        signals.request("SIGTERM")
        return check(signals, world, due=due)

    monkeypatch.setattr(StopSignals, "check", stopping)


def test_the_step_that_is_compared_is_the_one_that_is_trained(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    exact = Policy.batch_logps

    def counting(self: Policy, batch: Any, **others: Any) -> Any:
        if torch.is_grad_enabled():
            batches.append(len(batch.lengths))
        return exact(self, batch, **others)

    train(TrainConfig(**settings))
    plain = (settings["output_dir"] / "final" / "model.safetensors").read_bytes()
    monkeypatch.setattr(Policy, "batch_logps", counting)
    again = {**settings, "output_dir": settings["output_dir"].with_name("again")}
    result = train(TrainConfig(**again, micro_batch_tokens=100))
    assert result.parity is not None
    # Chosen and rejected of eight pairs, in several micro-batches, once.
    assert sum(batches) <= 16
    assert len(batches) > 1
    differs = {**settings, "output_dir": settings["output_dir"].with_name("differs")}
    train(TrainConfig(**differs, reference_differs=True))
    assert (differs["output_dir"] / "final" / "model.safetensors").read_bytes() == plain


def test_nothing_that_training_reads_imports_pandas(shards: Path) -> None:
    """pandas takes half a second, and pyarrow imports it wherever it is installed."""
    pytest.importorskip("pandas")
    program = (
        "import sys; from pathlib import Path\n"
        "from dpo_opt.optimize.parity_sample import pairs_beside\n"
        "from dpo_opt.optimize.stream import PairStream\n"
        "from dpo_opt.schemas.shard_folder import ShardFolder\n"
        "folder = ShardFolder.open(Path(sys.argv[1]))\n"
        "pairs_beside(folder, next(PairStream(folder, eval_split=0.2).steps(seed=0, size=2)))\n"
        "sys.exit('pandas' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(shards)], check=False)
    assert done.returncode == 0
