"""What ``convert --to`` writes is read back as the same pairs with the same ids, or it is not written."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from damage import GOOD
from fakes import write_jsonl
from messages import said

from dpo_opt.precompute.check.convert import Converted, convert
from dpo_opt.precompute.config import ConvertConfig, DataConfig, WrittenForm
from dpo_opt.precompute.read.datasets import read_pairs
from dpo_opt.precompute.read.shapes import SHAPES, find_shape
from dpo_opt.precompute.tokens.tokenize import encoder
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

Row = dict[str, Any]
FORMS: tuple[WrittenForm, ...] = tuple(form for form in get_args(WrittenForm) if form != "unpaired")
"""Of pairs; what is written as unpaired rows is tried in test_unpaired_rows.py."""


TEXT_CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
NO_OBJECT = {"type": "function", "function": {"name": "weather", "arguments": ["Rome"]}}
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
    assert not [ids for ids in found if not isinstance(ids, PairIds)]
    return [[part.tolist() for part in ids[:3]] for ids in found if isinstance(ids, PairIds)]


def test_every_form_of_rows_is_tried() -> None:
    tried = {shape.name for make in GOOD.values() if (shape := find_shape(make(0)))}
    assert tried == {shape.name for shape in SHAPES if not shape.unpaired}


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
            with pytest.raises(DataError, match=f"the format {to} can hold none of the rows"):
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


def calling(kind: str, i: int) -> Row:
    """A row whose chosen side calls a tool after another call was answered."""
    shown = {"city": f"Rom {i} ❄", "days": [1, 2.5], "deep": {"a": "", "b": [{}]}}
    calls = [{"type": "function", "function": {"name": "weather", "arguments": shown}}]
    texts = [{"type": "function", "function": {"name": "weather", "arguments": json.dumps(shown)}}]
    prompt = [*USER, said("assistant", "", tool_calls=calls), said("tool", "Cold.")]
    if kind == "sharegpt":
        value = json.dumps(calls[0]["function"])
        turns = [("human", "Warm?"), ("function_call", value), ("observation", "Cold.")]
        return {
            "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
            "chosen": {"from": "function_call", "value": json.dumps([c["function"] for c in calls * 2])},
            "rejected": {"from": "gpt", "value": "No."},
            "tools": json.dumps(TOOLS),
        }
    if kind == "pairs":
        return {"prompt": prompt, "chosen": [said("assistant", "", tool_calls=calls * 2)], "rejected": NO}
    prompt[1] = said("assistant", "", tool_calls=texts)
    chosen = [said("assistant", "", tool_calls=texts * 2)]
    if kind == "openai":
        asked = {"messages": prompt, "tools": TOOLS}
        return {"input": asked, "preferred_output": chosen, "non_preferred_output": NO}
    return {"messages": [*prompt, *chosen], "rejected_messages": [*prompt, *NO], "tools": TOOLS}


TEMPLATE = """{%- if tools -%}{{ tools | tojson }}{%- endif -%}
{%- for m in messages -%}<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls or [] -%}{{ call.function.name }} {{ ARGUMENTS }}{%- endfor -%}<end>
{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""
WRITES = {"object": "call.function.arguments | tojson", "text": "call.function.arguments + ''"}


@pytest.fixture(scope="module")
def calling_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One whose template takes arguments as objects, and one that joins their text."""
    models = []
    for form, written in WRITES.items():
        model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("calling") / form))
        (model / "chat_template.jinja").write_text(TEMPLATE.replace("ARGUMENTS", written))
        models.append(model)
    return models


@pytest.mark.parametrize("kind", ["pairs", "openai", "sharegpt", "swift"])
def test_tool_calls_come_back_with_the_same_ids_in_whichever_form_their_arguments_are(
    kind: str, calling_models: list[Path], tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [calling(kind, i) for i in range(3)])
    pairs = read(source)
    ids = [ids_of(pairs, model) for model in calling_models]
    assert [len(found) for found in ids] == [3, 3]
    for to in FORMS:
        assert run(source, tmp_path / to, to=to) == Converted(3, 0, {})
        written = tmp_path / to / "train.jsonl"
        assert [ids_of(read(written), model) for model in calling_models] == ids
        text = json.loads(written.read_text().splitlines()[0])
        if to == "openai":
            (call, _) = text["preferred_output"][0]["tool_calls"]
            assert json.loads(call["function"]["arguments"])["city"] == "Rom 0 ❄"
        if to == "sharegpt" and kind in ("pairs", "sharegpt"):
            assert json.loads(text["conversations"][1]["value"])["arguments"]["city"] == "Rom 0 ❄"
        # Back to what it was, and on from there, nothing changes any more.
        run(written, tmp_path / f"{to} again", to="trl")
        again = tmp_path / f"{to} again" / "train.jsonl"
        assert read(again) == read(written)
        assert to != "trl" or read(written) == pairs


HELD: list[tuple[tuple[WrittenForm, ...], Row]] = [
    (("openai", "sharegpt"), {**CHAT, "prompt": HISTORY, "tools": TOOLS}),
    (("openai", "sharegpt"), {**CHAT, "chat_template_kwargs": {"thinking": False}, "source": "web"}),
    (("sharegpt",), {**CHAT, "chosen": [said("assistant", "", tool_calls=[NO_OBJECT])]}),
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
