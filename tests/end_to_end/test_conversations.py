"""Completions that are conversations, from the data to the report: what users say in them counts nowhere."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from command_line import result_of
from messages import assistant, user
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_opt.cli import main
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.manifest import load_manifest
from dpo_opt.schemas.shard_folder import ShardFolder

TOWNS = ("Oslo", "Lima", "Bonn", "Kyiv", "Rome", "Riga")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "prompt": [user(f"Where is {town}?")],
            "chosen": [assistant(f"Far, {town}."), user("Much to eat?"), assistant("Fish."), user("Good.")],
            "rejected": [assistant("No idea."), user("Eh?"), assistant(f"None in {town}.")],
        }
        for town in TOWNS
    ]
    # And one whose completions are an answer each, as most data has it.
    rows.append({"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("No")]})
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("conversations") / "shards"
    found = result_of(
        "precompute", "--model", tiny_model, "--data", data, "--shards", folder, "--backend", "hf"
    )
    assert (found["kept"], found["dropped"]) == (len(TOWNS) + 1, {})
    return folder


@torch.no_grad()
def by_hand(model: Path, prompt: str, parts: list[tuple[str, bool]]) -> tuple[float, int]:
    """Log-prob of the parts of a conversation that count, and their tokens; each part is tokenized alone."""
    tokenizer, own = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids, counts = [], []
    for text, counting in [(prompt, False), *parts]:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        counts += [counting] * len(found)
    logps = own(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    of_tokens = logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return float(of_tokens[torch.tensor(counts[1:])].sum()), sum(counts)


def test_the_references_sums_are_of_the_assistants_turns(shards: Path, tiny_model: Path) -> None:
    pairs = list(ShardFolder.open(shards).pairs())
    for town, pair in zip(TOWNS, pairs, strict=False):
        prompt = f"<s>user: Where is {town}? assistant: "
        chosen = [
            (f"Far, {town}.</s> ", True),
            ("user: Much to eat? assistant: ", False),
            ("Fish.</s> ", True),
        ]
        rejected = [
            ("No idea.</s> ", True),
            ("user: Eh? assistant: ", False),
            (f"None in {town}.</s> ", True),
        ]
        for parts, total, count in (
            (chosen, pair.ref_chosen_logps, pair.chosen_counted),
            (rejected, pair.ref_rejected_logps, pair.rejected_counted),
        ):
            right, tokens = by_hand(tiny_model, prompt, parts)
            assert total == pytest.approx(right, abs=1e-4)
            assert count == tokens
    assert (pairs[-1].chosen_mask, pairs[-1].rejected_mask) == (None, None)
    assert load_manifest(shards).fingerprint.train_on == "all"
    assert result_of("verify", "--shards", shards, "--model", tiny_model)["ok"]


def test_a_run_and_its_report_are_of_the_assistants_turns(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result_of("train", "--shards", shards, "--model", tiny_model, "--output-dir", run, "--batch-size", "4",
            "--num-train-epochs", "3", "--learning-rate", "1e-3", "--logging-steps", "1")  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)
    assert losses[-1] < 0.6
    pairs = {pair.row: pair for pair in ShardFolder.open(shards).pairs()}
    for name, checkpoint in (("before", tiny_model), ("after", run / "final")):
        table = run / "scores" / f"{name}.parquet"
        result_of("score", "--shards", shards, "--model", checkpoint, "--output", table)
        for row in pq.read_table(table).to_pylist():
            pair = pairs[row["row"]]
            assert (row["chosen_length"], row["rejected_length"]) == (
                pair.chosen_counted,
                pair.rejected_counted,
            )
            assert len(row["chosen_token_logps"]) == pair.chosen_counted
            if name == "before":
                assert row["chosen_logps"] == pytest.approx(pair.ref_chosen_logps, abs=1e-4)
    for file in (run / "pair_logps").rglob("*.parquet"):
        for row in pq.read_table(file).to_pylist():
            assert row["chosen_length"] == pairs[row["row"]].chosen_counted
    assert result_of("report", run, "--output", tmp_path / "report.html")


def test_check_and_preview_show_what_is_scored(data: Path, tiny_model: Path, shards: Path) -> None:
    found = result_of("check", data, "--model", tiny_model, "--shards", shards)
    assert not [problem for problem in found["problems"] if problem["severity"] == "error"]
    (entry,) = result_of("preview", data, "--model", tiny_model, "--pairs", "1", "--train-on", "last")[
        "pairs"
    ]
    assert [(part["kind"], part["text"]) for part in entry["chosen"]][1:] == [
        ("context", "Far, Oslo.</s> user: Much to eat? assistant: "),
        ("chosen", "Fish.</s> "),
    ]
    text = CliRunner().invoke(main, ["preview", str(data), "--model", str(tiny_model), "-n", "1"]).stdout
    assert "context inside a completion" in text


def test_an_earlier_choice_of_turns_is_not_added_to(data: Path, tiny_model: Path, shards: Path) -> None:
    result = CliRunner().invoke(
        main,
        ["precompute", "--model", str(tiny_model), "--data", str(data), "--shards", str(shards), "--backend",
         "hf", "--train-on", "last"],
    )  # fmt: skip
    assert result.exit_code == 4, result.output
    assert "train_on" in result.output


def test_trls_trainer_is_not_given_what_it_would_train_on(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from dpo_opt.trl import trl_dataset

    with pytest.raises(ConfigError, match="row 0 has tokens inside a completion that do not count"):
        trl_dataset(shards, cache_folder=tmp_path)
