"""The fix that a message names leads on: carried out as it is printed, the same error does not come again."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from fakes import preference_rows, write_jsonl
from messages import said
from model_edits import change_weights

from dpo_opt.cli import main
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.schemas.manifest import INDEX, MANIFEST, PLAN, TOKENIZER, load_manifest

ROWS = preference_rows(8)


class Place(NamedTuple):
    """Where a situation is set up."""

    base: Path
    model: Path

    @property
    def shards(self) -> Path:
        return self.base / "my shards"

    @property
    def data(self) -> Path:
        return self.base / "data.jsonl"

    def precompute(self, *more: object) -> list[str]:
        own = ("precompute", "--model", self.model, "--data", self.data, "--shards", self.shards)
        return list(map(str, [*own, "--backend", "hf", "--pairs-per-shard", 3, *more]))

    def of_shards(self, command: str, *more: object) -> list[str]:
        return [command, "--shards", str(self.shards), *map(str, more)]

    def config(self, **changes: object) -> PrecomputeConfig:
        settings = {"model": str(self.model), "data": [str(self.data)], "shards": self.shards}
        return PrecomputeConfig.model_validate(settings | {"pairs_per_shard": 3} | changes)


class Situation(NamedTuple):
    """What is wrong, and a command that says so."""

    make: Callable[[Place], object]
    command: Callable[[Place], list[str]]
    says: str
    """The error."""
    fix: str
    """Its fix; both are parts of a line."""


@pytest.fixture(scope="module")
def scored(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Place(tmp_path_factory.mktemp("fixes"), tiny_model)
    write_jsonl(place.data, ROWS)
    result = CliRunner().invoke(main, place.precompute())
    assert result.exit_code == 0, result.output
    return place.base


@pytest.fixture
def place(scored: Path, tmp_path: Path, tiny_model: Path) -> Place:
    """A finished folder whose data is there."""
    return Place(Path(shutil.copytree(scored, tmp_path / "base")), tiny_model)


def rewrite(place: Place, rows: list[dict[str, object]]) -> None:
    write_jsonl(place.data, rows)


def grow(place: Place, times: int) -> None:
    """By scorers that answer at once; the fingerprint is the folder's own."""
    for number in range(1, times + 1):
        rewrite(place, preference_rows(8 + 3 * number))
        result = CliRunner().invoke(main, place.precompute("--append"))
        assert result.exit_code == 0, result.output


def anew(place: Place, *more: object) -> None:
    shutil.rmtree(place.shards)
    result = CliRunner().invoke(main, place.precompute(*more))
    assert result.exit_code == 0, result.output


def replace_by_links(folder: Path) -> None:
    outside = folder.parent / "elsewhere"
    shutil.copytree(folder, outside)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
        path.symlink_to(outside / path.relative_to(folder))


def unfinish(place: Place) -> None:
    (place.shards / MANIFEST).unlink()
    (place.shards / INDEX).unlink()


SITUATIONS: dict[str, Situation] = {
    "precompute: another --data-share": Situation(
        lambda place: anew(place, "--data-share", 0.7),
        lambda place: place.precompute("--data-share", 0.3),
        "it has --data-share 0.7, this run --data-share 0.3",
        "pass --data-share 0.7, as ",
    ),
    "precompute: a --data-share where there was none": Situation(
        lambda place: None,
        lambda place: place.precompute("--data-share", 0.5),
        "it has no --data-share, this run --data-share 0.5",
        "leave --data-share out, as ",
    ),
    "precompute: another --pairs-per-shard": Situation(
        lambda place: None,
        lambda place: place.precompute("--pairs-per-shard", 2),
        "its shards hold 3 rows, --pairs-per-shard now gives 2",
        "pass --pairs-per-shard 3, as ",
    ),
    "precompute: data that has grown": Situation(
        lambda place: rewrite(place, preference_rows(11)),
        lambda place: place.precompute(),
        "the data has grown from 8 to 11 rows",
        "pass --append to",
    ),
    "precompute: other data": Situation(
        lambda place: rewrite(place, preference_rows(9)[1:]),
        lambda place: place.precompute(),
        "its data has 8 rows with digest",
        "pass another --shards folder, or",
    ),
    "precompute: another dtype": Situation(
        lambda place: None,
        lambda place: place.precompute("--dtype", "bfloat16"),
        "the cached log-probs were not computed for this run",
        "pass another --shards folder, or",
    ),
    "precompute: one of three plans is lost": Situation(
        lambda place: (grow(place, 2), (place.shards / "plan-1.json").unlink()),
        lambda place: place.precompute(),
        "there is no plan-1.json, but plan-2.json",
        "dpo-opt repair",
    ),
    "status: the first of two plans is lost": Situation(
        lambda place: (grow(place, 1), (place.shards / PLAN).unlink()),
        lambda place: place.of_shards("status"),
        "there is no plan.json, but plan-1.json",
        "dpo-opt repair",
    ),
    "precompute: the plan is lost before it is finished": Situation(
        lambda place: (unfinish(place), (place.shards / PLAN).unlink()),
        lambda place: place.precompute(),
        "but no plan.json",
        "dpo-opt repair",
    ),
    "finalize: the plan is lost": Situation(
        lambda place: (unfinish(place), (place.shards / PLAN).unlink()),
        lambda place: place.of_shards("finalize"),
        "there is no plan.json",
        "dpo-opt repair",
    ),
    "precompute: files are links": Situation(
        lambda place: (unfinish(place), replace_by_links(place.shards)),
        lambda place: place.precompute(),
        "the file is a link that leads out of the folder",
        "where you trust the links: cp -rL",
    ),
    "verify: files are links": Situation(
        lambda place: replace_by_links(place.shards),
        lambda place: place.of_shards("verify"),
        "the file is a link that leads out of the folder",
        "where you trust the links: cp -rL",
    ),
    "finalize: the tokenizer's files are links": Situation(
        lambda place: (unfinish(place), replace_by_links(place.shards / TOKENIZER)),
        lambda place: place.of_shards("finalize"),
        "the file is a link that leads out of the folder",
        "where you trust the links: cp -rL",
    ),
    "finalize: a shard is not scored": Situation(
        lambda place: (unfinish(place), next((place.shards / "commits").glob("00001-*")).unlink()),
        lambda place: place.of_shards("finalize"),
        "1 of 3 shards is not scored yet",
        "dpo-opt precompute --config",
    ),
    "finalize: the index is lost": Situation(
        lambda place: (place.shards / INDEX).unlink(),
        lambda place: place.of_shards("finalize"),
        "the file is missing",
        "dpo-opt repair",
    ),
    "train: a shard is lost": Situation(
        lambda place: (place.shards / load_manifest(place.shards).shards[1].file).unlink(),
        lambda place: train(place),
        "the file is missing",
        "dpo-opt repair",
    ),
    "verify: nothing is finalized": Situation(
        unfinish,
        lambda place: place.of_shards("verify"),
        "there is no manifest.json",
        "dpo-opt finalize",
    ),
    "precompute: no pair fits": Situation(
        lambda place: shutil.rmtree(place.shards),
        lambda place: place.precompute("--max-length", 2),
        "none of 8 pairs can be used (8 prompt_fills_max_length)",
        "pass --max-length ",
    ),
    "convert: the output exists": Situation(
        lambda place: (place.base / "clean").mkdir(),
        lambda place: ["convert", str(place.data), "--output", str(place.base / "clean")],
        "the output exists already",
        "pass another --output",
    ),
    "convert: all pairs are held out": Situation(
        lambda place: rewrite(place, ROWS[:1]),
        lambda place: ["convert", str(place.data), "--output", f"{place.base}/new", "--eval-split", "0.999"],
        "no pair is left to train on (1 held out",
        "leave --eval-split out",
    ),
}


def chat(number: int, *more: dict[str, object]) -> dict[str, object]:
    """A row whose chosen side goes on with some turns."""
    prompt, no = [said("user", f"Question {number}?")], [said("assistant", f"No {number}.")]
    return {"prompt": prompt, "chosen": [said("assistant", f"Yes {number}."), *more], "rejected": no}


SITUATIONS |= {
    "precompute: another --train-on": Situation(
        lambda place: None,
        lambda place: place.precompute("--train-on", "last"),
        "the cached log-probs were not computed for this run",
        "pass another --shards folder, or",
    ),
    "precompute: turns that cannot be told apart": Situation(
        lambda place: (shutil.rmtree(place.shards), rewrite(place, [chat(0), chat(1, said("tool", "Hm."))])),
        lambda place: place.precompute(),
        "the assistant's turns inside a completion cannot be told from the others",
        "cut the conversations after the first answer that differs; or pass --on-bad-row skip: ",
    ),
    "precompute: a role that the chat template does not know": Situation(
        lambda place: (shutil.rmtree(place.shards), rewrite(place, [chat(0), chat(1, said("judge", "Hm."))])),
        lambda place: place.precompute(),
        'the chat template does not know the role "judge"',
        "pass --on-bad-row skip: ",
    ),
    "precompute: a model that overflows in float16": Situation(
        lambda place: (shutil.rmtree(place.shards), overflowing(place.base / "large", place.model)),
        lambda place: with_option(
            place.precompute("--dtype", "float16"), "--model", str(place.base / "large")
        ),
        "logits are not finite in float16",
        "pass --dtype bfloat16 or ",
    ),
    "precompute: longer than the model's context": Situation(
        lambda place: shutil.rmtree(place.shards),
        lambda place: place.precompute("--max-length", 100_000),
        "--max-length 100000",
        "pass --max-length 256 or less",
    ),
    "convert: a system prompt beside a question": Situation(
        lambda place: rewrite(place, [{**row_of_question(i), "system": "Be kind."} for i in range(4)]),
        lambda place: [
            *("convert", str(place.data), "--output", f"{place.base}/new"),
            *("--on-bad-row", "error", "--column", "prompt=question"),
        ],
        '"system" is not empty',
        "leave --column prompt=question out",
    ),
    "convert: a format that cannot hold the rows": Situation(
        lambda place: None,
        lambda place: ["convert", str(place.data), "--output", f"{place.base}/new", "--to", "openai"],
        "the format openai can hold none of the rows",
        "pass --to trl",
    ),
    "convert: a format that cannot hold tool calls": Situation(
        lambda place: rewrite(
            place, [chat(i, said("user", "And?"), said("assistant", "So.")) for i in (0, 1)]
        ),
        lambda place: ["convert", str(place.data), "--output", f"{place.base}/new", "--to", "sharegpt"],
        "the format sharegpt can hold none of the rows",
        "pass --to trl",
    ),
    "convert: the output stands inside the data": Situation(
        lambda place: ((place.base / "in").mkdir(), write_jsonl(place.base / "in" / "a.jsonl", ROWS)),
        lambda place: ["convert", str(place.base / "in"), "--output", str(place.base / "in" / "new")],
        "stands inside --data",
        "pass another --output",
    ),
    "verify: nothing is finalized, and a shard is not scored": Situation(
        lambda place: (unfinish(place), next((place.shards / "commits").glob("00001-*")).unlink()),
        lambda place: place.of_shards("verify"),
        "there is no manifest.json",
        "dpo-opt finalize",
    ),
}


def row_of_question(number: int) -> dict[str, object]:
    return {"question": f"Question {number}?", "chosen": f" Yes {number}.", "rejected": f" No {number}."}


def overflowing(folder: Path, model: Path) -> None:
    """A model whose activations are beyond the range of float16 alone."""
    shutil.copytree(model, folder)

    def enlarge(weights: dict[str, Any]) -> None:
        for name, weight in weights.items():
            if "_proj" in name and "mlp" in name:
                weight.mul_(1 / 3000 if "down" in name else 3000)

    change_weights(folder, enlarge)


def train(place: Place) -> list[str]:
    own = ("--model", place.model, "--output-dir", place.base / "run", "--max-steps", 1, "--batch-size", 2)
    return place.of_shards("train", *own)


def run(command: list[str]) -> str:
    """All that a command prints; nothing if it succeeds."""
    result = CliRunner().invoke(main, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    return "" if result.exit_code == 0 else result.output


def message(output: str) -> tuple[str, str]:
    """The error and the fix that a command printed."""
    lines = output.splitlines()
    first = max(i for i, line in enumerate(lines) if line.startswith("error: "))
    (fix,) = (line.removeprefix("  fix: ") for line in lines[first:] if line.startswith("  fix: "))
    return "\n".join(lines[first:]), fix


def follow(fix: str, command: list[str], base: Path, seen: list[str]) -> list[str]:
    """Do what a fix says first, as a person reads it; returns the command to run after it."""
    said = fix.partition(": ")[2] if re.match("where you trust", fix) else fix
    if found := re.match(r"pass another (--shards|--output)\b", said):
        return with_option(command, found[1], str(base / "another"))
    said = "pass --" + said.rpartition("; or pass --")[2] if "; or pass --" in said else said
    if said.startswith("pass --"):
        words = shlex.split(re.split(r", | to | as | or |[;:] ", said)[0])[1:]
        return with_option(command, words[0], *words[1:])
    if found := re.match(r"leave (--\S+)( \S+)? out", said):
        return with_option(command, found[1], None)
    for part in re.split(r", then |; | && ", said):
        words = shlex.split(part)
        if words[0] == "dpo-opt":
            lead_on(words[1:], base, seen)
        elif words[0] in ("rm", "cp", "mv", "chmod"):
            subprocess.run(["bash", "-ec", part.replace("COPY", shlex.quote(str(base / "COPY")))], check=True)
            copied = words[-2]
        else:
            assert words == ["pass", "COPY"], part
            command = [str(base / "COPY") if word == copied else word for word in command]
    return command


def with_option(command: list[str], option: str, *values: str | None) -> list[str]:
    """A command with an option's value replaced, added, or (None) taken away."""
    own = list(command)
    if option in own:
        place = own.index(option)
        del own[place : place + 2]
    return own if values == (None,) else [*own, option, *map(str, values)]


def lead_on(command: list[str], base: Path, seen: list[str]) -> list[str]:
    """Follow one fix after the other until a command succeeds; returns it. No error may come twice."""
    while printed := run(command):
        error, fix = message(printed)
        assert error not in seen
        seen.append(error)
        command = follow(fix, command, base, seen)
    return command


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_fix_leads_on(name: str, place: Place) -> None:
    situation = SITUATIONS[name]
    situation.make(place)
    seen: list[str] = []
    lead_on(situation.command(place), place.base, seen)
    assert situation.says in seen[0]
    assert f"  fix: {situation.fix}" in seen[0]
    assert not any(situation.says in error for error in seen[1:])
