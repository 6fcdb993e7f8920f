"""The fix that ``dpo-opt check`` prints leads on: with the user's own names, and the problem ends."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from fakes import preference_rows, write_jsonl

from dpo_opt.cli import main

Row = dict[str, Any]
ROWS: list[Row] = list(preference_rows(8))
SWAPPED = {**ROWS[3], "chosen": ROWS[3]["rejected"], "rejected": ROWS[3]["chosen"]}
MESSAGES = {side: [{"role": "assistant", "content": f"{side}."}] for side in ("chosen", "rejected")}
LONG = {"prompt": "Question?", "chosen": " yes" * 40, "rejected": " no" * 40}


def asked(row: Row, **others: object) -> Row:
    return {"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], **others}


class Trouble(NamedTuple):
    """Rows with a problem, and how they are checked."""

    rows: list[Row]
    options: list[str]
    fix: str
    """Part of the fix, with the names that the user gave."""
    replaced: Mapping[str, str] = MappingProxyType({})
    """Words of the fix that only the user can fill in."""
    bad_line: str = ""


TROUBLES: dict[str, Trouble] = {
    "duplicate": Trouble([*ROWS, ROWS[0]], [], "`dpo-opt convert my.jsonl --output DIR`"),
    "contradictory": Trouble([*ROWS, SWAPPED], [], "`dpo-opt convert my.jsonl --output DIR`"),
    "identical_completions": Trouble(
        [*ROWS, {**ROWS[1], "rejected": ROWS[1]["chosen"]}], [], "`dpo-opt convert my.jsonl --output DIR`"
    ),
    "shared_with_eval": Trouble(
        ROWS * 5,
        ["--eval-data", "held out.jsonl"],
        "`dpo-opt convert my.jsonl 'held out.jsonl' --output DIR --eval-split",
        {"0.05": "0.5"},
    ),
    "json": Trouble(ROWS, [], "`--on-bad-row skip`", bad_line="{\n"),
    "tie": Trouble(
        [{"prompt": f"q {i}", "response_a": "x", "response_b": "y", "winner": w} for i, w in enumerate("aba")]
        + [{"prompt": "q", "response_a": "x", "response_b": "y", "winner": "tie"}],
        [],
        "`--on-bad-row skip`",
    ),
    "turns": Trouble(
        [
            {"prompt": [{"role": "user", "content": "Hi"}], **MESSAGES},
            {
                "prompt": [{"role": "user", "content": "Hi!"}],
                **MESSAGES,
                "chosen": [*MESSAGES["chosen"], {"role": "tool", "content": "Hm"}],
            },
        ],
        ["--model", "MODEL"],
        "`--on-bad-row skip`",
    ),
    "template_loss": Trouble(
        [
            {"prompt": [{"role": "user", "content": "Hi"}], **MESSAGES},
            {"prompt": [{"role": "judge", "content": "Hi!"}], **MESSAGES},
        ],
        ["--model", "MODEL"],
        "`--on-bad-row skip`",
    ),
    "missing_key": Trouble(
        [asked(row) for row in ROWS], [], "`--column PART=NAME`", {"PART=NAME": "prompt=question"}
    ),
    "prompt_column": Trouble(
        [{**row, "images": ["a.png"]} for row in ROWS], [], "`--ignore-column NAME`", {"NAME": "images"}
    ),
    "shared_prompt": Trouble(
        [{**row, "prompt": "Answer.", "request": row["prompt"] + str(i)} for i, row in enumerate(ROWS)],
        [],
        "`--column prompt=NAME`",
        {"NAME": "request"},
    ),
    "left_out": Trouble(
        [*ROWS, LONG],
        ["--model", "MODEL", "--max-length", "60", "--truncation", "drop"],
        "a larger `--max-length`",
    ),
    "cut": Trouble([*ROWS, LONG], ["--model", "MODEL", "--max-length", "60"], "a larger `--max-length`"),
    "nothing_fits": Trouble(ROWS, ["--model", "MODEL", "--max-length", "3"], "a larger `--max-length`"),
    "unpaired": Trouble(
        [
            {"prompt": row["prompt"], "response": row[side], "label": side == "chosen"}
            for row in ROWS
            for side in ("chosen", "rejected")
        ],
        [],
        "`--column completion=NAME`",
        {"NAME": "response"},
    ),
}


def check(*command: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["check", *command, "--json"])
    assert result.exit_code in (0, 3), result.output
    return {problem["kind"]: problem for problem in json.loads(result.stdout)["problems"]}


def follow(fix: str, command: list[str]) -> list[str]:
    """Do what a fix says; returns what to check then."""
    if found := re.search(r"python (-c \".*\")", fix):
        subprocess.run([sys.executable, *shlex.split(found[1])], check=True)
        return ["pairs.jsonl"]
    (said, *_) = re.findall(r"`(.+?)`", fix)
    words = shlex.split(said)
    if words[0] != "dpo-opt":
        values = ["256"] if words == ["--max-length"] else []
        return [*command, *words, *values]
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, result.output
    return ["DIR/train.jsonl", *(["--eval-data", "DIR/eval.jsonl"] if "--eval-split" in words else [])]


@pytest.mark.parametrize("kind", TROUBLES)
def test_a_problem_ends_with_its_fix(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trouble = TROUBLES[kind]
    path = write_jsonl(tmp_path / "my.jsonl", trouble.rows)
    path.write_text(path.read_text() + trouble.bad_line)
    write_jsonl(tmp_path / "held out.jsonl", ROWS[:2])
    options = [str(tiny_model) if word == "MODEL" else word for word in trouble.options]
    found = check("my.jsonl", *options)
    fix = found[kind]["fix"]
    assert trouble.fix in fix
    for word, own in trouble.replaced.items():
        fix = fix.replace(word, own)
    left = check(*follow(fix, ["my.jsonl", *options]))
    severities = [left[kind]["severity"] if kind in left else ""]
    # A bad row that is left out on purpose is still said.
    assert severities == ["warning" if "--on-bad-row" in trouble.fix else ""]
    assert "no_pairs" not in left


OWN: list[tuple[list[str], str]] = [
    (["my.jsonl"], "my.jsonl"),
    (["my.jsonl", "a b.jsonl"], "my.jsonl 'a b.jsonl'"),
    (
        ["my.jsonl", "--ignore-column", "a b", "--column", "id=n"],
        "my.jsonl --column id=n --ignore-column 'a b'",
    ),
]


@pytest.mark.parametrize(("given", "printed"), OWN)
def test_a_fix_names_the_data_with_the_settings_that_read_it(
    given: list[str], printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my.jsonl", "a b.jsonl"):
        write_jsonl(tmp_path / name, [{**row, "n": 1} for row in [*ROWS, ROWS[0]]])
    assert f"`dpo-opt convert {printed} --output DIR`" in check(*given)["duplicate"]["fix"]
    output = CliRunner().invoke(main, ["convert", *given, "--output", "new", "--on-bad-row", "error"]).output
    assert "DATA" not in output


def test_a_fix_names_the_model_that_the_command_was_given(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "my.jsonl", [{"prompt": "q", "chosen": "a", "rejected": ""}])
    command = [
        "precompute",
        "--model",
        tiny_model,
        "--data",
        path,
        "--shards",
        tmp_path / "s",
        "--backend",
        "hf",
    ]
    output = CliRunner().invoke(main, [*map(str, command), "--on-bad-row", "skip"]).output
    assert f"`dpo-opt check {path} --model {tiny_model}`" in output
