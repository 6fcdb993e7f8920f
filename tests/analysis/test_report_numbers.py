"""The report's numbers, each computed a second time from the run's files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from compared_numbers import expected_difference, expected_kl
from report_numbers import MOVEMENTS, differences, expected_entry

from dpo_opt.analysis import report
from dpo_opt.schemas.kl_samples import write_kl_samples

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


def assert_every_number_is_compared(expected, found):
    """Any number that is a little off is noticed."""
    for path in list(leaves(found)):
        *way, last = path
        part = found
        for key in way:
            part = part[key]
        right = part[last]
        part[last] = right + 0.01 + 0.01 * abs(right)
        assert differences(expected[path[0]], found[path[0]], f"/{path[0]}/"), path
        part[last] = right


def test_every_number_of_the_summary_is_that_of_other_formulas(compared):
    expected, found = compared
    assert differences(expected, found) == []
    # No movement is missing everywhere, or its share would be compared as 0 alone.
    assert all(any(point[name] > 0 for point in found["points"]) for name in MOVEMENTS)
    assert sum(q["pairs"] > 0 for q in found["rankings"]) > 2


def test_any_number_that_is_off_is_noticed(compared):
    expected, found = compared
    assert len(list(leaves(found))) > 500
    assert_every_number_is_compared(expected, found)


@pytest.fixture
def two_runs(tmp_path, shards_writer, run_writer, texts, kl_samples):
    """A summary of two runs of which the second is worse, and whose samples have exact token KLs."""
    pairs = shards_writer(tmp_path / "shards", texts(300, prompts=170), pairs_per_shard=100)
    runs = [
        run_writer(tmp_path / name, tmp_path / "shards", pairs, steps=20, strength=strength)
        for name, strength in (("one", 1.0), ("two", -0.4))
    ]
    random, samples = np.random.default_rng(5), kl_samples(pairs[:40])
    samples = [
        replace(
            sample,
            token_kl=random.gamma(1, 0.02, length).astype(np.float32),
            **{
                name: getattr(sample, name)[:length]
                for name in ("completion_ids", "policy_token_logps", "ref_token_logps")
            },
        )
        for sample in samples
        for length in [int(random.integers(5, 49))]
    ]
    write_kl_samples(runs[0] / "kl" / "final.parquet", samples)
    report(runs, tmp_path / "report.html")
    return tmp_path, json.loads((tmp_path / "report.summary.json").read_text())


def test_kl_figures_are_those_of_other_formulas(two_runs):
    folder, summary = two_runs
    expected, found = (
        expected_kl(folder / "one" / "kl" / "final.parquet", step=None),
        summary["runs"][0]["kl"],
    )
    assert differences(expected, found) == []
    assert 0 < found["share_unfinished"] < 1
    assert_every_number_is_compared(expected, found)


def test_differences_of_runs_are_those_of_other_formulas(two_runs):
    folder, summary = two_runs
    expected = expected_difference(folder / "two", folder / "one", folder / "shards")
    (found,) = summary["differences"]
    assert differences(expected, found) == []
    assert found["reward_accuracy"]["high"] < 0
    assert_every_number_is_compared(expected, found)
