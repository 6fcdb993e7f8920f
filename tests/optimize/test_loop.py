import functools
import json
import math
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fakes import ScriptedScorer, preference_rows, write_jsonl
from model_edits import lose_a_merge
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_opt.dry_run import plan_train
from dpo_opt.optimize import TrainConfig, begin, run_folder, train
from dpo_opt.optimize.prepare import prepare
from dpo_opt.optimize.score_folder import score_shards
from dpo_opt.optimize.stream import PairStream, share_that_holds_out
from dpo_opt.optimize.update.optimizer import learning_rate
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, FingerprintError
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA
from dpo_opt.schemas.pairs import ScoredPair, TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import Column, write_column

FullLogps = Callable[[PreTrainedModel, TokenSequence], Tensor]
PAIRS = 28
TRAIN_METRICS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "num_unique_tokens",
    "pairs_per_second", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected",
}  # fmt: skip
EVAL_METRICS = {"step", "epoch"} | {
    f"eval_{name}" for name in TRAIN_METRICS if name == "loss" or name.startswith(("rewards/", "logps/"))
}


@pytest.fixture
def settings(shards: Path, tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A short run on the fp32 shards: 4 steps per epoch, the last of 4 pairs."""
    return {
        "shards": shards,
        "model": str(tiny_model),
        "output_dir": tmp_path / "run",
        "batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_metrics(run: Path) -> list[dict[str, float]]:
    return [line for line in metrics_of(run) if "loss" in line]


def pair_rows(run: Path, phase: str) -> list[dict[str, Any]]:
    files = sorted((run / "pair_logps").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist() if row["phase"] == phase]


def final_weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final" / "model.safetensors")


def sums(full_logps: FullLogps, model: PreTrainedModel, pair: ScoredPair) -> tuple[Tensor, Tensor]:
    return (
        full_logps(model, TokenSequence(pair.prompt_ids, pair.chosen_ids)).sum(),
        full_logps(model, TokenSequence(pair.prompt_ids, pair.rejected_ids)).sum(),
    )


def textbook_step(
    full_logps: FullLogps,
    model: PreTrainedModel,
    pairs: list[ScoredPair],
    *,
    label_smoothing: float,
    weights: dict[int, float],
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and clipped gradients of one step from full logits, pair by pair, in float64."""
    model.zero_grad()
    columns: dict[str, list[float]] = {}
    for pair in pairs:
        chosen, rejected = sums(full_logps, model, pair)
        chosen_reward = 0.1 * (chosen - float(pair.ref_chosen_token_logps.astype(np.float64).sum()))
        rejected_reward = 0.1 * (rejected - float(pair.ref_rejected_token_logps.astype(np.float64).sum()))
        odds = torch.sigmoid(chosen_reward - rejected_reward)
        loss = -(1 - label_smoothing) * odds.log() - label_smoothing * (1 - odds).log()
        loss = loss * weights.get(pair.row, 1.0)
        (loss / len(pairs)).backward()
        values = {
            "loss": loss,
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": (chosen_reward > rejected_reward).double(),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value.item())
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    means = {name: float(np.mean(column)) for name, column in columns.items()}
    return {**means, "grad_norm": norm}, {n: g / max(1.0, norm) for n, g in grads.items()}


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD: Adam and RMSprop turn a gradient that is rounding noise into a step as large as any other."""
    monkeypatch.setattr(begin, "make_optimizer", lambda model, config: torch.optim.SGD(model.parameters()))


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize(("label_smoothing", "weighted"), [(0.0, False), (0.2, False), (0.0, True)])
def test_steps_are_those_of_the_textbook(
    settings: dict[str, Any],
    full_logps: FullLogps,
    tiny_model: Path,
    tmp_path: Path,
    label_smoothing: float,
    weighted: bool,
) -> None:
    weights: dict[int, float] = {}
    if weighted:
        # Half of the rows say nothing, and count as 1 before all are brought to a mean of 1.
        folder = Path(shutil.copytree(settings["shards"], tmp_path / "weighted"))
        rows = [pair.row for pair in ShardFolder.open(folder).pairs()]
        given = {row: float(row % 5) for row in rows[::2]}
        write_column(folder, "weight", Column(array("q", given), array("d", given.values())))
        mean = np.mean([given.get(row, 1.0) for row in rows])
        weights = {row: given.get(row, 1.0) / mean for row in rows}
        settings |= {"shards": folder}
    settings |= {"learning_rate": 0.5, "label_smoothing": label_smoothing}
    config = TrainConfig(**settings, lr_scheduler_type="constant")
    train(config)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    stream = PairStream(ShardFolder.open(config.shards), eval_split=0.0)
    batches = stream.batches(stream.epoch(seed=config.seed, epoch=0), config.batch_size)
    logged = train_metrics(config.output_dir)
    for line, pairs in zip(logged, batches, strict=True):
        expected, grads = textbook_step(
            full_logps, model, pairs, label_smoothing=label_smoothing, weights=weights
        )
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert line[name] == pytest.approx(expected[name], abs=1e-4), name
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        if line["step"] > 1:  # at first every margin is 0 up to rounding
            assert line["rewards/accuracies"] == expected["rewards/accuracies"]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= config.learning_rate * grads[name]
    assert [len(pairs) for pairs in stream.batches(stream.epoch(seed=0, epoch=0), 8)] == [8, 8, 8, 4]
    assert abs(logged[-1]["loss"] - math.log(2)) > 0.01
    assert logged[0]["grad_norm"] > config.max_grad_norm, "clipping was not tested"
    trained = final_weights(config.output_dir)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=0, atol=1e-4)


def test_training_starts_at_ln_2_and_learns_the_training_pairs(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings, num_train_epochs=6))
    logged = train_metrics(settings["output_dir"])
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert np.mean([line["rewards/accuracies"] for line in logged[-4:]]) > 0.9
    assert np.mean([line["loss"] for line in logged[-4:]]) < 0.5


@pytest.mark.usefixtures("plain_descent")
def test_micro_batches_change_neither_metrics_nor_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    budgets = (1, 90, 4096)  # a forward per pair, a few pairs per forward, one forward
    runs = [tmp_path / f"budget-{budget}" for budget in budgets]
    settings |= {"max_steps": 1, "learning_rate": 0.1}
    for run, budget in zip(runs, budgets, strict=True):
        train(TrainConfig(**{**settings, "output_dir": run, "micro_batch_tokens": budget}))
    first, *others = (train_metrics(run)[0] for run in runs)
    for other in others:
        # In the first step every margin is 0 but for rounding, whose sign is the only difference.
        for name in TRAIN_METRICS - {"pairs_per_second", "rewards/accuracies"}:
            assert other[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name
    expected, *found = (final_weights(run) for run in runs)
    for weights in found:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_two_runs_with_one_seed_are_equal_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    runs = [tmp_path / "first", tmp_path / "second"]
    for run in runs:
        train(TrainConfig(**{**settings, "output_dir": run}, num_train_epochs=2, eval_split=0.3))
    first, second = (
        [{k: v for k, v in line.items() if k != "pairs_per_second"} for line in metrics_of(run)]
        for run in runs
    )
    assert first == second
    assert pair_rows(runs[0], "train") == pair_rows(runs[1], "train")
    weights, others = (final_weights(run) for run in runs)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_another_seed_is_another_order(settings: dict[str, Any], tmp_path: Path) -> None:
    visited = []
    for seed in (1, 2):
        run = tmp_path / f"seed-{seed}"
        train(TrainConfig(**{**settings, "output_dir": run}, seed=seed, max_steps=2))
        visited.append([row["row"] for row in pair_rows(run, "train")])
    assert visited[0] != visited[1]


def test_metrics_have_the_names_of_trl(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings, eval_split=0.3, eval_steps=2))
    evals = [line for line in metrics_of(settings["output_dir"]) if "eval_loss" in line]
    assert {frozenset(line) for line in train_metrics(settings["output_dir"])} == {frozenset(TRAIN_METRICS)}
    assert {frozenset(line) for line in evals} == {frozenset(EVAL_METRICS)}
    steps = train_metrics(settings["output_dir"])[-1]["step"]
    assert [line["step"] for line in evals] == sorted({*range(2, int(steps), 2), steps})


def test_counts_and_rates_of_the_metrics(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings, warmup_steps=2, lr_scheduler_type="cosine")
    train(config)
    pairs = list(ShardFolder.open(config.shards).pairs())
    last = train_metrics(config.output_dir)[-1]
    completions = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    prompts = sum(len(p.prompt_ids) for p in pairs)
    assert last["num_tokens"] == completions + 2 * prompts
    assert last["num_unique_tokens"] == completions + prompts
    assert last["epoch"] == 1.0
    assert [line["epoch"] for line in train_metrics(config.output_dir)] == pytest.approx(
        [8 / 28, 16 / 28, 24 / 28, 1.0], abs=1e-6
    )
    rates = [line["learning_rate"] for line in train_metrics(config.output_dir)]
    assert rates == [learning_rate(step, total_steps=4, config=config) for step in range(4)]
    assert all(line["pairs_per_second"] > 0 for line in train_metrics(config.output_dir))


def test_a_line_of_metrics_is_the_mean_over_its_pairs(settings: dict[str, Any], tmp_path: Path) -> None:
    each, together = tmp_path / "each", tmp_path / "together"
    train(TrainConfig(**{**settings, "output_dir": each}))
    train(TrainConfig(**{**settings, "output_dir": together, "logging_steps": 3}))
    lines, grouped = train_metrics(each), train_metrics(together)
    assert [line["step"] for line in grouped] == [3, 4]
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert grouped[0][name] == pytest.approx(np.mean([line[name] for line in lines[:3]]))
        assert grouped[1][name] == pytest.approx(lines[3][name])  # the 4 pairs of the last step


def test_trainer_state_is_what_notebooks_read(settings: dict[str, Any]) -> None:
    result = train(TrainConfig(**settings, eval_split=0.3, num_train_epochs=2))
    run = settings["output_dir"]
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["log_history"] == metrics_of(run)
    assert state["global_step"] == state["max_steps"] == result.steps == train_metrics(run)[-1]["step"]
    assert state["epoch"] == 2.0
    assert state["num_train_epochs"] == 2
    assert state["dtype"] == "float32"


def test_scores_of_a_checkpoint_say_how_far_it_was_trained(settings: dict[str, Any], tmp_path: Path) -> None:
    """As do those of the final model: the report shows the one that was trained longest."""
    run = settings["output_dir"]
    train(TrainConfig(**settings, save_steps=1, save_total_limit=9))
    found = []
    for model in (*sorted((run / "checkpoints").iterdir()), run / "final"):
        scores = tmp_path / f"{model.name}.parquet"
        score_shards(settings["shards"], model=str(model), output=scores, dtype="auto")
        (said,) = {(row["step"], round(row["epoch"], 6)) for row in pq.read_table(scores).to_pylist()}
        found.append(said)
    logged = [(line["step"], line["epoch"]) for line in train_metrics(run)]
    assert found == [*logged, logged[-1]]
    damaged = run / "checkpoints" / "step-00000001"
    (damaged / "training_state.json").write_text("{}")
    with pytest.raises(DataError, match="Field required") as caught:
        score_shards(settings["shards"], model=str(damaged), output=tmp_path / "x.parquet", dtype="auto")
    assert str(damaged / "training_state.json") in str(caught.value)
    assert not (tmp_path / "x.parquet").exists()


def test_the_resolved_configuration_makes_the_same_configuration(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings, max_steps=1)
    train(config)
    saved = yaml.safe_load((config.output_dir / "config.resolved.yaml").read_text())
    assert TrainConfig.model_validate(saved) == config.model_copy(update={"dtype": "float32"})


def test_every_visited_pair_has_its_row_once_per_epoch(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings, num_train_epochs=2)
    train(config)
    rows = pair_rows(config.output_dir, "train")
    pairs = {p.row: p for p in ShardFolder.open(config.shards).pairs()}
    for epoch in (0, 1):
        visited = [row for row in rows if epoch <= row["epoch"] < epoch + 1]
        assert sorted(row["row"] for row in visited) == list(range(PAIRS))
        assert [row["step"] for row in visited] == [4 * epoch + i // 8 for i in range(PAIRS)]
    for row in rows:
        pair = pairs[row["row"]]
        assert row["pair_id"] == pair.pair_id
        assert (row["chosen_length"], row["rejected_length"]) == (
            len(pair.chosen_ids),
            len(pair.rejected_ids),
        )
    untrained = [row for row in rows if row["step"] == 0]
    assert len(untrained) == 8
    for row in untrained:
        assert row["chosen_logps"] == pytest.approx(pairs[row["row"]].ref_chosen_logps, abs=1e-4)
        assert row["rejected_logps"] == pytest.approx(pairs[row["row"]].ref_rejected_logps, abs=1e-4)
    (file,) = (config.output_dir / "pair_logps").glob("*.parquet")
    assert pq.read_schema(file).equals(PAIR_LOGPS_SCHEMA)


def test_rows_of_evaluation_are_the_trained_policys(settings: dict[str, Any], full_logps: FullLogps) -> None:
    config = TrainConfig(**settings, eval_split=0.3, eval_steps=3)
    result = train(config)
    held_out = PairStream(ShardFolder.open(config.shards), eval_split=0.3).eval_positions.tolist()
    rows = pair_rows(config.output_dir, "eval")
    trained_on = {row["row"] for row in pair_rows(config.output_dir, "train")}
    assert 0 < len(held_out) < PAIRS
    assert trained_on == set(range(PAIRS)) - set(held_out)
    assert {row["step"] for row in rows} == {3, result.steps} - ({3} if result.steps < 3 else set())
    for step in {row["step"] for row in rows}:
        assert sorted(row["row"] for row in rows if row["step"] == step) == held_out
    model = AutoModelForCausalLM.from_pretrained(result.final, dtype=torch.float32).eval()
    pairs = {p.row: p for p in ShardFolder.open(config.shards).pairs()}
    with torch.no_grad():
        for row in (row for row in rows if row["step"] == result.steps):
            chosen, rejected = sums(full_logps, model, pairs[row["row"]])
            assert row["chosen_logps"] == pytest.approx(float(chosen), abs=1e-3)
            assert row["rejected_logps"] == pytest.approx(float(rejected), abs=1e-3)


def test_segments_hold_every_row_whatever_their_size(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_SEGMENT_ROWS", 10)
    train(TrainConfig(**settings, num_train_epochs=2))
    files = sorted((settings["output_dir"] / "pair_logps").iterdir())
    assert [file.name for file in files] == [
        "00000.parquet",
        "00001.parquet",
        "00002.parquet",
        "00003.parquet",
    ]
    rows = [row["row"] for row in pair_rows(settings["output_dir"], "train")]
    assert sorted(rows) == sorted([*range(PAIRS), *range(PAIRS)])


@pytest.mark.parametrize(("max_steps", "epochs"), [(2, 0.571429), (6, 1.571429)])
def test_max_steps_stops_early_or_goes_on(settings: dict[str, Any], max_steps: int, epochs: float) -> None:
    result = train(TrainConfig(**settings, max_steps=max_steps))
    last = train_metrics(settings["output_dir"])[-1]
    assert result.steps == last["step"] == max_steps
    assert last["epoch"] == pytest.approx(epochs, abs=1e-6)
    assert result.last_metrics == last


def test_rmsprop_learns_too(settings: dict[str, Any]) -> None:
    train(TrainConfig(**{**settings, "learning_rate": 1e-4}, optim="rmsprop", num_train_epochs=3))
    logged = train_metrics(settings["output_dir"])
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.05


def test_bf16_starts_near_ln_2_and_learns(settings: dict[str, Any], bf16_shards: Path) -> None:
    result = train(TrainConfig(**{**settings, "shards": bf16_shards}, dtype="bfloat16", num_train_epochs=4))
    logged = train_metrics(settings["output_dir"])
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=0.03)
    assert logged[-1]["loss"] < 0.6
    # The masters stayed fp32 all along: what is saved is as declared by the checkpoint.
    assert {w.dtype for w in load_file(result.final / "model.safetensors").values()} == {torch.float32}


def test_the_parity_of_the_run_is_kept(settings: dict[str, Any]) -> None:
    result = train(TrainConfig(**settings, max_steps=1))
    saved = json.loads((settings["output_dir"] / "parity.json").read_text())
    assert result.parity is not None
    assert saved == result.parity._asdict()
    assert saved["ok"] is True
    # The step's pairs, one of each other shard, and as many more as make the tokens enough.
    assert 8 < saved["pairs"] < PAIRS
    assert saved["alone_tokens"] < saved["tokens"]


def test_another_model_is_refused_by_content(settings: dict[str, Any], other_model: Path) -> None:
    with pytest.raises(FingerprintError, match="weights") as caught:
        train(TrainConfig(**{**settings, "model": str(other_model)}))
    assert f"dpo-opt precompute --model {other_model}" in str(caught.value)
    assert not settings["output_dir"].exists()


def test_a_reference_that_differs_is_allowed_when_said(settings: dict[str, Any], other_model: Path) -> None:
    config = TrainConfig(**{**settings, "model": str(other_model)}, reference_differs=True, max_steps=1)
    result = train(config)
    assert result.parity is None
    assert not (config.output_dir / "parity.json").exists()
    assert "another model than the starting policy" in (result.final / "README.md").read_text()
    # The reference is still the cached one.
    assert abs(train_metrics(config.output_dir)[0]["loss"] - math.log(2)) > 0.01


@pytest.mark.parametrize("reference_differs", [False, True])
def test_another_tokenizer_is_always_refused(
    settings: dict[str, Any], model: Path, reference_differs: bool
) -> None:
    lose_a_merge(model)
    with pytest.raises(FingerprintError, match="tokenizer"):
        train(TrainConfig(**{**settings, "model": str(model)}, reference_differs=reference_differs))


def test_a_model_without_tokenizer_is_refused_in_words(settings: dict[str, Any], model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="the tokenizer cannot be loaded"):
        train(TrainConfig(**{**settings, "model": str(model)}))


def test_a_used_folder_is_refused_and_left_alone(settings: dict[str, Any]) -> None:
    run = settings["output_dir"]
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already in use"):
        train(TrainConfig(**settings))
    assert [file.name for file in run.iterdir()] == ["notes.txt"]


def test_an_empty_folder_may_be_used(settings: dict[str, Any]) -> None:
    settings["output_dir"].mkdir()
    assert train(TrainConfig(**settings, max_steps=1)).final.is_dir()


def test_holding_out_everything_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="holds out every pair"):
        prepare(TrainConfig(**settings, eval_split=0.9999999))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eval_split": 1e-9}, "--eval-split 1e-09 holds out none of the prompts"),
        ({"eval_split": 1e-9, "eval_steps": 1}, "--eval-split 1e-09 holds out none of the prompts"),
        ({"eval_steps": 1}, "--eval-steps 1 has nothing to evaluate on"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_in_a_dry_run_too(
    settings: dict[str, Any], shards: Path, change: dict[str, Any], said: str
) -> None:
    for start in (prepare, plan_train, train):
        with pytest.raises(ConfigError, match=said) as caught:
            start(TrainConfig(**settings, **change))
        assert "--eval-split 0.05" in str(caught.value)
    assert not settings["output_dir"].exists()
    # Another folder is something to evaluate on.
    if "eval_split" not in change:
        assert len(prepare(TrainConfig(**settings, **change, eval_shards=[shards])).evaluations) == 1


@pytest.mark.parametrize(
    ("places", "share"),
    [
        ([0.01, 0.2, 0.7], 0.05),
        ([0.3001, 0.7], 0.31),
        ([0.3001, 0.304, 0.304], 0.301),
        ([0.30001, 0.30009], None),
        ([0.4, 0.4], None),
        ([0.999], None),
    ],
)
def test_a_share_that_is_advised_holds_out_some_prompts_and_not_all(
    places: list[float], share: float | None
) -> None:
    ids = pa.chunked_array([pa.array([f"{int(place * 2**32):08x}" + 56 * "0" for place in places])])
    assert share_that_holds_out(ids) == share


def test_where_all_pairs_share_a_prompt_no_share_is_advised(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{**row, "prompt": "Say:"} for row in preference_rows(4)]
    config = PrecomputeConfig(
        model=str(tiny_model), data=[str(write_jsonl(tmp_path / "one.jsonl", rows))], shards=tmp_path / "one"
    )
    precompute(config, scorer=ScriptedScorer())
    with pytest.raises(ConfigError, match="all pairs share one prompt") as caught:
        prepare(
            TrainConfig(**{**settings, "shards": tmp_path / "one"}, eval_split=0.2, reference_differs=True)
        )
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("leave --eval-split out")


def test_preparing_writes_nothing(settings: dict[str, Any]) -> None:
    prepared = prepare(TrainConfig(**settings, num_train_epochs=3))
    assert prepared.total_steps == 12
    assert not settings["output_dir"].exists()


def test_numbers_of_another_model_stop_the_run_before_it_starts(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, other_model: Path
) -> None:
    """The digests agree, the numbers do not: as after a wrong chat template, or a broken engine."""
    monkeypatch.setattr("dpo_opt.optimize.prepare.require_same_model", lambda *args, **kwargs: None)
    with pytest.raises(FingerprintError, match="the cached log-probs are not those of"):
        train(TrainConfig(**{**settings, "model": str(other_model)}))
    assert not settings["output_dir"].exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**{**settings, "learning_rate": 1e30})  # one step, and the weights overflow
    steps = 0
    make = begin.make_optimizer

    def counting(*args: Any) -> torch.optim.Optimizer:
        optimizer = make(*args)

        def count(*_: object) -> None:
            nonlocal steps
            # The state is made by a step at rate 0.
            steps += optimizer.param_groups[0]["lr"] > 0

        optimizer.register_step_post_hook(count)
        return optimizer

    monkeypatch.setattr(begin, "make_optimizer", counting)
    with pytest.raises(DpoOptError, match="a loss is not finite") as caught:
        train(config)
    assert steps == 1
    stream = PairStream(ShardFolder.open(config.shards), eval_split=0.0)
    second = stream.fetch(stream.epoch(seed=config.seed, epoch=0)[8:16])
    message = str(caught.value)
    assert message.startswith("step 2: ")
    named = {int(row) for row in message.split("source rows ")[1].split(")")[0].split(", ")}
    assert named
    assert named <= {pair.row for pair in second}
    assert not (config.output_dir / "final").exists()


def test_the_final_model_is_an_ordinary_one(settings: dict[str, Any], shards: Path, tiny_model: Path) -> None:
    result = train(TrainConfig(**settings, save_dtype="bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(result.final)
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    original = AutoTokenizer.from_pretrained(tiny_model)
    text = "the hat and </s> the cat"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.chat_template == original.chat_template
    assert model.dtype == torch.bfloat16
    assert "dpo_opt" not in (result.final / "config.json").read_text()
    saved = final_weights(settings["output_dir"])
    assert {w.dtype for w in saved.values()} == {torch.bfloat16}
    assert set(saved) == set(load_file(tiny_model / "model.safetensors"))
    card = (result.final / "README.md").read_text()
    manifest = ShardFolder.open(shards).manifest
    for part in (
        manifest.fingerprint.weights,
        manifest.dataset_digest,
        "28 of 28",
        "beta 0.1",
        "| steps | 4 |",
    ):
        assert part in card
    assert [p.name for p in settings["output_dir"].iterdir() if p.name.startswith(".")] == []


def test_the_final_model_has_changed(settings: dict[str, Any], tiny_model: Path) -> None:
    train(TrainConfig(**settings, max_steps=1))
    before = load_file(tiny_model / "model.safetensors")
    after = final_weights(settings["output_dir"])
    for name, weight in after.items():
        # AdamW's first step is the learning rate, in the direction of the gradient's sign.
        change = (weight - before[name]).abs().max().item()
        assert change == pytest.approx(1e-3, rel=0.01), name
