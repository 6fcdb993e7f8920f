"""In which form the arguments of tool calls reach a template: probes of templates of all habits."""

from collections.abc import Callable
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo_opt.precompute.tokens.tool_calls import taken
from dpo_opt.schemas.pairs import Message

Write = Callable[[list[Message], list[dict[str, Any]] | None], str]


def writer(template: str) -> Write:
    environment = ImmutableSandboxedEnvironment()

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)
    return lambda messages, tools: compiled.render(messages=messages, tools=tools)


def calls(arguments: str, *, before: str = "") -> str:
    return (
        f"{before}{{% for m in messages %}}{{{{ m.content }}}}{{% for c in m.tool_calls or [] %}}"
        f"[{{{{ c.function.name }}}} {arguments}]{{% endfor %}}{{% endfor %}}"
    )


AS_JSON = "{{ c.function.arguments | tojson }}"
JOINED = "{{ 'f' + c.function.arguments }}"
EITHER = "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
OWN_SYNTAX = (
    "{% if c.function.arguments is mapping %}{% for k, v in c.function.arguments.items() %}{{ k }}:<{{ v }}>"
    "{% endfor %}{% else %}{ {{ c.function.arguments }} }{% endif %}"
)
NEEDS = {
    "tools": "{% for tool in tools %}{{ tool.function.name }}{% endfor %}",
    "a system message": "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "an answer": "{% if messages[-1].role != 'tool' %}{{ raise_exception('no answer') }}{% endif %}",
}


@pytest.mark.parametrize(
    ("arguments", "form"), [(AS_JSON, "object"), (JOINED, "text"), (EITHER, "both"), (OWN_SYNTAX, "object")]
)
@pytest.mark.parametrize("needs", ["nothing", *NEEDS])
def test_the_form_is_found_whatever_else_the_template_wants(arguments: str, form: str, needs: str) -> None:
    assert taken(writer(calls(arguments, before=NEEDS.get(needs, "")))) == form


def test_a_template_that_renders_no_probe_gets_what_transformers_documents() -> None:
    assert taken(writer("{{ raise_exception('never') }}")) == "object"


def test_a_template_that_leaves_calls_out_changes_nothing() -> None:
    assert taken(writer("{% for m in messages %}{{ m.content }}{% endfor %}")) == "both"
