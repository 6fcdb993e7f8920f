"""What a template leaves out, moves or writes as another's, though its words are in the text."""

from typing import Any

import pytest
from messages import assistant, user
from template_table import (
    ASKED,
    BELGIUM,
    CALLED,
    NONE,
    RAIN,
    RESULT,
    TOOLS,
    call,
    pair_of,
    tokenizer_with,
)

from dpo_opt.precompute.read.rows import to_pairs
from dpo_opt.precompute.read.strict_json import SKIP_ROW
from dpo_opt.precompute.tokens.templates import Renderer
from dpo_opt.precompute.tokens.texts import rendered_texts
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.pairs import PreferencePair

WRITES = "[{{ m.role }}] {{ m.content }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
PLAIN = "{% for m in messages %}" + WRITES + CALLS + "</s>{% endfor %}"
WITH_TOOLS = "{{ tools | tojson if tools }}" + PLAIN
NO_HEADERS = "{% for m in messages %}{{ m.content }}" + CALLS + "</s>{% endfor %}"
SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Be kind."}
GOES_ON = [user("Hi."), assistant("Yes?"), user("Who are you?")]


def texts_of(template: str, pair: PreferencePair) -> tuple[str, str, str]:
    return rendered_texts(pair, tokenizer_with(template), date="2026-03-31")


def refusal(template: str, prompt: list[Any], chosen: list[Any], *, tools: bool = False) -> str:
    with pytest.raises(DataError) as refused:
        texts_of(template, pair_of(prompt, chosen, tools=tools))
    assert refused.value.kind == "template_loss"
    assert str(refused.value.fix).startswith(SKIP_ROW)
    return refused.value.what


def test_a_tool_that_stands_in_a_call_alone_is_lost() -> None:
    asked = [user("Weather of a town: Ghent"), CALLED, RESULT]
    says = refusal(PLAIN, asked, BELGIUM, tools=True)
    assert says == 'the chat template leaves out the name of a tool in "tools" (get_weather)'
    texts_of(WITH_TOOLS, pair_of(asked, BELGIUM, tools=True))
    names_only = "{% for t in tools %}{{ t.function.name }} {{ t.function.description }}{% endfor %}" + PLAIN
    assert 'a parameter of a tool in "tools" (town)' in refusal(names_only, asked, BELGIUM, tools=True)


LOOKS_UP = (
    "{% for c in m.tool_calls or [] %}{% for t in tools if t.function.name == c.function.name %}"
    "{{ t.function.name }}{% for p in t.function.parameters.properties if p in c.function.arguments %}"
    " {{ p }}={{ c.function.arguments[p] }}{% endfor %}{% endfor %}{% endfor %}"
)
KNOWS = (
    "{% for c in m.tool_calls or [] %}{{ raise_exception('?') if c.function.name not in names }}{% endfor %}"
)
NAMES = "{% set names = tools | map(attribute='function') | map(attribute='name') | list %}"


@pytest.mark.parametrize("listing", ["{{ tools | tojson }}", "{{ tools | tojson }}{{ tools | tojson }}"])
def test_a_call_may_be_written_as_the_list_of_tools_says(listing: str) -> None:
    begin = listing + NAMES + "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    again = [*RAIN, CALLED, RESULT, *BELGIUM, *RAIN]
    for calls in (LOOKS_UP, KNOWS + CALLS):
        template = begin + calls + "</s>{% endfor %}"
        texts_of(template, pair_of(RAIN, [CALLED], tools=True))
        texts_of(template, pair_of(again, [CALLED], tools=True))
    for drops in (KNOWS, LOOKS_UP.replace("{{ t.function.name }}", "")):
        says = refusal(begin + drops + "</s>{% endfor %}", again, BELGIUM, tools=True)
        assert 'in "tool_calls" of message 2 of "prompt"' in says
    # A row of the same shape that calls what is not among the tools says nothing of one that does.
    template = begin + LOOKS_UP + "</s>{% endfor %}"
    other = assistant(tool_calls=[{"function": {"name": "get_rain", "arguments": {"town": "Ghent"}}}])
    pair = pair_of([user("get_rain town Ghent get_weather")], [CALLED], tools=True)
    rendered_texts(pair, tokenizer := tokenizer_with(template))
    with pytest.raises(DataError, match='leaves out the name in "tool_calls"'):
        rendered_texts(pair._replace(chosen=[other]), tokenizer)


@pytest.mark.parametrize("arguments", [{"at": {"town": "Ghent"}}, {"towns": ["Ghent", "Bruges"]}, {"day": 3}])
def test_an_argument_of_any_depth_is_lost_where_only_the_user_has_its_words(arguments: Any) -> None:
    drops = PLAIN.replace(
        "{{ c.function | tojson }}", "{{ c.function.name }} {{ c.function.arguments | list }}"
    )
    asked = [user("Rain at the town of Ghent, towns of Bruges, day 3?")]
    says = refusal(drops, asked, [assistant(tool_calls=call(arguments)), RESULT, *BELGIUM])
    assert 'an argument in "tool_calls" of message 1 of "chosen"' in says
    texts_of(PLAIN, pair_of(asked, [assistant(tool_calls=call(arguments))]))


@pytest.mark.parametrize(
    "turns", [[user("Hi."), user("Hi.")], [user("Hi."), assistant("Hi."), user("Hi there. Hi.")]]
)
def test_two_equal_messages_that_are_written_once_are_lost(turns: list[Any]) -> None:
    once = "{% if loop.first or m.content != loop.previtem.content %}" + WRITES + "</s>{% endif %}"
    says = refusal("{% for m in messages %}" + once + "{% endfor %}", turns, BELGIUM)
    assert 'leaves out "content" of message 2 of "prompt"' in says
    texts_of(PLAIN, pair_of(turns, BELGIUM))


@pytest.mark.parametrize(
    ("arguments", "changes", "lost"),
    [
        ({"day": 0, "town": "Ghent"}, "{% if v %}{{ k }}: {{ v }}{% endif %}", "(day)"),
        ({"rain": False, "town": "Ghent"}, "{% if v %}{{ k }}: {{ v }}{% endif %}", "(rain)"),
        ({"day": 0}, "{{ k }}", "(0)"),
        ({"day": -7}, "{{ k }}: {{ v | abs }}", "(-7)"),
        ({"rain": 1.5}, "{{ k }}: {{ v if v is not float }}", "(1.5)"),
        ({"rain": [0.0, -2.5]}, "{{ k }}: {{ v | map('abs') | list }}", "(-2.5)"),
    ],
)
def test_an_argument_is_lost_that_a_template_leaves_out_for_its_value(
    arguments: Any, changes: str, lost: str
) -> None:
    writes = "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}" + changes + "{% endfor %}"
    asked = [user("Set the day to 0, -7, 1.5, 0.0 or -2.5, and the rain?")]
    says = refusal(
        PLAIN.replace("{{ c.function | tojson }}", writes), asked, [assistant(tool_calls=call(arguments))]
    )
    assert says.startswith("the chat template leaves out an argument")
    assert says.endswith(lost)
    texts_of(PLAIN, pair_of(asked, [assistant(tool_calls=call(arguments))]))


@pytest.mark.parametrize(
    "turns",
    [
        [SYSTEM, user("Hi."), assistant("Yes?"), SYSTEM, user("Well?")],
        [SYSTEM, user(str(SYSTEM["content"]))],
    ],
)
def test_the_second_of_two_equal_texts_is_lost_whoever_says_it(turns: list[Any]) -> None:
    once = PLAIN.replace("in messages", "in messages | unique(attribute='content')")
    assert 'leaves out "content" of message' in refusal(once, turns, BELGIUM)
    texts_of(PLAIN, pair_of(turns, BELGIUM))


@pytest.mark.parametrize(
    "says", ["Ghent</think>Ghent", "<think>Ghent</think>Ghent", "Ghent\n</think>\n\nGhent"]
)
def test_a_thought_is_lost_where_only_the_answer_has_its_words(says: str) -> None:
    last = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
    tagged = "m.content if '<think>\n' in m.content else m.content.split('</think>')[-1]"
    for template in (last, PLAIN.replace("m.content", f"({tagged})")):
        assert 'leaves out the thought in "content"' in refusal(template, ASKED, [assistant(says)])
    texts_of(PLAIN, pair_of(ASKED, [assistant(says)]))


def test_what_is_lost_does_not_depend_on_the_rows_before() -> None:
    forgets = PLAIN.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
    thought = [assistant("<think>\nIs it?\n</think>\n\nYes."), user("Sure?")]
    in_completion = pair_of(ASKED, [*thought, assistant("Quite.")])
    in_prompt = pair_of([*ASKED, *thought], [assistant("Quite.")])
    for pairs in ([in_completion, in_prompt], [in_prompt, in_completion]):
        tokenizer = tokenizer_with(forgets)
        for pair in pairs:
            if pair is in_prompt:
                rendered_texts(pair, tokenizer, date="2026-03-31")
            else:
                with pytest.raises(DataError, match='leaves out the thought in "content" of message 1'):
                    rendered_texts(pair, tokenizer, date="2026-03-31")


def test_messages_stand_in_the_order_of_the_row() -> None:
    last = "{% for m in messages | sort(attribute='role', reverse=true) %}" + WRITES + "</s>{% endfor %}"
    says = refusal(last, GOES_ON, BELGIUM)
    assert says.endswith('message 3 of "prompt" (role "user") before what precedes it in the row')
    texts_of(last, pair_of([user("Hi."), SYSTEM], BELGIUM))


def test_a_system_may_stand_in_a_later_turn_and_results_of_calls_in_any_order() -> None:
    moves = (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}] "
        "{{ messages[0].content if m == messages[-1] and messages[0].role == 'system' }} {{ m.content }}"
        "{{ CALLS }}</s>{% endfor %}"
    ).replace("{{ CALLS }}", CALLS)
    with pytest.raises(DataError, match="renders the prompt differently"):
        texts_of(moves, pair_of([SYSTEM, *GOES_ON], BELGIUM))
    first = moves.replace("m == messages[-1]", "loop.first")
    texts_of(first, pair_of([SYSTEM, *GOES_ON], BELGIUM))
    results = [RESULT, {**RESULT, "tool_call_id": "b23456789", "content": "dry"}]
    turned = "{% for m in messages if m.role != 'tool' %}" + WRITES + CALLS
    turned += "{% if m.tool_calls %}{% for t in messages | reverse if t.role == 'tool' %}{{ t.content }}"
    turned += "{% endfor %}{% endif %}</s>{% endfor %}"
    texts_of(turned, pair_of([*RAIN, CALLED, *results], BELGIUM))


@pytest.mark.parametrize(
    ("change", "says"), [("replace(' ', '')", "I do"), ("replace('\\n', ' ')", "def f(x)"), ("lower", None)]
)
def test_white_space_inside_a_content_is_content(change: str, says: str | None) -> None:
    template = PLAIN.replace("m.content", f"m.content | {change}")
    chosen = [assistant("I do\n\n    def f(x):\n        return x\n")]
    said = refusal(template, ASKED, chosen)
    assert ("changes the white space inside" in said) == (says is not None)
    assert 'of message 1 of "' in said
    texts_of(PLAIN.replace("m.content", "m.content | trim"), pair_of(ASKED, chosen))
    texts_of(PLAIN.replace("m.content", "m.content | tojson"), pair_of(ASKED, chosen))


def test_a_turn_without_words_leaves_a_trace() -> None:
    silent = [user("Hi."), assistant("Yes?"), user(""), assistant("Hello?"), user("Hm.")]
    skips = PLAIN.replace("in messages", "in messages if m.content")
    says = refusal(skips, silent, BELGIUM)
    assert says == 'the chat template writes nothing for message 3 of "prompt" (role "user"), which is empty'
    texts_of(PLAIN, pair_of(silent, BELGIUM))
    texts_of(skips, pair_of([{**SYSTEM, "content": ""}, *ASKED], BELGIUM))


@pytest.mark.parametrize(
    ("prompt", "chosen", "role"),
    [
        ([*GOES_ON, SYSTEM], BELGIUM, "system"),
        ([SYSTEM, {**SYSTEM, "content": "Be kind."}, *ASKED], BELGIUM, "system"),
        ([*RAIN, CALLED, RESULT], BELGIUM, "tool"),
        (RAIN, [CALLED, RESULT, *BELGIUM], "tool"),
        ([*ASKED, user("Sure?")], BELGIUM, "user"),
        (ASKED, [*BELGIUM, assistant("Quite so.")], "assistant"),
        ([assistant("Hello."), *ASKED], BELGIUM, "assistant"),
    ],
)
def test_a_role_that_neither_a_header_nor_its_place_says_is_lost(
    prompt: list[Any], chosen: list[Any], role: str
) -> None:
    says = refusal(NO_HEADERS, prompt, chosen)
    assert f'of the role "{role}", just as one of the role "' in says
    texts_of(PLAIN, pair_of(prompt, chosen))


def test_a_template_without_headers_takes_who_speaks_in_turn() -> None:
    going_on = [*BELGIUM, user("Sure?"), assistant("Yes.")]
    _, text, _ = texts_of(NO_HEADERS, pair_of([SYSTEM, *GOES_ON], going_on))
    assert all(message["content"] in text for message in (SYSTEM, *GOES_ON, *going_on))
    named = "{% set first = messages[0].role == 'developer' %}" + NO_HEADERS
    _, text, _ = texts_of(named, pair_of([DEVELOPER, *GOES_ON], BELGIUM))
    assert all(message["content"] in text for message in (DEVELOPER, *GOES_ON, *BELGIUM))


def test_a_result_may_be_written_as_the_users_behind_a_call_alone() -> None:
    as_user = PLAIN.replace("{{ m.role }}", "{{ 'user' if m.role == 'tool' else m.role }}")
    texts_of(as_user, pair_of([*RAIN, CALLED, RESULT, RESULT], BELGIUM))
    says = refusal(as_user, [*RAIN, {"role": "tool", "content": "3 mm"}], BELGIUM)
    assert 'message 2 of "prompt", of the role "tool", just as one of the role "user"' in says


def test_another_word_for_a_role_is_that_role() -> None:
    gemma = PLAIN.replace("{{ m.role }}", "{{ 'model' if m.role == 'assistant' else m.role }}")
    _, text, _ = texts_of(gemma, pair_of(GOES_ON, [{"role": "model", "content": "A camel."}]))
    assert "[model] A camel." in text


def with_settings(prompt: list[Any], **settings: Any) -> PreferencePair:
    row = {"prompt": prompt, "chosen": BELGIUM, "rejected": NONE, "chat_template_kwargs": settings}
    pairs, _ = to_pairs(row, where="data.jsonl:1")
    return pairs[0]


def test_documents_that_a_template_does_not_write_are_lost() -> None:
    pair = with_settings([user("Is Ghent old?")], documents=[{"title": "Ghent", "text": "Ghent is old"}])
    with pytest.raises(DataError, match='leaves out a text in "documents"'):
        texts_of(PLAIN, pair)
    with pytest.raises(DataError, match=r'leaves out a text in "documents" \(Ghent\)'):
        texts_of("{% for d in documents %}{{ d.text }}{% endfor %}" + PLAIN, pair)
    texts_of("{{ documents | tojson }}" + PLAIN, pair)


def test_a_setting_that_a_template_does_not_name_is_refused() -> None:
    reads = "{{ 'Think!' if enable_thinking }}" + PLAIN
    texts_of(reads, with_settings(ASKED, enable_thinking=True))
    for template, name in ((reads, "enable_thinkng"), (reads, "thinking"), (PLAIN, "custom_tools")):
        with pytest.raises(DataError, match=f'does not read "{name}" of "chat_template_kwargs"') as refused:
            texts_of(template, with_settings(ASKED, **{name: False}))
        assert refused.value.kind == "template_loss"
        assert "--ignore-column chat_template_kwargs" in str(refused.value.fix)


def test_a_name_that_a_template_does_not_write_is_lost_unless_a_call_has_it() -> None:
    named = [{**user("I am Ada."), "name": "Ada"}]
    assert '"name" of message 1 of "prompt" (Ada)' in refusal(PLAIN, named, BELGIUM)
    texts_of(PLAIN.replace("[{{ m.role }}]", "[{{ m.role }} {{ m.name }}]"), pair_of(named, BELGIUM))
    texts_of(PLAIN, pair_of([*RAIN, CALLED, RESULT], BELGIUM))


def test_rows_of_one_shape_are_rendered_as_words_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with(WITH_TOOLS)
    rendered: list[int] = []
    write = Renderer.__call__

    def counting(self: Renderer, conversations: list[list[Any]], **settings: Any) -> list[str]:
        rendered.append(len(conversations))
        return write(self, conversations, **settings)

    monkeypatch.setattr(Renderer, "__call__", counting)
    for town in ("Ghent", "Bruges", "Ypres"):
        calls = assistant(tool_calls=[{**call({"town": town})[0], "id": f"a2345{town}"}])
        prompt = [user(f"Rain in {town}?"), calls, {**RESULT, "tool_call_id": f"a2345{town}"}]
        pair = pair_of(prompt, [assistant(f"In {town}, yes.")])._replace(tools=TOOLS)
        rendered_texts(pair, tokenizer)
    assert rendered[0] == rendered[-1] == rendered[-2] == 3
    assert sum(rendered) - 9 <= 6


@pytest.mark.parametrize(
    ("broken", "says"), [("{% for m in %}", "line 2"), ("{{ m | loud }}", "No filter named 'loud'")]
)
def test_a_template_that_is_none_is_not_the_rows_fault(broken: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        texts_of("{# 1 #}\n" + broken, pair_of(ASKED, BELGIUM))
    assert "in line 2" in refused.value.what


def test_a_template_that_python_cannot_compile_is_not_the_rows_fault() -> None:
    deep = "{% for a in [1] %}" * 25 + PLAIN + "{% endfor %}" * 25
    with pytest.raises(ConfigError, match="cannot be compiled"):
        texts_of(deep, pair_of(ASKED, BELGIUM))


@pytest.mark.parametrize(
    ("writes", "says"), [("'\\ud800'", "surrogates not allowed"), ("'a' * 10 ** 13", "MemoryError")]
)
def test_a_template_that_writes_no_text_refuses_the_row(writes: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as refused:
        texts_of(PLAIN + "{{ " + writes + " }}", pair_of(ASKED, BELGIUM))
    assert refused.value.kind == "template"


def test_a_template_for_rows_with_tools_alone_is_said_to_be_one() -> None:
    tokenizer = tokenizer_with({"tool_use": WITH_TOOLS})
    rendered_texts(pair_of(RAIN, BELGIUM, tools=True), tokenizer)
    with pytest.raises(DataError, match=r"for rows with tools alone \(tool_use\)") as refused:
        rendered_texts(pair_of(RAIN, BELGIUM), tokenizer)
    assert refused.value.kind == "no_chat_template"
