"""One source gives the same ids in ``precompute``, ``preview`` and ``kl``, with tools, settings and date."""

import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fakes import write_jsonl
from messages import said
from pydantic import ValidationError

from dpo_opt.cli import main
from dpo_opt.commands.kl import KLConfig
from dpo_opt.kl.prompts import choose_prompts
from dpo_opt.precompute.config import PreviewConfig
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.preview import preview
from dpo_opt.schemas.errors import ConfigError, DataError, FingerprintError
from dpo_opt.schemas.shard_folder import ShardFolder

Row = dict[str, Any]
TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d %b') }}{% if tools %}{{ tools[0].function.name }}{% endif %}"
    "{% if tone is defined %}{{ tone }}{% endif %}{% for m in messages %}"
    "{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


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
    return [ids.tolist() for ids in choose_prompts(config, model=model, run=None)[1]]


def precomputed(model: Path, file: Path, *options: str) -> list[dict[str, list[int]]]:
    shards = file.parent / f"{file.stem}-shards"
    arguments = ["precompute", "--model", model, "--data", file, "--shards", shards, "--backend", "hf"]
    arguments += options
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


def previewed(model: Path, file: Path, **options: Any) -> list[dict[str, list[int]]]:
    found = []
    _, entries = preview(PreviewConfig(data=[str(file)], model=str(model), pairs=9, **options))
    for entry in entries:
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


def test_a_prompt_alone_is_refused_as_that_of_a_pair_is(model_with_date: Path, tmp_path: Path) -> None:
    refuses = "{{ raise_exception('no system') if m.role == 'system' }}"
    template = f"{{% for m in messages %}}{refuses}{{{{ m.content }}}}{{% endfor %}}"
    (model_with_date / "chat_template.jinja").write_text(template)
    cases = ((ASKED[1], 'the name of a tool in "tools"'), (ASKED[3], 'message 1 of "prompt" .*no system'))
    for row, says in cases:
        for values in (row, {**row, **SIDES}):
            with pytest.raises(DataError, match=says):
                kl_prompts(model_with_date, write_jsonl(tmp_path / "a.jsonl", [values]))


def test_kl_refuses_a_pair_that_precompute_refuses(tiny_model: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "How?", "chosen": "", "rejected": " No."}])
    with pytest.raises(DataError, match='"chosen" is empty'):
        kl_prompts(tiny_model, file)
    file = write_jsonl(tmp_path / "b.jsonl", [{"prompt": ""}])
    with pytest.raises(DataError, match='"prompt" is empty'):
        kl_prompts(tiny_model, file)


DAY = "2001-02-03"


def dated_rows(tmp_path: Path) -> Path:
    turns = [*SIDES["chosen"], said("user", "Sure?"), said("assistant", "Quite.")]
    rows = [{**ASKED[0], **SIDES}, {**ASKED[1], **SIDES}, {**ASKED[0], **SIDES, "chosen": turns}]
    return write_jsonl(tmp_path / "a.jsonl", rows)


def date_in(ids: list[int], model: Path) -> str:
    return str(load_tokenizer(model).decode(ids)).removeprefix("<s>")[:6]


def test_a_given_date_is_that_of_precompute_preview_and_kl(model_with_date: Path, tmp_path: Path) -> None:
    file = dated_rows(tmp_path)
    pairs = precomputed(model_with_date, file, "--template-date", DAY)
    assert {date_in(pair["prompt"], model_with_date) for pair in pairs} == {"03 Feb"}
    assert previewed(model_with_date, file, template_date=DAY)[:2] == pairs[:2]
    prompts = [pair["prompt"] for pair in pairs[:2]]
    assert kl_prompts(model_with_date, file, template_date=DAY) == prompts
    assert kl_prompts(model_with_date, file) != prompts


def test_preview_takes_the_rules_of_a_folder(model_with_date: Path, tmp_path: Path) -> None:
    file = dated_rows(tmp_path)
    pairs = precomputed(model_with_date, file, "--template-date", DAY, "--train-on", "last")
    shards = tmp_path / "a-shards"
    shown, entries = preview(PreviewConfig(data=[str(file)], model=str(model_with_date), shards=shards))
    assert shown == (DAY, str(shards))
    # The first answer of the third row is context there, because the folder was made with `last`.
    last = [segment["kind"] for segment in entries[2]["chosen"]]
    assert last.index("context") < last.index("chosen")
    sides = [[segment["ids"] for segment in entry["rejected"]] for entry in entries]
    assert sides == [[pair["prompt"], pair["rejected"]] for pair in pairs]
    with pytest.raises(ValidationError, match="--template-date is given beside --shards"):
        PreviewConfig(data=[str(file)], model=str(model_with_date), shards=shards, template_date=DAY)
    (model_with_date / "chat_template.jinja").write_text(TEMPLATE + " ")
    with pytest.raises(FingerprintError, match="chat_template "):
        preview(PreviewConfig(data=[str(file)], model=str(model_with_date), shards=shards))


def test_kl_takes_the_date_of_the_run_that_made_the_policy(model_with_date: Path, tmp_path: Path) -> None:
    file = dated_rows(tmp_path)
    pairs = precomputed(model_with_date, file, "--template-date", DAY)
    run = tmp_path / "run"
    policy = Path(shutil.copytree(model_with_date, run / "final"))
    (run / "config.resolved.yaml").write_text(f"shards: {tmp_path / 'a-shards'}\n")
    assert kl_prompts(policy, file) == [pair["prompt"] for pair in pairs[:2]]
    (run / "config.resolved.yaml").write_text("shards: gone\n")
    assert kl_prompts(policy, file) == kl_prompts(model_with_date, file)
    with pytest.raises(ConfigError, match="ids already"):
        kl_prompts(policy, tmp_path / "a-shards", template_date=DAY)


def test_check_says_the_date_that_it_takes(model_with_date: Path, tmp_path: Path) -> None:
    file = dated_rows(tmp_path)
    precomputed(model_with_date, file, "--template-date", DAY)
    asked = ["check", str(file), "--model", str(model_with_date)]
    shards = ["--shards", str(tmp_path / "a-shards")]
    for options, origin in ((shards, shards[1]), (["--template-date", DAY], "--template-date")):
        found = CliRunner().invoke(main, [*asked, *options])
        assert f"told the date {DAY} (from: {origin})" in found.stdout
    found = CliRunner().invoke(main, asked)
    assert f"{date.today()} (from: today; --template-date takes another day)" in found.stdout
    refused = CliRunner().invoke(main, [*asked, *shards, "--template-date", DAY])
    assert "--template-date is given beside --shards" in refused.output


def test_a_date_that_no_template_reads_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    file = dated_rows(tmp_path)
    for command in (["preview", file], ["check", file], ["precompute", "--data", file, "--shards", tmp_path]):
        asked = [*map(str, command), "--model", str(tiny_model), "--template-date"]
        assert "would have no effect" in CliRunner().invoke(main, [*asked, DAY]).output
    assert "2001-2-3" in CliRunner().invoke(main, [*asked, "2001-2-3"]).output


def test_a_folder_is_not_added_to_on_another_given_day(model_with_date: Path, tmp_path: Path) -> None:
    file = dated_rows(tmp_path)
    precomputed(model_with_date, file, "--template-date", DAY)
    asked = ["precompute", "--model", model_with_date, "--data", file, "--shards", tmp_path / "a-shards"]
    for options, code in (([], 0), (["--template-date", DAY], 0), (["--template-date", "2001-02-04"], 4)):
        result = CliRunner().invoke(main, [*map(str, asked), "--backend", "hf", *options])
        assert result.exit_code == code, result.output
    assert "template_date" in result.output
