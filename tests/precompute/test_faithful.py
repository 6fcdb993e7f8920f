"""Nothing that a row says is lost in a chat template: real templates, and what each kind of part becomes."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dpo_opt.precompute.read.rows import to_pairs
from dpo_opt.precompute.tokens.templates import rendered_texts
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

DOCS = Path(__file__).resolve().parents[2] / "docs" / "templates.md"
CALLING = (
    "{{ tools | tojson if tools }}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} WRITE{% endfor %}</s>{% endfor %}"
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "get_weather", "arguments": arguments}
    return [{"id": "a23456789", "type": "function", "function": function}]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a town",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "its name"}},
                "required": ["town"],
            },
        },
    }
]
ASKED, RAIN, NONE = [user("Where is Ghent?")], [user("Rain in Ghent?")], [assistant("I do not know that.")]
BELGIUM = [assistant("In Belgium.")]
THOUGHT = "<think>\nIt is Flemish.\n</think>\n\nIn Belgium."
CONVERSATIONS: dict[str, tuple[list[Any], list[Any], bool]] = {
    "turns": ([user("Hi there."), assistant("Hello!"), *ASKED], BELGIUM, False),
    "turns in a completion": (ASKED, [*BELGIUM, user("Sure?"), assistant("Quite so.")], False),
    "system": ([{"role": "system", "content": "Be brief, please."}, *ASKED], BELGIUM, False),
    "developer": ([{"role": "developer", "content": "Answer in Dutch."}, *ASKED], BELGIUM, False),
    "tools": (RAIN, [assistant("Let me see.")], True),
    "call, arguments an object": (RAIN, [assistant(tool_calls=call({"town": "Ghent", "on": None}))], True),
    "call, arguments a text": (RAIN, [assistant(tool_calls=call('{"town": "Ghent"}'))], True),
    "tool result": (
        [
            *RAIN,
            assistant(tool_calls=call({"town": "Ghent"})),
            {"role": "tool", "name": "get_weather", "tool_call_id": "a23456789", "content": '{"rain": 3}'},
        ],
        [assistant("Yes, 3 mm.")],
        True,
    ),
    "reasoning_content": (ASKED, [assistant("In Belgium.", reasoning_content="It is Flemish.")], False),
    "thinking": (ASKED, [assistant("In Belgium.", thinking="It is Flemish.")], False),
    "thought in content": (ASKED, [assistant(THOUGHT)], False),
    "earlier thought": ([*ASKED, assistant(THOUGHT), user("Sure?")], [assistant("Quite so.")], False),
    "parts": (ASKED, [{"role": "assistant", "content": [{"type": "text", "text": "In Ghent."}]}], False),
    "empty": ([{"role": "system", "content": ""}, *ASKED], BELGIUM, False),
}
"""Prompt and chosen, and whether the row has tools."""

TEMPLATES = [
    "cohere",
    "cohere2",
    "deepseek_r1_distill",
    "deepseekv3",
    "gemma",
    "gemma3",
    "gemma4_v5",
    "glm4moe",
    "gptoss",
    "idefics3",
    "lfm2_v2",
    "llama3",
    "llama3_1",
    "llama3_2",
    "llava_next",
    "nemotron_3_nano",
    "phi3",
    "phi3_5",
    "qwen2_5",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_6",
    "qwen3_instruct_2507",
    "smolvlm",
]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def pair_of(prompt: list[Any], chosen: list[Any], *, tools: bool = False) -> PreferencePair:
    row = {"prompt": prompt, "chosen": chosen, "rejected": NONE, **({"tools": TOOLS} if tools else {})}
    pairs, _ = to_pairs(json.loads(json.dumps(row)), where="data.jsonl:1")
    return pairs[0]


def texts_of(template: str, pair: PreferencePair) -> tuple[str, str, str]:
    return rendered_texts(pair, tokenizer_with(template), date="2026-03-31")


def outcome(template: str, prompt: list[Any], chosen: list[Any], *, tools: bool) -> str:
    """``faithful``, or the short name of a refusal."""
    try:
        texts_of(template, pair_of(prompt, chosen, tools=tools))
    except DataError as error:
        kinds = {"template": "refuses", "template_mismatch": "refused", "template_loss": "would lose"}
        return kinds[str(error.kind)]
    return "faithful"


def table() -> str:
    """The table of docs/templates.md."""
    trl = pytest.importorskip("trl", minversion="1.16")
    folder = Path(trl.__file__).parent / "chat_templates"
    lines = ["| template | " + " | ".join(CONVERSATIONS) + " |", "|---" * (len(CONVERSATIONS) + 1) + "|"]
    for name in TEMPLATES:
        template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        found = [outcome(template, a, b, tools=tools) for a, b, tools in CONVERSATIONS.values()]
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def test_the_page_of_templates_says_what_each_does() -> None:
    assert table() in DOCS.read_text(encoding="utf-8")


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


def test_a_null_in_an_object_is_absent() -> None:
    """As in a table, which gives every object the keys of all others."""
    pair = pair_of(RAIN, [assistant(tool_calls=call({"town": "Ghent", "on": None}))], tools=True)
    assert isinstance(pair.chosen, list)
    assert pair.chosen[0]["tool_calls"] == call({"town": "Ghent"})
