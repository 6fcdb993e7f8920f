"""What ``check`` says that ``precompute`` would do it does: by truncation, kind of rows and reason."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from fakes import ScriptedScorer, write_jsonl
from messages import said, user

from dpo_opt.integrity import integrity_problems
from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.check.problems import BAD_ROWS
from dpo_opt.precompute.config import CheckConfig, PrecomputeConfig, Truncation
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.tokens.mismatched import NO_OTHER_PROMPT
from dpo_opt.precompute.tokens.truncation import DropReason
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import Manifest, ShardCommit, all_prompts_truncated
from dpo_opt.schemas.shards import UNPAIRED

Row = dict[str, Any]
TRUNCATIONS: tuple[Truncation, ...] = get_args(Truncation)
ENDING = " and the same end of it"


def texts() -> Iterator[tuple[str, str, str]]:
    """Prompt and two completions of any length: runs of one prompt, of some that end alike, and of others."""
    chance = random.Random(0)
    for i in range(36):
        run = i // 6 % 5
        prompt = (f"Question {i}?", "Same?", f"Long {i % 2}" + ENDING * 2, "Same" + ENDING, f"{i}" * 3)[run]
        good, bad = (" word" * chance.randrange(1, 9) + str(chance.randrange(3)) for _ in range(2))
        yield prompt, good, good if i % 13 == 0 else bad


def plain() -> Iterator[Row]:
    for prompt, good, bad in texts():
        yield {"prompt": prompt, "chosen": good, "rejected": bad}


def spoken() -> Iterator[Row]:
    for prompt, good, bad in texts():
        sides = {"chosen": [said("assistant", good)], "rejected": [said("assistant", bad)]}
        yield {"prompt": [user(prompt)], **sides}


def plain_unpaired() -> Iterator[Row]:
    for i, (prompt, good, _) in enumerate(texts()):
        yield {"prompt": prompt, "completion": good, "label": i % 3 > 0}


def spoken_unpaired() -> Iterator[Row]:
    """Some completions begin with context: of what the user says in between nothing counts."""
    for i, (prompt, good, _) in enumerate(texts()):
        turns = [said("assistant", good)]
        if i % 4 == 1:
            turns = [said("assistant", "Hm"), user("And" + " so" * (i % 9)), *turns]
        yield {"prompt": [user(prompt)], "completion": turns, "label": i % 3 > 0}
    # In shards of two: beside ever longer prompts nothing counts of the first row's completion any more.
    late = [said("assistant", "Hm"), user("And so on"), said("assistant", "Yes")]
    for i in range(9):
        yield {"prompt": [user("Why?")], "completion": late, "label": True}
        yield {
            "prompt": [user(f"Why{'?' * 4 * i} {i}")],
            "completion": [said("assistant", "No")],
            "label": False,
        }


def single_prompt() -> Iterator[Row]:
    yield from ({**row, "prompt": "Same" + ENDING} for row in plain_unpaired())


KINDS: dict[str, Callable[[], Iterator[Row]]] = {
    made.__name__: made for made in (plain, spoken, plain_unpaired, spoken_unpaired, single_prompt)
}


def outcome(config: PrecomputeConfig) -> tuple[Manifest | None, dict[str, int]]:
    """What ``precompute`` makes of the data, and how many rows it leaves out for which reason.

    Where it refuses the data before it scores, it has looked at the first rows alone and counts none.
    """
    try:
        manifest = precompute(config, scorer=ScriptedScorer())
    except DataError as error:
        counts = re.fullmatch(r"no \w+ is left of \d+ \((.*)\)|none of .* can be used .*", error.what)
        if counts is None:
            raise
        return None, json.loads(counts[1] or "{}")
    return manifest, manifest.dropped


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_check_counts_what_precompute_does(
    kind: str, truncation: Truncation, tiny_model: Path, tmp_path: Path
) -> None:
    rows = list(KINDS[kind]())
    # Bad rows have numbers too, and move what follows into other shards.
    lines: list[Row] = [*rows[:5], {"nothing": 1}, *rows[5:20], {**rows[0], "prompt": None}, *rows[20:]]
    path = write_jsonl(tmp_path / "data.jsonl", lines)
    seen: Counter[str] = Counter()
    train_on = "last" if kind == "spoken_unpaired" else "all"
    for max_length, size in ((12, 6), (26, 6), (40, 2), (70, 2), (256, 64)):
        settings: dict[str, Any] = {
            "model": str(tiny_model),
            "data": [str(path)],
            "max_length": max_length,
            "truncation": truncation,
            "train_on": train_on,
            "pairs_per_shard": size,
            "on_bad_row": "skip",
            "processes": 1,
        }
        found = audit(CheckConfig.model_validate(settings))
        shards = tmp_path / f"{max_length}-{size}"
        manifest, dropped = outcome(PrecomputeConfig.model_validate({**settings, "shards": shards}))
        (fit,) = (fit for fit in found.truncation if fit.max_length == max_length)
        bad = {f"bad_row:{p.kind}": p.count for p in found.problems if p.kind in BAD_ROWS}
        if dropped:
            assert {**bad, **fit.dropped} == dropped
        kinds = {p.kind: p.count for p in found.problems}
        if manifest is None:
            assert (fit.whole, fit.cut) == (0, 0)
            assert found.refused
            continue
        prompts_truncated = manifest.prompts_truncated
        assert prompts_truncated is not None
        assert (fit.cut, fit.whole + fit.cut) == (
            manifest.truncated + prompts_truncated,
            manifest.kept,
        )
        assert found.estimate is not None
        assert found.estimate.shards == len(manifest.shards)
        assert kinds.get("cut", 0) == fit.cut
        assert kinds.get(NO_OTHER_PROMPT, 0) == dropped.get(NO_OTHER_PROMPT, 0)
        assert integrity_problems(shards, manifest) == []
        seen.update({**dropped, "cut": fit.cut})
        assert (manifest.fingerprint.rows == UNPAIRED) == ("label" in rows[0])
    if kind == "single_prompt":
        return
    assert seen["cut"] or truncation == "drop"
    if kind in ("plain_unpaired", "spoken_unpaired"):
        assert seen[NO_OTHER_PROMPT]
    # Every reason that lengths give in this mode was met.
    by_length = {
        "keep_start": {"prompt_fills_max_length"},
        "keep_end": {"completion_fills_max_length"},
        "drop": {"longer_than_max_length"},
    }
    assert by_length[truncation] <= seen.keys() & set(get_args(DropReason))


def test_rows_without_a_completion_of_another_prompt_have_a_fix_of_their_own(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = list(plain_unpaired())
    path = write_jsonl(tmp_path / "data.jsonl", rows)

    def problems(size: int) -> dict[str, Any]:
        config = CheckConfig(data=[str(path)], model=str(tiny_model), pairs_per_shard=size)
        return {p.kind: p for p in audit(config).problems}

    few = problems(6)
    assert few[NO_OTHER_PROMPT].severity == "warning"
    assert few[NO_OTHER_PROMPT].examples[0].where == f"{path}:7"
    assert "left_out" not in few
    assert NO_OTHER_PROMPT in few
    assert "--pairs-per-shard" in few[NO_OTHER_PROMPT].fix
    # Which ends it.
    assert NO_OTHER_PROMPT not in problems(64)
    write_jsonl(path, single_prompt())
    alone = problems(64)
    assert alone[f"all_{NO_OTHER_PROMPT}"].severity == "error"
    assert "nothing_fits" not in alone
    write_jsonl(path, [*single_prompt(), *rows[:6]])
    assert f"all_{NO_OTHER_PROMPT}" not in problems(128)


def test_a_record_from_before_prompts_were_counted_says_nothing_of_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", plain())
    config = PrecomputeConfig(
        model=str(tiny_model),
        data=[str(path)],
        shards=tmp_path / "shards",
        max_length=40,
        truncation="keep_end",
        pairs_per_shard=30,
    )
    manifest = precompute(config, scorer=ScriptedScorer())
    first, second = manifest.shards
    assert first.prompts_truncated
    assert manifest.prompts_truncated == all_prompts_truncated([first, second])
    wrong = manifest.model_copy(update={"prompts_truncated": 0})
    assert any("prompts_truncated 0" in problem for problem in integrity_problems(config.shards, wrong))
    stored = first.model_dump(mode="json")
    del stored["prompts_truncated"]
    early = ShardCommit.model_validate(stored)
    assert all_prompts_truncated([early, second]) is None
    old = manifest.model_copy(update={"prompts_truncated": None, "shards": [early, second]})
    assert integrity_problems(config.shards, old) == []
