"""The report's numbers, each computed a second time from the run's files."""

import json

import pytest
from report_numbers import MOVEMENTS, differences, expected_entry

from dpo_opt.analysis import report

NOISE = 0.3


@pytest.fixture
def compared(tmp_path, shards_writer, run_writer, texts):
    """What a report says of a run, and what it must say."""
    pairs = shards_writer(tmp_path / "shards", texts(300, prompts=170), pairs_per_shard=100)
    run = run_writer(tmp_path / "run", tmp_path / "shards", pairs, steps=20)
    parity = json.loads((run / "parity.json").read_text())
    (run / "parity.json").write_text(json.dumps(parity | {"margin_sd": NOISE}))
    report([run], tmp_path / "report.html")
    found = json.loads((tmp_path / "report.summary.json").read_text())["runs"][0]
    expected = expected_entry(run, tmp_path / "shards", beta=0.1, noise=NOISE)
    return expected, {name: found[name] for name in expected}


def leaves(value, path=()):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def test_every_number_of_the_summary_is_that_of_other_formulas(compared):
    expected, found = compared
    assert differences(expected, found) == []
    # No movement is missing everywhere, or its share would be compared as 0 alone.
    assert all(any(point[name] > 0 for point in found["points"]) for name in MOVEMENTS)
    assert sum(q["pairs"] > 0 for q in found["rankings"]) > 2


def test_any_number_that_is_off_is_noticed(compared):
    expected, found = compared
    paths = list(leaves(found))
    assert len(paths) > 500
    for path in paths:
        *way, last = path
        part = found
        for key in way:
            part = part[key]
        right = part[last]
        part[last] = right + 0.01 + 0.01 * abs(right)
        assert differences(expected[path[0]], found[path[0]], f"/{path[0]}/"), path
        part[last] = right
