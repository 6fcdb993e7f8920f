"""TRL's trainer takes the same steps from our shards as after its own precompute, with no reference model."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt import trl as adapter
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.schemas.errors import ConfigError, DataError, FingerprintError
from dpo_opt.schemas.manifest import MANIFEST
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.trl import ReferenceFromShards, trl_dataset

pytestmark = pytest.mark.usefixtures("peers")
ROWS = preference_rows(22)
STEPS = 5


@pytest.fixture(scope="module")
def shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scored by the model that the trainers start from."""
    folder = tmp_path_factory.mktemp("scored")
    config = PrecomputeConfig(
        model=str(tiny_model),
        data=write_jsonl(folder / "data.jsonl", ROWS),
        shards=folder / "shards",
        pairs_per_shard=8,
        dtype="float32",
    )
    precompute(config, scorer=HfScorer(tiny_model, dtype="float32"))
    return folder / "shards"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def other_shards(tiny_model: Path, folder: Path, rows: list[dict[str, object]]) -> Path:
    config = PrecomputeConfig(
        model=str(tiny_model), data=write_jsonl(folder / "data.jsonl", rows), shards=folder / "shards"
    )
    precompute(config, scorer=ScriptedScorer())
    return folder / "shards"


# --- The dataset.


def test_the_dataset_holds_every_pair_in_order_and_nothing_else(shards: Path, cache: Path) -> None:
    found = trl_dataset(shards, cache_folder=cache)
    pairs = list(ShardFolder.open(shards).pairs())
    assert found.column_names == [
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "ref_chosen_logps",
        "ref_rejected_logps",
    ]
    assert len(found) == len(pairs) == len(ROWS)
    for ours, pair in zip(found, pairs, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert ours[name] == getattr(pair, name).tolist()
        assert ours["ref_chosen_logps"] == np.float32(pair.ref_chosen_logps)
        assert ours["ref_rejected_logps"] == np.float32(pair.ref_rejected_logps)


def test_the_copy_is_written_a_few_rows_at_a_time(
    shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trl_dataset(shards, cache_folder=cache / "whole")
    in_hand: list[int] = []
    batch = adapter._batch
    monkeypatch.setattr(adapter, "_ROWS_AT_ONCE", 5)
    monkeypatch.setattr(adapter, "_batch", lambda pairs: (in_hand.append(len(pairs)), batch(pairs))[1])
    streamed = trl_dataset(shards, cache_folder=cache / "streamed")
    assert in_hand == [5, 5, 5, 5, 2]
    assert streamed.to_list() == whole.to_list()


def test_the_copy_is_made_once_for_each_content(
    shards: Path, tiny_model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trl_dataset(shards, cache_folder=cache)
    trl_dataset(other_shards(tiny_model, tmp_path, ROWS[:4]), cache_folder=cache)
    files = {path: path.stat().st_mtime_ns for path in cache.glob("*.arrow")}
    assert len(files) == 2
    monkeypatch.setattr(adapter, "_write", lambda folder, path: pytest.fail("it was there"))
    moved = shutil.copytree(shards, tmp_path / "moved")
    assert trl_dataset(moved, cache_folder=cache).to_list() == first.to_list()
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.arrow")} == files


def test_an_interrupted_copy_leaves_none(shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(pairs: list[Any]) -> pa.RecordBatch:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trl_dataset(shards, cache_folder=cache)
    assert not list(cache.glob("*.arrow"))
    assert len(trl_dataset(shards, cache_folder=cache)) == len(ROWS)


def test_a_folder_that_is_not_finalized_is_refused(shards: Path, tmp_path: Path, cache: Path) -> None:
    unfinished = shutil.copytree(shards, tmp_path / "unfinished")
    (unfinished / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"no manifest\.json") as caught:
        trl_dataset(unfinished, cache_folder=cache)
    assert caught.value.fix == f"dpo-opt finalize --shards {unfinished}"
    assert not cache.exists()


def test_another_model_is_refused_where_it_is_named(
    shards: Path, tiny_model: Path, other_model: Path, cache: Path
) -> None:
    trl_dataset(shards, model=tiny_model, cache_folder=cache)
    with pytest.raises(FingerprintError, match="weights"):
        trl_dataset(shards, model=other_model, cache_folder=cache)


def test_weights_are_said_to_be_left_out(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    weighted = [row | {"weight": 1.0 + i} for i, row in enumerate(ROWS[:4])]
    folder = other_shards(tiny_model, tmp_path, weighted)
    with pytest.warns(UserWarning, match="weights, which TRL has no place for"):
        assert "weight" not in trl_dataset(folder, cache_folder=cache).column_names


# --- The trainer.


class Run(NamedTuple):
    losses: list[float]
    """Of each step."""
    batches: list[list[tuple[list[int], list[int]]]]
    """Of each step: prompt and completion of each of its sequences, chosen ones first."""
    forwards: int
    """Passes through any model."""
    trainer: Any


def config(output: Path, **settings: Any) -> Any:
    from trl import DPOConfig

    values: dict[str, Any] = {
        "output_dir": str(output),
        "max_length": None,
        "precompute_ref_log_probs": True,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return DPOConfig(**values | settings)


def trained(data: Any, model: Path, output: Path, *mixins: type, **settings: Any) -> Run:
    """A few steps of TRL's trainer, with what it was given and computed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    losses: list[float] = []
    batches: list[list[tuple[list[int], list[int]]]] = []
    forwards: list[int] = []

    class Trainer(*mixins, DPOTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *others: Any, **named: Any) -> Any:
            loss = super().compute_loss(model, inputs, *others, **named)
            losses.append(float(loss.detach()))
            batches.append(list(sequences(inputs)))
            return loss

    # For all modules: a reference model that is loaded somewhere else counts too.
    def count(module: Any, *_: Any) -> None:
        if hasattr(module, "lm_head"):
            forwards.append(1)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=config(output, **settings),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        trainer.train()
    finally:
        hook.remove()
    return Run(losses, batches, len(forwards), trainer)


def sequences(inputs: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    for ids, real, completion in zip(
        inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool(), strict=True
    ):
        yield ids[real & ~completion].tolist(), ids[completion].tolist()


@pytest.mark.slow
def test_the_steps_are_those_of_trls_own_precompute_and_no_reference_is_loaded_or_run(
    shards: Path, tiny_model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from trl.trainer import dpo_trainer

    monkeypatch.setattr(
        dpo_trainer, "create_model_from_path", lambda *_, **__: pytest.fail("a model is loaded")
    )
    texts = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS])
    theirs = trained(texts, tiny_model, tmp_path / "theirs")
    data = trl_dataset(shards, model=tiny_model, cache_folder=cache)
    ours = trained(data, tiny_model, tmp_path / "ours", ReferenceFromShards)

    assert ours.trainer.ref_model is None
    assert ours.forwards == STEPS
    assert theirs.forwards == STEPS + math.ceil(len(ROWS) / 4)

    assert ours.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(ours.losses[-1] - math.log(2)) > 0.01
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)

    assert ours.batches == theirs.batches
    scored = {
        (tuple(pair.prompt_ids.tolist()), tuple(completion.tolist()))
        for pair in ShardFolder.open(shards).pairs()
        for completion in (pair.chosen_ids, pair.rejected_ids)
    }
    assert {(tuple(p), tuple(c)) for batch in ours.batches for p, c in batch} <= scored


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["ipo", "apo_zero", "sppo_hard", "aot", "sigmoid_norm"])
def test_losses_that_read_the_references_sums_train(
    shards: Path, tiny_model: Path, tmp_path: Path, cache: Path, loss_type: str
) -> None:
    data = trl_dataset(shards, cache_folder=cache)
    run = trained(data, tiny_model, tmp_path / "run", ReferenceFromShards, loss_type=loss_type, max_steps=2)
    # At the first step policy and reference are the same model.
    beta = run.trainer.args.beta
    first = {
        "ipo": (1 / (2 * beta)) ** 2,
        "apo_zero": 1.0,
        "sppo_hard": 2 * (0.5 / beta) ** 2,
        "aot": math.log(2),
        "sigmoid_norm": math.log(2),
    }
    assert run.losses[0] == pytest.approx(first[loss_type], rel=1e-4)


@pytest.mark.slow
def test_a_part_of_the_dataset_can_be_held_out(
    shards: Path, tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    class Trainer(ReferenceFromShards, DPOTrainer):
        pass

    parts = trl_dataset(shards, cache_folder=cache).train_test_split(6, seed=0)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=config(tmp_path / "run", max_length=256),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precompute_ref_log_probs": False}, "precompute_ref_log_probs is False"),
        ({"ld_alpha": 0.5}, "ld_alpha is 0.5"),
        ({"max_length": 8}, "max_length is 8 and the longest sequence has"),
    ],
)
def test_settings_that_do_not_fit_the_shards_are_refused(
    shards: Path, tiny_model: Path, tmp_path: Path, cache: Path, settings: dict[str, Any], message: str
) -> None:
    data = trl_dataset(shards, cache_folder=cache)
    with pytest.raises(ConfigError, match=message):
        trained(data, tiny_model, tmp_path / "run", ReferenceFromShards, **settings)


@pytest.mark.slow
def test_max_length_may_be_that_of_the_longest_sequence_and_no_less(
    shards: Path, tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    longest = max(
        len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        for pair in ShardFolder.open(shards).pairs()
    )
    data = trl_dataset(shards, cache_folder=cache)
    trained(data, tiny_model, tmp_path / "run", ReferenceFromShards, max_length=longest, max_steps=1)
    with pytest.raises(ConfigError, match=f"longest sequence has {longest} tokens"):
        trained(data, tiny_model, tmp_path / "run", ReferenceFromShards, max_length=longest - 1)


@pytest.mark.slow
def test_other_data_and_a_second_model_are_refused(
    shards: Path, tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    class Trainer(ReferenceFromShards, DPOTrainer):
        pass

    with pytest.raises(ConfigError, match="columns prompt_ids") as caught:
        trained(Dataset.from_list(ROWS), tiny_model, tmp_path / "run", ReferenceFromShards)
    assert caught.value.where == "the train dataset"
    with pytest.raises(ConfigError, match="there is a reference model"):
        Trainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            ref_model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=config(tmp_path / "run"),
            train_dataset=trl_dataset(shards, cache_folder=cache),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )


def test_a_trainer_that_would_tokenize_again_is_refused_when_it_is_defined() -> None:
    class Later:
        def _prepare_dataset(self) -> None: ...

    with pytest.raises(ConfigError, match="has no _precompute_ref_logps"):

        class Wrong(ReferenceFromShards, Later):
            pass
