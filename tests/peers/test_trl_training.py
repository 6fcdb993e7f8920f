"""Fifty steps of `dpo-opt train` are fifty steps of TRL's trainer: same pairs, same order, same settings.

TRL runs its reference model beside the policy in every step; ours reads the shards. How near the curves must
be is measured, not chosen: TRL differs from itself, by rounding, when it cuts the same steps into other
micro-batches.

Where the two differ on purpose, so that nothing here may depend on it:

* TRL averages its metrics, and its loss, over micro-batches. Where the last one of a step is smaller than the
  others its pairs count more; ours count alike. So here a short step still holds whole micro-batches.
* TRL's linear warm-up begins with an update at rate 0. There is none here.
* TRL's sigmoid loss leaves `label_smoothing` out. There is none here.
* At the first step policy and reference are the same model, and which completion is ahead is rounding: no
  accuracies.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from fakes import write_jsonl

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.stream import PairStream
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.schemas.shard_folder import ShardFolder

Texts = list[dict[str, Any]]
Values = npt.NDArray[np.float64]

SEED = 42
STEPS = 50
ROUNDED = [
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
]
CERTAIN = ["learning_rate", "num_tokens", "epoch"]
pytestmark = pytest.mark.usefixtures("peers")


class Run(NamedTuple):
    """What a trainer did."""

    curves: dict[str, Values]
    """Of each metric, its value at each step."""
    pair_logps: Values
    """(pairs, 2) of every pair as it was met, chosen and rejected; empty where micro-batches had several."""
    moved: dict[str, Values]
    """Of each parameter, how far it is from where it began."""


class Task(NamedTuple):
    """Pairs that a model was scored on, and what to train it with."""

    model: Path
    texts: Texts
    shards: Path
    orders: list[list[int]]
    """Of each epoch, the rows in the order in which `dpo-opt train` meets them."""
    pairs_per_step: int
    settings: dict[str, Any]
    """In the names that TRL and dpo-opt share."""


def scored(model: Path, texts: Texts, folder: Path, *, pairs_per_step: int, **settings: Any) -> Task:
    config = PrecomputeConfig(
        model=str(model),
        data=write_jsonl(folder / "pairs.jsonl", texts),
        shards=folder / "shards",
        pairs_per_shard=32,
        dtype="float32",
    )
    precompute(config, scorer=HfScorer(model, dtype="float32"))
    stream = PairStream(ShardFolder.open(folder / "shards"), eval_split=0)
    orders = [
        [pair.row for pair in stream.fetch(stream.epoch(seed=SEED, epoch=epoch))]
        for epoch in range(settings["num_train_epochs"])
    ]
    assert all(sorted(order) == list(range(len(texts))) for order in orders)
    return Task(model, texts, folder / "shards", orders, pairs_per_step, settings)


def ours(task: Task, output: Path, **others: Any) -> Run:
    from transformers import AutoModelForCausalLM

    config = TrainConfig(
        model=str(task.model),
        shards=task.shards,
        output_dir=output,
        batch_size=task.pairs_per_step,
        seed=SEED,
        dtype="float32",
        save_dtype="float32",
        logging_steps=1,
        **task.settings | others,
    )
    final = train(config).final
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    table = pq.read_table(output / "pair_logps").to_pylist()
    # One row for each pair in each epoch.
    found = {(int(line["epoch"] + 1e-9), line["row"]): line for line in table}
    met = [found[epoch, row] for epoch, order in enumerate(task.orders) for row in order]
    return Run(
        curves([json.loads(line) for line in lines]),
        np.array([[line["chosen_logps"], line["rejected_logps"]] for line in met]),
        moved(AutoModelForCausalLM.from_pretrained(final, dtype="float32"), task.model),
    )


def theirs(task: Task, output: Path, *, micro_batch: int) -> Run:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Orders(torch.utils.data.Sampler[int]):
        """Another order in each epoch, as in ours."""

        def __init__(self) -> None:
            self.left = list(task.orders)

        def __len__(self) -> int:
            return len(task.texts)

        def __iter__(self) -> Iterator[int]:
            return iter(self.left.pop(0))

    pair_logps: list[list[float]] = []

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return Orders()

        def log(self, *args: Any, **named: Any) -> None:
            found = (self._metrics["train"].get(f"logps/{side}", []) for side in ("chosen", "rejected"))
            pair_logps.extend(map(list, zip(*found, strict=True)))
            super().log(*args, **named)

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(output),
            max_length=None,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=task.pairs_per_step // micro_batch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **task.settings,
        ),
        train_dataset=Dataset.from_list(
            [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in task.texts]
        ),
        processing_class=AutoTokenizer.from_pretrained(task.model),
    )
    assert trainer.ref_model is not None
    trainer.train()
    return Run(
        curves([entry for entry in trainer.state.log_history if "loss" in entry]),
        np.array(pair_logps if micro_batch == 1 else []),
        moved(trainer.model, task.model),
    )


def curves(history: Sequence[dict[str, Any]]) -> dict[str, Values]:
    return {name: np.array([entry[name] for entry in history]) for name in [*ROUNDED, *CERTAIN]}


def moved(trained: Any, begin: Path) -> dict[str, Values]:
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(begin, dtype="float32").named_parameters())
    return {
        name: (parameter - before[name]).detach().numpy() for name, parameter in trained.named_parameters()
    }


def unequal(found: Run, expected: Run, again: Run) -> dict[str, str]:
    """Where a run is not ``expected`` but for rounding, whose size ``again``, the same once more, shows."""
    problems = {}
    for name in ROUNDED:
        difference = found.curves[name] - expected.curves[name]
        noise = rms(again.curves[name] - expected.curves[name])
        if rms(difference) > 3 * noise:
            problems[name] = f"off by {rms(difference):.1e}, rounding is {noise:.1e}"
        # Rounding stays in the weights for the steps after it, so that fifty steps are worth about ten
        # independent ones: this is three standard errors of their mean. TRL's own mean reaches half of it.
        elif abs(difference.mean()) > noise:
            problems[name] = f"drifts by {difference.mean():+.1e}, rounding is {noise:.1e}"
    away = {name: part - expected.moved[name] for name, part in found.moved.items()}
    noise = total({name: part - expected.moved[name] for name, part in again.moved.items()})
    if total(away) > 3 * noise:
        problems["weights"] = f"off by {total(away):.1e}, rounding is {noise:.1e}"
    return problems


def rms(values: Values) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def total(parts: dict[str, Values]) -> float:
    return float(np.sqrt(sum(np.square(part, dtype=np.float64).sum() for part in parts.values())))


def require_equal(task: Task, found: Run, expected: Run, again: Run) -> None:
    """The proof, with what it found for the reader of a test run."""
    losses, apart = expected.curves["loss"], found.curves["loss"] - expected.curves["loss"]
    itself = again.curves["loss"] - losses
    print(
        f"loss {losses[0]:.6f} -> {losses[-1]:.6f}; ours minus TRL's: mean {apart.mean():+.1e}, "
        f"rms {rms(apart):.1e}, largest {abs(apart).max():.1e}; TRL minus itself: {itself.mean():+.1e}, "
        f"{rms(itself):.1e}, {abs(itself).max():.1e}"
    )
    assert len(losses) == STEPS
    np.testing.assert_array_equal(found.curves["num_tokens"], expected.curves["num_tokens"])
    np.testing.assert_allclose(found.curves["learning_rate"], expected.curves["learning_rate"], rtol=1e-9)
    np.testing.assert_allclose(found.curves["epoch"], expected.curves["epoch"], atol=1e-6)
    assert unequal(found, expected, again) == {}
    # Pair by pair, so that no two may be swapped: sums over dozens of tokens, each in fp32.
    assert len(again.pair_logps) == sum(map(len, task.orders))
    np.testing.assert_allclose(found.pair_logps, again.pair_logps, rtol=3e-6, atol=3e-5)


# --- A model of random weights, two epochs of 25 steps, each with a short one at its end.


def made_up(count: int) -> Texts:
    """Rows that all differ, in lengths too."""
    rng = np.random.default_rng(0)
    words = ["the", "on", "a", "we", "can", "add", "seven", "is", "water", "that", "bought", "town", "not"]

    def text(low: int, high: int) -> str:
        return "".join(f" {words[i]}" for i in rng.integers(0, len(words), rng.integers(low, high)))

    return [
        {"prompt": f"{i}.{text(1, 10)}?", "chosen": text(1, 16), "rejected": text(1, 16)}
        for i in range(count)
    ]


PLAIN = {"learning_rate": 1e-4, "lr_scheduler_type": "linear"}
# Far from the defaults, so that nothing is right by being left out; about half of the steps are clipped.
UNUSUAL = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 5.0,
    "beta": 0.3,
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(PLAIN, id="plain"), pytest.param(UNUSUAL, id="unusual", marks=pytest.mark.slow)],
)
def task(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("task")
    return scored(tiny_model, made_up(98), folder, pairs_per_step=4, num_train_epochs=2, **request.param)


@pytest.fixture(scope="module")
def peer(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """TRL with two pairs at a time, and with one."""
    folder = tmp_path_factory.mktemp("trl")
    return theirs(task, folder / "2", micro_batch=2), theirs(task, folder / "1", micro_batch=1)


@pytest.mark.parametrize("budget", [2048, 64])
def test_the_curves_are_those_of_trl_with_its_reference_model(
    task: Task, peer: tuple[Run, Run], tmp_path: Path, budget: int
) -> None:
    expected, again = peer
    assert expected.curves["loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    assert expected.curves["loss"][-10:].mean() < 0.95 * expected.curves["loss"][:10].mean()
    require_equal(task, ours(task, tmp_path / "run", micro_batch_tokens=budget), expected, again)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("learning_rate", lambda rate: rate * 1.0001),
        ("beta", lambda beta: beta * 1.0001),
        ("adam_beta1", lambda decay: decay + 1e-4),
        ("adam_beta2", lambda decay: decay - 1e-4),
        ("label_smoothing", lambda share: share + 1e-4),
    ],
)
def test_a_setting_that_is_off_by_a_little_shows(
    task: Task, peer: tuple[Run, Run], tmp_path: Path, name: str, change: Callable[[float], float]
) -> None:
    """So equal curves mean equal settings, to four digits for the rate."""
    value = task.settings.get(name, TrainConfig.model_fields[name].default)
    assert unequal(ours(task, tmp_path / "run", **{name: change(value)}), *peer)


# --- Real models on real pairs.


def short_human_pairs(shared_data: Path, count: int, *, characters: int) -> Texts:
    """The longest different ones whose both sides have no more than so many characters."""
    with gzip.open(shared_data / "pairs" / "human_pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    different = {(row["prompt"], row["chosen"], row["rejected"]): row for row in rows}.values()

    def size(row: dict[str, Any]) -> int:
        return len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))

    fitting = [row for row in different if row["chosen"] != row["rejected"] and size(row) <= characters]
    return sorted(fitting, key=size)[-count:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_curves_of_a_trained_model_on_human_pairs(shared_data: Path, tmp_path: Path) -> None:
    texts = short_human_pairs(shared_data, 4 * STEPS, characters=200)
    model = shared_data / "models" / "stories260K"
    task = scored(model, texts, tmp_path, pairs_per_step=4, num_train_epochs=1, **PLAIN)
    expected, again = (theirs(task, tmp_path / f"trl-{size}", micro_batch=size) for size in (2, 1))
    require_equal(task, ours(task, tmp_path / "run"), expected, again)
