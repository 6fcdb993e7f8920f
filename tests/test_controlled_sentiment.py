"""The paper's sentiment experiment: what it claims of frontiers, its prompts and its settings."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from example_scripts import scripts_of

from dpo_opt.schemas.errors import ConfigError, DataError

EXAMPLE = Path(__file__).parents[1] / "examples" / "controlled_sentiment"
PROMPTS, SEEDS = 24, (0, 1, 2)


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a file of the example, which are scripts of one folder and no package."""
    with scripts_of(EXAMPLE) as imported:
        yield imported


def measured(example: Callable[[str], ModuleType], *, better: str | None, noise: float = 0.02) -> list[Any]:
    """Made-up points: the rewards of all methods rise alike with KL, those of one are 0.2 higher."""
    point = example("points").Point
    random = np.random.default_rng(0)
    found = []
    for seed in SEEDS:
        prompt = random.normal(scale=0.3, size=PROMPTS)
        found.append(point("sft", None, seed, 0, np.zeros(PROMPTS), 0.2 + prompt))
        for method in ("dpo", "ppo", "ppo_gt", "preferred_ft", "unlikelihood"):
            for step in (1, 2, 3, 4):
                reward = 0.2 + 0.1 * step + (0.2 if method == better else 0.0)
                own = reward + prompt + random.normal(scale=noise, size=PROMPTS)
                kl = step + random.normal(scale=0.05, size=PROMPTS)
                found.append(point(method, 1.0, seed, step, kl, own))
    return found


def verdicts(example: Callable[[str], ModuleType], points: list[Any]) -> dict[str, str]:
    return {claim.statement: claim.verdict for claim in example("claims").claims(points)}


def test_a_better_dpo_confirms_each_claim(example: Callable[[str], ModuleType]) -> None:
    assert set(verdicts(example, measured(example, better="dpo")).values()) == {"confirmed"}


@pytest.mark.parametrize("better", ["PPO", "PPO-GT", "Unlikelihood", "Preferred-FT"])
def test_the_claim_against_a_better_method_is_not_confirmed(
    example: Callable[[str], ModuleType], better: str
) -> None:
    name = next(name for name, title in example("settings").TITLES.items() if title == better)
    found = verdicts(example, measured(example, better=name))
    against = f"DPO's reward is above that of {better} at equal KL"
    assert found.pop(against) == "not confirmed"
    assert "confirmed" not in found.values()


def test_equal_methods_are_undecided(example: Callable[[str], ModuleType]) -> None:
    found = verdicts(example, measured(example, better=None, noise=0.2))
    assert set(found.values()) == {"undecided"}


def test_a_reward_that_only_a_larger_kl_bought_is_no_better(example: Callable[[str], ModuleType]) -> None:
    points = measured(example, better=None, noise=0.2)
    further = [
        p._replace(kl=2 * p.kl, reward=p.reward + p.kl * 0.1) if p.method == "dpo" else p for p in points
    ]
    final = {m: np.mean([p.reward for p in further if p.method == m and p.step == 4]) for m in ("dpo", "ppo")}
    assert final["dpo"] > final["ppo"] + 0.2
    assert verdicts(example, further)["DPO's reward is above that of PPO at equal KL"] == "undecided"


def test_methods_that_share_no_kl_are_undecided(example: Callable[[str], ModuleType]) -> None:
    points = measured(example, better="dpo")
    near = [p._replace(kl=0.1 * p.kl) if p.method == "ppo" else p for p in points]
    by_name = {claim.statement: claim for claim in example("claims").claims(near)}
    claim = by_name["DPO's reward is above that of PPO at equal KL"]
    assert claim.verdict == "undecided"
    assert claim.kl[0] > claim.kl[1]
    assert claim.as_record()["difference"] == {"value": None, "low": None, "high": None}


def test_the_frontier_is_the_best_reward_within_a_kl(example: Callable[[str], ModuleType]) -> None:
    frontier = example("claims").frontier
    kl, reward = np.array([0.0, 4.0, 2.0, 3.0]), np.array([0.0, 1.5, 1.0, 0.4])
    assert frontier(kl, reward, np.array([0.0, 1.0, 2.0, 3.0, 3.5, 9.0])).tolist() == [
        0,
        0.5,
        1,
        1,
        1.25,
        1.5,
    ]


def test_best_of_n_takes_what_the_learned_reward_prefers(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    import polars as pl

    class FirstId:
        def __init__(self, folder: Path, *, dtype: str) -> None:
            pass

        def rewards(self, sequences: list[np.ndarray]) -> list[float]:
            return [float(ids[-1]) for ids in sequences]

    module = example("best_of_n")
    monkeypatch.setattr(module, "RewardModel", FirstId)
    samples = pl.DataFrame(
        {
            "prompt_id": ["a"] * 4 + ["b"] * 4,
            "prompt_ids": [[1]] * 8,
            "completion_ids": [[value] for value in (1, 9, 3, 2, 5, 6, 8, 7)],
            "reward": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        }
    )
    two, four = module.best_of_n(samples, Path("unused"), [2, 4], seed=0)
    assert two.reward.tolist() == [1.5, 5.5]
    assert four.reward.tolist() == [1.0, 6.0]
    assert four.kl.tolist() == pytest.approx([np.log(4) - 0.75] * 2)


@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
def test_each_size_is_whole(example: Callable[[str], ModuleType], size: str) -> None:
    experiment, file = example("settings").read_experiment(size, model="model")
    left_out = {"unlikelihood", "ppo", "best_of_n"} if size == "small" else set()
    assert set(experiment.methods) == set(example("settings").TITLES) - left_out
    assert (file.parent / experiment.reward.partition(":")[0]).is_file()
    # Equal sampling budgets, up to a twentieth.
    sampled = experiment.ppo.steps * experiment.ppo.batch_size
    assert sampled == pytest.approx(experiment.train_prompts * experiment.completions, rel=0.05)


def test_settings_that_cannot_be_used_are_named(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    read = example("settings").read_experiment
    with pytest.raises(ConfigError, match="no size"):
        read("huge", model=None)
    with pytest.raises(ConfigError, match="no model"):
        read("tiny", model=None)
    text = (EXAMPLE / "tiny.yaml").read_text(encoding="utf-8")
    for before, after, says in (
        ("knobs: [2, 4]", "knobs: [3]", "does not divide"),
        ("learning_rates: [1.0e-4, 3.0e-4]", "learning_rates: [1.0e-4]", "same number"),
        ("checkpoints: 4", "checkpoints: 5", "no multiple"),
        ("seeds: [0, 1, 2]", "seed: 0", "seed"),
    ):
        assert before in text
        file = tmp_path / "own.yaml"
        file.write_text(text.replace(before, after, 1), encoding="utf-8")
        with pytest.raises(ConfigError, match=says):
            read(str(file), model="model")


def test_no_prompt_is_in_two_splits(example: Callable[[str], ModuleType]) -> None:
    prompts = example("prompts")
    prompts.require_disjoint({"train": ["a", "b"], "validation": ["c"], "held_out": ["d"]})
    with pytest.raises(DataError, match="in train and again in held_out"):
        prompts.require_disjoint({"train": ["a", "b"], "held_out": ["c", "b"]})


def test_prompts_are_disjoint_and_of_one_length(
    example: Callable[[str], ModuleType], shared_data: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = shared_data / "models" / "stories260K"
    experiment, _ = example("settings").read_experiment("tiny", model=str(model))
    example("prompts").write_prompts(tmp_path / "prompts", experiment, corpus=None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {
        split: example("prompts").read_prompts(tmp_path / "prompts" / f"{split}.jsonl")
        for split in ("train", "validation", "held_out")
    }
    assert [len(prompts) for prompts in found.values()] == [160, 32, 48]
    everything = [prompt for prompts in found.values() for prompt in prompts]
    assert len(set(everything)) == len(everything)
    assert {len(ids) for ids in tokenizer(everything)["input_ids"]} == {experiment.prompt_tokens}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of reviews as the sentence polarity data set has them, one of them twice."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for suffix, word in (("pos", "wonderful"), ("neg", "dreadful")):
        lines = [f"film number {n} about a caf\xe9 is truly {word} to see again" for n in range(60)]
        (folder / f"reviews.{suffix}").write_bytes("\n".join([*lines, lines[0], ""]).encode("latin-1"))
    return folder


def test_reviews_are_read_from_a_folder_and_from_a_zip_file(
    example: Callable[[str], ModuleType], corpus: Path, tmp_path: Path
) -> None:
    reviews = example("reviews")
    found = reviews.read_reviews(corpus)
    assert len(found) == len(set(found)) == 120
    assert sum(review.positive for review in found) == 60
    assert reviews.read_reviews(Path(shutil.make_archive(str(tmp_path / "zip"), "zip", corpus))) == found
    classifier, prompts = reviews.shuffled(found, 0.5)
    assert not set(classifier) & set(prompts)
    assert len(classifier) == len(prompts) == 60
    assert reviews.shuffled(found[::-1], 0.5) == (classifier, prompts)
    (corpus / "reviews.neg").unlink()
    with pytest.raises(DataError, match="not both"):
        reviews.read_reviews(corpus)
    (tmp_path / "broken.zip").write_bytes(b"no zip file")
    with pytest.raises(DataError, match="cannot be read"):
        reviews.read_reviews(tmp_path / "broken.zip")


def test_prompts_from_reviews_are_disjoint_and_few_are_refused(
    example: Callable[[str], ModuleType], tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    experiment, _ = example("settings").read_experiment("small", model=str(tiny_model))
    size = example("settings").Split(prompts=8, samples=8)
    few = experiment.model_copy(
        update={"train_prompts": 16, "prompt_tokens": 16, "validation": size, "held_out": size}
    )
    prompts = example("prompts")
    prompts.write_prompts(tmp_path / "prompts", few, corpus=corpus)
    splits = {
        s: prompts.read_prompts(tmp_path / "prompts" / f"{s}.jsonl")
        for s in ("train", "validation", "held_out")
    }
    prompts.require_disjoint(splits)
    whole = (tmp_path / "prompts" / "sft.jsonl").read_text().splitlines()
    assert len(whole) == 16
    assert all(
        json.loads(line)["text"].startswith(prompt)
        for line, prompt in zip(whole, splits["train"], strict=True)
    )
    with pytest.raises(DataError, match="held_out has 1 of the 64 prompts"):
        prompts.write_prompts(tmp_path / "many", experiment, corpus=corpus)
    assert not (tmp_path / "many").exists()


def test_a_folder_is_continued_with_its_own_settings_alone(
    example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    begin = example("folders").begin
    experiment, _ = example("settings").read_experiment("tiny", model="model")
    begin(tmp_path / "new", experiment, {})
    begin(tmp_path / "new", experiment, {})
    with pytest.raises(ConfigError, match="other settings"):
        begin(tmp_path / "new", experiment.model_copy(update={"seeds": [7]}), {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not empty"):
        begin(tmp_path / "full", experiment, {})
