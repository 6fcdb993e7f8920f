import gzip
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.check.forecast import estimate, forecast, forecast_lengths, kept_pairs
from dpo_opt.precompute.check.near_duplicates import nearest_earlier
from dpo_opt.precompute.check.pair_statistics import Facts, Wanted, collect
from dpo_opt.precompute.check.problems import (
    BAD_ROWS,
    FOUND,
    LEAVES_NOTHING,
    MERGED_TURNS,
    without_skipping,
)
from dpo_opt.precompute.config import CheckConfig, DataConfig, Truncation
from dpo_opt.precompute.read import files
from dpo_opt.precompute.read.datasets import read_pairs
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer, model_vocab_size
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.audit_record import Audit, LengthBias, Problem
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import IdArray, PreferencePair, TokenizedPair
from dpo_opt.schemas.progress import Silent
from dpo_opt.schemas.weights import parameter_count

TRUNCATIONS: tuple[Truncation, ...] = get_args(Truncation)
Rows = list[dict[str, Any]]


def repetitive_rows(count: int, seed: int = 0) -> Rows:
    """Rows of few words, so that many repeat or contradict others, or prefer nothing."""
    chance = random.Random(seed)
    words = ["yes", "no", "perhaps so", "I do not know", "yes and no"]
    return [
        {
            "prompt": f"Is {chance.randrange(6)} even?",
            "chosen": " " + chance.choice(words),
            "rejected": " " + chance.choice(words),
            "source": chance.choice(["web", "books", "web", None]),
        }
        for _ in range(count)
    ]


def check(*data: Path, **options: Any) -> Audit:
    return audit(CheckConfig.model_validate({"data": [str(d) for d in data], **options}))


def by_kind(found: Audit) -> dict[str, Problem]:
    kinds = [p.kind for p in found.problems]
    assert len(kinds) == len(set(kinds))
    return {p.kind: p for p in found.problems}


def facts_of(*data: Path, model: Path | None = None) -> Facts:
    config = DataConfig(data=[str(d) for d in data])
    return collect(config, Wanted(model), processes=1, progress=Silent())


def tokenizer_of(model: Path, *, max_length: int = 10**6, truncation: Truncation = "drop") -> PairTokenizer:
    vocab_size = model_vocab_size(model)
    return PairTokenizer(
        load_tokenizer(model), max_length=max_length, truncation=truncation, vocab_size=vocab_size
    )


# By brute force --------------------------------------------------------------------------------------------


def triple(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["prompt"], row["chosen"], row["rejected"]


def duplicates(rows: Rows) -> dict[int, int]:
    """Pair to the first one that is the same."""
    found = {}
    for i, row in enumerate(rows):
        earlier = [j for j in range(i) if triple(rows[j]) == triple(row)]
        if earlier:
            found[i] = earlier[0]
    return found


def contradictory(rows: Rows) -> dict[int, int]:
    """Pair to the first one that says the opposite."""
    found = {}
    for i, (prompt, chosen, rejected) in enumerate(map(triple, rows)):
        others = [j for j, row in enumerate(rows) if triple(row) == (prompt, rejected, chosen)]
        if others and chosen != rejected:
            found[i] = others[0]
    return found


def percentile(values: list[int], share: float) -> int:
    """The smallest value that at least this share of the values does not exceed."""
    return next(v for v in sorted(values) if sum(x <= v for x in values) >= share * len(values))


def bias_of(lengths: list[tuple[int, int, int]]) -> LengthBias:
    longer = sum(c > r for _, c, r in lengths)
    unequal = sum(c != r for _, c, r in lengths)
    share = longer / unequal if unequal else None
    return LengthBias(longer_chosen=share, unequal_pairs=unequal, equal_pairs=len(lengths) - unequal)


def characters(row: dict[str, Any]) -> tuple[int, int, int]:
    return tuple(map(len, triple(row)))  # type: ignore[return-value]


def tokens(model: Path) -> Callable[[dict[str, Any]], tuple[int, int, int]]:
    tokenizer = load_tokenizer(model)

    def lengths(row: dict[str, Any]) -> tuple[int, int, int]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        sides = [
            tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]
            for side in ("chosen", "rejected")
        ]
        # No token of these texts joins the end of a prompt with what follows.
        assert all(side[: len(prompt)] == prompt for side in sides)
        return len(prompt), len(sides[0]) - len(prompt), len(sides[1]) - len(prompt)

    return lengths


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    rows = repetitive_rows(150)
    return write_jsonl(tmp_path_factory.mktemp("audit") / "data.jsonl", rows), rows


def test_repeated_pairs_are_counted_and_named_with_the_pair_they_repeat(
    repetitive: tuple[Path, Rows],
) -> None:
    path, rows = repetitive
    problems = by_kind(check(path))
    for kind, words, found in (
        ("duplicate", "the same as {}", duplicates(rows)),
        ("contradictory", "the other way round in {}", contradictory(rows)),
    ):
        assert len(found) > 20
        problem = problems[kind]
        assert (problem.count, problem.severity) == (len(found), "warning")
        shown = [(e.where, e.detail) for e in problem.examples]
        assert shown == [
            (f"{path}:{i + 1}", words.format(f"{path}:{other + 1}")) for i, other in sorted(found.items())[:5]
        ]


def test_pairs_that_prefer_nothing_are_counted(repetitive: tuple[Path, Rows]) -> None:
    path, rows = repetitive
    same = [i for i, row in enumerate(rows) if row["chosen"] == row["rejected"]]
    problem = by_kind(check(path))["identical_completions"]
    assert problem.count == len(same) > 10
    assert [e.where for e in problem.examples] == [f"{path}:{i + 1}" for i in same[:5]]


def test_what_tools_are_called_with_has_a_length(tmp_path: Path) -> None:
    """Without a model, a side that only calls a tool is not an empty one."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    asked = [{"role": "user", "content": "Warm?"}]
    row = {
        "prompt": asked,
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    lengths = {part.part: part for part in check(write_jsonl(tmp_path / "a.jsonl", [row])).lengths}
    assert lengths["rejected"].longest == 3
    assert lengths["chosen"].longest == len(json.dumps([call]))


@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_lengths_and_their_bias_are_those_of_the_texts(
    repetitive: tuple[Path, Rows], tiny_model: Path, unit: str
) -> None:
    path, rows = repetitive
    found = check(path, **({"model": str(tiny_model)} if unit == "tokens" else {}))
    lengths = [(tokens(tiny_model) if unit == "tokens" else characters)(row) for row in rows]
    assert (found.unit, found.pairs) == (unit, 150)
    assert found.length_bias == bias_of(lengths)
    whole = [p + max(c, r) for p, c, r in lengths]
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*lengths, strict=True)), strict=True))
    columns["prompt + longer completion"] = whole
    assert [r.part for r in found.lengths] == list(columns)
    for row in found.lengths:
        values = columns[row.part]
        assert row.mean == pytest.approx(sum(values) / 150)
        expected = [percentile(values, share) for share in (0.5, 0.9, 0.95, 0.99, 1.0)]
        assert [row.p50, row.p90, row.p95, row.p99, row.longest] == expected


@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_each_source_has_its_own_row(repetitive: tuple[Path, Rows], tiny_model: Path, unit: str) -> None:
    path, rows = repetitive
    found = check(path, **({"model": str(tiny_model)} if unit == "tokens" else {}))
    of = tokens(tiny_model) if unit == "tokens" else characters
    again, against = duplicates(rows), contradictory(rows)
    assert [s.pairs for s in found.sources] == sorted((s.pairs for s in found.sources), reverse=True)
    assert {s.source for s in found.sources} == {"web", "books", None}
    for s in found.sources:
        members = [i for i, row in enumerate(rows) if row["source"] == s.source]
        lengths = [of(rows[i]) for i in members]
        assert s.pairs == len(members)
        assert s.prompts == len({rows[i]["prompt"] for i in members})
        assert s.duplicates == sum(i in again for i in members)
        assert s.contradictory == sum(i in against for i in members)
        assert s.length_bias == bias_of(lengths)
        medians = [percentile(list(column), 0.5) for column in zip(*lengths, strict=True)]
        assert [s.median_prompt, s.median_chosen, s.median_rejected] == medians


def test_prompts_of_the_evaluation_data_are_found_in_the_training_data(tmp_path: Path) -> None:
    train = repetitive_rows(80)
    held_out = [{**train[7], "chosen": " other"}, {**train[0], "prompt": "Nobody asked this"}, train[7]]
    path, other = write_jsonl(tmp_path / "t.jsonl", train), write_jsonl(tmp_path / "e.jsonl", held_out)
    problem = by_kind(check(path, eval_data=[str(other)]))["shared_with_eval"]
    shared = [i for i, row in enumerate(train) if row["prompt"] == train[7]["prompt"]]
    assert problem.count == len(shared)
    assert [e.where for e in problem.examples] == [f"{path}:{i + 1}" for i in shared[:5]]
    assert {e.detail for e in problem.examples} == {f"the prompt of {other}:1"}
    assert "shared_with_eval" not in by_kind(check(path))
    (tmp_path / "e.jsonl").write_text(json.dumps(held_out[1]) + "\n")
    assert "shared_with_eval" not in by_kind(check(path, eval_data=[str(other)]))


def test_bad_rows_of_the_evaluation_data_are_reported_too(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", repetitive_rows(3))
    other = write_jsonl(tmp_path / "e.jsonl", [{"prompt": "a", "chosen": "b"}])
    found = by_kind(check(path, eval_data=[str(other)]))
    assert [e.where for e in found["missing_key"].examples] == [f"{other}:1"]


def biased_rows(unequal: int, longer: int, source: str) -> Rows:
    return [
        {
            "prompt": f"{source} {i}?",
            "chosen": " long answer" if i < longer else " no",
            "rejected": " no" if i < longer else " long answer",
            "source": source,
        }
        for i in range(unequal)
    ]


@pytest.mark.parametrize(
    ("unequal", "longer", "said"),
    [
        (50, 30, "the longer completion wins 60.0% of 50 pairs of unequal length"),
        (50, 20, "the shorter completion wins 60.0% of 50 pairs of unequal length"),
        (50, 29, None),
        (50, 21, None),
        (49, 49, None),
    ],
)
def test_a_length_bias_is_a_problem_where_there_is_enough_of_it(
    tmp_path: Path, unequal: int, longer: int, said: str | None
) -> None:
    found = by_kind(check(write_jsonl(tmp_path / "d.jsonl", biased_rows(unequal, longer, "a"))))
    if said is None:
        assert "length_bias" not in found
    else:
        assert [(e.where, e.detail) for e in found["length_bias"].examples] == [
            ("all data", said),
            ("source a", said),
        ]
        assert found["length_bias"].count == unequal


def test_opposite_biases_of_two_sources_do_not_cancel_out(tmp_path: Path) -> None:
    rows = biased_rows(60, 60, "a") + biased_rows(70, 0, "b") + biased_rows(60, 30, "c")
    found = check(write_jsonl(tmp_path / "d.jsonl", rows))
    assert 0.45 < float(found.length_bias.longer_chosen or 0) < 0.55
    problem = by_kind(found)["length_bias"]
    assert problem.count == 130
    assert {e.where for e in problem.examples} == {"source a", "source b"}


def test_examples_stand_at_the_right_line_of_the_right_file(tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"{i}?"} for i, row in enumerate(repetitive_rows(9))]
    for i, row in enumerate(rows):
        row["rejected"] = row["chosen"] + "!"
        if i in (2, 5, 8):
            row["chosen"] = row["chosen"] + "\x1b[31m"
    first = tmp_path / "a" / "1.jsonl"
    first.parent.mkdir()
    # Blank lines and a bad row are lines all the same.
    texts = [json.dumps(row) for row in rows]
    first.write_text("\n".join(["", *texts[:3], "{", "", *texts[3:6]]) + "\n")
    second = write_jsonl(tmp_path / "a" / "2.jsonl", rows[6:])
    found = by_kind(check(first.parent))
    assert [e.where for e in found["control_character"].examples] == [
        f"{first}:4",
        f"{first}:9",
        f"{second}:3",
    ]
    assert [e.where for e in found["json"].examples] == [f"{first}:5"]


# Flags -----------------------------------------------------------------------------------------------------

PLAIN = {"prompt": "How are you today?", "chosen": " Fine.", "rejected": " Bad."}
FLAGS: dict[str, dict[str, Any]] = {
    "control_character": {**PLAIN, "rejected": " Bad\x07."},
    "blank_completion": {**PLAIN, "chosen": " \n\t"},
    "repeated_prompt": {**PLAIN, "chosen": "How are you today? Fine."},
    "special_token": {**PLAIN, "chosen": " Fine.</s> user: more"},
    # "h" and "e" are one token.
    "merged": {**PLAIN, "prompt": "The answer is h", "chosen": "e"},
}


@pytest.mark.parametrize("kind", FLAGS)
def test_what_is_suspicious_about_one_pair_is_found_in_it_alone(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [PLAIN, {**FLAGS[kind], "source": "odd"}, {**PLAIN, "prompt": "And tomorrow?"}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    found = by_kind(check(path, model=str(tiny_model)))
    assert set(found) == {kind}
    assert found[kind].count == 1
    assert [e.where for e in found[kind].examples] == [f"{path}:2"]


def test_nothing_is_suspicious_about_ordinary_pairs(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        PLAIN,
        {**PLAIN, "prompt": "Why?\r\n\tBecause", "chosen": " Fine.</s>", "rejected": " é ❄ \u200b"},
    ]
    found = check(write_jsonl(tmp_path / "data.jsonl", rows), model=str(tiny_model))
    assert found.problems == []
    assert not found.refused


def test_an_empty_turn_is_found_but_not_one_that_calls_a_tool(tmp_path: Path) -> None:
    def talk(*texts: str) -> list[dict[str, Any]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    reply = [{"role": "assistant", "content": "Yes"}]
    call = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]
    rows = [
        {"prompt": talk("Hi"), "chosen": reply, "rejected": call},
        {"prompt": talk("Hi", " ", "So?"), "chosen": reply, "rejected": call},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    found = by_kind(check(path))
    assert [e.where for e in found["empty_turn"].examples] == [f"{path}:2"]


@pytest.mark.parametrize("drops", [True, False])
def test_a_thought_that_the_template_leaves_out_of_the_prompt_is_a_note(
    drops: bool, model: Path, tmp_path: Path
) -> None:
    content = "m.content.split('</think>')[-1] if not loop.last else m.content" if drops else "m.content"
    template = f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ {content} }}}}</s> {{% endfor %}}"
    (model / "chat_template.jinja").write_text(template)
    user, thought = {"role": "user", "content": "So?"}, "<think>\nHm.\n</think>\n\n"
    side = {"role": "assistant", "content": thought + "Yes."}
    row = {"prompt": [user], "chosen": [side], "rejected": [{**side, "content": "No."}]}
    path = write_jsonl(tmp_path / "data.jsonl", [row, {**row, "prompt": [user, side, user]}])
    found = [p for p in check(path, model=str(model)).problems if p.kind == "earlier_thought"]
    assert [(p.severity, p.count, p.examples[0].where) for p in found] == [("note", 1, f"{path}:2")] * drops


def test_a_short_shared_beginning_is_no_prompt(tmp_path: Path) -> None:
    rows = [
        {"chosen": "The sky is blue.", "rejected": "The sky is grey."},
        {"chosen": "I am glad.", "rejected": "I do not."},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    problem = by_kind(check(path))["short_prompt"]
    assert (problem.count, [e.where for e in problem.examples]) == (1, [f"{path}:2"])


def test_a_prompt_that_ends_with_an_answer_is_said_where_answers_follow(tmp_path: Path) -> None:
    user, so, no = (
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "So."), ("assistant", "No."))
    )
    rows = [
        {"prompt": [user, so], "chosen": [so], "rejected": [no]},
        {"prompt": [user, so, user], "chosen": [so], "rejected": [no]},
        {"prompt": [user, so], "chosen": [{**user, "role": "tool"}, so], "rejected": [no]},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    problem = by_kind(check(path))["answered_prompt"]
    assert (problem.severity, [e.where for e in problem.examples]) == ("warning", [f"{path}:1"])


def test_the_same_texts_with_other_tools_are_another_pair(tmp_path: Path) -> None:
    def row(name: str | None, good: str, bad: str) -> dict[str, Any]:
        tools = {} if name is None else {"tools": [{"type": "function", "function": {"name": name}}]}
        prompt = [{"role": "user", "content": "Hi"}]
        return {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
            **tools,
        }

    rows = [row("f", "a", "b"), row("g", "a", "b"), row(None, "a", "b"), row("h", "b", "a")]
    assert by_kind(check(write_jsonl(tmp_path / "a.jsonl", rows))).keys() == {"shared_prompt"}
    found = by_kind(check(write_jsonl(tmp_path / "b.jsonl", [*rows, row("g", "a", "b"), row("f", "b", "a")])))
    counts = {kind: problem.count for kind, problem in found.items()}
    assert counts == {"duplicate": 1, "contradictory": 2, "shared_prompt": 6}
    (source,) = check(tmp_path / "b.jsonl").sources
    assert source.prompts == 1


# Bad rows --------------------------------------------------------------------------------------------------


def test_every_kind_of_bad_row_is_counted_apart_and_stops_a_later_command(tmp_path: Path) -> None:
    lines = [b"{", b"[]", b'{"prompt": "a"}', b"\xff", b"{", json.dumps(PLAIN).encode()]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = check(path)
    counts = {kind: problem.count for kind, problem in by_kind(found).items()}
    assert counts == {"json": 2, "not_an_object": 1, "missing_key": 1, "encoding": 1}
    assert found.refused
    assert (found.pairs, found.data[0].bad_rows) == (1, 5)
    skipped = check(path, on_bad_row="skip")
    assert not skipped.refused
    assert {p.severity for p in skipped.problems} == {"warning"}


def test_a_file_that_is_cut_off_is_an_error_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [PLAIN])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(PLAIN).encode() * 50)[:-9])
    found = check(cut, good, on_bad_row="skip")
    assert by_kind(found)["unreadable_file"].severity == "error"
    assert found.refused
    assert found.data[1].pairs == 1


def test_data_without_a_usable_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{\n{\n")
    found = check(path, on_bad_row="skip")
    assert by_kind(found)["no_pairs"].severity == "error"
    assert (found.pairs, found.lengths, found.sources) == (0, [], [])


def test_messages_need_a_chat_template_only_where_a_model_is_given(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    turn = [{"role": "assistant", "content": "Yes"}]
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": turn,
        "rejected": [{**turn[0], "content": "No"}],
    }
    path = write_jsonl(tmp_path / "data.jsonl", [row, row])
    assert by_kind(check(path, model=str(model)))["no_chat_template"].count == 2
    assert not check(path).refused
    assert not check(path, model=str(tiny_model)).refused


def test_a_template_that_is_none_is_said_once_and_not_of_the_rows(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ messages }}\n{% for %}")
    row = {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    row["rejected"] = [row["chosen"][0], {"role": "assistant", "content": "No"}]
    path = write_jsonl(tmp_path / "data.jsonl", [row, row])
    with pytest.raises(ConfigError, match="chat template has an error in line 2") as refused:
        check(path, model=str(model))
    assert refused.value.where == str(model / "chat_template.jinja")


def test_every_problem_has_words_and_the_worst_come_first(tmp_path: Path) -> None:
    assert not BAD_ROWS.keys() & FOUND.keys()
    lines = [b"{", *(json.dumps(row).encode() for row in repetitive_rows(100))]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    found = check(tmp_path / "data.jsonl").problems
    ranks = [("error", "warning", "note").index(p.severity) for p in found]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0
    for problem in found:
        assert problem.title
        assert problem.why
        assert problem.fix


# Near duplicates -------------------------------------------------------------------------------------------


def prose(chance: random.Random, words: int) -> str:
    return " ".join("".join(chance.choices("abcdefghij", k=6)) for _ in range(words))


def test_pairs_that_nearly_repeat_another_are_found_and_no_others(tmp_path: Path) -> None:
    chance = random.Random(3)
    rows: Rows = [
        {"prompt": prose(chance, 20), "chosen": prose(chance, 60), "rejected": prose(chance, 60)}
        for _ in range(40)
    ]
    # One word less, other capitals, other spaces: nearly the same. The half of it: not.
    close = [
        (4, {"chosen": rows[4]["chosen"].rpartition(" ")[0]}),
        (9, {"prompt": rows[9]["prompt"].upper()}),
    ]
    close += [(30, {"rejected": rows[30]["rejected"].replace(" ", "  ")})]
    far = [
        (5, {"chosen": prose(chance, 60)}),
        (6, {"chosen": rows[6]["rejected"], "rejected": rows[6]["chosen"]}),
    ]
    more = [{**rows[i], **changes} for i, changes in close + far]
    path = write_jsonl(tmp_path / "data.jsonl", [*rows, *more, rows[0]])
    problem = by_kind(check(path, near_duplicates=True))["near_duplicate"]
    assert [(e.where, e.detail) for e in problem.examples] == [
        (f"{path}:{41 + n}", f"nearly the same as {path}:{i + 1}") for n, (i, _) in enumerate(close)
    ]
    assert problem.count == 3
    # An exact repetition is a duplicate, not a near one.
    assert by_kind(check(path, near_duplicates=True))["duplicate"].count == 1
    assert "near_duplicate" not in by_kind(check(path))


def test_signatures_are_compared_by_the_share_of_equal_values() -> None:
    chance = np.random.default_rng(0)
    base = chance.integers(0, 2**32, 128, dtype=np.uint32)

    def changed(values: int) -> np.ndarray:
        other = base.copy()
        other[:values] += np.uint32(values)
        return other

    signed = np.stack([base, changed(19), changed(20), chance.integers(0, 2**32, 128, dtype=np.uint32), base])
    # 109 of 128 are 0.8516, 108 are 0.84375.
    assert nearest_earlier(signed, similarity=0.85) == {1: 0, 4: 0}
    assert nearest_earlier(signed[:0], similarity=0.85) == {}


# Truncation and estimates ----------------------------------------------------------------------------------

# Few different ids, so that completions begin alike and are often the same.
IDS = st.lists(st.integers(2, 3), max_size=7).map(lambda ids: np.array(ids, dtype=np.int32))


def masked(prompt: IdArray, chosen: IdArray, rejected: IdArray, counts: list[bool] | None) -> PairIds:
    """A pair whose completions hold context, up to the last token that counts."""
    if counts is None:
        return PairIds(prompt, chosen, rejected)
    mask = np.array(counts)
    stops = [max(np.flatnonzero(mask[: len(ids)]), default=-1) + 1 for ids in (chosen, rejected)]
    sides = [ids[:stop] for ids, stop in zip((chosen, rejected), stops, strict=True)]
    masks = [None if mask[:stop].all() else mask[:stop] for stop in stops]
    return PairIds(prompt, *sides, False, *masks)


COUNTS = st.none() | st.lists(st.booleans(), min_size=7, max_size=7)
WHOLE = st.builds(masked, IDS, IDS, IDS, COUNTS)
SOME_PAIR = PreferencePair(0, "", "", "", None, "here")


def lengths_of(pairs: list[PairIds]) -> np.ndarray:
    def shared(ids: PairIds) -> int:
        return next((i for i, (a, b) in enumerate(zip(ids.chosen, ids.rejected, strict=False)) if a != b), -1)

    rows = []
    for ids in pairs:
        same = shared(ids)
        same = min(len(ids.chosen), len(ids.rejected)) if same < 0 else same
        masks = [
            [True] * len(side) if mask is None else mask.tolist()
            for side, mask in ((ids.chosen, ids.chosen_mask), (ids.rejected, ids.rejected_mask))
        ]
        firsts = [mask.index(True, same) for mask in masks if len(mask) > same]
        uncounted = max((mask.index(True) for mask in masks if mask), default=0)
        rows.append([*map(len, ids[:3]), min(firsts, default=same), uncounted])
    return np.array(rows, dtype=np.int32).reshape(len(pairs), 5)


def really_happens(
    pairs: list[PairIds], tokenizer: PairTokenizer
) -> tuple[list[TokenizedPair | None], dict[str, int]]:
    fitted = [tokenizer.fit(SOME_PAIR, ids) for ids in pairs]
    reasons = Counter(found.reason for found in fitted if not isinstance(found, TokenizedPair))
    return [found if isinstance(found, TokenizedPair) else None for found in fitted], dict(reasons)


def total(ids: Any) -> int:
    return len(ids.prompt_ids) + len(ids.chosen_ids) + len(ids.rejected_ids)


def assert_forecast_is_true(
    pairs: list[PairIds], lengths: np.ndarray, tokenizer: PairTokenizer, **mode: Any
) -> None:
    kept, reasons = really_happens(pairs, tokenizer)
    cut = sum(
        found is not None and total(found) < sum(map(len, ids[:3]))
        for found, ids in zip(kept, pairs, strict=True)
    )
    said = forecast(lengths, **mode)
    assert said.dropped == reasons
    assert said.cut == cut
    assert said.whole == sum(found is not None for found in kept) - cut
    mask, _ = kept_pairs(lengths, **mode)
    assert mask.tolist() == [found is not None for found in kept]


@settings(deadline=None, max_examples=300)
@given(pairs=st.lists(WHOLE, max_size=12), max_length=st.integers(1, 16), mode=st.sampled_from(TRUNCATIONS))
def test_the_forecast_is_what_tokenizing_does_to_any_pairs(
    fitting: Callable[[int, Truncation], PairTokenizer],
    pairs: list[PairIds],
    max_length: int,
    mode: Truncation,
) -> None:
    tokenizer = fitting(max_length, mode)
    assert_forecast_is_true(pairs, lengths_of(pairs), tokenizer, max_length=max_length, truncation=mode)


@pytest.fixture(scope="session")
def fitting(tiny_model: Path) -> Callable[[int, Truncation], PairTokenizer]:
    tokenizer = load_tokenizer(tiny_model)

    def make(max_length: int, truncation: Truncation) -> PairTokenizer:
        return PairTokenizer(tokenizer, max_length=max_length, truncation=truncation, vocab_size=1000)

    return make


@pytest.mark.parametrize("mode", TRUNCATIONS)
def test_the_report_says_what_each_length_would_do(
    repetitive: tuple[Path, Rows], tiny_model: Path, mode: Truncation
) -> None:
    path, rows = repetitive
    found = check(path, model=str(tiny_model), truncation=mode, max_length=25)
    lengths = [tokens(tiny_model)(row) for row in rows]
    longest = max(p + max(c, r) for p, c, r in lengths)
    assert (found.truncation_mode, [t.max_length for t in found.truncation]) == (mode, [25, 256])
    assert longest <= 256
    for fit in found.truncation:
        assert fit.whole + fit.cut + sum(fit.dropped.values()) == 150
    tokenizer = tokenizer_of(tiny_model, max_length=25, truncation=mode)
    fitted = [tokenizer(pair) for pair in read_pairs(DataConfig(data=[str(path)]))]
    kept = [pair for pair in fitted if isinstance(pair, TokenizedPair)]
    whole = [p + c + r for p, c, r in lengths]
    cut = [i for i, pair in enumerate(fitted) if isinstance(pair, TokenizedPair) and total(pair) < whole[i]]
    problems = by_kind(found)
    fit = found.truncation[0]
    assert (fit.whole, fit.cut) == (len(kept) - len(cut), len(cut))
    if cut:
        assert problems["cut"].count == len(cut)
        assert [e.where for e in problems["cut"].examples] == [f"{path}:{i + 1}" for i in cut[:5]]
    left_out = [
        i
        for i, pair in enumerate(fitted)
        if not isinstance(pair, TokenizedPair) and pair.reason != "identical_completions"
    ]
    assert ("left_out" in problems) == bool(left_out)
    if left_out:
        assert problems["left_out"].count == len(left_out)
        summary, *examples = problems["left_out"].examples
        assert summary.where == "--max-length 25"
        assert [e.where for e in examples] == [f"{path}:{i + 1}" for i in left_out[:4]]


@pytest.mark.parametrize("mode", TRUNCATIONS)
def test_pairs_that_are_cut_or_left_out_are_shown_where_they_stand(
    tiny_model: Path, tmp_path: Path, mode: Truncation
) -> None:
    sizes = [(3, 2, 4), (40, 2, 3), (3, 50, 2), (60, 50, 50), (3, 2, 4), (20, 12, 3)]
    rows = [{"prompt": "p" * p, "chosen": "c" * c, "rejected": "r" * r} for p, c, r in sizes]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    problems = by_kind(check(path, model=str(tiny_model), truncation=mode, max_length=30))
    # With BOS and EOS: 8, 44, 54, 111, 8, 33 tokens, of which prompts are 4, 41, 4, 61, 4, 21.
    cut = {"keep_start": [3, 6], "keep_end": [2, 6], "drop": []}[mode]
    left_out = {"keep_start": [2, 4], "keep_end": [3, 4], "drop": [2, 3, 4, 6]}[mode]
    assert [e.where for e in problems["left_out"].examples[1:]] == [f"{path}:{n}" for n in left_out]
    assert problems["left_out"].count == len(left_out)
    assert ("cut" in problems) == bool(cut)
    if cut:
        assert [e.where for e in problems["cut"].examples] == [f"{path}:{n}" for n in cut]


def test_a_pair_without_a_token_is_not_blamed_on_the_length(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    backend = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**backend, "post_processor": None}))  # writes no BOS
    path = write_jsonl(tmp_path / "data.jsonl", [PLAIN, {**PLAIN, "prompt": ""}])
    found = check(path, model=str(model))
    assert {p.kind: [e.where for e in p.examples] for p in found.problems} == {"no_token": [f"{path}:2"]}
    assert [fit.dropped for fit in found.truncation] == [{"empty_prompt": 1}]


def test_data_of_which_nothing_fits_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [PLAIN])
    found = check(path, model=str(tiny_model), max_length=3)
    assert by_kind(found)["nothing_fits"].severity == "error"
    assert found.refused


def test_lengths_to_forecast_reach_from_short_to_everything() -> None:
    def lengths(longest: int) -> np.ndarray:
        return np.array([[longest - 9, 9, 4, 0, 0], [1, 1, 1, 0, 0]], dtype=np.int32)

    assert forecast_lengths(lengths(100), 256) == [256]
    assert forecast_lengths(lengths(256), 1024) == [256, 1024]
    assert forecast_lengths(lengths(257), 100) == [100, 256, 512]
    assert forecast_lengths(lengths(40_000), 512)[-1] == 32768
    # None that the model does not take: its context stands for all that are longer.
    assert forecast_lengths(lengths(40_000), 512, context=1000) == [256, 512, 1000]
    assert forecast_lengths(lengths(300), 256, context=512) == [256, 512]


@pytest.mark.parametrize("mode", TRUNCATIONS)
@pytest.mark.parametrize("max_length", [30, 64, 256])
def test_the_estimate_is_the_sum_over_distinct_sequences(
    tiny_model: Path, tmp_path: Path, mode: Truncation, max_length: int
) -> None:
    chance = random.Random(1)
    # All texts differ in their first characters, so that nothing cut becomes equal.
    answers = [f" {i} " + "x" * chance.randrange(60) for i in range(12)]
    rows = []
    for k in range(40):
        good, bad = chance.sample(answers, 2)
        rows.append({"prompt": f"Q{k % 4}" + "y" * (9 * (k % 4)), "chosen": good, "rejected": bad})
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    found = check(path, model=str(tiny_model), truncation=mode, max_length=max_length, pairs_per_shard=16)
    tokenizer = tokenizer_of(tiny_model, max_length=max_length, truncation=mode)
    kept = [
        pair
        for pair in map(tokenizer, read_pairs(DataConfig(data=[str(path)])))
        if isinstance(pair, TokenizedPair)
    ]
    said = found.estimate
    assert said is not None
    assert kept
    # One text is one sequence, the first time; keep_end may cut its prompt differently the next time.
    texts: dict[tuple[str, str], int] = {}
    for pair in kept:
        row = rows[pair.row]
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            texts.setdefault((row["prompt"], row[side]), len(pair.prompt_ids) + len(ids))
    assert said.sequences == len(texts)
    if mode != "keep_end" or max_length == 256:
        distinct = {
            (*pair.prompt_ids.tolist(), -1, *ids.tolist())
            for pair in kept
            for ids in (pair.chosen_ids, pair.rejected_ids)
        }
        assert len(texts) == len(distinct)
        assert said.tokens == sum(len(ids) - 1 for ids in distinct)
    stored = sum(4 * len(p.prompt_ids) + 8 * (len(p.chosen_ids) + len(p.rejected_ids)) for p in kept)
    assert said.disk_gb == round(stored / 1e9, 4)
    assert (said.shards, said.max_length) == (math.ceil(40 / 16), max_length)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert said.parameters == parameters
    assert said.gpu_hours == pytest.approx(2 * parameters * said.tokens / (0.4 * 989e12) / 3600)


# On several processes --------------------------------------------------------------------------------------


def test_several_processes_find_what_one_does(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 2500)
    rows = [*repetitive_rows(300, seed=5), *biased_rows(60, 55, "late")]
    first = write_jsonl(tmp_path / "a.jsonl", rows[:200])
    with first.open("ab") as file:
        file.write(b"{\n" * 7)
    second = write_jsonl(tmp_path / "b.jsonl", rows[200:])
    options = {"model": str(tiny_model), "near_duplicates": True, "max_length": 20, "truncation": "drop"}
    one, two = (check(first, second, processes=processes, **options) for processes in (1, 2))
    assert one == two
    assert one.pairs == 360
    assert {"duplicate", "contradictory", "json", "left_out"} <= by_kind(one).keys()
    assert by_kind(one)["duplicate"].count == len(duplicates(rows))


def test_a_model_that_cannot_be_used_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [PLAIN])
    with pytest.raises(ConfigError):
        check(path, model=str(tmp_path))


# Real pairs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def human_pairs(shared_data: Path) -> tuple[Path, Rows]:
    path = shared_data / "pairs" / "human_pairs.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return path, [json.loads(line) for line in file]


def test_real_pairs_repeat_and_contradict_each_other(human_pairs: tuple[Path, Rows]) -> None:
    path, rows = human_pairs
    found = check(path)
    problems = by_kind(found)
    first: dict[tuple[str, str, str], int] = {}
    again = [i for i, row in enumerate(rows) if first.setdefault(triple(row), i) != i]
    against = [i for i, row in enumerate(rows) if (row["prompt"], row["rejected"], row["chosen"]) in first]
    against = [i for i in against if rows[i]["chosen"] != rows[i]["rejected"]]
    assert (found.pairs, problems["duplicate"].count, problems["contradictory"].count) == (3302, 63, 52)
    assert (len(rows), len(again), len(against)) == (3302, 63, 52)
    assert [e.where for e in problems["duplicate"].examples] == [f"{path}:{i + 1}" for i in again[:5]]
    assert [e.where for e in problems["contradictory"].examples] == [f"{path}:{i + 1}" for i in against[:5]]
    by_source = Counter(row["source"] for row in rows)
    assert {s.source: s.pairs for s in found.sources} == dict(by_source)
    assert {s.source: s.duplicates for s in found.sources} == {
        source: sum(rows[i]["source"] == source for i in again) for source in by_source
    }
    assert found.length_bias == bias_of([characters(row) for row in rows])


def test_published_transcripts_are_2312_pairs(shared_data: Path) -> None:
    found = check(shared_data / "pairs" / "hh_harmless_base_test.jsonl.gz")
    assert (found.pairs, found.data[0].form) == (2312, 'HH-RLHF transcripts (text without "prompt")')
    assert not found.refused


def test_transcripts_and_explicit_prompts_give_the_same_token_ids(
    shared_data: Path, human_pairs: tuple[Path, Rows]
) -> None:
    tokenizer = tokenizer_of(shared_data / "models" / "stories260K")
    transcripts = list(
        read_pairs(DataConfig(data=[str(shared_data / "pairs" / "hh_harmless_base_test.jsonl.gz")]))
    )
    explicit = list(read_pairs(DataConfig(data=[str(human_pairs[0])])))
    by_text = {(f"{p.prompt}{p.chosen}", f"{p.prompt}{p.rejected}"): p for p in transcripts}
    shared = [
        (by_text[key], p)
        for p in explicit
        if (key := (f"{p.prompt}{p.chosen}", f"{p.prompt}{p.rejected}")) in by_text
    ]
    assert len(shared) > 2000
    implicit_ids, explicit_ids = (tokenizer.encode(list(side)) for side in zip(*shared, strict=True))
    for (ours, theirs), a, b in zip(shared, implicit_ids, explicit_ids, strict=True):
        assert (ours.prompt, ours.chosen, ours.rejected) == (theirs.prompt, theirs.chosen, theirs.rejected)
        assert isinstance(a, PairIds)
        assert isinstance(b, PairIds)
        assert all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_forecasts_and_estimates_of_real_pairs_come_true(
    shared_data: Path, human_pairs: tuple[Path, Rows]
) -> None:
    model = shared_data / "models" / "stories260K"
    encoded = tokenizer_of(model).encode(list(read_pairs(DataConfig(data=[str(human_pairs[0])]))))
    whole = [ids for ids in encoded if isinstance(ids, PairIds)]
    assert len(whole) == 3302
    facts = facts_of(human_pairs[0], model=model)
    for mode in TRUNCATIONS:
        for max_length in (16, 100, 512, 4096):
            tokenizer = tokenizer_of(model, max_length=max_length, truncation=mode)
            assert_forecast_is_true(whole, facts.tokens, tokenizer, max_length=max_length, truncation=mode)
    longest = max(len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)) for ids in whole)
    said = estimate(
        facts,
        max_length=longest,
        truncation="keep_start",
        parameters=parameter_count(model),
        pairs_per_shard=1024,
    )
    kept, _ = really_happens(whole, tokenizer_of(model, max_length=longest, truncation="keep_start"))
    distinct = {
        (*pair.prompt_ids.tolist(), *ids.tolist())
        for pair in kept
        if pair is not None
        for ids in (pair.chosen_ids, pair.rejected_ids)
    }
    assert (said.sequences, said.shards) == (len(distinct), 4)
    assert said.tokens == sum(map(len, distinct))


def test_a_prompt_that_most_pairs_have_is_said(tmp_path: Path) -> None:
    def found(prompts: list[str]) -> dict[str, Problem]:
        rows = [{"prompt": p, "chosen": f" a{i}", "rejected": f" b{i}"} for i, p in enumerate(prompts)]
        return by_kind(check(write_jsonl(tmp_path / "a.jsonl", rows)))

    problem = found(["q", "p", "p", "p"])["shared_prompt"]
    assert (problem.severity, problem.count) == ("warning", 3)
    assert problem.examples[0].where == f"{tmp_path}/a.jsonl:2"
    assert "shared_prompt" not in found(["p", "p", "q", "r"])  # half of them
    assert "shared_prompt" not in found(["p", "p", "p"])


def test_margins_that_prefer_the_other_side_or_neither_are_said(tmp_path: Path) -> None:
    margins = [1.0, -0.5, 0, None, -0.0, -3, 0.1]
    rows = [{"prompt": f"p{i}", "chosen": " a", "rejected": " b", "margin": m} for i, m in enumerate(margins)]
    rows.append({"prompt": "q", "chosen": " a", "rejected": " b", "score_chosen": 2, "score_rejected": 5})
    found = by_kind(check(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert {kind: (p.severity, p.count) for kind, p in found.items()} == {
        "negative_margin": ("warning", 3),
        "zero_margin": ("warning", 2),
    }


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_rating", "rejected_rating"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_ratings_that_prefer_the_other_side_or_neither_are_said(
    chosen: str, rejected: str, kind: str, tmp_path: Path
) -> None:
    ratings = [(5, 1), (1, 5), (3, 3), (None, 3), (4.5, 4.75), (2, 1)]
    rows = [
        {"prompt": f"p{i}", "chosen": f" a{i}", "rejected": f" b{i}", chosen: a, rejected: b}
        for i, (a, b) in enumerate(ratings)
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [
            ",".join(rows[0]),
            *(",".join("" if v is None else str(v) for v in r.values()) for r in rows),
        ]
        path.write_text("\n".join(lines) + "\n")
    found = by_kind(check(path))
    assert {key: p.count for key, p in found.items()} == {"negative_margin": 2, "zero_margin": 1}
    # A text that calls itself a rating is compared by nobody, and a margin of the row's own hides nothing.
    words = [{**row, chosen: "good", rejected: "bad"} for row in rows]
    if not chosen.startswith("score"):
        assert not check(write_jsonl(tmp_path / "b.jsonl", words)).problems
    beside = [{**row, "margin": 1.0} for row in rows]
    assert by_kind(check(write_jsonl(tmp_path / "c.jsonl", beside))).keys() == found.keys()


SKIPPED = "`--on-bad-row skip`"


def test_rows_that_are_all_bad_are_not_said_to_be_left_out(tmp_path: Path) -> None:
    ties = [{"prompt": f"p{i}", "response_a": "a", "response_b": "b", "preference": "tie"} for i in range(3)]
    found = by_kind(check(write_jsonl(tmp_path / "a.jsonl", ties)))
    assert found["tie"].fix == "correct or remove the rows"
    good = {**ties[0], "preference": "a"}
    assert SKIPPED in by_kind(check(write_jsonl(tmp_path / "b.jsonl", [*ties, good])))["tie"].fix
    for kind, texts in BAD_ROWS.items():
        alone = without_skipping(kind)
        assert "skip" not in alone
        assert len(alone) > 9
        assert texts.fix.startswith(alone), kind


def test_what_convert_would_leave_nothing_of_is_not_said_to_be_removed_by_it(tmp_path: Path) -> None:
    def fixes(rows: Rows) -> set[str]:
        return {p.fix for p in check(write_jsonl(tmp_path / "a.jsonl", rows)).problems}

    same = [{"prompt": f"p{i}", "chosen": " a", "rejected": " a"} for i in range(3)]
    both = [
        {"prompt": "p", "chosen": " a", "rejected": " b"},
        {"prompt": "p", "chosen": " b", "rejected": " a"},
    ]
    for rows in (same, both, [*same, *both]):
        assert fixes(rows) == {LEAVES_NOTHING}
        good = {"prompt": "q", "chosen": " a", "rejected": " c"}
        assert LEAVES_NOTHING not in fixes([*rows, good])


def test_prompts_that_merge_are_no_fault_of_conversations(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    rows: Rows = [
        {
            "prompt": [{"role": "user", "content": "The answer is h"}],
            "chosen": [{"role": "assistant", "content": "e"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
    ]
    found = by_kind(check(write_jsonl(tmp_path / "a.jsonl", rows), model=str(model)))
    assert found["merged"].fix == MERGED_TURNS
    plain = [{"prompt": "The answer is h", "chosen": "e", "rejected": "no"}]
    found = by_kind(check(write_jsonl(tmp_path / "b.jsonl", plain), model=str(model)))
    assert found["merged"].fix == FOUND["merged"].fix


def test_a_completion_that_nearly_all_pairs_have_is_said(tmp_path: Path) -> None:
    def found(same: str, pairs: int, others: int) -> dict[str, Problem]:
        rows = [{"prompt": f"p{i}", "chosen": f" a{i}", "rejected": f" b{i}"} for i in range(pairs + others)]
        for row in rows[:pairs]:
            row[same] = " The same."
        return by_kind(check(write_jsonl(tmp_path / "a.jsonl", rows)))

    for side in ("chosen", "rejected"):
        problem = found(side, 19, 1)[f"shared_{side}"]
        assert (problem.severity, problem.count) == ("warning", 19)
        assert not found(side, 18, 2)
        assert not found(side, 9, 0)


def test_weights_that_are_all_0_are_an_error_and_some_are_not(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": f" a{i}", "rejected": f" b{i}", "weight": 0} for i in range(4)]
    found = by_kind(check(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert {kind: (p.severity, p.count) for kind, p in found.items()} == {"no_weight": ("error", 4)}
    assert not check(write_jsonl(tmp_path / "b.jsonl", [*rows[1:], {**rows[0], "weight": 0.1}])).problems


def test_conversations_that_begin_like_another_prompt_are_counted(tmp_path: Path) -> None:
    """Not pairs of one prompt, and not conversations that begin by themselves."""

    def row(number: int, *turns: str) -> dict[str, Any]:
        roles = ("user", "assistant")
        prompt = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        sides = {
            side: [{"role": "assistant", "content": f"{side} {number}"}] for side in ("chosen", "rejected")
        }
        return {"prompt": prompt, **sides}

    rows = [
        row(0, "hi"),
        row(1, "hi"),
        row(2, "who?", "I", "and?"),
        row(3, "why?", "so", "ok?"),
        row(4, "why?"),
    ]
    found = check(write_jsonl(tmp_path / "data.jsonl", rows)).problems
    (shared,) = [problem for problem in found if problem.kind == "shared_opening"]
    assert (shared.count, shared.severity) == (2, "note")
    assert [example.where.rpartition(":")[2] for example in shared.examples] == ["4", "5"]
    assert shared.examples[0].detail == "2 prompts begin with its first message"
    alone = check(write_jsonl(tmp_path / "alone.jsonl", rows[:4])).problems
    assert not [problem for problem in alone if problem.kind == "shared_opening"]
