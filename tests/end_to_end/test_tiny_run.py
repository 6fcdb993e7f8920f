"""From a JSONL file to a report through the command line, with the made-up model: every stage, every file."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command_line import invoke, result_of

from dpo_opt.schemas.shard_folder import ShardFolder

PAIRS = 40
# Where `dpo-opt report` looks for them.
SCORE = Path("run", "scores", "final.parquet")
KL = Path("run", "kl", "final.parquet")


def fails(*arguments: str | Path) -> tuple[int, str]:
    """Run a command that must fail in words; its exit code and its message."""
    result = invoke(*arguments)
    assert result.exit_code != 0
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose chosen side always ends in another letter: something to learn. One of them is unusable."""
    rng = random.Random(0)
    rows = []
    for i in range(PAIRS):
        words = " ".join(rng.choices(["red", "cat", "hat", "sat", "town"], k=rng.randint(2, 9)))
        rows.append(
            {
                "prompt": f"{i % 13} says:",
                "chosen": f" {words} yes",
                "rejected": f" {words} no",
                "source": "made up",
            }
        )
    rows[7]["rejected"] = rows[7]["chosen"]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_model: Path) -> Path:
    """A folder with shards, a run, scores, on-policy samples and a report, made one command at a time."""
    folder = tmp_path_factory.mktemp("work")
    shards, run = folder / "shards", folder / "run"
    results = {
        "precompute": result_of(
            "precompute", "--model", tiny_model, "--data", data, "--shards", shards, "--backend", "hf",
            "--pairs-per-shard", "16",
        ),
        "status": result_of("status", "--shards", shards),
        "verify": result_of("verify", "--shards", shards, "--model", tiny_model),
        "plan": result_of(
            "train", "--shards", shards, "--model", tiny_model, "--output-dir", run, "--eval-split", "0.25",
            "--num-train-epochs", "6", "--batch-size", "8", "--dry-run",
        ),
        "train": result_of(
            "train", "--shards", shards, "--model", tiny_model, "--output-dir", run, "--batch-size", "8",
            "--learning-rate", "1e-3", "--num-train-epochs", "6", "--logging-steps", "1",
            "--eval-split", "0.25", "--eval-steps", "10",
        ),
        "score": result_of(
            "score", "--shards", shards, "--model", run / "final", "--output", folder / SCORE
        ),
        "kl": result_of(
            "kl", "--model", run / "final", "--reference", tiny_model, "--prompts", shards, "--output",
            folder / KL, "--backend", "hf", "--num-prompts", "8", "--num-samples", "4",
            "--max-new-tokens", "16",
        ),
        "report": result_of("report", run, "--output", folder / "report.html"),
    }  # fmt: skip
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


def estimate_value(interval: dict[str, float]) -> float:
    """The estimate of an interval as ``--json`` prints it."""
    value = interval["value"]
    assert interval["low"] < value < interval["high"]
    return value


def printed(work: Path, command: str) -> Any:
    return json.loads((work / f"{command}.json").read_text())


def test_every_row_is_kept_or_dropped_for_a_reason(work: Path) -> None:
    assert printed(work, "precompute")["kept"] == PAIRS - 1
    assert printed(work, "precompute")["dropped"] == {"identical_completions": 1}
    status = printed(work, "status")
    assert status["share_done"] == 1
    assert sum(worker["shards"] for worker in status["workers"]) == 3
    counted = {name: value for name, value in status.items() if name.startswith(("shards", "pairs_", "drop"))}
    assert counted | {"pairs_per_second": None} == {
        "shards_total": 3,
        "shards_committed": 3,
        "pairs_total": PAIRS,
        "pairs_kept": PAIRS - 1,
        "pairs_dropped": 1,
        "dropped": {"identical_completions": 1},
        "pairs_per_second": None,
    }
    assert status["finalized"]


def test_the_shards_are_verified(work: Path) -> None:
    verdict = printed(work, "verify")
    assert verdict["integrity"] == {"ok": True, "problems": []}
    assert verdict["parity"]["ok"]
    assert verdict["parity"]["max"] < 1e-5


def test_the_plan_says_what_the_run_then_does(work: Path) -> None:
    plan = printed(work, "plan")
    assert plan["pairs_train"] + plan["pairs_eval"] == PAIRS - 1
    assert plan["pairs_eval"] > 0
    assert plan["steps"] == printed(work, "train")["steps"]
    assert plan["memory_gb"]["reference model"] == 0


def test_the_run_learns_what_there_is_to_learn(work: Path) -> None:
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "eval_loss" in line]
    assert train[0]["loss"] > train[-1]["loss"]
    assert train[-1]["rewards/accuracies"] > 0.9
    assert evals[-1]["eval_rewards/accuracies"] > 0.8
    assert printed(work, "train")["loss"] == train[-1]["loss"]


def test_the_score_of_the_final_model_is_what_the_last_evaluation_saw(work: Path) -> None:
    evaluated = {
        row["row"]: row
        for file in (work / "run" / "pair_logps").glob("*.parquet")
        for row in pq.read_table(file).to_pylist()
        if row["phase"] == "eval" and row["step"] == printed(work, "train")["steps"]
    }
    scores = {row["row"]: row for row in pq.read_table(work / SCORE).to_pylist()}
    assert len(scores) == PAIRS - 1
    assert 0 < len(evaluated) < PAIRS
    for number, row in evaluated.items():
        assert scores[number]["pair_id"] == row["pair_id"]
        assert scores[number]["chosen_logps"] == pytest.approx(row["chosen_logps"], abs=1e-4)
        assert scores[number]["rejected_logps"] == pytest.approx(row["rejected_logps"], abs=1e-4)


def test_kl_is_measured_on_the_policys_own_samples(work: Path) -> None:
    samples = pq.read_table(work / KL).to_pylist()
    assert len(samples) == 8 * 4
    ratios = [sum(row["policy_token_logps"]) - sum(row["ref_token_logps"]) for row in samples]
    value = estimate_value(printed(work, "kl")["kl"][0]["k1_sequence"])
    assert value == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert value > 0.05, "the policy did not move"


def test_the_report_stands_alone_and_has_the_runs_numbers(work: Path) -> None:
    page = (work / "report.html").read_text()
    for outside in ("<script src", "<link", 'src="http', "url(http"):
        assert outside not in page
    (run,) = json.loads((work / "report.summary.json").read_text())["runs"]
    assert run["steps"] == printed(work, "train")["steps"]
    assert run["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run["final"]["loss"] == printed(work, "train")["loss"]
    assert run["parity"]["ok"]
    assert run["scored"]["pairs"] == PAIRS - 1
    assert run["held_out"]["pairs"] == printed(work, "plan")["pairs_eval"]
    pairs = {pair.row: pair for pair in ShardFolder.open(work / "shards").pairs()}
    rewards = [
        row["chosen_logps"] - pairs[row["row"]].ref_chosen_logps
        > row["rejected_logps"] - pairs[row["row"]].ref_rejected_logps
        for row in pq.read_table(work / SCORE).to_pylist()
    ]
    assert run["scored"]["reward_accuracy"] == pytest.approx(sum(rewards) / len(rewards))
    assert run["kl"]["k1_sequence"]["value"] == pytest.approx(
        estimate_value(printed(work, "kl")["kl"][0]["k1_sequence"])
    )


def test_a_second_precompute_has_nothing_to_do(work: Path, data: Path, tiny_model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (work / "shards" / "data").iterdir()}
    again = result_of(
        "precompute", "--model", tiny_model, "--data", data, "--shards", work / "shards", "--backend", "hf",
        "--pairs-per-shard", "16",
    )  # fmt: skip
    assert again == printed(work, "precompute")
    assert {path: path.stat().st_mtime_ns for path in (work / "shards" / "data").iterdir()} == before


def test_a_used_run_folder_is_refused_in_words(work: Path, tiny_model: Path) -> None:
    code, message = fails(
        "train", "--shards", work / "shards", "--model", tiny_model, "--output-dir", work / "run"
    )
    assert code == 2
    assert "already in use" in message
    assert "fix: " in message


def test_training_another_model_than_was_scored_is_refused(work: Path) -> None:
    code, message = fails(
        "train",
        "--shards",
        work / "shards",
        "--model",
        work / "run" / "final",
        "--output-dir",
        work / "second",
    )
    assert code == 4
    assert "weights" in message
    assert not (work / "second").exists()


def test_a_second_round_may_keep_the_first_reference(work: Path) -> None:
    command = [
        "train", "--shards", work / "shards", "--model", work / "run" / "final",
        "--output-dir", work / "round-2", "--reference-differs", "--max-steps", "1",
    ]  # fmt: skip
    result = result_of(*command)
    assert result["parity"] is None
    shown = invoke(*command, "--resume").stdout
    assert "parity  not measured: the reference is not the starting policy" in shown
    assert result["loss"] < 0.6, "the first round's policy is already ahead of the reference"


def test_a_flipped_bit_stops_training(work: Path, tiny_model: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(work / "shards", shards)
    victim = sorted(p for p in (shards / "data").iterdir() if "dropped" not in p.name)[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, message = fails(
        "train", "--shards", shards, "--model", tiny_model, "--output-dir", tmp_path / "run"
    )
    assert code == 3
    assert victim.name in message
    assert damaged_files(shards) == [victim.name]


def damaged_files(shards: Path) -> list[str]:
    """Names of the files that ``verify`` complains of."""
    result = invoke("verify", "--shards", shards, "--json")
    assert result.exit_code == 3
    problems = json.JSONDecoder().raw_decode(result.stdout)[0]["integrity"]["problems"]
    return [Path(problem.split(":")[0]).name for problem in problems]
