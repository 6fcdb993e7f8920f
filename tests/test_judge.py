"""``dpo-opt judge`` with a function, a reward model and a chat model of this machine, up to the shards."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from command_line import invoke
from fakes import write_jsonl
from model_edits import change_config, change_json
from transformers import AutoConfig, LlamaForSequenceClassification

from dpo_opt.feedback.judging.answer_log import AnswerLog
from dpo_opt.feedback.judging.ratings import RATINGS_SCHEMA
from dpo_opt.feedback.work_folder import begin_or_resume
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer

PROMPTS: list[dict[str, Any]] = [{"prompt": f"the {word}"} for word in ("sea", "hill", "town")]
CONVERSATIONS = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
LONGER = "def longer(prompts, completions):\n    return [len(text) for text in completions]\n"


def sampled(model: Path, folder: Path, rows: list[dict[str, Any]]) -> Path:
    prompts = write_jsonl(folder / "prompts.jsonl", rows)
    small = ["--backend", "hf", "--num-samples", 3, "--max-new-tokens", 8]
    result = invoke("sample", "--model", model, "--prompts", prompts, "--output", folder / "samples", *small)
    assert result.exit_code == 0, result.output
    return folder / "samples"


@pytest.fixture
def samples(tiny_model: Path, tmp_path: Path) -> Path:
    return sampled(tiny_model, tmp_path, PROMPTS)


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "reward.py").write_text(LONGER)
    return f"{tmp_path / 'reward.py'}:longer"


def ranked(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ranked.jsonl").read_text().splitlines()]


def test_a_functions_ranking_becomes_shards(
    samples: Path, function: str, tiny_model: Path, tmp_path: Path
) -> None:
    result = invoke(
        "judge", "--samples", samples, "--output", tmp_path / "j", "--function", function, "--json"
    )
    said = json.loads(result.stdout)
    rows = ranked(tmp_path / "j")
    assert rows
    assert all(row["scores"] == [len(text) for text in row["completions"]] for row in rows)
    assert said["rows"] == len(rows)
    again = invoke(
        "judge", "--samples", samples, "--output", tmp_path / "j", "--function", function, "--json"
    )
    assert json.loads(again.stdout) == said
    shards = ["--shards", tmp_path / "shards", "--backend", "hf", "--json"]
    scored = invoke("precompute", "--model", tiny_model, "--data", tmp_path / "j" / "ranked.jsonl", *shards)
    assert json.loads(scored.stdout)["rows"] == said["pairs"]
    (tmp_path / "reward.py").write_text(LONGER.replace("len(text)", "-len(text)"))
    other = invoke("judge", "--samples", samples, "--output", tmp_path / "j", "--function", function)
    assert other.exit_code == 4
    assert "sha256" in other.stderr


def test_a_folder_of_samples_is_no_place_for_a_judges_files(samples: Path, function: str) -> None:
    before = {path: path.read_bytes() for path in samples.rglob("*") if path.is_file()}
    result = invoke("judge", "--samples", samples, "--output", samples, "--function", function)
    assert result.exit_code == 2
    assert "its settings.json is not this command's" in result.stderr
    assert {path: path.read_bytes() for path in samples.rglob("*") if path.is_file()} == before


def test_another_judge_is_refused_while_one_is_at_work_and_changes_nothing(
    samples: Path, function: str, tmp_path: Path
) -> None:
    folder, other = tmp_path / "j", tmp_path / "other.py"
    other.write_text(LONGER + "\n")
    identity = {"judge": "function", "function": "of the one at work", "sha256": "0"}
    begin_or_resume(folder, identity, kind="judge", has_results=False)
    with AnswerLog(folder, RATINGS_SCHEMA):
        result = invoke("judge", "--samples", samples, "--output", folder, "--function", f"{other}:longer")
    assert result.exit_code == 2
    assert "another process is at work" in result.stderr
    assert json.loads((folder / "settings.json").read_text()) == identity


@pytest.mark.parametrize("change", ["samples", "finished_only"])
def test_what_is_judged_is_part_of_a_folder_and_nothing_else_replaces_its_ranking(
    samples: Path, function: str, tiny_model: Path, tmp_path: Path, change: str
) -> None:
    judge = ["judge", "--output", tmp_path / "j", "--function", function, "--samples"]
    assert invoke(*judge, samples).exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "j").iterdir()}
    (tmp_path / "other").mkdir()
    others = [sampled(tiny_model, tmp_path / "other", PROMPTS[:2])]
    result = invoke(*judge, *(others if change == "samples" else [samples, "--finished-only"]))
    if change == "finished_only" and result.exit_code == 2:
        assert "two completions to compare" in result.stderr  # none of a random model's are finished
        return
    assert result.exit_code == 4
    assert change in result.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "j").iterdir()} == before


def test_a_folder_that_moved_holds_the_same_samples(samples: Path, function: str, tmp_path: Path) -> None:
    judge = ["judge", "--output", tmp_path / "j", "--function", function, "--json", "--samples"]
    first = json.loads(invoke(*judge, samples).stdout)
    again = json.loads(invoke(*judge, samples.rename(tmp_path / "moved")).stdout)
    assert {**again, "samples": None} == {**first, "samples": None}


def test_scores_that_are_all_equal_are_nothing_to_train_on(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def same(prompts, completions):\n    return [1.0] * len(prompts)\n")
    named = f"{tmp_path / 'reward.py'}:same"
    result = invoke("judge", "--samples", samples, "--output", tmp_path / "j", "--function", named, "--json")
    assert result.exit_code == 3
    assert "there is nothing to train on" in result.stderr
    assert sorted(path.name for path in (tmp_path / "j").iterdir()) == [
        "answers.parquet",
        "settings.json",
        "summary.json",
    ]


def test_a_function_that_fails_leaves_no_ranking(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def broken(prompts, completions):\n    return [float('nan')] * 99\n")
    named = f"{tmp_path / 'reward.py'}:broken"
    result = invoke("judge", "--samples", samples, "--output", tmp_path / "j", "--function", named)
    assert result.exit_code == 3
    assert "99 numbers for" in result.stderr
    assert [path.name for path in (tmp_path / "j").iterdir()] == ["settings.json"]


def reward_model(model: Path, folder: Path, *, labels: int = 1) -> Path:
    """A sequence classifier with the tokenizer of ``model`` and weights of its own."""
    config = AutoConfig.from_pretrained(model, num_labels=labels, pad_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rows", [PROMPTS, CONVERSATIONS], ids=["text", "messages"])
def test_a_reward_models_scores_are_its_logits(
    tiny_model: Path, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    samples = sampled(tiny_model, tmp_path, rows)
    folder = reward_model(tiny_model, tmp_path / "reward")
    result = invoke("judge", "--samples", samples, "--output", tmp_path / "j", "--reward-model", folder)
    assert result.exit_code == 0, result.output
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder)
    for row in ranked(tmp_path / "j"):
        for completion, score in zip(row["completions"], row["scores"], strict=True):
            if isinstance(row["prompt"], str):
                ids = tokenizer(row["prompt"] + completion + "</s>")["input_ids"]
            else:
                text = tokenizer.apply_chat_template([*row["prompt"], *completion], tokenize=False)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([ids])).logits.item()
            assert score == pytest.approx(expected, abs=1e-5)
    assert len({score for row in ranked(tmp_path / "j") for score in row["scores"]}) > 5


@pytest.mark.parametrize("pad", [1, None], ids=["pad token", "no pad token"])
def test_a_reward_model_needs_no_eos_token(
    samples: Path, tiny_model: Path, tmp_path: Path, pad: int | None
) -> None:
    """A classifier writes nothing: the reward is that of the last token of the completion."""
    folder = reward_model(tiny_model, tmp_path / "reward")
    change_config(folder, pad_token_id=pad)
    change_json(folder / "tokenizer_config.json", lambda config: config.pop("eos_token"))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert load_tokenizer(folder, needs_eos=False).eos_token is None
    result = invoke("judge", "--samples", samples, "--output", tmp_path / "j", "--reward-model", folder)
    assert result.exit_code == 0, result.output
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder, needs_eos=False)
    for row in ranked(tmp_path / "j"):
        for completion, score in zip(row["completions"], row["scores"], strict=True):
            ids = tokenizer(row["prompt"] + completion)["input_ids"]
            with torch.no_grad():
                hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
                expected = model.score(hidden)[0, -1].item()
            assert score == pytest.approx(expected, abs=1e-5)


def test_a_model_without_a_head_of_one_reward_is_refused(
    samples: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for folder, said in (
        (tiny_model, "no weights for score.weight"),
        (reward_model(tiny_model, tmp_path / "two", labels=2), "2 labels"),
    ):
        result = invoke("judge", "--samples", samples, "--output", tmp_path / "j", "--reward-model", folder)
        assert result.exit_code == 2
        assert said in result.stderr
        assert not (tmp_path / "j" / "ranked.jsonl").exists()


@pytest.mark.parametrize("backend", ["hf", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])])
def test_a_chat_model_is_asked_in_both_orders(
    samples: Path, model: Path, tmp_path: Path, backend: str
) -> None:
    change_config(model, max_position_embeddings=4096)
    judge = ["judge", "--samples", samples, "--output", tmp_path / "j", "--judge-model", model, "--json"]
    judge += ["--backend", backend, "--max-new-tokens", 4]
    result = invoke(*judge)
    assert result.exit_code == 3, result.output
    assert "no completion is better than another one of its prompt (3 prompts)" in result.stderr
    assert not (tmp_path / "j" / "ranked.jsonl").exists()
    said = json.loads((tmp_path / "j" / "summary.json").read_text())
    answers = pq.read_table(tmp_path / "j" / "answers.parquet").to_pylist()
    assert said["asked"] == len(answers) == 18  # 3 prompts, 3 pairs each, both orders
    assert said["comparisons"] == 9
    assert said["malformed_answers"] == 18  # of a model of random weights
    assert said["position_bias"] is None
    assert (said["ranked"], said["rows"], said["tied_prompts"]) == (None, 0, 3)
    assert all(json.loads(row["request"])[0]["role"] == "system" for row in answers)
    assert invoke(*judge).exit_code == 3
    assert json.loads((tmp_path / "j" / "summary.json").read_text())["asked"] == 0


def test_a_judge_without_a_chat_template_is_refused_by_name(
    samples: Path, model: Path, tmp_path: Path
) -> None:
    for path in model.glob("*chat_template*"):
        path.unlink()
    change_json(model / "tokenizer_config.json", lambda config: config.pop("chat_template", None))
    result = invoke("judge", "--samples", samples, "--output", tmp_path / "j", "--judge-model", model)
    assert result.exit_code == 2
    assert "the judge has no chat template" in result.stderr
    assert not (tmp_path / "j").exists()


def test_questions_longer_than_the_judges_context_are_refused(
    samples: Path, tiny_model: Path, tmp_path: Path
) -> None:
    result = invoke("judge", "--samples", samples, "--output", tmp_path / "j", "--judge-model", tiny_model)
    assert result.exit_code == 2
    assert "the judge's context has 256" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "one of --function, --reward-model, --judge-model is needed, and none is given"),
        (["--function", "a.py:f", "--judge-model", "m"], "--function and --judge-model are given"),
        (["--function", "a.py:f", "--criteria", "x"], "--criteria has no effect with --function"),
        (["--function", "a.py:f", "--endpoint", "http://h"], "--endpoint has no effect with --function"),
        (["--judge-model", "m", "--key-variable", "K"], "--key-variable has no effect with --judge-model"),
        (["--judge-model", "m", "--endpoint", "http://h", "--dtype", "float32"], "--dtype has no effect"),
    ],
)
def test_settings_that_the_judge_does_not_read_are_refused(
    tmp_path: Path, options: list[str], said: str
) -> None:
    result = invoke("judge", "--samples", tmp_path, "--output", tmp_path / "j", *options)
    assert result.exit_code == 2
    assert said in result.stderr
