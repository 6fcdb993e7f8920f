import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import GOOD
from fakes import write_jsonl

from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.check.convert import Converted, convert
from dpo_opt.precompute.config import CheckConfig, ConvertConfig, DataConfig
from dpo_opt.precompute.read.datasets import read_pairs
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.pairs import PreferencePair

Rows = list[dict[str, Any]]


def row(prompt: str, chosen: str, rejected: str, **others: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


def turn(role: str, content: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def run(data: Path | list[Path], output: Path, **options: Any) -> Converted:
    names = [str(d) for d in (data if isinstance(data, list) else [data])]
    return convert(ConvertConfig.model_validate({"data": names, "output": output, **options}))


def lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(pair: PreferencePair) -> dict[str, Any]:
    """All that a pair says, but not where."""
    return {**pair._asdict(), "row": None, "where": None}


def read(*paths: Path) -> list[dict[str, Any]]:
    return [said(pair) for pair in read_pairs(DataConfig(data=[str(path) for path in paths]))]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_clean_data_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [
        row("Schnee ❄\u2028ist", " weiß\r\n", ' "grün"', source="de", weight=0.5, margin=-2),
        row("Is ice cold?", " Yes.", " No."),
        row("", "Once", "Twice", chat_template_kwargs={"a": [1, None]}),
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert run(path, tmp_path / "clean") == Converted(3, 0, {})
    assert read(tmp_path / "clean" / "train.jsonl") == read(path)
    assert files(tmp_path / "clean") == ["_convert.json", "_removed.jsonl", "train.jsonl"]
    assert (tmp_path / "clean" / "_removed.jsonl").read_text() == ""


def test_messages_with_tools_come_back_as_they_were(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    asking = {"role": "assistant", "content": "", "tool_calls": [call]}
    rows = [
        row(
            turn("user", f"Warm {i}?"),  # type: ignore[arg-type]
            [asking, *turn("tool", "31")],  # type: ignore[arg-type]
            turn("assistant", "Nö"),  # type: ignore[arg-type]
            tools=[{"type": "function", "function": {"name": "weather"}}],
        )
        for i in range(3)
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    run(path, tmp_path / "clean")
    assert read(tmp_path / "clean" / "train.jsonl") == read(path)
    assert lines(tmp_path / "clean" / "train.jsonl") == rows


def test_every_published_form_becomes_plain_pairs(tmp_path: Path) -> None:
    ranked = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "p", "completions": ["x", "y", "z"], "ranks": [2, 1, 3]}]
    )
    shp = {"history": "How?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 0}
    other = write_jsonl(tmp_path / "b.jsonl", [shp])
    hh = write_jsonl(
        tmp_path / "c.jsonl",
        [{"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant: C"}],
    )
    run(ranked, tmp_path / "r")
    assert lines(tmp_path / "r" / "train.jsonl") == [
        row("p", "y", "x"),
        row("p", "y", "z"),
        row("p", "x", "z"),
    ]
    run(other, tmp_path / "s")
    assert lines(tmp_path / "s" / "train.jsonl") == [
        {
            "prompt": turn("user", "How?"),
            "chosen": turn("assistant", "No."),
            "rejected": turn("assistant", "So."),
        }
    ]
    run(hh, tmp_path / "h")
    assert lines(tmp_path / "h" / "train.jsonl") == [row("\n\nHuman: A\n\nAssistant:", " B", " C")]


@pytest.mark.parametrize("form", sorted(GOOD))
def test_rows_of_any_form_are_the_same_pairs_after_conversion(tmp_path: Path, form: str) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD[form](i) for i in range(3)])
    assert run(path, tmp_path / "clean") == Converted(3, 0, {})
    assert read(tmp_path / "clean" / "train.jsonl") == read(path)


def test_the_first_of_equal_pairs_is_kept_and_both_of_a_contradiction_go(tmp_path: Path) -> None:
    rows = [
        row("p", " a", " b", source="first"),
        row("q", " a", " b"),
        row("p", " a", " b", source="again"),
        row("q", " b", " a"),
        row("r", " same", " same"),
        row("q", " a", " b"),
        row("s", " b", " a"),
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert run(path, tmp_path / "clean") == Converted(
        2, 0, {"contradictory": 3, "duplicate": 1, "identical_completions": 1}
    )
    assert lines(tmp_path / "clean" / "train.jsonl") == [rows[0], rows[6]]
    assert lines(tmp_path / "clean" / "_removed.jsonl") == [
        {"where": f"{path}:2", "reason": "contradictory", "same_as": f"{path}:4"},
        {"where": f"{path}:3", "reason": "duplicate", "same_as": f"{path}:1"},
        {"where": f"{path}:4", "reason": "contradictory", "same_as": f"{path}:2"},
        {"where": f"{path}:5", "reason": "identical_completions"},
        {"where": f"{path}:6", "reason": "contradictory", "same_as": f"{path}:4"},
    ]


def messy_rows(count: int) -> Rows:
    chance = random.Random(2)
    words = [" yes", " no", " perhaps", " I do not know"]
    return [row(f"{chance.randrange(40)}?", chance.choice(words), chance.choice(words)) for _ in range(count)]


def messy_file(path: Path) -> Path:
    """Lines, every tenth of which is no row."""
    texts = [json.dumps(r) for r in messy_rows(200)]
    for i in range(0, 200, 10):
        texts[i] = ["{", "[]", '{"prompt": "p", "chosen": ""}', json.dumps(row("p", "", "b"))][i // 10 % 4]
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.mark.parametrize("to", ["trl", "unpaired"])
def test_a_repeat_with_another_weight_is_said(tmp_path: Path, to: str) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 1.0, "d": None}
    others = [name if to == "unpaired" else "b" for name in weights]
    rows = [row("p", " a", f" {b}", weight=w) for b, w in zip(others, weights.values(), strict=True)]
    path = write_jsonl(tmp_path / "data.jsonl", [row("p", " a", " z", weight=1.0), *rows[1:]])
    if to == "trl":
        write_jsonl(path, rows)
    found = run(path, tmp_path / "clean", to=to)
    assert found.removed == {"duplicate": 2, "duplicate_with_other_weight": 1}
    reasons = {line["where"]: line["reason"] for line in lines(tmp_path / "clean" / "_removed.jsonl")}
    assert reasons[f"{path}:2"] == "duplicate_with_other_weight"


def test_a_completion_with_other_tools_is_no_repeat_of_an_unpaired_row(tmp_path: Path) -> None:
    prompt, sides = turn("user", "q"), [turn("assistant", text) for text in "ab"]
    tools = [None, [{"type": "function", "function": {"name": "f"}}]]
    rows = [{"prompt": prompt, "chosen": sides[0], "rejected": sides[1], "tools": t} for t in tools]
    found = run(write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "clean", to="unpaired")
    assert found == Converted(4, 0, {})


def test_the_record_and_what_is_kept_are_all_rows_each_once(tmp_path: Path) -> None:
    path = messy_file(tmp_path / "data.jsonl")
    result = run(path, tmp_path / "clean", eval_split=0.3)
    kept = lines(tmp_path / "clean" / "train.jsonl") + lines(tmp_path / "clean" / "eval.jsonl")
    removed = lines(tmp_path / "clean" / "_removed.jsonl")
    assert (result.train + result.eval, sum(result.removed.values())) == (len(kept), len(removed))
    assert len(kept) + len(removed) == 200
    assert result.removed["bad_row"] == 20
    gone = {int(r["where"].rpartition(":")[2]) for r in removed}
    assert len(gone) == len(removed)
    source = path.read_text().splitlines()
    left = [json.loads(text) for number, text in enumerate(source, start=1) if number not in gone]
    assert sorted(map(json.dumps, kept)) == sorted(map(json.dumps, left))
    # Each side is in the order of the data.
    for side in ("train", "eval"):
        part = lines(tmp_path / "clean" / f"{side}.jsonl")
        assert part == [r for r in left if r in part]
    bad = [r for r in removed if r["reason"] == "bad_row"]
    assert [r["kind"] for r in bad[:4]] == ["json", "not_an_object", "missing_key", "empty"]
    assert all(r["detail"] for r in bad)


def test_converted_data_has_none_of_the_problems_that_were_removed(tmp_path: Path) -> None:
    path = messy_file(tmp_path / "data.jsonl")
    before = {p.kind for p in audit(CheckConfig(data=[str(path)])).problems}
    assert {"duplicate", "contradictory", "identical_completions", "json", "empty"} <= before
    run(path, tmp_path / "clean", eval_split=0.3)
    train, held_out = (str(tmp_path / "clean" / name) for name in ("train.jsonl", "eval.jsonl"))
    assert audit(CheckConfig(data=[train, held_out], on_bad_row="error")).problems == []
    assert audit(CheckConfig(data=[train], eval_data=[held_out])).problems == []
    # Nor is there anything left to remove.
    again = run([Path(train), Path(held_out)], tmp_path / "again", eval_split=0.3)
    assert again.removed == {}
    assert lines(tmp_path / "again" / "eval.jsonl") == lines(Path(held_out))


def test_the_split_is_by_prompt_and_about_right(tmp_path: Path) -> None:
    rows = [row(f"Question {i // 3}?", f" yes {i}", " no", source=str(i % 2)) for i in range(3000)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    result = run(path, tmp_path / "clean", eval_split=0.2)
    train, held_out = (lines(tmp_path / "clean" / f"{side}.jsonl") for side in ("train", "eval"))
    assert (result.train, result.eval) == (len(train), len(held_out))
    prompts = [{r["prompt"] for r in side} for side in (train, held_out)]
    assert prompts[0] & prompts[1] == set()
    # Five standard deviations of 1,000 prompts.
    assert abs(len(prompts[1]) - 200) < 5 * (1000 * 0.2 * 0.8) ** 0.5
    # By content, so that other data beside it moves no prompt to the other side.
    more = write_jsonl(tmp_path / "more.jsonl", [row(f"More {i}?", " a", " b") for i in range(50)])
    run([more, path], tmp_path / "larger", eval_split=0.2)
    assert {r["prompt"] for r in lines(tmp_path / "larger" / "eval.jsonl")} >= prompts[1]


def test_one_prompt_with_other_tools_stays_on_one_side(tmp_path: Path) -> None:
    def asked(prompt: int, tool: int) -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": f"f{tool}"}}]
        texts = (turn("user", f"{prompt}?"), turn("assistant", "a"), turn("assistant", "b"))
        return {**dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)), "tools": tools}

    path = write_jsonl(tmp_path / "data.jsonl", [asked(p, t) for p in range(40) for t in range(3)])
    result = run(path, tmp_path / "clean", eval_split=0.5)
    assert result.removed == {}
    assert result.train + result.eval == 120
    sides = [
        {r["prompt"][0]["content"] for r in lines(tmp_path / "clean" / f"{side}.jsonl")}
        for side in ("train", "eval")
    ]
    assert all(sides)
    assert sides[0] & sides[1] == set()


def test_conversations_that_begin_alike_stay_on_one_side(tmp_path: Path) -> None:
    """Each of 40 first messages is asked alone and goes on in two ways, under two system messages."""
    rows = []
    for i in range(40):
        first = {"role": "user", "content": f"question {i}"}
        for j, more in enumerate(([], ["yes", "and then?"], ["no", "why not?"])):
            said = (
                [{"role": "assistant", "content": more[0]}, {"role": "user", "content": more[1]}]
                if more
                else []
            )
            told = [{"role": "system", "content": f"rule {i}"}] if j == 1 else []
            sides = {
                side: [{"role": "assistant", "content": f"{side} {i} {j}"}] for side in ("chosen", "rejected")
            }
            rows.append({"prompt": [*told, first, *said], **sides})
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    result = run(path, tmp_path / "clean", eval_split=0.3)
    assert result.eval > 0 < result.train
    openings = {
        side: {
            next(m["content"] for m in json.loads(line)["prompt"] if m["role"] == "user")
            for line in (tmp_path / "clean" / f"{side}.jsonl").read_text().splitlines()
        }
        for side in ("train", "eval")
    }
    assert not openings["train"] & openings["eval"]
    assert (result.train + result.eval, result.eval % 3) == (120, 0)


def test_near_duplicates_go_where_that_is_asked_for(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(80))
    rows = [row("p", text, "no"), row("q", text[::-1], "no"), row("p", text + " more", "no")]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert run(path, tmp_path / "all").removed == {}
    assert run(path, tmp_path / "clean", near_duplicates=True) == Converted(2, 0, {"near_duplicate": 1})
    assert lines(tmp_path / "clean" / "_removed.jsonl") == [
        {"where": f"{path}:3", "reason": "near_duplicate", "same_as": f"{path}:1"}
    ]


def test_the_folder_says_how_it_was_made(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [row("p", " a", " b"), row("p", " a", " b")])
    run(path, tmp_path / "clean")
    about = json.loads((tmp_path / "clean" / "_convert.json").read_text())
    assert (about["train"], about["eval"], about["removed"]) == (1, 0, {"duplicate": 1})
    assert about["settings"]["data"] == [str(path)]
    assert about["settings"]["output"] == str(tmp_path / "clean")
    assert about["dpo_opt"]


def test_what_was_written_is_read_again_as_a_folder(tmp_path: Path) -> None:
    run(messy_file(tmp_path / "data.jsonl"), tmp_path / "clean")
    written = lines(tmp_path / "clean" / "train.jsonl")
    assert run(tmp_path / "clean", tmp_path / "again") == Converted(len(written), 0, {})
    assert lines(tmp_path / "again" / "train.jsonl") == written


def test_two_conversions_of_the_same_data_are_the_same_bytes(tmp_path: Path) -> None:
    path = messy_file(tmp_path / "data.jsonl")
    for name, processes in (("one", 1), ("two", 2)):
        run(path, tmp_path / name, eval_split=0.3, processes=processes)
    for file in ("train.jsonl", "eval.jsonl", "_removed.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# Nothing half done ------------------------------------------------------------------------------------------


def refused(kind: type[Exception], tmp_path: Path, data: Path, **options: Any) -> Exception:
    before = files(tmp_path)
    with pytest.raises(kind) as caught:
        run(data, tmp_path / "clean", **options)
    assert files(tmp_path) == before
    return caught.value


def test_an_output_that_exists_is_not_touched(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [row("p", " a", " b")])
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "mine.txt").write_text("mine")
    refused(ConfigError, tmp_path, path)
    assert files(tmp_path / "clean") == ["mine.txt"]


def test_a_bad_row_stops_it_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row("p", " a", " b")) + "\n{\n")
    error = refused(DataError, tmp_path, path, on_bad_row="error")
    assert isinstance(error, DataError)
    assert error.where == f"{path}:2"
    assert run(path, tmp_path / "clean").removed == {"bad_row": 1}


def test_a_file_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(b"no gzip")
    assert "cannot be read" in str(refused(DataError, tmp_path, path))


def test_data_of_which_nothing_is_left_leaves_nothing(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl", [row("p", " a", " b"), row("p", " b", " a"), row("q", " c", " c")]
    )
    error = refused(DataError, tmp_path, path)
    assert "2 contradictory, 1 identical_completions" in str(error)


CHANGES: dict[str, Callable[[Rows], Rows]] = {
    "another_prompt": lambda rows: [*rows[:2], {**rows[2], "prompt": "other"}, *rows[3:]],
    "one_row_less": lambda rows: rows[:-1],
    "one_row_more": lambda rows: [*rows, row("new", " a", " b")],
    "another_order": lambda rows: rows[::-1],
}


class Meddler:
    """Progress that changes the data when the second reading begins."""

    def __init__(self, change: Callable[[], object]) -> None:
        self._change = change

    def start(self, what: str, *, total: int | None, unit: str, done: int = 0) -> None:
        if what == "writing":
            self._change()

    def advance(self, count: int, note: str = "") -> None:
        pass

    def finish(self) -> None:
        pass

    def say(self, line: str) -> None:
        pass


@pytest.mark.parametrize("name", CHANGES)
def test_data_that_changes_between_the_readings_is_noticed_and_nothing_is_left(
    name: str, tmp_path: Path
) -> None:
    rows = [row(f"{i}?", " a", " b") for i in range(5)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    config = ConvertConfig(data=[str(path)], output=tmp_path / "clean")
    with pytest.raises(DataError, match="changed while it was read"):
        convert(config, progress=Meddler(lambda: write_jsonl(path, CHANGES[name](rows))))
    assert files(tmp_path) == ["data.jsonl"]


def test_completions_that_change_between_the_readings_are_noticed(tmp_path: Path) -> None:
    rows = [row("p", " a", " b"), row("p", " b", " a"), row("q", " a", " b")]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    # The second pair would now be no contradiction, and go all the same.
    changed = [rows[0], row("p", " c", " d"), rows[2]]
    with pytest.raises(DataError, match="changed while it was read"):
        convert(
            ConvertConfig(data=[str(path)], output=tmp_path / "clean"),
            progress=Meddler(lambda: write_jsonl(path, changed)),
        )


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [row(f"{i}?", " a", " b") for i in range(5)])

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(ConvertConfig(data=[str(path)], output=tmp_path / "clean"), progress=Meddler(interrupt))
    assert files(tmp_path) == ["data.jsonl"]


def test_a_file_name_that_is_not_utf8_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "data" / b"caf\xe9.jsonl".decode("utf-8", errors="surrogateescape")
    path.parent.mkdir()
    path.write_text(json.dumps(row("p", " a", " b")) + "\n{\n")
    run(path.parent, tmp_path / "clean")
    (record,) = lines(tmp_path / "clean" / "_removed.jsonl")
    assert record["where"] == f"{path}:2"
