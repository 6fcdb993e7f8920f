"""The table of losses on its page says of each what its function does."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from loss_cases import AT_START

from dpo_opt.optimize.losses.preference_loss import (
    DIVERGENCES,
    LOSSES,
    NEED_MARGINS,
    REFERENCE_FREE,
    options_of,
    takes_divergence,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "losses.md"


class Row(NamedTuple):
    """A line of the table."""

    loss: str
    formula: str
    start: str
    chosen: str
    rejected: str
    options: str
    when: str
    paper: str


def lines(heading: str) -> list[list[str]]:
    """The cells below a table's head."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n| {heading} |")
    table = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


ROWS = {row.loss.strip("`"): row for row in (Row(*cells) for cells in lines("loss"))}


def test_every_loss_and_divergence_has_its_line() -> None:
    assert list(ROWS) == list(LOSSES)
    assert [cells[0].strip("`") for cells in lines("divergence")] == list(DIVERGENCES)
    assert all(row.formula and row.when for row in ROWS.values())


@pytest.mark.parametrize("name", LOSSES)
def test_a_line_says_where_its_loss_begins_and_what_it_needs(name: str) -> None:
    row, start = ROWS[name], AT_START[name]
    assert (row.start, row.chosen, row.rejected) == (f"{start.loss:.4f}", start.chosen, start.rejected)
    flags = {"--" + option.replace("_", "-") for option in options_of(name) if option != "divergence"}
    assert set(re.findall(r"`(--[a-z-]+)`", row.options)) == flags
    assert ("divergence" in row.options) == takes_divergence(name)
    assert ("margins" in row.options) == (name in NEED_MARGINS)
    assert ("no reference" in row.options) == (name in REFERENCE_FREE)
    text = " ".join((LOSSES[name].__doc__ or "").split())
    assert all(f"arXiv {paper}" in text for paper in re.findall(r"\[(\d+\.\d+)\]", row.paper))
