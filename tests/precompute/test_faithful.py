"""Nothing that a row says is lost in a chat template: real templates, and what each kind of part becomes."""

import json
from typing import Any

import pytest
from messages import assistant, user
from template_table import (
    ASKED,
    BELGIUM,
    CALLED,
    PAGE,
    RAIN,
    RESULT,
    THOUGHT,
    Source,
    call,
    pair_of,
    place,
    sources,
    table,
    tokenizer_with,
)

from dpo_opt.precompute.tokens.known_roles import knows_role
from dpo_opt.precompute.tokens.texts import rendered_texts
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

CALLING = (
    "{{ tools | tojson if tools }}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} WRITE{% endfor %}</s>{% endfor %}"
)


def texts_of(template: str, pair: PreferencePair) -> tuple[str, str, str]:
    return rendered_texts(pair, tokenizer_with(template), date="2026-03-31")


@pytest.mark.parametrize("source", [pytest.param(s, id=s.name) for s in sources()])
def test_the_page_of_templates_says_what_each_does(source: Source) -> None:
    if not source.files:
        pytest.skip(f"the templates of {source.name} are not here")
    page = PAGE.read_text(encoding="utf-8")
    assert table(source) == page[place(page, source)]


@pytest.mark.parametrize(
    ("prompt", "chosen", "says"),
    [
        (
            RAIN,
            [assistant(tool_calls=call({"town": "Ghent"}))],
            'the name in "tool_calls" of message 1 of "ch',
        ),
        (
            ASKED,
            [assistant("No.", reasoning_content="Hm.")],
            '"reasoning_content" in message 1 of "chosen" (Hm.)',
        ),
        (
            [{"role": "tool_call", "content": "{}"}, *ASKED],
            BELGIUM,
            'role "tool_call" of message 1 of "prompt"',
        ),
        (ASKED, [{"role": "gpt", "content": "Yes."}], 'role "gpt" of message 1 of "chosen"'),
    ],
)
def test_what_a_template_leaves_out_is_named(prompt: list[Any], chosen: list[Any], says: str) -> None:
    plain = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    with pytest.raises(DataError) as refused:
        texts_of(plain, pair_of(prompt, chosen))
    assert says in refused.value.what
    assert refused.value.kind == "template_loss"


def test_the_key_that_the_template_reads_is_the_fix() -> None:
    reads = "{% for m in messages %}[{{ m.role }}] {{ m.thinking }}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(DataError) as refused:
        texts_of(reads, pair_of(ASKED, [assistant("No.", reasoning_content="Hm.")]))
    assert refused.value.fix is not None
    assert refused.value.fix.startswith('rename "reasoning_content" to "thinking"')


def test_a_completion_is_looked_for_behind_the_prompt() -> None:
    """The answer's text stands in the question too, where it does not count."""
    drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(DataError, match='leaves out "content" of message 1 of "chosen"'):
        texts_of(drops, pair_of([user("Say: In Belgium.")], BELGIUM))


def test_a_thought_before_the_last_question_is_the_templates_own_to_leave_out() -> None:
    drops = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    texts_of(drops, pair_of([*ASKED, assistant(THOUGHT), user("Sure?")], BELGIUM))
    with pytest.raises(DataError, match='the thought in "content" of message 1 of "chosen"'):
        texts_of(drops, pair_of(ASKED, [assistant(THOUGHT)]))


@pytest.mark.parametrize("given", [{"town": "Ghent"}, '{"town": "Ghent"}'])
@pytest.mark.parametrize("write", ["{{ c.function.arguments | tojson }}", "{{ 'A' + c.function.arguments }}"])
def test_arguments_reach_the_template_in_the_form_it_takes(given: Any, write: str) -> None:
    template = CALLING.replace("WRITE", write)
    _, chosen, _ = texts_of(template, pair_of(RAIN, [assistant(tool_calls=call(given))], tools=True))
    assert '{"town": "Ghent"}</s>' in chosen


def test_arguments_that_a_template_takes_in_both_forms_stay_as_they_are() -> None:
    write = "{% set a = c.function.arguments %}{{ a if a is string else a | tojson }}"
    pair = pair_of(RAIN, [assistant(tool_calls=call('{"town":"Ghent"}'))], tools=True)
    assert '{"town":"Ghent"}</s>' in texts_of(CALLING.replace("WRITE", write), pair)[1]


@pytest.mark.parametrize("town", ["L'Aquila", "a\\b", "Ghent\nBruges", '\'s "Gravenhage"', "a\tb'c"])
@pytest.mark.parametrize(
    "write",
    [
        "{{ c.function.arguments }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}='"
        "{{ v | replace(B, B + B) | replace(A, B + A) | replace(E, B + 'n') }}'{% endfor %}",
    ],
)
def test_a_text_that_stands_in_quotes_of_python_is_there(town: str, write: str) -> None:
    """As LFM2's templates write the arguments of calls, and those that print an object."""
    signs = '{% set A = "\'" %}{% set B = "\\\\" %}{% set E = "\\n" %}'
    template = signs + CALLING.replace("WRITE", write)
    _, text, _ = texts_of(template, pair_of(RAIN, [assistant(tool_calls=call({"town": town}))], tools=True))
    escaped = town.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    assert (json.dumps({"town": town}) if "items" not in write else f"town='{escaped}'") in text


@pytest.mark.parametrize(
    "source",
    [
        "{{ tools[0]['function'].name if tools }}{{ tools[0].get('name') if tools }}",
        "{% if tools and 'function' in tools %}{% endif %}",
        "{% set kind = 'function' %}{{ {'role': 'user', 'content': 'name'}['content'] }}",
        "{# 'function' #}function",
    ],
)
def test_a_word_that_stands_in_a_template_is_no_role_that_it_knows(source: str) -> None:
    template = source + "{% for m in messages %}[{{ m['role'] }}] {{ m.content }}</s>{% endfor %}"
    for role in ("function", "content", "name"):
        with pytest.raises(DataError, match=f'does not know the role "{role}"') as refused:
            texts_of(template, pair_of([*ASKED, {"role": role, "content": "22 C"}], BELGIUM))
        assert refused.value.kind == "template_loss"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if m.role == 'critic' %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m['role'] in ['tool', 'critic'] %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% set who = m.get('role') %}{{ 'C' if who is eq 'critic' }}{% endfor %}",
        "{% set known = ('user', 'critic') %}",
        "{% set headers = {'user': 'U', 'critic': 'C'} %}",
        "{% set role = 'critic' %}",
        "{% for m in messages %}{{ '' if m.role == 'user' else 'critic' }}{% endfor %}",
        "{% for m in messages | selectattr('role', 'eq', 'critic') %}{% generation %}{% endgeneration %}"
        "{% endfor %}",
    ],
)
def test_a_role_is_known_that_a_template_compares_or_writes(source: str) -> None:
    template = source + "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    assert knows_role(template, "critic")
    assert not knows_role(template, "narrator")


@pytest.mark.parametrize(
    "parameter",
    [
        {"type": "object", "properties": {"street": {"type": "string"}}},
        {"type": "array", "items": {"type": "object", "properties": {"street": {}}}},
        {"anyOf": [{"type": "null"}, {"properties": {"in": {"properties": {"street": {}}}}}]},
        {"$defs": {"Address": {"properties": {"street": {}}}}, "$ref": "#/$defs/Address"},
    ],
)
def test_a_parameter_of_any_depth_is_lost_where_a_template_writes_the_outer_ones(parameter: Any) -> None:
    parameters = {"type": "object", "properties": {"address": parameter, "properties": {"type": "string"}}}
    tools: list[object] = [{"type": "function", "function": {"name": "find", "parameters": parameters}}]
    pair = pair_of(RAIN, BELGIUM)._replace(tools=tools)
    outer = (
        "{% for t in tools %}{{ t.function.name }} {{ t.function.parameters.properties | list }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r'a parameter of a tool in "tools" \((street|in)\)'):
        texts_of(outer + CALLING[len("{{ tools | tojson if tools }}") :], pair)
    texts_of(CALLING, pair)


def test_a_null_in_an_object_is_absent() -> None:
    """As in a table, which gives every object the keys of all others."""
    pair = pair_of(RAIN, [assistant(tool_calls=call({"town": "Ghent", "on": None}))], tools=True)
    assert isinstance(pair.chosen, list)
    assert pair.chosen[0]["tool_calls"] == call({"town": "Ghent"})


LISTS_TOOLS = (
    "{{ tools | tojson if tools }}{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
)


def test_a_call_that_stands_in_the_list_of_tools_alone_is_lost() -> None:
    """Its name is a tool's and its argument is in the question, so all of it is in the text."""
    pair = pair_of([*RAIN, CALLED, RESULT], [assistant("Yes, 3 mm.")], tools=True)
    with pytest.raises(DataError, match='the name in "tool_calls" of message 2 of "prompt"') as refused:
        texts_of(LISTS_TOOLS, pair)
    assert refused.value.kind == "template_loss"
    write = "{{ c.function.arguments | tojson }}"
    texts_of(CALLING.replace("WRITE", write), pair)
    with pytest.raises(DataError, match='an argument in "tool_calls" of message 2 of "prompt"'):
        texts_of(CALLING.replace("WRITE", ""), pair)


@pytest.mark.parametrize("lost", ["Belgium", "In", "."])
def test_words_that_another_message_has_too_are_not_taken_for_a_message(lost: str) -> None:
    drops = "{% for m in messages if m.role != 'tool' %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    pair = pair_of([user("Where?"), {"role": "tool", "content": lost}], BELGIUM)
    with pytest.raises(DataError, match='message 2 of "prompt"'):
        texts_of(drops, pair)
    ends = [assistant("In Belgium."), {"role": "tool", "content": lost}, assistant("Yes: In Belgium.")]
    with pytest.raises(DataError, match='message 2 of "chosen"'):
        texts_of(drops, pair_of(ASKED, ends))


def test_a_thought_in_the_words_of_its_answer_is_not_taken_for_written() -> None:
    plain = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    with pytest.raises(DataError, match='"reasoning_content" in message 1 of "chosen"'):
        texts_of(plain, pair_of(ASKED, [assistant("In Belgium.", reasoning_content="Belgium")]))


def test_repeated_words_that_are_all_written_are_faithful() -> None:
    plain = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}"
    again = [user("Sure?"), assistant("Yes."), user("Sure?"), assistant(THOUGHT), user("assistant")]
    _, text, _ = texts_of(plain, pair_of(again, [assistant("Yes. "), user("Yes."), assistant("")]))
    assert text.count("] Yes.</s>") == 3
    picky = "{% for m in messages %}{{ raise_exception('?') if 'word' in m.content }}" + plain[26:]
    assert texts_of(picky, pair_of(again, [assistant("Yes.")]))[1].count("] Yes.</s>") == 2


ALTERNATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}"
    "{% if m.role == 'system' and not systems %}{{ raise_exception('no system') }}{% endif %}"
    "{% if not loop.first and m.role == loop.previtem.role %}{{ raise_exception('must alternate') }}"
    "{% endif %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
)
DEVELOPER = {"role": "developer", "content": "Be brief."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("prompt", "chosen", "says", "fix"),
    [
        (
            [SYSTEM, *ASKED],
            BELGIUM,
            'message 1 of "prompt" (role "system") (no system)',
            "put its text before that of the next message",
        ),
        (
            [*ASKED, user("Sure?")],
            BELGIUM,
            'message 2 of "prompt" (role "user") (must alternate)',
            "join it to the message before it",
        ),
        (
            ASKED,
            [*BELGIUM, RESULT],
            'message 2 of "chosen" (role "tool") (no tool)',
            "correct the roles and their order",
        ),
        (
            [DEVELOPER, *ASKED],
            BELGIUM,
            'message 1 of "prompt" (role "developer") (no developer)',
            "put its text before that of the next message",
        ),
    ],
)
def test_a_refusal_names_the_message_and_a_way_out_that_the_template_takes(
    prompt: list[Any], chosen: list[Any], says: str, fix: str
) -> None:
    with pytest.raises(DataError) as refused:
        texts_of(ALTERNATE, pair_of(prompt, chosen))
    assert refused.value.what == f"the chat template refuses {says}"
    assert str(refused.value.fix).startswith("pass --on-bad-row skip")
    assert fix in str(refused.value.fix)
    assert refused.value.kind == "template"


def test_a_developer_is_a_system_where_the_template_takes_one() -> None:
    with pytest.raises(DataError) as refused:
        texts_of(ALTERNATE.replace("not systems", "false"), pair_of([DEVELOPER, *ASKED], BELGIUM))
    assert str(refused.value.fix).endswith('; or give it the role "system"')


def test_a_refusal_of_any_conversation_blames_no_message() -> None:
    with pytest.raises(DataError, match="whatever they are"):
        texts_of("{{ functions }}{{ functions.a.b }}", pair_of(ASKED, BELGIUM))


def test_a_message_is_blamed_without_which_the_rest_is_rendered() -> None:
    """Alone the first one is refused for another reason: that nobody asks."""
    asks = "{{ raise_exception('nobody asks') if 'user' not in messages | map(attribute='role') }}"
    with pytest.raises(DataError, match=r'message 1 of "prompt" \(role "developer"\) \(no developer\)'):
        texts_of(asks + ALTERNATE, pair_of([DEVELOPER, *ASKED], BELGIUM))
