"""``dpo-opt sample``: completions of prompts, resumable, each with a seed of its own."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from command_line import invoke
from fakes import write_jsonl

from dpo_opt.cli import main
from dpo_opt.feedback import sample_prompts
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.schemas.pairs import content_hash, sampling_seed

PROMPTS: list[dict[str, Any]] = [
    {"prompt": f"the {word}"} for word in ("sea", "hill", "town", "bird", "king")
]


def sample(model: Path, prompts: Path, output: Path, *options: object) -> Result:
    small = ["--backend", "hf", "--max-new-tokens", 6, "--num-samples", 3]
    return invoke("sample", "--model", model, "--prompts", prompts, "--output", output, *small, *options)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [pq.read_table(path).to_pylist() for path in sorted((folder / "data").glob("*.parquet"))]
    return [row for part in found for row in part]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)


def test_each_completion_is_a_row_that_says_how_it_was_made(
    tiny_model: Path, prompts: Path, tmp_path: Path
) -> None:
    result = sample(tiny_model, prompts, tmp_path / "s", "--seed", 7, "--json")
    found = rows(tmp_path / "s")
    assert result.exit_code == 0
    assert [(row["prompt"], row["sample"]) for row in found] == [
        (row["prompt"], n) for row in PROMPTS for n in range(3)
    ]
    tokenizer = load_tokenizer(tiny_model)
    for row in found:
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert row["prompt_id"] == content_hash(row["prompt_ids"])
        assert row["seed"] == sampling_seed(7, row["prompt_ids"]) + row["sample"]
        assert row["finished"] == (row["completion_ids"][-1] == tokenizer.eos_token_id)
        text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert row["completion"] == (text if row["finished"] else text.rstrip("\ufffd"))
        assert json.loads(row["row"]) == {"prompt": row["prompt"]}
    said = json.loads(result.stdout)
    assert said["completions"] == len(found) == 15
    assert said["completions_cut"] == sum(not row["finished"] for row in found) > 0
    settings = json.loads((tmp_path / "s" / "settings.json").read_text())
    assert (settings["seed"], settings["num_samples"], settings["engine"]) == (7, 3, "transformers")
    assert len(settings["weights_sha256"]) == 64
    part = pq.read_schema(tmp_path / "s" / "data" / "00000.parquet")
    assert json.loads(part.metadata[b"dpo_opt.settings"]) == settings


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_completions(
    tiny_model: Path, prompts: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert sample(tiny_model, prompts, tmp_path / name, "--seed", seed).exit_code == 0
    a, b = (tmp_path / name / "data" / "00000.parquet" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    one, other = ([row["completion_ids"] for row in rows(tmp_path / name)] for name in "ac")
    assert sum(x == y for x, y in zip(one, other, strict=True)) < 3


def test_a_killed_run_continues_and_ends_with_the_same_files(
    tiny_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_prompts, "_PART", 6)  # two prompts
    assert sample(tiny_model, prompts, tmp_path / "whole").exit_code == 0
    write = sample_prompts.write_part
    calls: list[int] = []

    def counted(folder: Path, number: int, *rest: Any) -> None:
        calls.append(number)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        write(folder, number, *rest)

    monkeypatch.setattr(sample_prompts, "write_part", counted)
    stopped = sample(tiny_model, prompts, tmp_path / "s")
    assert stopped.exit_code == 130
    assert [path.name for path in (tmp_path / "s" / "data").iterdir()] == ["00000.parquet"]
    resumed = sample(tiny_model, prompts, tmp_path / "s", "--json")
    assert json.loads(resumed.stdout)["completions_before"] == 6
    assert calls == [0, 1, 1, 2]
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert (tmp_path / "s" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", 5], "seed 0 there, 5 now"),
        (["--temperature", 0.5], "temperature 1.0 there, 0.5 now"),
        (["--num-samples", 2], "num_samples 3 there, 2 now"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    tiny_model: Path, prompts: Path, tmp_path: Path, change: list[object], said: str
) -> None:
    sample(tiny_model, prompts, tmp_path / "s")
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    result = sample(tiny_model, prompts, tmp_path / "s", *change)
    assert result.exit_code == 4
    assert said in result.stderr
    assert "fix: pass another --output" in result.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()} == before


def test_another_models_weights_are_refused(
    tiny_model: Path, other_model: Path, prompts: Path, tmp_path: Path
) -> None:
    sample(tiny_model, prompts, tmp_path / "s")
    result = sample(other_model, prompts, tmp_path / "s")
    assert result.exit_code == 4
    assert "weights_sha256" in result.stderr


def test_a_folder_of_other_files_is_refused(tiny_model: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    result = sample(tiny_model, prompts, tmp_path / "s")
    assert result.exit_code == 2
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["notes.txt"]


def test_a_run_whose_folder_another_began_otherwise_writes_nothing_into_it(
    tiny_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*given: Any, **settings: Any) -> Any:
        found = sample_of(*given, **settings)
        begun = json.loads((tmp_path / "s" / "settings.json").read_text())
        (tmp_path / "s" / "settings.json").write_text(json.dumps({**begun, "seed": 7}))
        return found

    sample_of = HfScorer.sample
    monkeypatch.setattr(HfScorer, "sample", slow)
    result = sample(tiny_model, prompts, tmp_path / "s")
    assert result.exit_code == 4
    assert "seed 7 there, 0 now" in result.stderr
    assert not (tmp_path / "s" / "data").exists()


def test_workers_share_a_folder_and_write_what_one_alone_writes(
    tiny_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_prompts, "_PART", 3)  # one prompt
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert sample(tiny_model, prompts, alone).exit_code == 0
    second = sample(tiny_model, prompts, shared, "--worker-index", 1, "--num-workers", 2, "--json")
    said = json.loads(second.stdout)
    assert (said["completions"], said["parts_missing"]) == (6, 3)
    judged = CliRunner().invoke(
        main,
        ["judge", "--samples", str(shared), "--output", str(tmp_path / "j"), "--function", f"{__file__}:len"],
    )
    assert "3 of 5 parts are missing" in judged.stderr
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = json.loads(sample(tiny_model, prompts, shared, "--json").stdout)
    assert (first["completions"], first["parts_missing"]) == (9, 0)
    for path in (path for path in alone.rglob("*") if path.is_file()):
        assert (shared / path.relative_to(alone)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "options", [["--worker-index", 1], ["--num-workers", 2], ["--worker-index", 2, "--num-workers", 2]]
)
def test_a_worker_that_cannot_be_is_refused(
    tiny_model: Path, prompts: Path, tmp_path: Path, options: list[object]
) -> None:
    result = sample(tiny_model, prompts, tmp_path / "s", *options)
    assert result.exit_code == 2
    assert "--worker-index" in result.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("row", "options", "said", "fix"),
    [
        (None, [], "there is no such file", "check the path given to --prompts"),
        ({"text": "a"}, [], 'the key "prompt" is missing (found: text)', "--column prompt=NAME reads it"),
        ({"question": "a"}, [], 'the key "prompt" is missing', "pass --column prompt=question"),
        ({"prompt": None}, [], '"prompt" is null', "correct or remove the row\n"),
        ({"prompt": ""}, [], '"prompt" is empty', "correct or remove the row\n"),
        ({"a": "b"}, ["--column", "prompt=c"], 'the key "c" is missing', "correct --column, or the row"),
    ],
)
def test_prompts_that_cannot_be_read_are_named_with_the_commands_own_options(
    tiny_model: Path, tmp_path: Path, row: dict[str, Any] | None, options: list[str], said: str, fix: str
) -> None:
    asked = tmp_path / "p.jsonl"
    if row is not None:
        write_jsonl(asked, [row])
    found = sample(tiny_model, asked, tmp_path / "s", *options)
    assert found.exit_code == 3
    assert said in found.stderr
    assert fix in found.stderr
    assert "--data" not in found.stderr
    assert "DATA" not in found.stderr
    assert not (tmp_path / "s").exists()


def test_repeated_and_too_long_prompts_are_counted_and_not_sampled(tiny_model: Path, tmp_path: Path) -> None:
    some = write_jsonl(tmp_path / "p.jsonl", [*PROMPTS, PROMPTS[0], {"prompt": "xy" * 200}])
    result = sample(tiny_model, some, tmp_path / "s", "--json")
    said = json.loads(result.stdout)
    assert (said["prompts"], said["prompts_repeated"], said["prompts_too_long"]) == (5, 1, 1)
    assert len(rows(tmp_path / "s")) == 15
    none = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "xy" * 200}])
    result = sample(tiny_model, none, tmp_path / "none")
    assert result.exit_code == 2
    assert "none of 1 prompts leaves room for --max-new-tokens 6" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.vllm
def test_a_run_of_vllm_that_was_killed_ends_with_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"number {n} " + "x" * (n % 40)} for n in range(400)]
    asked = write_jsonl(tmp_path / "p.jsonl", rows)

    def words(output: Path) -> list[str]:
        command = [
            sys.executable,
            "-m",
            "dpo_opt",
            "sample",
            "--model",
            str(tiny_model),
            "--prompts",
            str(asked),
        ]
        return [*command, "--output", str(output), "--backend", "vllm", "--max-new-tokens", "16"]

    subprocess.run(words(tmp_path / "whole"), check=True, capture_output=True)
    with subprocess.Popen(
        words(tmp_path / "s"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as killed:
        while not list((tmp_path / "s").glob("data/*.parquet")):
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    before = len(list((tmp_path / "s").glob("data/*.parquet")))
    assert before < 4
    subprocess.run(words(tmp_path / "s"), check=True, capture_output=True)
    for number in range(4):
        part = f"data/{number:05}.parquet"
        assert (tmp_path / "s" / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()


def test_a_conversation_is_shown_by_the_chat_template_and_kept_as_it_is(
    tiny_model: Path, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "where is the sea"}]
    asked = write_jsonl(tmp_path / "p.jsonl", [{"prompt": messages}])
    assert sample(tiny_model, asked, tmp_path / "s").exit_code == 0
    row = rows(tmp_path / "s")[0]
    assert row["prompt"].endswith("user: where is the sea assistant: ")
    assert json.loads(row["row"]) == {"prompt": messages}
