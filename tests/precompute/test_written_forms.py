"""What ``convert --to`` writes is read back as the same pairs with the same ids, or it is not written."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from damage import GOOD
from fakes import write_jsonl

from dpo_opt.precompute.check.convert import Converted, convert
from dpo_opt.precompute.config import ConvertConfig, DataConfig, WrittenForm
from dpo_opt.precompute.read.datasets import read_pairs
from dpo_opt.precompute.read.shapes import SHAPES, find_shape
from dpo_opt.precompute.tokens.tokenize import encoder
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

Row = dict[str, Any]
FORMS: tuple[WrittenForm, ...] = get_args(WrittenForm)


def said(role: str, content: str, **others: Any) -> Row:
    return {"role": role, "content": content, **others}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TEXT_CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
USER, SO, NO = [said("user", "Warm?")], [said("assistant", "So.")], [said("assistant", "No.")]
CHAT = {"prompt": USER, "chosen": SO, "rejected": NO}
HISTORY = [said("system", "Be kind."), *USER, *SO, said("user", "And ❄?")]


def run(data: Path, output: Path, **options: Any) -> Converted:
    return convert(ConvertConfig.model_validate({"data": [str(data)], "output": output, **options}))


def read(path: Path) -> list[PreferencePair]:
    """All that the pairs say, but not where."""
    return [pair._replace(where="") for pair in read_pairs(DataConfig(data=[str(path)]))]


def ids_of(pairs: list[PreferencePair], model: Path) -> list[list[list[int]]]:
    found = encoder(model).encode(pairs)
    return [[part.tolist() for part in ids[:3]] for ids in found if isinstance(ids, PairIds)]


def test_every_form_of_rows_is_tried() -> None:
    tried = {shape.name for make in GOOD.values() if (shape := find_shape(make(0)))}
    assert tried == {shape.name for shape in SHAPES}


@pytest.mark.parametrize("to", FORMS)
def test_every_form_comes_back_with_the_same_pairs_and_ids(
    to: WrittenForm, tiny_model: Path, tmp_path: Path
) -> None:
    for number, (form, make) in enumerate(GOOD.items()):
        source = write_jsonl(
            tmp_path / f"{number}.jsonl", [{**make(i), "id": i, "weight": i + 0.5} for i in range(3)]
        )
        pairs = read(source)
        output = tmp_path / str(number)
        if to != "trl" and isinstance(pairs[0].prompt, str):
            with pytest.raises(DataError, match=f"the format {to} cannot say"):
                run(source, output, to=to)
            continue
        assert run(source, output, to=to) == Converted(3, 0, {}), form
        assert read(output / "train.jsonl") == pairs
        again = tmp_path / f"{number}-plain"
        run(output / "train.jsonl", again, to="trl")
        plain = read(again / "train.jsonl")
        assert plain == pairs
        assert len(ids_of(plain, tiny_model)) == len(pairs)
        assert ids_of(plain, tiny_model) == ids_of(pairs, tiny_model)


HELD: list[tuple[tuple[WrittenForm, ...], Row]] = [
    (("openai", "sharegpt"), {**CHAT, "prompt": HISTORY, "tools": TOOLS}),
    (("openai", "sharegpt"), {**CHAT, "chat_template_kwargs": {"thinking": False}, "source": "web"}),
    (("sharegpt",), {**CHAT, "tools": TOOLS, "chosen": [said("assistant", "", tool_calls=[CALL])]}),
    (("sharegpt",), {**CHAT, "tools": TOOLS, "chosen": [said("assistant", "", tool_calls=[CALL, CALL])]}),
    (("openai", "sharegpt"), {**CHAT, "chosen": [said("assistant", "", tool_calls=[TEXT_CALL])]}),
    (("openai",), {**CHAT, "chosen": [said("assistant", "", tool_calls=[{"id": "1", **TEXT_CALL}])]}),
    (("openai",), {**CHAT, "chosen": [said("assistant", "Wait.", tool_calls=[TEXT_CALL])]}),
    (("openai",), {**CHAT, "chosen": [*SO, *USER, *SO]}),
    (("openai",), {**CHAT, "prompt": [*USER, *USER]}),
    (("openai",), {**CHAT, "prompt": [said("developer", "Be kind."), *USER]}),
    (("openai",), {**CHAT, "prompt": [said("user", "Warm?", name="Ada")]}),
    (("openai",), {**CHAT, "chosen": [said("assistant", "So.", reasoning_content="Hm.")]}),
    (("openai",), {**CHAT, "prompt": [said("system", "Be kind.")]}),
    ((), {"prompt": "Warm?", "chosen": " So.", "rejected": " No."}),
]


@pytest.mark.parametrize(("held", "row"), HELD)
def test_a_row_that_a_format_cannot_hold_is_listed_and_never_changed(
    held: tuple[WrittenForm, ...], row: Row, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [row, {**CHAT, "prompt": [said("user", "Other?")]}])
    if isinstance(row["prompt"], str):
        source.write_text("\n".join(source.read_text().splitlines()[:1]))
    for to in FORMS:
        output = tmp_path / to
        if to in (*held, "trl"):
            assert not run(source, output, to=to).removed
            assert read(output / "train.jsonl") == read(source)
            continue
        with pytest.raises(DataError, match=f"the format {to} cannot say") as caught:
            run(source, output, to=to, on_bad_row="error")
        assert caught.value.where == f"{source}:1"
        if isinstance(row["prompt"], list):
            assert run(source, output, to=to) == Converted(1, 0, {"unwritable": 1})
            (removed,) = map(json.loads, (output / "_removed.jsonl").read_text().splitlines())
            assert (removed["where"], removed["reason"]) == (f"{source}:1", "unwritable")
            assert removed["detail"]
