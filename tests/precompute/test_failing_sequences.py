import dataclasses
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import NUMERICS, ScriptedScorer, preference_rows, scripted_logps, write_jsonl
from safetensors.torch import load_file, save_file

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.engine import vllm_model
from dpo_opt.precompute.engine.failing_sequences import (
    ENGINE_ERROR,
    MOST_LEFT_OUT,
    Losses,
    score_or_leave_out,
)
from dpo_opt.precompute.engine.process_death import death_is_noticed
from dpo_opt.precompute.engine.score_pairs import score_pairs
from dpo_opt.precompute.engine.vllm_model import VllmModel
from dpo_opt.precompute.run import precompute, work
from dpo_opt.schemas.errors import ConfigError, DpoOptError, EngineStopped, Preempted
from dpo_opt.schemas.pairs import LogpArray, TokenizedPair, TokenSequence
from dpo_opt.schemas.progress import Silent
from dpo_opt.schemas.shard_folder import ShardFolder


class Engine:
    """A scorer that breaks or gives NaN by rule; each break counts as a start of the engine.

    Args:
        breaks: Raised when it returns an exception for what is asked together.
        nan: Sequences whose last value is no number.
    """

    numerics = NUMERICS

    def __init__(
        self,
        breaks: Callable[[Sequence[TokenSequence]], Exception | None] = lambda asked: None,
        *,
        nan: Callable[[TokenSequence, int], bool] = lambda sequence, together: False,
    ) -> None:
        self.calls = self.failures = 0
        self._breaks, self._nan = breaks, nan

    def token_logps(self, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
        self.calls += 1
        error = self._breaks(sequences)
        if error is not None:
            self.failures += 1
            raise error
        found = [scripted_logps(s.prompt_ids, s.completion_ids) for s in sequences]
        for sequence, values in zip(sequences, found, strict=True):
            if self._nan(sequence, len(sequences)):
                values[-1] = np.nan
        return found


def sequences(count: int) -> list[TokenSequence]:
    """The last token of each is its number."""
    return [
        TokenSequence(np.array([1, 2, i % 5], np.int32), np.array([7, i], np.int32)) for i in range(count)
    ]


def number(sequence: TokenSequence) -> int:
    return int(sequence.completion_ids[-1])


def bad(*numbers: int, error: Exception | None = None) -> Callable[[Sequence[TokenSequence]], Any]:
    raised = error or RuntimeError("device-side assert\nmore")
    return lambda asked: (
        raised if {number(s) for s in asked if len(s.completion_ids) > 1} & {*numbers} else None
    )


@pytest.mark.parametrize("wrong", [[], [0], [63], [20], [20, 21], [0, 31, 32, 63], [*range(8, 16)]])
def test_exactly_the_sequences_that_break_the_engine_are_left_out(wrong: list[int]) -> None:
    asked = sequences(64)
    engine = Engine(bad(*wrong))
    found = score_or_leave_out(asked, engine)
    assert sorted(found.left_out) == wrong
    assert {*found.left_out.values()} <= {"the scorer stopped (RuntimeError: device-side assert)"}
    for i, (sequence, values) in enumerate(zip(asked, found.values, strict=True)):
        if i in wrong:
            assert values is None
        else:
            np.testing.assert_array_equal(
                values, scripted_logps(sequence.prompt_ids, sequence.completion_ids)
            )


@pytest.mark.parametrize("position", [0, 100, 2047])
def test_a_search_takes_few_starts_of_the_engine(position: int) -> None:
    engine = Engine(lambda asked: RuntimeError() if any(s is one for s in asked) else None)
    asked = sequences(2048)
    one = asked[position]
    assert list(score_or_leave_out(asked, engine).left_out) == [position]
    # The whole, then at most one failure for each halving.
    assert engine.failures <= 1 + 11
    assert engine.calls <= 2 * 12 + engine.failures


def test_an_engine_that_fails_at_everything_leaves_nothing_out() -> None:
    original = MemoryError("no memory")
    engine = Engine(lambda asked: original)
    with pytest.raises(EngineStopped, match="MemoryError: no memory") as caught:
        score_or_leave_out(sequences(64), engine)
    assert caught.value.__cause__ is not None
    # The first failure and the small sequence; no search.
    assert engine.calls == 2


def test_an_engine_that_breaks_for_good_stops_the_run() -> None:
    engine = Engine()
    engine._breaks = lambda asked: RuntimeError("gone") if engine.calls > 1 else bad(5)(asked)
    with pytest.raises(EngineStopped, match="device-side assert"):
        score_or_leave_out(sequences(64), engine)
    assert engine.calls == 2


def test_many_that_fail_are_no_accident() -> None:
    too_many = range(10, 10 + MOST_LEFT_OUT + 1)
    with pytest.raises(EngineStopped, match=f"{len(too_many)} sequences of one shard fail alone") as caught:
        score_or_leave_out(sequences(64), Engine(bad(*too_many)))
    assert "device-side assert" in caught.value.what


def test_an_engine_that_only_takes_little_at_a_time_is_not_asked_for_ever() -> None:
    engine = Engine(lambda asked: RuntimeError("out of memory") if len(asked) > 2 else None)
    found = score_or_leave_out(sequences(64), engine)
    assert not found.left_out
    assert all(values is not None for values in found.values)
    with pytest.raises(EngineStopped, match="out of memory"):
        score_or_leave_out(sequences(2048), engine)


@pytest.mark.parametrize("refusal", [DpoOptError("another reference"), Preempted("stopped")])
def test_refusals_are_not_searched_for(refusal: DpoOptError) -> None:
    engine = Engine(lambda asked: refusal)
    with pytest.raises(type(refusal)) as caught:
        score_or_leave_out(sequences(64), engine)
    assert caught.value is refusal
    assert engine.calls == 1


def test_being_stopped_during_a_search_is_not_taken_for_a_broken_engine() -> None:
    stopped = Preempted("stopped")
    engine = Engine()
    engine._breaks = lambda asked: stopped if engine.calls == 2 else RuntimeError("broken")
    with pytest.raises(Preempted):
        score_or_leave_out(sequences(8), engine)


def test_a_sequence_that_overflows_alone_is_left_out() -> None:
    engine = Engine(nan=lambda sequence, together: number(sequence) == 9)
    found = score_or_leave_out(sequences(64), engine)
    assert found.left_out == {9: "1 of 2 log-probs is not finite in float32"}
    assert found.values[9] is None
    # All at once, the one again, and a small one beside it.
    assert engine.calls == 3


@pytest.mark.parametrize(
    "nan",
    [
        lambda sequence, together: True,
        lambda sequence, together: number(sequence) == 9 and together > 1,
        lambda sequence, together: number(sequence) <= MOST_LEFT_OUT,
    ],
    ids=["everywhere", "in company only", "in many"],
)
def test_other_values_that_are_not_finite_are_handed_on(nan: Callable[[TokenSequence, int], bool]) -> None:
    found = score_or_leave_out(sequences(64), Engine(nan=nan))
    assert not found.left_out
    assert any(not np.isfinite(v).all() for v in found.values if v is not None)


def test_nothing_is_asked_about_nothing() -> None:
    engine = Engine()
    assert score_or_leave_out([], engine) == ([], {})
    assert engine.calls == 0


def test_pairs_with_a_bad_sequence_are_dropped_listed_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    rows = preference_rows(12)
    # One completion of three pairs, and a pair that stays identical in its text.
    for i in (2, 5, 9):
        rows[i] |= {"prompt": "Same?", "chosen": " The bad one.", "rejected": f" Other {i}"}
    rows[7]["rejected"] = rows[7]["chosen"]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    shards = tmp_path / "shards"
    config = PrecomputeConfig(model=str(tiny_model), data=[str(data)], shards=shards, pairs_per_shard=6)

    def breaks(asked: Sequence[TokenSequence]) -> Exception | None:
        from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer

        texts = [load_tokenizer(tiny_model).decode(s.completion_ids) for s in asked]
        return ValueError("bad\x1b[31m row") if any(" The bad one." in text for text in texts) else None

    manifest = precompute(config, scorer=Engine(breaks))
    assert manifest.dropped == {"engine_error": 3, "identical_completions": 1}
    assert manifest.kept == 8
    assert [c.dropped for c in manifest.shards] == [
        {"engine_error": 2},
        {"engine_error": 1, "identical_completions": 1},
    ]
    left_out = [row for c in manifest.shards for row in pq.read_table(shards / c.dropped_file).to_pylist()]
    assert [(r["row"], r["reason"]) for r in left_out] == [
        (2, "engine_error"),
        (5, "engine_error"),
        (7, "identical_completions"),
        (9, "engine_error"),
    ]
    assert left_out[0]["where"] == f"{data}:3: the scorer stopped (ValueError: bad[31m row)"
    assert left_out[0]["source"] == rows[2]["source"]
    undisturbed = config.model_copy(update={"shards": tmp_path / "undisturbed"})
    precompute(undisturbed, scorer=ScriptedScorer())
    expected = {p.row: p for p in ShardFolder.open(undisturbed.shards).pairs()}
    for pair in ShardFolder.open(shards).pairs():
        right = expected.pop(pair.row)
        assert pair.pair_id == right.pair_id
        np.testing.assert_array_equal(pair.ref_chosen_token_logps, right.ref_chosen_token_logps)
        np.testing.assert_array_equal(pair.ref_rejected_token_logps, right.ref_rejected_token_logps)
    assert sorted(expected) == [2, 5, 9]
    # Equal sequences are asked for once, so one that is bad is bad once a shard.
    assert manifest.shards[0].unique_sequences == 2 * 6 - 2


def folder_of(
    model: Path, folder: Path, *, rows: int, long: range = range(0), **settings: Any
) -> PrecomputeConfig:
    """Settings for pairs of which some are much longer than the others."""
    pairs = preference_rows(rows)
    for i in long:
        pairs[i]["prompt"] = f"Tell me more about the {i}. " * 6
    data = write_jsonl(folder / "data.jsonl", pairs)
    values = {"model": str(model), "data": [str(data)], "shards": folder / "shards", "pairs_per_shard": 2}
    return PrecomputeConfig.model_validate(values | settings)


def too_long(asked: Sequence[TokenSequence]) -> Exception | None:
    longest = max(len(s.prompt_ids) for s in asked)
    return RuntimeError("index out of range") if longest > 80 else None


def test_what_every_shard_loses_is_counted_over_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    config = folder_of(tiny_model, tmp_path, rows=40, long=range(0, 40, 2))
    with pytest.raises(EngineStopped, match=r"failed on 9 of 18 rows, .*index out of range") as caught:
        precompute(config, scorer=Engine(too_long))
    assert "all of them are longer than what it scored: pass --max-length" in str(caught.value.fix)
    length = int(str(caught.value.fix).partition("--max-length ")[2].split()[0])
    assert len(list((config.shards / "commits").iterdir())) == 8
    # Another process goes on counting where this one stopped, also as another worker.
    for worker in ({}, {"worker_index": 1, "num_workers": 2}):
        with pytest.raises(EngineStopped, match="failed on 9 of 18 rows"):
            work(config.model_copy(update=worker), scorer=Engine(too_long))
    # What the message advises works.
    config = config.model_copy(update={"max_length": length, "truncation": "drop", "shards": tmp_path / "b"})
    assert ENGINE_ERROR not in precompute(config, scorer=Engine(too_long)).dropped


def test_a_small_folder_may_lose_one_pair_in_four(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    config = folder_of(tiny_model, tmp_path / "one", rows=2, long=range(1, 2))
    assert precompute(config, scorer=Engine(too_long)).dropped == {ENGINE_ERROR: 1}
    config = folder_of(tiny_model, tmp_path, rows=12, long=range(4), pairs_per_shard=12)
    with pytest.raises(EngineStopped, match="failed on 4 of 12 rows"):
        precompute(config, scorer=Engine(too_long))


def test_a_large_folder_may_lose_one_pair_in_two_hundred() -> None:
    ids = np.zeros(1, np.int32)
    pairs = [
        TokenizedPair(row=i, source=None, prompt_ids=ids, chosen_ids=ids, rejected_ids=ids)
        for i in range(1000)
    ]
    losses = Losses(rows=10_000, seen=2000, lost=12)
    losses.add(pairs, {0: "bad", 1: "bad", 2: "bad"})
    with pytest.raises(
        EngineStopped, match="failed on 21 of 4,000 rows, the last time with: worse"
    ) as caught:
        losses.add(pairs, dict.fromkeys(range(5), "bad") | {5: "worse"})
    assert "--max-length" not in str(caught.value.fix)
    Losses(rows=10_000, seen=2000, lost=100).add(pairs, {})


def test_a_run_says_how_many_pairs_it_lost_to_the_engine(tiny_model: Path, tmp_path: Path) -> None:
    class Watched(Silent):
        said: ClassVar[list[str]] = []

        def say(self, line: str) -> None:
            self.said.append(line)

    config = folder_of(tiny_model, tmp_path, rows=12, long=range(2))
    precompute(config, scorer=Engine(too_long), progress=Watched())
    (line,) = Watched.said
    assert line.startswith("left out because the engine failed on them: 2 (engine_error)")
    (tmp_path / "good").mkdir()
    precompute(folder_of(tiny_model, tmp_path / "good", rows=12), scorer=Engine(), progress=Watched())
    assert len(Watched.said) == 1


@pytest.mark.parametrize("count", [1, MOST_LEFT_OUT + 1, 64])
def test_weights_that_are_no_numbers_are_named_however_few_sequences_they_touch(
    tiny_model: Path, tmp_path: Path, count: int
) -> None:
    engine = Engine(nan=lambda sequence, together: number(sequence) < count)
    assert score_or_leave_out(sequences(64), engine, model=tiny_model)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"weights that are NaN or infinite: model\.norm\.weight"):
        score_or_leave_out(sequences(64), engine, model=model)
    assert score_or_leave_out(sequences(64), Engine(), model=model)


@pytest.mark.parametrize(
    ("dtype", "fix"), [("float16", "--dtype bfloat16 or float32"), ("bfloat16", "--backend hf")]
)
def test_what_overflows_in_float16_is_told_another_dtype(
    tiny_model: Path, tmp_path: Path, dtype: str, fix: str
) -> None:
    engine = Engine(nan=lambda sequence, together: True)
    engine.numerics = NUMERICS._replace(dtype=dtype)
    with pytest.raises(DpoOptError, match="not finite") as caught:
        precompute(folder_of(tiny_model, tmp_path, rows=12), scorer=engine)
    assert fix in str(caught.value.fix)
    assert (f"not finite in {dtype}" in caught.value.what) == (dtype == "float16")


@pytest.mark.vllm
def test_the_real_engine_on_a_broken_weight_is_told_which(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    scorer = VllmModel(model, dtype="float32", max_length=64)
    with pytest.raises(ConfigError, match=r"NaN or infinite: model\.layers\.1\.mlp\.up_proj\.weight"):
        precompute(folder_of(model, tmp_path, rows=4), scorer=scorer)


@pytest.mark.slow
@pytest.mark.vllm
def test_the_real_engine_goes_on_after_a_sequence_that_it_refuses(tiny_model: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        TokenizedPair(
            row=i,
            source=None,
            prompt_ids=np.array([0, *rng.integers(2, 250, 20 + i)], np.int32),
            chosen_ids=rng.integers(2, 250, 7).astype(np.int32),
            rejected_ids=rng.integers(2, 250, 9).astype(np.int32),
        )
        for i in range(3)
    ]
    # Longer than the engine was told to expect.
    bad_ids = rng.integers(2, 250, 100).astype(np.int32)
    long = dataclasses.replace(pairs[0], row=9, chosen_ids=bad_ids)
    broken = [*pairs, long]
    model = VllmModel(tiny_model, dtype="float32", max_length=64)
    expected = score_pairs(pairs, model)
    found = score_pairs(broken, model)
    assert list(found.left_out) == [9]
    assert "vLLM stopped" in found.left_out[9]
    assert [p.row for p in found.pairs] == [p.row for p in pairs]
    for a, b in zip(found.pairs, expected.pairs, strict=True):
        np.testing.assert_allclose(a.ref_chosen_token_logps, b.ref_chosen_token_logps, atol=5e-4)
        np.testing.assert_allclose(a.ref_rejected_token_logps, b.ref_rejected_token_logps, atol=5e-4)


@pytest.mark.vllm
def test_the_real_engine_starts_anew_after_it_broke(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = sequences(12)
    model = VllmModel(tiny_model, dtype="float32", max_length=64)
    expected = model.token_logps(asked)
    engines = [model._started()]
    step = engines[0].llm_engine.step
    steps = 0

    def breaking() -> Any:
        nonlocal steps
        steps += 1
        if steps == 1:
            raise RuntimeError("CUDA error: an illegal memory access")
        return step()

    monkeypatch.setattr(engines[0].llm_engine, "step", breaking)
    with pytest.raises(EngineStopped, match="illegal memory access"):
        model.token_logps(asked[:5])
    # What was queued in the broken engine is not answered by the new one.
    found = model.token_logps(asked)
    assert model._started() is not engines[0]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-4)


def test_a_new_engine_that_does_not_start_is_not_blamed_on_a_row(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_model, "vllm_version", lambda: "0.32.0")

    class Dead:
        def generate(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("the first error")

    starts = iter([Dead()])

    def start(**_: Any) -> Any:
        for engine in starts:
            return engine
        raise DpoOptError("vLLM cannot run this model (poisoned)")

    monkeypatch.setattr(vllm_model, "_start", start)
    model = VllmModel(tiny_model, dtype="float32", max_length=64, reuse=False)
    with pytest.raises(EngineStopped, match="the first error"):
        score_or_leave_out(sequences(4), model)


def test_who_waits_for_a_dead_engine_is_told() -> None:
    answers: queue.Queue[Exception] = queue.Queue()
    state = SimpleNamespace(engine_dead=False)
    client = SimpleNamespace(outputs_queue=answers, resources=state)
    with death_is_noticed(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=client))):
        with pytest.raises(queue.Empty):
            answers.get(timeout=0.7)
        state.engine_dead = True
        assert "process died" in str(answers.get(timeout=5))
    # Engines in this process have nothing to wait for.
    with death_is_noticed(SimpleNamespace()):
        pass


DEATH = """
import os, signal, sys
from pathlib import Path
import numpy as np
from dpo_opt.precompute.engine import process_watchdog
from dpo_opt.precompute.engine.failing_sequences import score_or_leave_out
from dpo_opt.precompute.engine.vllm_build import prepare_environment
from dpo_opt.precompute.engine.vllm_model import VllmModel
from dpo_opt.schemas.pairs import TokenSequence

def main():
    prepare_environment()
    model = VllmModel(Path(sys.argv[1]), dtype="float32", max_length=64)
    asked = [TokenSequence(np.array([1, 2, i % 5], np.int32), np.array([7, i], np.int32)) for i in range(20)]
    before = model.token_logps(asked)
    below = {}
    process_watchdog._collect(os.getpid(), below)
    engines = [p for p in below if "EngineCor" in Path(f"/proc/{p}/comm").read_text()]
    assert len(engines) == 1, engines
    os.kill(engines[0], signal.SIGKILL)
    found = score_or_leave_out(asked, model)
    assert not found.left_out
    print(max(float(np.abs(a - b).max()) for a, b in zip(found.values, before)))

# The engine's process imports this file anew.
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.vllm
def test_a_real_engine_that_dies_in_its_own_process_is_started_anew(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "death.py").write_text(DEATH)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "death.py"), str(tiny_model)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 5e-4
