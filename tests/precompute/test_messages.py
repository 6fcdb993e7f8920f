import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.datasets import read_pairs, row_content
from dpo_opt.precompute.read.rows import to_pairs
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

USER = {"role": "user", "content": "How warm is it?"}
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWER = {"role": "tool", "content": "31", "name": "weather", "tool_call_id": "1"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("31 degrees.", "No idea."))
ROW: dict[str, Any] = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TEXT_ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


def pair_of(row: dict[str, Any]) -> PreferencePair:
    (pair,), _ = to_pairs(row, where="data.jsonl:1")
    return pair


def refusal(row: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        pair_of(row)
    assert caught.value.where == "data.jsonl:1"
    return caught.value


def test_a_message_that_calls_a_tool_needs_no_content() -> None:
    for message in (CALLING, {**CALLING, "content": None}, {"role": "assistant", "tool_calls": [CALL]}):
        assert pair_of({**ROW, "chosen": [message, ANSWER, GOOD]}).chosen == [CALLING, ANSWER, GOOD]
        assert pair_of({**ROW, "chosen": [message]}).chosen == [CALLING]


def test_an_empty_list_of_tool_calls_is_none() -> None:
    assert pair_of({**ROW, "chosen": [{**GOOD, "tool_calls": []}]}).chosen == [GOOD]


def calling(**call: Any) -> dict[str, Any]:
    return {**CALLING, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({**CALLING, "tool_calls": "weather()"}, '"tool_calls" in message 1 of "chosen" is a string'),
        ({**CALLING, "tool_calls": ["weather()"]}, '"tool_calls" in message 1 of "chosen" is a list'),
        ({"role": "assistant", "tool_calls": []}, 'message 1 of "chosen" lacks "content"'),
        ({**GOOD, "tool_call_id": 7}, '"tool_call_id" in message 1 of "chosen" is a number'),
        ({**GOOD, "reasoning_content": ["x"]}, '"reasoning_content" in message 1 of "chosen" is a list'),
        (calling(function="weather"), '"function" in "tool_calls" of message 1 of "chosen" is a string'),
        (
            calling(function={"name": "weather", "arguments": " "}),
            'the arguments in "tool_calls" of message 1 of "chosen" are an empty text',
        ),
        (
            calling(function={"name": "weather", "arguments": '{"a": 1, "a": 2}'}),
            'the arguments in "tool_calls" of message 1 of "chosen" are not readable as JSON '
            '(the key "a" appears twice in one object)',
        ),
        ({"from": "gpt", "value": "x"}, 'message 1 of "chosen" lacks "role" (it has "from" and "value")'),
    ],
)
def test_a_message_that_no_template_could_show_is_refused(message: dict[str, Any], what: str) -> None:
    error = refusal({**ROW, "chosen": [message]})
    assert (error.kind, error.what) == ("message", what)


AT_ROME = {"city": "Rome"}


@pytest.mark.parametrize(
    ("call", "key", "renames"),
    [
        ({"type": "tool_call", "name": "weather", "args": AT_ROME}, "args", True),
        ({"type": "tool_use", "name": "weather", "input": AT_ROME}, "input", True),
        ({"function": {"name": "weather", "input": AT_ROME}}, "input", True),
        ({**CALL, "result": "31"}, "result", False),
        ({**CALL, "args": AT_ROME}, "args", False),
        ({"function": {"name": "weather"}, "arguments": AT_ROME}, "arguments", False),
        ({"name": "weather", "arguments": AT_ROME, "parameters": AT_ROME}, "parameters", False),
    ],
)
def test_a_key_of_a_call_that_no_template_reads_is_refused(call: Any, key: str, renames: bool) -> None:
    error = refusal({**ROW, "chosen": [calling(**call), ANSWER, GOOD]})
    assert f'"tool_calls" of message 1 of "chosen" has the key "{key}"' in error.what
    assert ('rename it to "arguments"' in str(error.fix)) == renames


@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_a_call_may_stand_in_function_or_alone_with_what_an_api_adds(key: str) -> None:
    function = {"name": "weather", key: AT_ROME}
    for call in ({**function, "id": "1"}, {"function": {**function, "args": None}, "index": 0}):
        assert pair_of({**ROW, "chosen": [calling(**call)]}).chosen[0]["role"] == "assistant"  # type: ignore[index]


def in_parts(*texts: str, **others: object) -> list[dict[str, object]]:
    return [{"type": "text", "text": text, **others} for text in texts]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (in_parts("31 degrees."), "31 degrees."),
        (in_parts("31 ", "degrees", "."), "31 degrees."),
        (in_parts(" 31\n", "degrees "), " 31\ndegrees "),
        (in_parts("31", image_url=None, image=None), "31"),
    ],
)
def test_content_in_parts_is_their_text_with_nothing_between(parts: list[object], text: str) -> None:
    plain = {"role": "user", "content": text}, {"role": "assistant", "content": text}
    for message in plain:
        row = {**ROW, "prompt": [USER, BAD, message], "chosen": [GOOD, message]}
        other = {**message, "content": parts}
        assert pair_of({**row, "prompt": [USER, BAD, other], "chosen": [GOOD, other]}) == pair_of(row)


def test_parts_of_a_table_are_those_of_its_lines(tmp_path: Path) -> None:
    image = {"type": "text", "text": "31", "image": None}
    rows = [
        {**ROW, "chosen": [{**GOOD, "content": [part]}]} for part in (image, *in_parts("32")) for _ in "ab"
    ]
    lines, table = tmp_path / "data.jsonl", tmp_path / "data.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), table)
    said = [[p.chosen for p in read_pairs(DataConfig(data=[str(path)]))] for path in (lines, table)]
    assert said[0] == said[1] == [[{**GOOD, "content": text}] for text in ("31", "31", "32", "32")]


def test_a_part_that_is_no_text_is_refused_with_the_way_out() -> None:
    parts = [*in_parts("What is this?"), {"type": "image_url", "image_url": {"url": "a.png"}}]
    error = refusal({**ROW, "prompt": [{**USER, "content": parts}]})
    assert error.what == 'part 2 of "content" in message 1 of "prompt" is of the type "image_url"'
    assert "dpo-opt convert" in str(error.fix)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_a_thought_is_part_of_its_message(key: str) -> None:
    message = {**GOOD, key: "Rome in July."}
    assert pair_of({**ROW, "chosen": [message]}).chosen == [message]


@pytest.mark.parametrize("role", ["user", "human", "system", "developer"])
def test_a_completion_that_the_user_begins_is_refused(role: str) -> None:
    for side in ("chosen", "rejected"):
        error = refusal({**ROW, side: [{"role": role, "content": "And tomorrow?"}, GOOD]})
        assert error.kind == "role_order"
        assert error.what == f'"{side}" begins with a message of the role "{role}"'


@pytest.mark.parametrize("role", ["tool", "ipython", "observation"])
def test_a_completion_in_which_the_assistant_says_nothing_is_refused(role: str) -> None:
    result = {"role": role, "content": "31"}
    for completion in ([result], result, [result, result], [result, USER]):
        error = refusal({**ROW, "rejected": completion})
        assert error.kind == "role_order"
        assert error.what == f'"rejected" has no message of the assistant, but of the role "{role}"'


def test_a_completion_may_begin_with_a_tools_answer_and_go_on_with_the_user() -> None:
    assert pair_of({**ROW, "chosen": [ANSWER, GOOD, USER, GOOD]}).chosen == [ANSWER, GOOD, USER, GOOD]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_settings_are_values_or_their_json_text(as_text: bool) -> None:
    settings = {"enable_thinking": False, "documents": ["a"]}
    row = {**ROW, "tools": TOOLS, "chat_template_kwargs": settings}
    if as_text:
        row |= {name: json.dumps(row[name]) for name in ("tools", "chat_template_kwargs")}
    pair = pair_of(row)
    assert (pair.tools, pair.chat_template_kwargs) == (TOOLS, settings)


def test_tools_of_a_table_are_those_of_its_lines(tmp_path: Path) -> None:
    rows = [{**ROW, "tools": TOOLS}, {**ROW, "chat_template_kwargs": {"enable_thinking": True}}]
    lines, table = tmp_path / "data.jsonl", tmp_path / "data.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.Table.from_pylist([rows[0] | rows[1]]).schema), table)
    found = [
        [(p.tools, p.chat_template_kwargs) for p in read_pairs(DataConfig(data=[str(path)]))]
        for path in (lines, table)
    ]
    assert found[0] == found[1] == [(TOOLS, None), (None, {"enable_thinking": True})]


@pytest.mark.parametrize("nothing", [None, [], "[]", "null"])
def test_no_tools_are_none(nothing: object) -> None:
    assert pair_of({**ROW, "tools": nothing}).tools is None
    assert pair_of({**TEXT_ROW, "tools": nothing}).tools is None


@pytest.mark.parametrize("nothing", [None, {}, "{}", {"enable_thinking": None}])
def test_no_template_settings_are_none(nothing: object) -> None:
    assert pair_of({**ROW, "chat_template_kwargs": nothing}).chat_template_kwargs is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tools": "weather"}, '"tools" is text that is not JSON'),
        ({"tools": "[" * 100_000}, '"tools" is text that is not JSON'),
        ({"tools": {"name": "weather"}}, '"tools" is an object'),
        ({"tools": ["weather"]}, '"tools" is a list'),
        ({"chat_template_kwargs": [1]}, '"chat_template_kwargs" is a list'),
        ({"chat_template_kwargs": "thinking"}, '"chat_template_kwargs" is text that is not JSON'),
    ],
)
def test_tools_and_settings_that_cannot_be_used_are_refused(changes: dict[str, Any], what: str) -> None:
    error = refusal({**ROW, **changes})
    assert (error.kind, error.what) == ("tools", what)


def test_tools_beside_plain_text_are_refused() -> None:
    assert refusal({**TEXT_ROW, "tools": TOOLS}).what == '"tools" stands beside plain text'


@pytest.mark.parametrize("row", [ROW, TEXT_ROW])
@pytest.mark.parametrize(("value", "number"), [(2, 2.0), (0, 0.0), (0.25, 0.25), (None, None)])
def test_weight_and_margin_are_numbers_or_none(
    row: dict[str, Any], value: float | None, number: float | None
) -> None:
    pair = pair_of({**row, "weight": value, "margin": value})
    assert (pair.weight, pair.margin) == (number, number)
    assert pair_of({**row, "margin": -1.5}).margin == -1.5


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"weight": -0.5}, '"weight" is -0.5'),
        ({"weight": True}, '"weight" is a boolean'),
        ({"weight": "1"}, '"weight" is a string'),
        ({"weight": 10**400}, '"weight" is inf'),
        ({"margin": float("inf")}, '"margin" is inf'),
        ({"score_chosen": "8", "score_rejected": 1}, '"score_chosen" is a string'),
    ],
)
def test_a_weight_or_margin_that_is_no_number_is_refused(changes: dict[str, Any], what: str) -> None:
    error = refusal({**TEXT_ROW, **changes})
    assert (error.kind, error.what) == ("number", what)


def test_weight_and_margin_are_no_part_of_what_a_pair_says_but_tools_are() -> None:
    plain = row_content(pair_of(ROW))
    assert row_content(pair_of({**ROW, "weight": 3, "margin": 2})) == plain
    assert row_content(pair_of({**ROW, "tools": TOOLS})) != plain
    assert row_content(pair_of({**ROW, "chat_template_kwargs": {"a": 1}})) != plain
