import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import invoke
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.precompute.config import PrecomputeConfig, PreviewConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.preview import preview
from dpo_opt.schemas.manifest import load_manifest

ROWS = preference_rows(12)


def found(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return dict(json.loads(result.stdout))


def refused(exit_code: int, *arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    return str(result.stderr)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", ROWS)


# check ------------------------------------------------------------------------------------------------------


def test_check_of_good_data_says_so_and_exits_with_0(data: Path) -> None:
    result = invoke("check", data)
    assert result.exit_code == 0
    assert result.stdout.startswith(f'{data}: 12 pairs, read as text with "prompt"\n\nno problem found\n')
    # Every longer completion is the chosen one, but 12 pairs say nothing about a share.
    assert "the longer completion wins 100.0% of 12 pairs of unequal length" in result.stdout


def test_check_json_has_the_promised_keys(data: Path) -> None:
    with data.open("a") as file:
        file.write("{\n" + json.dumps(ROWS[0]) + "\n")
    report = found("check", data, exit_code=3)
    assert report["pairs"] == 13
    assert report["unit"] == "characters"
    first, second = report["problems"]
    for problem in (first, second):
        assert problem.keys() == {"kind", "count", "severity", "title", "why", "fix", "examples"}
        assert all(example.keys() == {"where", "detail"} for example in problem["examples"])
    assert (first["kind"], first["count"], first["severity"]) == ("json", 1, "error")
    assert first["examples"][0]["where"] == f"{data}:13"
    assert (second["kind"], second["count"], second["severity"]) == ("duplicate", 1, "warning")
    assert second["examples"] == [{"where": f"{data}:14", "detail": f"the same as {data}:1"}]
    assert report["truncation"] == []
    assert report["estimate"] is None


def test_check_exits_with_3_where_a_later_command_would_refuse_and_with_0_for_warnings(data: Path) -> None:
    with data.open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    warned = invoke("check", data)
    assert warned.exit_code == 0
    assert "warning pairs that repeat an earlier pair: 1 [duplicate]" in warned.stdout
    with data.open("a") as file:
        file.write("{\n")
    bad = invoke("check", data)
    assert bad.exit_code == 3
    assert "ERROR   lines that are not JSON: 1 [json]" in bad.stdout
    assert f"        {data}:14: not valid JSON" in bad.stdout
    assert "12 pairs" not in bad.stdout
    assert "13 pairs, 1 bad row," in bad.stdout
    assert invoke("check", data, "--on-bad-row", "skip").exit_code == 0


def test_check_agrees_with_precompute_about_what_is_refused(
    data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for line, code in (("", 0), ("{\n", 3)):
        with data.open("a") as file:
            file.write(line)
        common = ["--model", tiny_model, "--shards", tmp_path / f"shards{code}", "--backend", "hf"]
        assert invoke("check", data, "--model", tiny_model).exit_code == code
        assert invoke("precompute", "--data", data, *common, "--dry-run").exit_code == code


def test_check_with_a_model_counts_tokens_and_forecasts(data: Path, tiny_model: Path) -> None:
    report = found("check", data, "--model", tiny_model, "--max-length", 26, "--truncation", "drop")
    assert (report["unit"], report["truncation_mode"]) == ("tokens", "drop")
    assert [fit["max_length"] for fit in report["truncation"]] == [26, 256]
    assert report["estimate"]["max_length"] == 26
    assert {p["kind"] for p in report["problems"]} == {"left_out"}
    text = invoke("check", data, "--model", tiny_model).stdout
    assert "length in tokens" in text
    assert "--max-length (keep_start)" in text
    assert "scoring at --max-length 256: 24 distinct sequences" in text


def test_a_forecast_needs_no_weights(
    data: Path, model: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "model.safetensors").unlink()
    whole, without = (found("check", data, "--model", folder) for folder in (tiny_model, model))
    assert without["estimate"] == whole["estimate"]
    assert without["estimate"]["parameters"] > 100_000
    assert found("preview", data, "--model", model) == found("preview", data, "--model", tiny_model)
    # Nor are they fetched.
    asked: list[str] = []

    def fetch(name: str, *, patterns: list[str], **others: object) -> Path:
        asked.extend(patterns)
        return model

    monkeypatch.setattr("dpo_opt.schemas.models.fetch", fetch)
    assert found("check", data, "--model", "made/model")["estimate"] == whole["estimate"]
    assert "*.json" in asked
    assert "*.safetensors" not in asked


def test_check_writes_a_page(data: Path, tmp_path: Path) -> None:
    page = tmp_path / "check.html"
    before = invoke("check", data).stdout
    assert invoke("check", data, "--html", page).stdout == before
    text = page.read_text(encoding="utf-8")
    assert text.lower().startswith("<!doctype html>")
    assert "data.jsonl" in text


@pytest.fixture(scope="module")
def shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("data-cli")
    path = write_jsonl(base / "data.jsonl", ROWS)
    config = PrecomputeConfig(model=str(tiny_model), data=[str(path)], shards=base / "shards")
    precompute(config, scorer=ScriptedScorer())
    return config.shards


def test_check_with_shards_says_how_the_reference_ranks_the_pairs(data: Path, shards: Path) -> None:
    view = found("check", data, "--shards", shards)["reference"]
    assert view["pairs"] == load_manifest(shards).kept == 12
    table = pa.concat_tables(pq.read_table(shards / s.file) for s in load_manifest(shards).shards)
    margins = [
        chosen - rejected
        for chosen, rejected in zip(
            table["ref_chosen_logps"].to_pylist(), table["ref_rejected_logps"].to_pylist(), strict=True
        )
    ]
    assert view["ranking_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 12)
    assert view["hardest"][0]["ranking_margin"] == pytest.approx(min(margins), abs=1e-3)
    text = invoke("check", data, "--shards", shards).stdout
    assert f"the reference itself ranks {view['ranking_accuracy']:.1%}" in text
    assert found("check", data)["reference"] is None


def test_check_of_hostile_text_steers_no_terminal(tmp_path: Path) -> None:
    evil = "\x1b[31m\u202e[/red]{{ 7*7 }}<script>\x07"
    rows = [{**ROWS[0], "source": evil}, {**ROWS[0], "source": evil}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "a", evil: "b"}) + "\n")
    page = tmp_path / "check.html"
    result = invoke("check", path, "--html", page)
    assert result.exit_code == 3
    for character in "\x1b\u202e\x07":
        assert character not in result.output
    assert "[31m[/red]{{ 7*7 }}<script>" in result.stdout
    assert "<script>" not in page.read_text()
    # JSON escapes what text leaves out.
    assert any(s["source"] == evil for s in found("check", path, exit_code=3)["sources"])


def test_check_of_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    name = os.fsencode(folder) + b"/caf\xe9.jsonl"
    Path(os.fsdecode(name)).write_text(json.dumps(ROWS[0]) + "\n{\n")
    report = found("check", folder, exit_code=3)
    assert report["problems"][0]["examples"][0]["where"] == os.fsdecode(name) + ":2"
    assert "caf.jsonl:2" in invoke("check", folder).stdout


# Which data -------------------------------------------------------------------------------------------------


def renamed(path: Path) -> Path:
    return write_jsonl(
        path, [{"question": r["prompt"], "good": r["chosen"], "rejected": r["rejected"]} for r in ROWS]
    )


def test_several_sources_are_given_one_after_the_other(data: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{**ROWS[0], "prompt": "Other?"}])
    report = found("check", data, other)
    assert [(d["name"], d["pairs"]) for d in report["data"]] == [(str(data), 12), (str(other), 1)]
    shared = found("check", data, other, "--data-share", 0.5, "--data-share", 1)
    assert 0 < shared["data"][0]["pairs"] < 12
    assert shared["data"][1]["pairs"] == 1
    assert "2 --data, but 1 --data-share" in refused(2, "check", data, other, "--data-share", 0.5)


def test_precompute_takes_several_sources_as_flags(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{**ROWS[0], "prompt": "Other?"}])
    arguments = ["--model", tiny_model, "--shards", tmp_path / "s", "--backend", "hf", "--dry-run"]
    plan = found("precompute", "--data", data, "--data", other, *arguments)
    assert plan["rows"] == 13
    assert not (tmp_path / "s").exists()


def test_columns_are_named_one_by_one(tmp_path: Path) -> None:
    path = renamed(tmp_path / "renamed.jsonl")
    assert found("check", path, exit_code=3)["pairs"] == 0
    names = ["--column", "prompt=question", "--column", "chosen=good"]
    assert found("check", path, *names)["pairs"] == 12
    assert "not of the form key=value" in refused(2, "check", path, "--column", "prompt")


def test_sources_shares_and_columns_may_stand_in_a_file(tmp_path: Path) -> None:
    first, second = renamed(tmp_path / "a.jsonl"), renamed(tmp_path / "b.jsonl")
    config = tmp_path / "check.yaml"
    config.write_text(
        f"data:\n  - {first}\n  - {second}\ndata_share: [1, 1]\n"
        "column: {prompt: question, chosen: good}\non_bad_row: skip\n"
    )
    report = found("check", "--config", config)
    assert [d["pairs"] for d in report["data"]] == [12, 12]
    assert {p["kind"]: p["count"] for p in report["problems"]} == {"duplicate": 12}
    # One source needs no list, and what is named on the line replaces the file's.
    config.write_text(f"data: {first}\ncolumn: {{prompt: question, chosen: good}}\n")
    assert found("check", "--config", config)["pairs"] == 12
    assert [d["name"] for d in found("check", second, "--config", config)["data"]] == [str(second)]


@pytest.mark.parametrize("command", ["check", "preview", "convert"])
def test_a_command_without_data_says_so(command: str, tiny_model: Path, tmp_path: Path) -> None:
    needed = {"check": [], "preview": ["--model", tiny_model], "convert": ["--output", tmp_path / "out"]}
    message = refused(2, command, *needed[command])
    assert message == "error: DATA is missing\n  fix: name it after the command, or set data in --config\n"
    assert "DATA..." in invoke(command, "--help").stdout


@pytest.mark.parametrize("command", ["check", "preview", "convert"])
def test_data_that_is_not_there_is_refused(command: str, tiny_model: Path, tmp_path: Path) -> None:
    needed = {"check": [], "preview": ["--model", tiny_model], "convert": ["--output", tmp_path / "out"]}
    message = refused(3, command, tmp_path / "nowhere.jsonl", *needed[command])
    assert message.startswith(f"error: {tmp_path / 'nowhere.jsonl'}: there is no such file or folder")
    assert not (tmp_path / "out").exists()


# preview ----------------------------------------------------------------------------------------------------


def whole_ids(model: Path, row: dict[str, Any], side: str) -> list[int]:
    tokenizer = load_tokenizer(model)
    return list(tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"])


def entries(data: Path, model: Path, **options: Any) -> list[dict[str, Any]]:
    return preview(PreviewConfig.model_validate({"data": [str(data)], "model": str(model), **options}))[1]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop"])
@pytest.mark.parametrize("max_length", [8, 17, 22, 256])
def test_segments_are_the_encoded_sequence_divided(
    data: Path, tiny_model: Path, truncation: str, max_length: int
) -> None:
    shown = entries(data, tiny_model, pairs=12, truncation=truncation, max_length=max_length)
    assert len(shown) == 12
    decode = load_tokenizer(tiny_model).decode
    for row, entry in zip(ROWS, shown, strict=True):
        for side in ("chosen", "rejected"):
            segments = entry[side]
            ids = [i for s in segments for i in s["ids"]]
            assert ids == whole_ids(tiny_model, row, side)
            assert "".join(s["text"] for s in segments) == decode(ids)
            kinds = [s["kind"] for s in segments]
            if entry["dropped"]:
                assert set(kinds) == {"cut"}
            else:
                order = {"keep_start": ["prompt", side, "cut"], "keep_end": ["cut", "prompt", side]}
                assert kinds == [kind for kind in order.get(truncation, ["prompt", side]) if kind in kinds]
                assert {"prompt", side} <= set(kinds)
                assert sum(len(s["ids"]) for s in segments if s["kind"] != "cut") <= max_length


def test_what_is_cut_is_shown_where_it_stood(tiny_model: Path, tmp_path: Path) -> None:
    row = {"prompt": "p" * 10, "chosen": "c" * 10, "rejected": "r" * 4}
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    (entry,) = entries(path, tiny_model, max_length=16)
    # BOS and ten letters are prompt; five places are left for c c c c c c c c c c EOS.
    assert [(s["kind"], len(s["ids"]), s["text"]) for s in entry["chosen"]] == [
        ("prompt", 11, "<s>" + "p" * 10),
        ("chosen", 5, "c" * 5),
        ("cut", 6, "c" * 5 + "</s>"),
    ]
    assert [(s["kind"], len(s["ids"])) for s in entry["rejected"]] == [("prompt", 11), ("rejected", 5)]
    (entry,) = entries(path, tiny_model, max_length=16, truncation="keep_end")
    # The longer side needs eleven places, so both keep the last five of the prompt.
    assert [(s["kind"], len(s["ids"]), s["text"]) for s in entry["chosen"]] == [
        ("cut", 6, "<s>" + "p" * 5),
        ("prompt", 5, "p" * 5),
        ("chosen", 11, "c" * 10 + "</s>"),
    ]
    assert [s["kind"] for s in entry["rejected"]] == ["cut", "prompt", "rejected"]
    (entry,) = entries(path, tiny_model, max_length=16, truncation="drop")
    assert entry["dropped"] == "longer_than_max_length"
    text = invoke("preview", path, "--model", tiny_model, "--max-length", 16).stdout
    assert "chosen (11 prompt, 5 chosen, 6 cut tokens)" in text
    assert "left out" not in text
    dropped = invoke(
        "preview", path, "--model", tiny_model, "--max-length", 16, "--truncation", "drop"
    ).stdout
    assert "left out: longer_than_max_length" in dropped


@pytest.mark.parametrize("max_length", range(12, 30))
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_a_character_cut_in_its_middle_is_shown_once(
    tiny_model: Path, tmp_path: Path, max_length: int, truncation: str
) -> None:
    row = {"prompt": "é😀" * 3, "chosen": "❄é😀", "rejected": "😁"}
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    (entry,) = entries(path, tiny_model, max_length=max_length, truncation=truncation)
    for side in ("chosen", "rejected"):
        assert [i for s in entry[side] for i in s["ids"]] == whole_ids(tiny_model, row, side)
        assert "".join(s["text"] for s in entry[side]) == f"<s>{row['prompt']}{row[side]}</s>"


def test_a_prompt_whose_last_token_merges_is_marked(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "h", "chosen": "e", "rejected": "x"}, {"prompt": "a", "chosen": "b", "rejected": "x"}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert [e["merged"] for e in entries(path, tiny_model)] == [True, False]
    text = invoke("preview", path, "--model", tiny_model).stdout
    assert text.count("the prompt's last token changes when a completion follows") == 1


def test_start_and_pairs_choose_rows_and_bad_ones_are_shown_as_such(data: Path, tiny_model: Path) -> None:
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:3], "{", *lines[3:]]) + "\n")
    shown = entries(data, tiny_model, start=2, pairs=3)
    assert [e["where"] for e in shown] == [f"{data}:{n}" for n in (3, 4, 5)]
    assert ["error" in e for e in shown] == [False, True, False]
    assert entries(data, tiny_model, start=100) == []
    report = found("preview", data, "--model", tiny_model, "--start", 2, "--pairs", 3, exit_code=3)
    date = {"template_date": None, "template_date_from": None}
    assert report == {**date, "pairs": json.loads(json.dumps(shown))}
    refused = invoke("preview", data, "--model", tiny_model, "--start", 3, "--pairs", 1)
    assert f"{data}:4\n  not valid JSON" in refused.stdout
    # As a later command would, unless it leaves such rows out.
    assert refused.exit_code == 3
    assert invoke("preview", data, "--model", tiny_model, "--pairs", 3).exit_code == 0
    skips = ("--pairs", 9, "--on-bad-row", "skip")
    assert invoke("preview", data, "--model", tiny_model, *skips).exit_code == 0


def test_messages_are_shown_as_the_template_renders_them(tiny_model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    rows = [{"chosen": turns, "rejected": [turns[0], {**turns[1], "content": "No"}]}]
    (entry,) = entries(write_jsonl(tmp_path / "data.jsonl", rows), tiny_model)
    assert [(s["kind"], s["text"]) for s in entry["chosen"]] == [
        ("prompt", "<s>user: Hi assistant: "),
        ("chosen", "Yes</s> "),
    ]


def test_conversations_that_cannot_be_rendered_are_shown_with_their_error(
    tiny_model: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    row = {"chosen": turns, "rejected": [turns[0], {**turns[1], "content": "No"}]}
    rows = [row, {**row, "chat_template_kwargs": {"tokenize": True}}]
    good, bad = entries(write_jsonl(tmp_path / "data.jsonl", rows), tiny_model)
    assert "error" not in good
    assert bad["error"].startswith('"chat_template_kwargs" sets tokenize')


HOSTILE = [
    "[/red]",
    "[bold]loud[/bold]",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\u202egnp.exe",
    ":smile: [link=file:///etc]x[/link]",
    "one\rtwo",
    "[",
    "\\[/]",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_taken_for_markup_or_control_codes(text: str, tiny_model: Path, tmp_path: Path) -> None:
    row = {"prompt": f"Say {text}", "chosen": f" a {text}", "rejected": f" b {text}", "source": text}
    path = write_jsonl(tmp_path / "data.jsonl", [row, {**row, "chosen": 3}])
    result = invoke("preview", path, "--model", tiny_model)
    assert result.exit_code == 3, result.output
    for character in "\x1b\x07\u202e\r":
        assert character not in result.stdout
    shown = "".join(c for c in text if c not in "\x1b\x07\u202e\r")
    assert f"Say {shown} a {shown}</s>" in result.stdout
    shown_pair = found("preview", path, "--model", tiny_model, "--pairs", 1)["pairs"][0]
    assert shown_pair["source"] == text


def test_a_long_text_is_not_broken_into_lines(tiny_model: Path, tmp_path: Path) -> None:
    row = {"prompt": "word " * 40, "chosen": "yes", "rejected": "no"}
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    assert f"<s>{row['prompt']}yes</s>" in invoke("preview", path, "--model", tiny_model).stdout


# convert ----------------------------------------------------------------------------------------------------


def test_convert_writes_a_folder_and_says_what_went(data: Path, tmp_path: Path) -> None:
    with data.open("a") as file:
        file.write("{\n" + json.dumps(ROWS[0]) + "\n")
    output = tmp_path / "clean"
    assert found("convert", data, "--output", output) == {
        "output": str(output),
        "train": 12,
        "eval": 0,
        "removed": {"bad_row": 1, "duplicate": 1},
    }
    assert found("check", output / "train.jsonl")["pairs"] == 12
    assert "the output exists already" in refused(2, "convert", data, "--output", output)
    other = tmp_path / "split"
    text = invoke("convert", data, "--output", other, "--eval-split", 0.4).stdout
    assert ["removed", "bad_row", "1,", "duplicate", "1"] in [line.split() for line in text.splitlines()]
    train, held_out = other / "train.jsonl", other / "eval.jsonl"
    assert found("check", train, held_out)["pairs"] == 12
    assert found("check", train, "--eval-data", held_out)["problems"] == []


def test_convert_needs_an_output(data: Path) -> None:
    assert "--output is missing" in refused(2, "convert", data)


def test_what_convert_wrote_can_be_scored(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    invoke("convert", data, "--output", tmp_path / "clean")
    config = PrecomputeConfig(
        model=str(tiny_model), data=[str(tmp_path / "clean" / "train.jsonl")], shards=tmp_path / "shards"
    )
    assert precompute(config, scorer=ScriptedScorer()).kept == 12
