"""A completion ends with exactly one token that stops generation, or it is said which way it does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fakes import ScriptedScorer, write_jsonl
from tokenizers import Tokenizer, processors

from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.check.problems import FOUND
from dpo_opt.precompute.config import CheckConfig, PrecomputeConfig, PreviewConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.tokens.ends import Ends, stop_ids
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.tokenize import PairTokenizer, prompt_ids
from dpo_opt.preview import preview, rendered
from dpo_opt.schemas.pairs import PreferencePair
from dpo_opt.schemas.progress import Silent

TURN = "<|im_end|>"
"""Special in tokenizer.json; tokenizer_config.json does not name it."""

_CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}END{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat(end: str) -> str:
    return _CHAT.replace("END", end)


MESSAGES = {
    "prompt": [{"role": "user", "content": "Where?"}],
    "chosen": [{"role": "assistant", "content": "There."}],
    "rejected": [{"role": "assistant", "content": "Nowhere."}],
}
TEXT = {"prompt": "Where?", "chosen": " There.", "rejected": " Nowhere."}


class Case(NamedTuple):
    odd: set[str]
    row: dict[str, Any]
    template: str = ""
    generation: dict[str, Any] | None = None
    """None: there is no generation_config.json."""
    config: dict[str, Any] = {}  # noqa: RUF012
    adds: str | None = None
    """What the tokenizer adds around a text."""


CASES = {
    "the EOS token": Case(set(), MESSAGES, chat("</s>")),
    "a line break behind the EOS token": Case(set(), MESSAGES, chat("</s>\n \n")),
    "nothing": Case({"no_end"}, MESSAGES, chat("")),
    "a special token where generation goes on": Case({"unknown_end"}, MESSAGES, chat(TURN)),
    "a token of generation_config.json": Case(
        set(), MESSAGES, chat(TURN), generation={"eos_token_id": [1, 270]}
    ),
    "the token of generation_config.json": Case(
        set(), MESSAGES, chat(TURN), generation={"eos_token_id": 270}
    ),
    "a token of config.json": Case(set(), MESSAGES, chat(TURN), config={"eos_token_id": 270}),
    "one of config.json that generation_config.json replaces": Case(
        {"unknown_end"}, MESSAGES, chat(TURN), generation={}, config={"eos_token_id": 270}
    ),
    "two of them": Case(
        {"several_ends"}, MESSAGES, chat(f"{TURN}\n</s>"), generation={"eos_token_id": [1, 270]}
    ),
    "a prompt that nothing opens for the answer": Case(
        {"prompt_end"}, MESSAGES, "{% for m in messages %}{{ m.content }}</s>\n{% endfor %}"
    ),
    "text": Case(set(), TEXT, adds="<s> $A"),
    "text that has its end": Case(set(), {**TEXT, "chosen": " There.</s>"}, adds="<s> $A"),
    "text behind which the tokenizer adds another": Case({"added_end"}, TEXT, adds="<s> $A </s>"),
    "text that has another end": Case(
        {"several_ends"}, {**TEXT, "chosen": f" There.{TURN}"}, generation={"eos_token_id": [270]}
    ),
    "a prompt of text that has an end": Case({"prompt_end"}, {**TEXT, "prompt": "Where?</s>\n"}),
}


def folder_of(model: Path, case: Case) -> Path:
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_special_tokens([TURN])
    if case.adds is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=case.adds, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    backend.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(case.template)
    (model / "generation_config.json").unlink(missing_ok=True)
    if case.generation is not None:
        (model / "generation_config.json").write_text(json.dumps(case.generation))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 280, **case.config}))
    return model


def pair_of(row: dict[str, Any]) -> PreferencePair:
    return PreferencePair(row=0, source=None, where="here", **row)


def tokenizer_of(folder: Path) -> PairTokenizer:
    return PairTokenizer(load_tokenizer(folder), max_length=100, truncation="drop", vocab_size=280)


@pytest.mark.parametrize("name", CASES)
def test_what_is_odd_about_the_ends_of_a_pair(model: Path, name: str) -> None:
    case = CASES[name]
    folder = folder_of(model, case)
    tokenizer = tokenizer_of(folder)
    (ids,) = tokenizer.encode([pair_of(case.row)])
    ends = Ends(tokenizer.tokenizer, folder, added=tokenizer.added)
    assert ends.odd(ids, plain=case.row is not MESSAGES and isinstance(case.row["prompt"], str)) == case.odd
    # Worked out another way: the text behind the last sign of the answer.
    stops = {tokenizer.tokenizer.decode([i]) for i in stop_ids(tokenizer.tokenizer, folder)}
    behind = tokenizer.tokenizer.decode(ids.chosen.tolist()).rpartition(".")[2]
    count = sum(map(behind.count, stops))
    assert (count == 1) == (not case.odd - {"prompt_end"})
    # That the tokenizer ends a prompt which goes on is no merging of tokens.
    assert not ids.merged or case.template


def test_a_prompt_alone_is_what_its_pairs_begin_with_where_the_tokenizer_ends_every_text(model: Path) -> None:
    folder = folder_of(model, CASES["text behind which the tokenizer adds another"])
    tokenizer = tokenizer_of(folder)
    (ids,) = tokenizer.encode([pair_of(TEXT)])
    alone = prompt_ids("Where?", tokenizer.tokenizer, where="here")
    assert alone.tolist() == ids.prompt.tolist()
    assert alone[-1] != tokenizer.tokenizer.eos_token_id


Say = Callable[[Path, Path], list[str]]


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def say_in_check(model: Path, data: Path) -> list[str]:
    found = audit(CheckConfig(data=[str(data)], model=str(model)), count_parameters=lambda _: 1).problems
    assert {p.severity for p in found if p.kind in FOUND} <= {"warning", "note"}
    return [p.title for p in found]


def say_in_preview(model: Path, data: Path) -> list[str]:
    date, entries = preview(PreviewConfig(data=[str(data)], model=str(model)))
    shown = str(rendered(entries, date))
    assert all(FOUND[kind].title in shown for entry in entries for kind in entry["odd_ends"])
    return [shown]


def say_in_precompute(model: Path, data: Path) -> list[str]:
    config = PrecomputeConfig.model_validate(
        {"model": str(model), "data": [str(data)], "shards": data.parent / "shards"}
    )
    progress = Said()
    precompute(config, scorer=ScriptedScorer(), progress=progress)
    return progress.lines


@pytest.mark.parametrize("say", [say_in_check, say_in_preview, say_in_precompute])
def test_odd_ends_are_said_before_anything_is_scored(model: Path, tmp_path: Path, say: Say) -> None:
    rows = [{**TEXT, "prompt": f"{i}: where?"} for i in range(3)]
    for case in (CASES["text"], CASES["text behind which the tokenizer adds another"]):
        place = tmp_path / (case.adds or "").replace("/", "")
        folder = folder_of(Path(shutil.copytree(model, place / "model")), case)
        said = say(folder, write_jsonl(place / "pairs.jsonl", rows))
        assert any(FOUND["added_end"].title in line for line in said) == bool(case.odd), said
