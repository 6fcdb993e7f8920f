"""What real chat templates do with each kind of conversation: the tables of ``docs/templates.md``.

``python tests/template_table.py`` writes the page again. The templates of TRL are those that are installed.
The others are files of a source distribution, which nothing installs: ``DPO_OPT_TEMPLATES`` names their
folder, as ``CONTRIBUTING.md`` says. A table whose templates are not there stays as it is.
"""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from messages import assistant, user
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dpo_opt.precompute.read.rows import to_pairs
from dpo_opt.precompute.tokens.templates import asks_for_the_date
from dpo_opt.precompute.tokens.texts import texts_of_messages
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

PAGE = Path(__file__).resolve().parents[1] / "docs" / "templates.md"
FOLDER = "DPO_OPT_TEMPLATES"


class Source(NamedTuple):
    """Templates that are published together."""

    name: str
    """Package and version; a table of the page begins with it."""
    folder: Path | None
    """Where they are; None if they are not on this machine."""
    pattern: str
    """Which files are templates as their models have them."""

    @property
    def files(self) -> list[Path]:
        """The templates, in the order of their names."""
        found = [] if self.folder is None else self.folder.glob("*.jinja")
        return sorted(path for path in found if re.fullmatch(self.pattern, path.stem))


def sources() -> list[Source]:
    """All that have a table."""
    trl = find_spec("trl")
    own = None if trl is None or trl.origin is None else Path(trl.origin).parent / "chat_templates"
    given = os.environ.get(FOLDER)
    return [
        # Those for training are the same with marks around what is generated.
        Source("TRL 1.16", own, r"(?!.*_training$).*"),
        # Those that llama.cpp wrote itself belong to no model.
        Source("llama-cpp-python 0.3.36", Path(given) if given else None, r"(?!llama-cpp-).*"),
    ]


def call(arguments: Any) -> list[dict[str, Any]]:
    """The value of ``tool_calls`` for one call."""
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
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "a23456789", "content": '{"rain": 3}'}
CALLED = assistant(tool_calls=call({"town": "Ghent"}))
CONVERSATIONS: dict[str, tuple[list[Any], list[Any], bool]] = {
    "several turns": ([user("Hi there."), assistant("Hello!"), *ASKED], BELGIUM, False),
    "turns in a completion": (ASKED, [*BELGIUM, user("Sure?"), assistant("Quite so.")], False),
    "system": ([{"role": "system", "content": "Be brief, please."}, *ASKED], BELGIUM, False),
    "developer": ([{"role": "developer", "content": "Answer in Dutch."}, *ASKED], BELGIUM, False),
    "tools": (RAIN, [assistant("Let me see.")], True),
    "call, arguments an object": (RAIN, [CALLED], True),
    "call, arguments a text": (RAIN, [assistant(tool_calls=call('{"town": "Ghent"}'))], True),
    "call with nulls": (RAIN, [assistant(None, tool_calls=call({"town": "Ghent", "on": None}))], True),
    "tool result": ([*RAIN, CALLED, RESULT], [assistant("Yes, 3 mm.")], True),
    "tool result in a completion": (RAIN, [CALLED, RESULT, assistant("Yes, 3 mm.")], True),
    "reasoning_content": (ASKED, [assistant("In Belgium.", reasoning_content="It is Flemish.")], False),
    "thinking": (ASKED, [assistant("In Belgium.", thinking="It is Flemish.")], False),
    "thought in content": (ASKED, [assistant(THOUGHT)], False),
    "earlier thought": ([*ASKED, assistant(THOUGHT), user("Sure?")], [assistant("Quite so.")], False),
    "parts": (ASKED, [{"role": "assistant", "content": [{"type": "text", "text": "In Ghent."}]}], False),
    "empty system": ([{"role": "system", "content": ""}, *ASKED], BELGIUM, False),
}
"""Prompt and chosen, and whether the row has tools."""

_CELLS = {"template": "refuses", "template_mismatch": "prompt", "template_loss": "loses", "turns": "turns"}


def tokenizer_with(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of no token with a template, or several with names."""
    backend = Tokenizer(models.BPE())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def pair_of(prompt: list[Any], chosen: list[Any], *, tools: bool = False) -> PreferencePair:
    """A row as a file has it, read."""
    row = {"prompt": prompt, "chosen": chosen, "rejected": NONE, **({"tools": TOOLS} if tools else {})}
    pairs, _ = to_pairs(json.loads(json.dumps(row)), where="data.jsonl:1")
    return pairs[0]


def outcome(tokenizer: PreTrainedTokenizerFast, prompt: list[Any], chosen: list[Any], *, tools: bool) -> str:
    """A tick where nothing is lost, or the short name of a refusal."""
    pair = pair_of(prompt, chosen, tools=tools)
    try:
        texts_of_messages(pair, tokenizer, date="2026-03-31", train_on="all")
    except DataError as error:
        return _CELLS[str(error.kind)]
    return "✓"


def table(source: Source) -> str:
    """A source's table, in Markdown."""
    header = ["template", *CONVERSATIONS, "asks for the date"]
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *map(_row, source.files)]
    )


def _row(path: Path) -> list[str]:
    template = path.read_text(encoding="utf-8")
    named = path.stem.endswith("tool_use")
    # A tokenizer takes the template of this name for rows with tools alone.
    tokenizer = tokenizer_with({"default": "", "tool_use": template} if named else template)
    cells = [
        outcome(tokenizer, prompt, chosen, tools=tools) if tools or not named else "-"
        for prompt, chosen, tools in CONVERSATIONS.values()
    ]
    return [path.stem, *cells, "yes" if asks_for_the_date(tokenizer) else "no"]


def place(page: str, source: Source) -> slice:
    """Where the page has a source's table.

    Raises:
        ValueError: It has none.
    """
    found = re.search(rf"^### {re.escape(source.name)}\n.*?^(\|.*?)\n(?!\|)", page, re.M | re.S)
    if found is None:
        raise ValueError(f"the page has no table for {source.name}")
    return slice(*found.span(1))


if __name__ == "__main__":
    written = PAGE.read_text(encoding="utf-8")
    for source in sources():
        if source.files:
            there = place(written, source)
            written = written[: there.start] + table(source) + written[there.stop :]
    PAGE.write_text(written, encoding="utf-8")
