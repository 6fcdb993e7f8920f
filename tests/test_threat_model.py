"""The page about who may write what says nothing that no test holds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "threat_model.md"
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
_ROWS = [
    line
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| what somebody writes")
]


def test_the_page_is_about_everything_that_is_read() -> None:
    titles = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    words = " ".join(titles)
    assert all(word in words for word in ("data", "shards", "bucket", "model", "checkpoint", "adapter"))
    assert len(_ROWS) > len(titles)


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_line_names_a_test_that_there_is(row: str) -> None:
    named = _TEST.findall(row)
    assert named, "a line that no test holds"
    for file, name in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", text, flags=re.MULTILINE), name
