import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from architectures import PACKED, PADDED, groups, load, save_random
from model_edits import lose_a_merge
from torch import Tensor
from transformers import PreTrainedModel

from dpo_opt.optimize import TrainConfig, train
from dpo_opt.optimize.score_folder import score_shards
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA
from dpo_opt.schemas.pairs import IdArray, TokenSequence
from dpo_opt.schemas.shard_folder import ShardFolder

FullLogps = Callable[[PreTrainedModel, TokenSequence], Tensor]
EOS = 1


def ids(*values: int) -> IdArray:
    return np.array(values, dtype=np.int32)


@pytest.fixture(scope="module")
def scorer(tiny_model: Path) -> HfScorer:
    return HfScorer(tiny_model, dtype="float32")


def edited(tiny_model: Path, folder: Path, settings: dict[str, object]) -> Path:
    """The tiny model with other generation settings."""
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, **settings}))
    return folder


def test_groups_are_scored_as_one_sequence_at_a_time(
    scorer: HfScorer, stock_model: PreTrainedModel, full_logps: FullLogps
) -> None:
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(30):
        prompt = rng.integers(2, 270, size=rng.integers(1, 40)).astype(np.int32)
        for _ in range(rng.integers(1, 5)):
            sequences.append(
                TokenSequence(prompt, rng.integers(2, 270, size=rng.integers(1, 50)).astype(np.int32))
            )
    # The same prompt again, not adjacent: another group.
    sequences.append(sequences[0])
    assert sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences) > 2048, "one forward held all"
    found = scorer.token_logps(sequences)
    assert len(found) == len(sequences)
    for sequence, values in zip(sequences, found, strict=True):
        assert values.dtype == np.float32
        with torch.no_grad():
            expected = full_logps(stock_model, sequence).numpy()
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found[0], found[-1])


def test_numerics_say_what_computes(scorer: HfScorer) -> None:
    assert scorer.numerics.engine == "transformers"
    assert scorer.numerics.dtype == "float32"


def sample(model: HfScorer, prompts: list[IdArray], **settings: int | float) -> list[list[IdArray]]:
    """Samples without their flags."""
    asked = {"num_samples": 3, "max_new_tokens": 12, "temperature": 1.0, "seed": 0, **settings}
    return [[c.completion_ids for c in cs] for cs in model.sample(prompts, **asked)]  # type: ignore[arg-type]


def test_every_prompt_gets_its_number_of_samples_without_the_prompt(scorer: HfScorer) -> None:
    prompts = [ids(0, 7, 8), ids(0, *range(20, 60)), ids(9)]
    found = scorer.sample(prompts, num_samples=30, max_new_tokens=6, temperature=1.0, seed=0)
    assert [len(completions) for completions in found] == [30, 30, 30]  # more than one batch
    for completion in (c for completions in found for c in completions):
        assert 1 <= len(completion.completion_ids) <= 6
        assert completion.completion_ids.dtype == np.int32
        assert completion.finished == (completion.completion_ids[-1] == EOS)
        assert EOS not in completion.completion_ids[:-1]
        assert completion.finished or len(completion.completion_ids) == 6
    assert len({c.completion_ids.tobytes() for completions in found for c in completions}) > 60


def test_a_completion_ends_with_any_of_the_models_ends(tiny_model: Path, tmp_path: Path) -> None:
    every_second = list(range(1, 270, 2))
    scorer = HfScorer(edited(tiny_model, tmp_path / "m", {"eos_token_id": every_second}), dtype="float32")
    completions = [
        c
        for cs in scorer.sample([ids(0, 5)], num_samples=40, max_new_tokens=12, temperature=1.0, seed=1)
        for c in cs
    ]
    finished = [c for c in completions if c.finished]
    assert len(finished) > 30
    for completion in finished:
        assert completion.completion_ids[-1] % 2 == 1
        assert all(token % 2 == 0 for token in completion.completion_ids[:-1])


def test_sampling_is_reproducible_and_depends_on_the_seed(scorer: HfScorer) -> None:
    first, again, other = (sample(scorer, [ids(0, 5, 6)], seed=seed) for seed in (3, 3, 4))
    assert [c.tolist() for c in first[0]] == [c.tolist() for c in again[0]]
    assert [c.tolist() for c in first[0]] != [c.tolist() for c in other[0]]


def test_a_prompts_samples_depend_on_nothing_beside_it(scorer: HfScorer) -> None:
    prompts = [ids(0, 5, 6), ids(0, 9, 40, 41, 42), ids(0, 12, 13, 14)]
    together = sample(scorer, prompts, num_samples=30)  # more than one batch
    for prompt, expected in zip(prompts, together, strict=True):
        (alone,) = sample(scorer, [prompt], num_samples=3)
        assert [c.tolist() for c in alone] == [c.tolist() for c in expected[:3]]


def test_a_temperature_of_0_takes_the_most_likely_token(
    scorer: HfScorer, stock_model: PreTrainedModel
) -> None:
    prompt = ids(0, 5, 6)
    with torch.no_grad():
        best = int(stock_model(input_ids=torch.tensor([prompt.tolist()])).logits[0, -1].argmax())
    (written,) = sample(scorer, [prompt], num_samples=3, temperature=0.0, max_new_tokens=1)
    assert [int(c[0]) for c in written] == [best] * 3


def test_sampling_leaves_scoring_as_it_was(scorer: HfScorer) -> None:
    sequences = [TokenSequence(ids(0, 5, 6), ids(7, 8)), TokenSequence(ids(0, 5, 6), ids(9))]
    before = scorer.token_logps(sequences)
    sample(scorer, [ids(0, 5, 6)])
    for mine, expected in zip(scorer.token_logps(sequences), before, strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_samples_follow_the_whole_distribution(scorer: HfScorer, stock_model: PreTrainedModel) -> None:
    prompt = ids(0, 40, 41)
    drawn = Counter(int(c[0]) for c in sample(scorer, [prompt], num_samples=4000, max_new_tokens=1)[0])
    with torch.no_grad():
        logits = stock_model(input_ids=torch.tensor([prompt.tolist()])).logits[0, -1].double()
    expected = logits.softmax(-1).numpy()
    frequencies = np.array([drawn[i] for i in range(270)]) / 4000
    # Total variation of 4000 draws over 270 tokens is about 0.1 by chance; top-k 50 would give more than 0.3.
    assert 0.5 * np.abs(frequencies - expected).sum() < 0.15
    outside_top_50 = np.argsort(-expected)[50:]
    assert frequencies[outside_top_50].sum() == pytest.approx(expected[outside_top_50].sum(), abs=0.05)
    assert expected[outside_top_50].sum() > 0.2


def test_samples_are_the_models_own_whatever_its_generation_settings(
    tiny_model: Path, tmp_path: Path
) -> None:
    """KL is an expectation over the policy's own samples; a repetition penalty would make them another's."""
    plain, warped = (
        HfScorer(edited(tiny_model, tmp_path / name, settings), dtype="float32")
        for name, settings in (
            ("plain", {}),
            (
                "warped",
                {
                    "do_sample": True,
                    "repetition_penalty": 1.8,
                    "top_k": 2,
                    "min_p": 0.5,
                    "no_repeat_ngram_size": 1,
                    "temperature": 0.1,
                },
            ),
        )
    )
    prompts = [ids(0, 5, 6), ids(0, 9)]
    assert [[c.tolist() for c in cs] for cs in sample(warped, prompts)] == [
        [c.tolist() for c in cs] for cs in sample(plain, prompts)
    ]


def test_padding_does_not_reach_the_samples(scorer: HfScorer, stock_model: PreTrainedModel) -> None:
    """Almost greedy, so that the samples are known: beside a long prompt, a short one is padded."""
    short, long = ids(0, 5), ids(0, *range(30, 90))
    together = sample(scorer, [short, long], num_samples=1, temperature=1e-4)
    for prompt, completions in zip((short, long), together, strict=True):
        context = prompt.tolist()
        for token in completions[0].tolist():
            with torch.no_grad():
                logits = stock_model(input_ids=torch.tensor([context])).logits[0, -1]
            assert token == int(logits.argmax())
            context.append(token)


def test_scores_of_a_folder_join_with_its_shards(
    shards: Path, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    pairs = list(ShardFolder.open(shards).pairs())
    tables = {}
    for name, model in (("same", tiny_model), ("other", other_model)):
        output = tmp_path / f"{name}.parquet"
        assert score_shards(shards, model=str(model), output=output, dtype="auto") == len(pairs) == 28
        tables[name] = pq.read_table(output)
        assert tables[name].schema.equals(PAIR_LOGPS_SCHEMA)
    for row, other, pair in zip(tables["same"].to_pylist(), tables["other"].to_pylist(), pairs, strict=True):
        assert (row["row"], row["pair_id"]) == (pair.row, pair.pair_id)
        assert (row["phase"], row["checkpoint"], row["step"], row["epoch"]) == (
            "score",
            str(tiny_model),
            0,
            0.0,
        )
        for side in ("chosen", "rejected"):
            cached = getattr(pair, f"ref_{side}_token_logps")
            np.testing.assert_allclose(row[f"{side}_token_logps"], cached, rtol=0, atol=1e-5)
            assert row[f"{side}_logps"] == pytest.approx(float(cached.sum(dtype=np.float64)), abs=1e-4)
            assert row[f"{side}_length"] == len(cached)
            assert abs(row[f"{side}_logps"] - other[f"{side}_logps"]) > 1e-3


def test_the_final_model_of_a_run_is_scored_with_its_step(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        shards=shards,
        model=str(tiny_model),
        output_dir=tmp_path / "run",
        batch_size=8,
        learning_rate=1e-3,
        max_steps=5,
    )
    result = train(config)
    score_shards(shards, model=str(result.final), output=tmp_path / "score.parquet", dtype="auto")
    rows = pq.read_table(tmp_path / "score.parquet").to_pylist()
    assert {row["step"] for row in rows} == {5}
    assert {round(row["epoch"], 6) for row in rows} == {round(36 / 28, 6)}


def test_a_checkpoint_with_another_tokenizer_is_refused(shards: Path, model: Path, tmp_path: Path) -> None:
    lose_a_merge(model)
    with pytest.raises(FingerprintError, match="tokenizer"):
        score_shards(shards, model=str(model), output=tmp_path / "score.parquet", dtype="auto")
    assert not (tmp_path / "score.parquet").exists()


@pytest.mark.parametrize("name", list(PACKED | PADDED))
def test_half_precision_is_that_of_training_from_fp32_bit_by_bit(name: str, tmp_path: Path) -> None:
    save_random(*(PACKED | PADDED)[name], tmp_path, seed=5)
    scorer = HfScorer(tmp_path, dtype="bfloat16")
    sequences = [sequence for group in groups() for sequence in group]
    trained = load(tmp_path, dtype=torch.bfloat16).sequence_logps(groups())
    for mine, theirs in zip(scorer.token_logps(sequences), trained, strict=True):
        np.testing.assert_array_equal(mine, theirs.detach().numpy())
    projections = [m for n, m in scorer.policy.model.named_modules() if n.endswith(("q_proj", "in_proj"))]
    assert {projection.weight.dtype for projection in projections} <= {torch.bfloat16}
