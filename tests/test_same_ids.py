"""One source gives the same ids in ``precompute``, ``preview`` and ``kl``, with tools, settings and date."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fakes import write_jsonl

from dpo_opt.cli import main
from dpo_opt.commands.kl import KLConfig
from dpo_opt.measure_kl import _prompts
from dpo_opt.precompute.config import PreviewConfig
from dpo_opt.preview import preview
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.shard_folder import ShardFolder

Row = dict[str, Any]
TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d %b') }}{% if tools %}{{ tools[0].function.name }}{% endif %}"
    "{% if tone is defined %}{{ tone }}{% endif %}{% for m in messages %}"
    "{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def said(role: str, content: str) -> Row:
    return {"role": role, "content": content}


SIDES = {"chosen": [said("assistant", "So.")], "rejected": [said("assistant", "No.")]}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ASKED: list[Row] = [
    {"prompt": [said("user", "How?")]},
    {"prompt": [said("user", "How?")], "tools": TOOLS},
    {"prompt": [said("user", "How?")], "chat_template_kwargs": {"tone": "kind"}},
    {"prompt": [said("user", "How?")], "system": "Be brief."},
]
ALPACA = {"instruction": "Do", "input": "it", "system": "s", "history": [["Hi", "Yes"]]}


@pytest.fixture
def model_with_date(model: Path) -> Path:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def kl_prompts(model: Path, file: Path, **options: Any) -> list[list[int]]:
    config = KLConfig(
        model=str(model), reference=str(model), prompts=file, output=file.parent / "kl.parquet", **options
    )
    return [ids.tolist() for ids in _prompts(config, model)]


def precomputed(model: Path, file: Path) -> list[dict[str, list[int]]]:
    shards = file.parent / f"{file.stem}-shards"
    arguments = ["precompute", "--model", model, "--data", file, "--shards", shards, "--backend", "hf"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return [
        {
            "prompt": p.prompt_ids.tolist(),
            "chosen": p.chosen_ids.tolist(),
            "rejected": p.rejected_ids.tolist(),
        }
        for p in ShardFolder.open(shards).pairs()
    ]


def previewed(model: Path, file: Path) -> list[dict[str, list[int]]]:
    found = []
    for entry in preview(PreviewConfig(data=[str(file)], model=str(model), pairs=9)):
        parts = {side: {s["kind"]: s["ids"] for s in entry[side]} for side in ("chosen", "rejected")}
        assert parts["chosen"]["prompt"] == parts["rejected"]["prompt"]
        sides = {side: parts[side][side] for side in parts}
        found.append({"prompt": parts["chosen"]["prompt"], **sides})
    return found


@pytest.mark.parametrize("form", ["messages", "alpaca", "text"])
def test_a_source_gives_the_same_ids_everywhere(form: str, model_with_date: Path, tmp_path: Path) -> None:
    text = [{"prompt": "How? ", "chosen": "So.", "rejected": "No."}]
    alpaca = [{**ALPACA, "chosen": "So.", "rejected": "No.", "tools": TOOLS}]
    rows = {"messages": [{**row, **SIDES} for row in ASKED], "alpaca": alpaca, "text": text}[form]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    pairs = precomputed(model_with_date, file)
    assert len({str(pair["prompt"]) for pair in pairs}) == len(rows)
    assert previewed(model_with_date, file) == pairs
    assert kl_prompts(model_with_date, file) == [pair["prompt"] for pair in pairs]
    assert kl_prompts(model_with_date, tmp_path / "a-shards") == [pair["prompt"] for pair in pairs]


def test_kl_reads_prompts_alone_by_the_same_rules(model_with_date: Path, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{**row, **SIDES} for row in ASKED])
    alone = write_jsonl(tmp_path / "alone.jsonl", ASKED)
    assert kl_prompts(model_with_date, alone) == kl_prompts(model_with_date, pairs)
    images = write_jsonl(tmp_path / "images.jsonl", [{**ASKED[0], "images": ["a.png"]}])
    with pytest.raises(DataError, match='"images" is not empty'):
        kl_prompts(model_with_date, images)
    assert len(kl_prompts(model_with_date, images, ignore_column=["images"])) == 1
    question = write_jsonl(tmp_path / "question.jsonl", [{"question": ASKED[0]["prompt"]}])
    found = kl_prompts(model_with_date, question, column={"prompt": "question"})
    assert found == kl_prompts(model_with_date, alone)[:1]


def test_kl_refuses_a_pair_that_precompute_refuses(tiny_model: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "How?", "chosen": "", "rejected": " No."}])
    with pytest.raises(DataError, match='"chosen" is empty'):
        kl_prompts(tiny_model, file)
    file = write_jsonl(tmp_path / "b.jsonl", [{"prompt": ""}])
    with pytest.raises(DataError, match='"prompt" is empty'):
        kl_prompts(tiny_model, file)
