"""Feedback that no rule reads is refused by the name of its form, and what is advised makes it readable."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import write_jsonl
from messages import said

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.datasets import read_pairs
from dpo_opt.schemas.errors import DataError

Row = dict[str, Any]


ANSWER = [{"value": ["response2", "response1"], "user_id": "u"}]
CHAT = {"prompt": [said("user", "How?")], "completion": [said("assistant", "So.")]}
FORMS: list[tuple[str, Row]] = [
    ("unpaired", {"completion": "How? So.", "label": True}),
    ("unpaired", {"prompt": "How?", "response": "So.", "label": True}),
    ("unpaired", {"question": "How?", "output": "So.", "kto_tag": True}),
    (
        "annotations",
        {
            **{"id": "1", "status": "completed", "_server_id": "2", "metadata": {"a": 1}, "vectors": None},
            **{"fields": {"instruction": "How?", "response1": "So.", "response2": "No."}},
            **{"suggestions": {"ranking": {"value": None}}, "responses": {"ranking": ANSWER}},
        },
    ),
    (
        "annotations",
        {
            **{"instruction": "How?", "response1": "So.", "response2": "No."},
            "ranking.responses": [["response2", "response1"]],
        },
    ),
    ("annotations", {"prompt": "How?", "a": "So.", "b": "No.", "best.suggestion": "a"}),
]


@pytest.mark.parametrize(("kind", "row"), FORMS)
def test_feedback_that_is_no_pairs_is_refused_by_name(kind: str, row: Row, tmp_path: Path) -> None:
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row]), table)
    for path in (write_jsonl(tmp_path / "a.jsonl", [row]), table):
        with pytest.raises(DataError) as caught:
            list(read_pairs(DataConfig(data=[str(path)])))
        assert caught.value.kind == kind
        assert caught.value.fix
        assert str(caught.value.where).startswith(str(path))


def test_labels_beside_a_pair_or_a_published_form_are_no_feedback(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": " a", "rejected": " b", "completion": " a", "label": True},
        {"prompt": "p", "completions": [" a", " b"], "ranks": [1, 2], "label": 3, "response": "x"},
    ]
    for i, row in enumerate(rows):
        table = tmp_path / f"{i}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), table)
        (pair,) = read_pairs(DataConfig(data=[str(table)]))
        assert (pair.prompt, pair.chosen, pair.rejected) == ("p", " a", " b")


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "How?", "response": " So.", "label": True}, "--column completion=response"),
        (
            {"question": "How?", "output": " So.", "kto_tag": True},
            "--column prompt=question --column completion=output --column label=kto_tag",
        ),
    ],
)
def test_feedback_under_other_names_is_read_by_the_settings_that_its_refusal_names(
    row: Row, settings: str, tmp_path: Path
) -> None:
    data = [str(write_jsonl(tmp_path / "a.jsonl", [row]))]
    with pytest.raises(DataError) as caught:
        list(read_pairs(DataConfig(data=data)))
    assert caught.value.fix == f"pass {settings}"
    named = dict(word.split("=") for word in settings.split() if "=" in word)
    (found,) = read_pairs(DataConfig(data=data, column=named))
    assert (found.prompt, found.chosen, found.label) == ("How?", " So.", True)


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_program_of_the_page_makes_every_pair_of_labelled_rows_and_no_other(
    is_chat: bool, tmp_path: Path
) -> None:
    rows = [("p", "a", True), ("p", "b", False), ("q", "c", True), ("p", "d", False), ("r", "e", False)]

    def whole(role: str, text: str) -> Any:
        return [said(role, text)] if is_chat else text

    write_jsonl(
        tmp_path / "DATA.jsonl",
        [{"prompt": whole("user", p), "completion": whole("assistant", c), "label": x} for p, c, x in rows],
    )
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (program,) = (part for part in page.split("```") if "read_ndjson" in part)
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True)
    pairs = read_pairs(DataConfig(data=[str(tmp_path / "pairs.jsonl")]))
    found = [(p.prompt, p.chosen, p.rejected) for p in pairs]
    user, assistant = whole("user", "p"), [whole("assistant", c) for c in "abd"]
    assert sorted(map(str, found)) == sorted(str((user, assistant[0], bad)) for bad in assistant[1:])
