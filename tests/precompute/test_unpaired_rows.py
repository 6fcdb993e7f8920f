"""Rows of one completion and a label: read from every form, given a mismatched completion, and scored."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ScriptedScorer, preference_rows, scripted_logps, write_jsonl
from messages import said

from dpo_opt.integrity import integrity_problems
from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.check.convert import Converted, convert
from dpo_opt.precompute.check.problems import of_rows, problem
from dpo_opt.precompute.config import CheckConfig, ConvertConfig, DataConfig, PrecomputeConfig
from dpo_opt.precompute.read.datasets import read_pairs, row_content
from dpo_opt.precompute.read.shapes import SHAPES, find_shape
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.tokens.mismatched import NO_OTHER_PROMPT, with_mismatched
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, FingerprintError
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import load_manifest
from dpo_opt.schemas.pairs import IdArray, TokenizedPair
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import SHARD_SCHEMA, UNPAIRED, UNPAIRED_SCHEMA, UNPAIRED_VERSION

Row = dict[str, Any]


def refused(call: Callable[[], object]) -> DpoOptError:
    """The error that a call ends with."""
    with pytest.raises(DpoOptError) as caught:
        call()
    return caught.value


def problems_of(shards: AnyPath) -> list[str]:
    return integrity_problems(shards, load_manifest(shards))


USER, SO = [said("user", "How?")], [said("assistant", "So.")]
SHAREGPT = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]
FORMS: list[tuple[str, Row]] = [
    ("unpaired", {"prompt": USER, "completion": SO}),
    ("unpaired", {"prompt": USER, "completion": SO, "kto_tag": None}),
    ("unpaired", {"prompt": "How?", "completion": SO}),
    ("labelled conversations", {"messages": [*USER, *SO]}),
    ("labelled conversations", {"messages": [*USER, *SO], "images": [], "conversations": None}),
    ("labelled conversations", {"conversations": SHAREGPT, "tools": ""}),
    ("labelled conversations", {"conversations": SHAREGPT, "messages": [*USER, *SO]}),
    ("Alpaca feedback", {"instruction": "How?", "input": "", "output": "So."}),
    ("Alpaca feedback", {"instruction": "How?", "output": "So.", "system": "", "history": []}),
]
LABELS = [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("True", True), ("false", False)]


@pytest.mark.parametrize(("name", "row"), FORMS)
def test_every_form_is_read_as_the_completion_and_its_label(name: str, row: Row, tmp_path: Path) -> None:
    keys = ["label"] if name == "unpaired" else ["label", "kto_tag"]
    for number, ((label, meant), key) in enumerate((pair, key) for pair in LABELS for key in keys):
        given = {**row, key: label, "source": "s", "id": 7, "weight": 2}
        shape = find_shape(given)
        assert shape is not None
        assert (shape.name, shape.unpaired) == (name, True)
        table = tmp_path / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist([{**given, "embedding": [0.5]}]), table)
        for path in (write_jsonl(tmp_path / f"{number}.jsonl", [given]), table):
            (found,) = read_pairs(DataConfig(data=[str(path)]))
            assert (found.prompt, found.chosen, found.rejected) == (USER, SO, SO)
            assert (found.label, found.source, found.id, found.weight) == (meant, "s", "7", 2.0)


def test_every_form_of_unpaired_rows_is_tried() -> None:
    assert {name for name, _ in FORMS} == {shape.name for shape in SHAPES if shape.unpaired}


def test_a_csv_file_has_labels_too(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\np,a,True\nq,b,false\nr,c,1\n")
    assert [pair.label for pair in read_pairs(DataConfig(data=[str(path)]))] == [True, False, True]


@pytest.mark.parametrize("label", [None, 2, 0.5, -1, "good", "", [True], {"label": True}])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_a_label_that_is_neither_is_refused(key: str, label: object, tmp_path: Path) -> None:
    row = {"messages": [*USER, *SO], key: label}
    error = refused(
        lambda: list(read_pairs(DataConfig(data=[str(write_jsonl(tmp_path / "a.jsonl", [row]))])))
    )
    assert isinstance(error, DataError)
    assert error.kind == "label"


BROKEN: list[tuple[Row, str]] = [
    ({"messages": [*USER, *SO], "label": True, "kto_tag": False}, "two_sources"),
    ({"messages": USER, "label": True}, "shape"),
    ({"messages": [*USER, *SO, said("user", "Why?")], "label": True}, "shape"),
    ({"messages": "How? So.", "label": True}, "shape"),
    ({"messages": [*USER, *SO], "label": True, "images": ["a.png"]}, "prompt_column"),
    ({"prompt": "p", "completion": "", "label": True}, "empty"),
    ({"prompt": "p", "completion": None, "label": True}, "type"),
    ({"prompt": None, "completion": "a", "label": True}, "type"),
    ({"prompt": USER, "completion": [said("user", "So.")], "label": True}, "role_order"),
    ({"prompt": "p", "completion": "a", "label": True, "system": "Be kind."}, "prompt_column"),
]


@pytest.mark.parametrize(("row", "kind"), BROKEN)
def test_a_broken_row_is_refused_by_kind(row: Row, kind: str, tmp_path: Path) -> None:
    error = refused(
        lambda: list(read_pairs(DataConfig(data=[str(write_jsonl(tmp_path / "a.jsonl", [row]))])))
    )
    assert isinstance(error, DataError)
    assert error.kind == kind
    assert error.fix


def test_a_row_with_both_completions_stays_a_pair(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": " a", "rejected": " b", "completion": " a", "label": True}
    (found,) = read_pairs(DataConfig(data=[str(write_jsonl(tmp_path / "a.jsonl", [row]))]))
    assert (found.chosen, found.rejected, found.label) == (" a", " b", None)


def test_the_label_is_a_part_of_what_a_row_says(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": " a", "label": label} for label in (True, False)]
    good, bad = read_pairs(DataConfig(data=[str(write_jsonl(tmp_path / "a.jsonl", rows))]))
    pair = good._replace(label=None)
    assert len({row_content(good), row_content(bad), row_content(pair)}) == 3


# --- Mismatched completions


def ids(*values: int) -> IdArray:
    return np.array(values, dtype=np.int32)


def tokenized(prompts: list[int], *, labels: list[bool] | None = None) -> list[TokenizedPair]:
    """One row for each prompt, whose completion is its number, twice."""
    return [
        TokenizedPair(
            row=row,
            source=None,
            prompt_ids=ids(1, prompt),
            chosen_ids=ids(100 + row, 100 + row),
            rejected_ids=ids(100 + row, 100 + row),
            label=row % 2 == 0 if labels is None else labels[row],
        )
        for row, prompt in enumerate(prompts)
    ]


def given(row: TokenizedPair) -> int:
    """The row whose completion another one got, while its own stayed on the side of its label."""
    own, other = (row.chosen_ids, row.rejected_ids)[:: 1 if row.label else -1]
    assert own.tolist() == [100 + row.row] * 2
    return int(other[0]) - 100


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([1, 2, 3, 4], [3, 0, 1, 2]),
        ([1, 2], [1, 0]),
        # As a pair becomes two rows: desirable completions meet prompts as often as the others do.
        ([1, 1, 2, 2, 3, 3], [4, 5, 0, 1, 2, 3]),
        ([1, 1, 2], [2, 2, 0]),
        ([1, 2, 1, 2, 1], [3, 0, 1, 2, 3]),
        # The row before has the same prompt, and so the next earlier one counts.
        ([1, 2, 3, 1], [2, 0, 1, 2]),
    ],
)
def test_each_prompt_gets_the_completion_of_an_earlier_row_of_another(
    prompts: list[int], expected: list[int]
) -> None:
    found = with_mismatched(tokenized(prompts), max_length=9)
    assert not found.left_out
    assert [given(row) for row in found.rows] == expected


def test_no_row_ever_meets_its_own_prompt_and_few_completions_are_given_twice() -> None:
    rng = np.random.default_rng(0)
    for count in range(2, 40):
        prompts = rng.integers(0, max(2, count // 2), size=count).tolist()
        found = with_mismatched(tokenized(prompts), max_length=9)
        if len(set(prompts)) == 1:
            assert len(found.left_out) == count
            continue
        assert not found.left_out
        assert all(prompts[given(row)] != prompts[row.row] for row in found.rows)
    distinct = with_mismatched(tokenized(list(range(50))), max_length=9).rows
    assert sorted(map(given, distinct)) == list(range(50))


def test_a_single_prompt_has_no_mismatched_completion() -> None:
    for prompts in ([1], [1, 1, 1]):
        found = with_mismatched(tokenized(prompts), max_length=9)
        assert (found.rows, len(found.left_out)) == ([], len(prompts))
    assert with_mismatched([], max_length=9) == ([], [])


def test_a_mismatched_completion_is_cut_to_what_fits_and_must_count_there() -> None:
    first, second, third = tokenized([1, 2, 3], labels=[True, False, True])
    mask = np.array([False, True])
    second = dataclasses.replace(second, chosen_mask=mask, rejected_mask=mask)
    one, two, three = with_mismatched([first, second, third], max_length=3).rows
    assert (two.chosen_ids.tolist(), two.chosen_truncated, two.chosen_mask) == ([100], True, None)
    assert (one.rejected_ids.tolist(), one.rejected_truncated) == ([102], True)
    # Of the second row's completion nothing counts in the room that there is.
    assert (three.rejected_ids.tolist(), three.rejected_mask) == ([100], None)
    whole = with_mismatched([first, second, third], max_length=4).rows[2]
    assert whole.rejected_mask is not None
    assert (whole.rejected_ids.tolist(), whole.rejected_mask.tolist()) == ([101, 101], [False, True])


# --- A folder


@pytest.fixture
def rows() -> list[Row]:
    made = []
    for i, row in enumerate(preference_rows(11)):
        side = "rejected" if i % 3 == 1 else "chosen"
        label = side == "chosen"
        made.append(
            {"prompt": row["prompt"], "completion": row[side], "label": label, "source": row["source"]}
        )
    return made


@pytest.fixture
def config(rows: list[Row], tiny_model: Path, tmp_path: Path) -> PrecomputeConfig:
    return PrecomputeConfig(
        model=str(tiny_model),
        data=[str(write_jsonl(tmp_path / "data.jsonl", rows))],
        shards=tmp_path / "shards",
        pairs_per_shard=4,
    )


def test_a_folder_holds_each_rows_completion_on_its_labels_side(
    config: PrecomputeConfig, rows: list[Row]
) -> None:
    scorer = ScriptedScorer()
    manifest = precompute(config, scorer=scorer)
    assert (manifest.kept, manifest.fingerprint.rows) == (11, UNPAIRED)
    assert manifest.fingerprint.schema_version == UNPAIRED_VERSION
    pairs = list(ShardFolder.open(config.shards).pairs())
    assert [pair.label for pair in pairs] == [row["label"] for row in rows]
    own = {pair.row: pair.chosen_ids if pair.label else pair.rejected_ids for pair in pairs}
    for pair in pairs:
        other = pair.rejected_ids if pair.label else pair.chosen_ids
        shard = pair.row // 4
        source = next(r for r, found in own.items() if r // 4 == shard and np.array_equal(found, other))
        assert rows[source]["prompt"] != rows[pair.row]["prompt"]
        for side in ("chosen", "rejected"):
            expected = scripted_logps(pair.prompt_ids, getattr(pair, f"{side}_ids"))
            assert getattr(pair, f"ref_{side}_token_logps").tolist() == expected.tolist()
    for commit in manifest.shards:
        schema = pq.read_schema(config.shards / commit.file)
        assert schema.names == UNPAIRED_SCHEMA.names
        assert (schema.metadata or {})[b"dpo_opt.schema_version"] == b"2"
    assert problems_of(config.shards) == []


def test_a_folder_of_pairs_is_as_it_was(config: PrecomputeConfig, tmp_path: Path) -> None:
    data = [str(write_jsonl(tmp_path / "pairs.jsonl", preference_rows(5)))]
    manifest = precompute(config.model_copy(update={"data": data}), scorer=ScriptedScorer())
    assert (manifest.fingerprint.rows, manifest.fingerprint.schema_version) == (None, 1)
    schema = pq.read_schema(config.shards / manifest.shards[0].file)
    assert schema.names == SHARD_SCHEMA.names
    assert (schema.metadata or {})[b"dpo_opt.schema_version"] == b"1"


def test_interrupted_scoring_ends_as_scoring_that_was_not(config: PrecomputeConfig, tmp_path: Path) -> None:
    def stop(calls: int) -> None:
        if calls == 1:
            raise KeyboardInterrupt

    other = config.model_copy(update={"shards": tmp_path / "other"})
    precompute(other, scorer=ScriptedScorer())
    with pytest.raises(KeyboardInterrupt):
        precompute(config, scorer=ScriptedScorer(before_call=stop))
    worker = config.model_copy(update={"worker_index": 1, "num_workers": 2})
    assert work(worker, scorer=ScriptedScorer()) == 2
    manifest = precompute(config, scorer=ScriptedScorer())
    assert (config.shards / "plan.json").read_bytes() == (other.shards / "plan.json").read_bytes()
    tables = [pq.read_table(config.shards / commit.file) for commit in manifest.shards]
    others = [pq.read_table(other.shards / commit.file) for commit in load_manifest(other.shards).shards]
    assert pa.concat_tables(tables).equals(pa.concat_tables(others))


def test_a_folder_grows_by_unpaired_rows_and_by_nothing_else(
    config: PrecomputeConfig, rows: list[Row], tmp_path: Path
) -> None:
    precompute(config, scorer=ScriptedScorer())
    data = Path(config.data[0])
    more = {"prompt": "More?", "completion": " Yes.", "label": False}
    pair = {"prompt": "More?", "chosen": " Yes.", "rejected": " No."}
    growing = config.model_copy(update={"append": True})
    apart = write_jsonl(tmp_path / "pairs.jsonl", [pair])
    mixed = growing.model_copy(update={"data": [str(data), str(apart)]})
    error = refused(lambda: precompute(mixed, scorer=ScriptedScorer()))
    assert (error.exit_code, "of its own" in (error.fix or "")) == (3, True)
    write_jsonl(data, [*rows, more, {**more, "prompt": "Less?"}])
    assert precompute(growing, scorer=ScriptedScorer()).kept == 13
    with pytest.raises(FingerprintError, match="rows"):
        precompute(config.model_copy(update={"data": [str(apart)]}), scorer=ScriptedScorer())


def test_labels_that_changed_since_the_plan_are_noticed(config: PrecomputeConfig, rows: list[Row]) -> None:
    def stop(calls: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute(config, scorer=ScriptedScorer(before_call=stop))
    rows[0]["label"] = not rows[0]["label"]
    write_jsonl(Path(config.data[0]), rows)
    worker = config.model_copy(update={"worker_index": 0, "num_workers": 1})
    with pytest.raises(DataError, match="changed"):
        work(worker, scorer=ScriptedScorer())


def test_rows_of_a_single_prompt_are_left_out_with_the_reason(
    config: PrecomputeConfig, rows: list[Row]
) -> None:
    write_jsonl(
        Path(config.data[0]), [*rows[:4], *({**row, "prompt": "Same?"} for row in rows[4:8]), *rows[8:]]
    )
    manifest = precompute(config, scorer=ScriptedScorer())
    assert (manifest.kept, manifest.dropped) == (7, {NO_OTHER_PROMPT: 4})
    assert problems_of(config.shards) == []


def test_a_folder_without_a_row_left_says_where_the_reasons_are(
    config: PrecomputeConfig, rows: list[Row]
) -> None:
    write_jsonl(Path(config.data[0]), rows[:1])
    error = refused(lambda: precompute(config, scorer=ScriptedScorer()))
    assert str(error.what) == f'no row is left of 1 ({{"{NO_OTHER_PROMPT}": 1}})'
    assert error.why
    assert "dropped/" in str(error.fix)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"train_on": "first-difference"}, "--train-on first-difference compares two completions"),
        ({"pairs_per_shard": 1}, "--pairs-per-shard 1 leaves a row"),
    ],
)
def test_settings_of_pairs_are_refused_before_anything_is_written(
    settings: Row, what: str, config: PrecomputeConfig
) -> None:
    error = refused(lambda: precompute(config.model_copy(update=settings), scorer=ScriptedScorer()))
    assert isinstance(error, ConfigError)
    assert error.what.startswith(what)
    assert not config.shards.exists()


@pytest.mark.parametrize("damage", ["a label turned", "no labels", "an older version"])
def test_a_damaged_shard_is_noticed(damage: str, config: PrecomputeConfig) -> None:
    manifest = precompute(config, scorer=ScriptedScorer())
    path = config.shards / manifest.shards[0].file
    table = pq.read_table(path)
    if damage == "a label turned":
        labels = [not table["label"][0].as_py(), *table["label"].to_pylist()[1:]]
        table = table.set_column(table.column_names.index("label"), "label", pa.array(labels))
    elif damage == "no labels":
        table = table.drop_columns("label")
    else:
        table = table.replace_schema_metadata({**table.schema.metadata, "dpo_opt.schema_version": "1"})
    pq.write_table(table, path)
    assert problems_of(config.shards)


# --- Before scoring, and to and from pairs


def checked(path: Path, model: Path | None = None) -> Any:
    return audit(CheckConfig(data=[str(path)], model=None if model is None else str(model)))


def test_check_counts_labels_and_finds_what_repeats(
    tmp_path: Path, tiny_model: Path, rows: list[Row]
) -> None:
    turned = {**rows[3], "label": not rows[3]["label"]}
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[2], turned])
    found = checked(path, tiny_model)
    kinds = {problem.kind: problem.count for problem in found.problems}
    assert kinds == {"duplicate": 1, "contradictory": 2, "label_balance": 8}
    assert found.labels.model_dump() == {"desirable": 8, "undesirable": 5}
    assert found.truncation[-1].dropped == {}
    assert found.estimate.sequences == 2 * len({(r["prompt"], r["completion"]) for r in rows})
    (balance,) = (problem for problem in found.problems if problem.kind == "label_balance")
    assert balance.fix.startswith("`--desirable-weight 0.62` to `0.83`")


def test_check_and_precompute_count_the_same_cuts_and_call_rows_rows(
    tmp_path: Path, tiny_model: Path, rows: list[Row]
) -> None:
    """A completion that is cut beside another row's prompt is no cut of the row that it comes from."""
    # Short prompts with long completions beside long prompts with short ones.
    for number, row in enumerate(rows):
        row["prompt"] += " and so on" * (number % 2) * 6
        row["completion"] += " again" * (number % 3) * 9
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = CheckConfig(data=[str(path)], model=str(tiny_model), max_length=90)
    found = audit(config)
    (cut,) = (problem for problem in found.problems if problem.kind == "cut")
    scoring = PrecomputeConfig(
        model=str(tiny_model), data=[str(path)], shards=tmp_path / "shards", max_length=90
    )
    manifest = precompute(scoring, scorer=ScriptedScorer())
    pairs = list(ShardFolder.open(scoring.shards).pairs())
    either = sum(pair.chosen_truncated or pair.rejected_truncated for pair in pairs)
    assert 0 < cut.count == manifest.truncated < either
    assert (found.noun, manifest.fingerprint.noun) == ("row", "row")
    texts = [text for p in found.problems for text in (p.title, p.why)]
    assert not [text for text in texts if re.search(r"\bpairs?\b", text)]
    assert problems_of(scoring.shards) == []
    # Folders of earlier versions say the other count, and are whole.
    (commit,) = manifest.shards
    earlier = manifest.model_copy(
        update={"truncated": either, "shards": [commit.model_copy(update={"truncated": either})]}
    )
    assert integrity_problems(scoring.shards, earlier) == []
    wrong = manifest.model_copy(update={"shards": [commit.model_copy(update={"truncated": either + 1})]})
    assert any("truncated" in problem for problem in integrity_problems(scoring.shards, wrong))


def test_an_option_with_pairs_in_its_name_stays() -> None:
    found = of_rows(problem("cut", 1, [], fix="pairs: see `--pairs-per-shard`, and the pair"))
    assert (found.title, found.fix) == (
        "rows that are cut to max_length",
        "rows: see `--pairs-per-shard`, and the row",
    )
    assert "pair" in of_rows(problem("shape", 1, [])).why


def test_check_refuses_a_mixture_and_warns_of_one_label(tmp_path: Path, rows: list[Row]) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(3))
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = audit(CheckConfig(data=[str(path), str(pairs)]))
    assert found.refused
    assert found.problems[0].kind == "two_kinds"
    write_jsonl(path, [{**row, "label": True} for row in rows])
    assert "one_label" in {problem.kind for problem in checked(path).problems}
    assert "shared_rejected" not in {problem.kind for problem in checked(path).problems}
    assert checked(pairs).labels is None


def test_convert_makes_two_rows_of_a_pair_and_writes_none_twice(tmp_path: Path) -> None:
    pairs = [
        {"prompt": "p", "chosen": " a", "rejected": " b", "margin": 2.0, "source": "s", "weight": 3.0},
        {"prompt": "p", "chosen": " a", "rejected": " c"},
        {"prompt": USER, "chosen": SO, "rejected": [said("assistant", "No.")]},
    ]
    found = []
    for number, some in enumerate((pairs[:2], pairs[2:])):
        source = write_jsonl(tmp_path / f"{number}.jsonl", some)
        output = tmp_path / f"out{number}"
        config = ConvertConfig(data=[str(source)], output=output, to="unpaired")
        # The row without a weight has weight 1.
        removed = {} if number else {"duplicate_with_other_weight": 1}
        assert convert(config) == Converted(3 - number, 0, removed)
        found += list(map(json.loads, (output / "train.jsonl").read_text().splitlines()))
    beside = {"source": "s", "weight": 3.0}
    assert found == [
        {"prompt": "p", "completion": " a", "label": True, **beside},
        {"prompt": "p", "completion": " b", "label": False, **beside},
        {"prompt": "p", "completion": " c", "label": False},
        {"prompt": USER, "completion": SO, "label": True},
        {"prompt": USER, "completion": [said("assistant", "No.")], "label": False},
    ]


@pytest.mark.parametrize("to", ["trl", "unpaired", "openai", "sharegpt"])
def test_convert_keeps_unpaired_rows_or_says_that_a_format_cannot(
    to: str, tmp_path: Path, rows: list[Row]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])
    config = ConvertConfig.model_validate({"data": [str(source)], "output": tmp_path / "out", "to": to})
    if to in ("openai", "sharegpt"):
        error = refused(lambda: convert(config))
        assert error.exit_code == 3
        assert "one completion with a label" in (error.why or "")
        return
    assert convert(config).removed == {"duplicate": 1}
    written = list(read_pairs(DataConfig(data=[str(tmp_path / "out" / "train.jsonl")])))
    read = list(read_pairs(DataConfig(data=[str(source)])))[:-1]
    assert [pair._replace(where="") for pair in written] == [pair._replace(where="") for pair in read]


def test_rows_of_different_labels_are_never_nearly_the_same(tmp_path: Path) -> None:
    pytest.importorskip("rensa", reason="rensa is not installed")
    words = " ".join(f"word{i}" for i in range(60))
    rows = [
        {"prompt": words, "completion": f" {words} {end}", "label": label}
        for end, label in (("a", True), ("b", True), ("c", False))
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    config = ConvertConfig(data=[str(source)], output=tmp_path / "out", near_duplicates=True)
    assert convert(config).removed == {"near_duplicate": 1}
