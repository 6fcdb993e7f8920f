import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dpo_opt.analysis.final_state import LastLogps, final_pairs
from dpo_opt.analysis.load import scan_pair_logps
from dpo_opt.analysis.notable_pairs import hardest_pairs
from dpo_opt.analysis.outcomes import (
    by_source,
    length_bias,
    outcome,
    reference_accuracy,
)
from dpo_opt.analysis.slices import shard_slices
from dpo_opt.schemas.pair_logps import write_pair_logps


@pytest.fixture
def scored(tmp_path, shards_writer, texts, fake_policy):
    """Pairs, their scores in reverse order, and both as plain arrays."""
    pairs = shards_writer(
        tmp_path / "shards", texts(120, prompts=50), pairs_per_shard=30, sources=("a", "b", None, "a")
    )
    rows = fake_policy(pairs).rows([p.row for p in pairs], step=9, steps=10, phase="score")
    write_pair_logps(tmp_path / "scores.parquet", [rows[::-1]])
    arrays = {
        "policy": np.array([[r.chosen_logps, r.rejected_logps] for r in rows]),
        "reference": np.array([[p.ref_chosen_logps, p.ref_rejected_logps] for p in pairs]),
        "length": np.array([[len(p.chosen_ids), len(p.rejected_ids)] for p in pairs]),
        "source": np.array([p.source or "" for p in pairs]),
        "prompt": np.array([p.prompt_id for p in pairs]),
    }
    return tmp_path, arrays


def final(folder, held_out=(), scores=None):
    scratch = Path(tempfile.mkdtemp(dir=folder))
    table = scan_pair_logps(folder / "scores.parquet") if scores is None else scores
    last = LastLogps(table, pl.lit(True), step=1, scored=True, label="", dtype=None, where="scores")
    return final_pairs(
        last,
        shard_slices(folder / "shards"),
        held_out=pl.Series("row", held_out, dtype=pl.Int64),
        scratch=scratch,
    )


def margins(arrays, beta):
    logratio = arrays["policy"] - arrays["reference"]
    return beta * (logratio[:, 0] - logratio[:, 1])


def test_outcome_is_what_numpy_says_of_the_same_pairs(scored):
    folder, arrays = scored
    found = outcome(final(folder), beta=0.3)
    before = arrays["reference"][:, 0] > arrays["reference"][:, 1]
    after = arrays["policy"][:, 0] > arrays["policy"][:, 1]
    logratio = arrays["policy"] - arrays["reference"]
    margin = margins(arrays, 0.3)
    assert (found.pairs, found.prompts) == (120, 50)
    assert found.reward_accuracy.value == pytest.approx((margin > 0).mean())
    assert found.ranking_accuracy.value == pytest.approx(after.mean())
    assert found.reference_ranking_accuracy.value == pytest.approx(before.mean())
    assert found.flipped_right == pytest.approx((~before & after).mean())
    assert found.flipped_wrong == pytest.approx((before & ~after).mean())
    assert found.mean_margin == pytest.approx(margin.mean())
    assert found.mean_chosen_logratio == pytest.approx(logratio[:, 0].mean())
    assert found.chosen_fell == pytest.approx((logratio[:, 0] < 0).mean())
    assert found.rejected_fell == pytest.approx((logratio[:, 1] < 0).mean())
    assert found.fell_without_margin == pytest.approx(((logratio[:, 0] < 0) & (margin <= 0)).mean())


def test_interval_resamples_prompts(scored):
    folder, arrays = scored
    found = outcome(final(folder), beta=1.0).reward_accuracy
    right = margins(arrays, 1.0) > 0
    groups = [right[arrays["prompt"] == p] for p in np.unique(arrays["prompt"])]
    random = np.random.default_rng(5)
    means = [np.concatenate([groups[i] for i in random.integers(0, 50, 50)]).mean() for _ in range(3000)]
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.02)


def test_reference_accuracy_needs_no_policy(scored):
    folder, arrays = scored
    expected = (arrays["reference"][:, 0] > arrays["reference"][:, 1]).mean()
    assert reference_accuracy(shard_slices(folder / "shards")) == pytest.approx(expected)


def test_slicing_does_not_change_the_final_pairs(scored, monkeypatch):
    folder, _ = scored
    whole = final(folder, held_out=[3, 77]).collect()
    monkeypatch.setattr("dpo_opt.analysis.slices._SLICE_ROWS", 30)
    assert len(shard_slices(folder / "shards")) == 4
    assert final(folder, held_out=[3, 77]).collect().equals(whole)
    assert whole["row"].to_list() == list(range(120))
    assert whole.filter("held_out")["row"].to_list() == [3, 77]


def test_a_pair_scored_twice_counts_once(scored):
    folder, _ = scored
    table = scan_pair_logps(folder / "scores.parquet")
    again = final(folder, scores=pl.concat([table, table]))
    assert again.collect().equals(final(folder).collect())


def test_sources_are_counted_apart_and_none_is_one_of_them(scored):
    folder, arrays = scored
    found = {s.source or "": s for s in by_source(final(folder), beta=0.3)}
    assert [s.pairs for s in found.values()] == [60, 30, 30]
    for source, of in found.items():
        member = arrays["source"] == source
        assert of.prompts == len(set(arrays["prompt"][member]))
        assert of.reward_accuracy.value == pytest.approx((margins(arrays, 1)[member] > 0).mean())
        assert of.mean_margin == pytest.approx(margins(arrays, 0.3)[member].mean())


def test_without_sources_there_is_no_table(scored):
    folder, _ = scored
    none = final(folder).with_columns(source=pl.lit(None, dtype=pl.String))
    assert by_source(none, beta=0.3) == []


def test_length_bias_counts_and_correlates(scored):
    folder, arrays = scored
    found = length_bias(final(folder), beta=0.3)
    difference = arrays["length"][:, 0] - arrays["length"][:, 1]
    assert found.longer_chosen == pytest.approx((difference > 0).sum() / (difference != 0).sum())
    assert found.unequal_pairs == (difference != 0).sum()
    assert found.correlation == pytest.approx(np.corrcoef(difference, margins(arrays, 0.3))[0, 1])
    by_name = {g.name: g for g in found.groups}
    assert by_name["longer"].mean_margin == pytest.approx(margins(arrays, 0.3)[difference > 0].mean())
    assert sum(g.pairs for g in found.groups) == 120


def test_lengths_that_do_not_vary_have_no_correlation(scored):
    folder, _ = scored
    same = final(folder).with_columns(
        pl.lit(7, dtype=pl.Int32).alias(n) for n in ("chosen_length", "rejected_length")
    )
    found = length_bias(same, beta=0.3)
    assert found.correlation is None
    assert found.unequal_pairs == 0
    assert [g.name for g in found.groups] == ["as long"]


def test_hardest_pairs_have_the_lowest_margins_in_order(scored):
    folder, arrays = scored
    found = hardest_pairs(final(folder), beta=0.3, count=5)
    order = np.argsort(margins(arrays, 0.3))[:5]
    assert found["row"].to_list() == order.tolist()
    assert found["margin"].to_list() == pytest.approx(margins(arrays, 0.3)[order].tolist())
    reference = arrays["reference"][order]
    assert found["reference_ranking_margin"].to_list() == pytest.approx(
        (reference[:, 0] - reference[:, 1]).tolist()
    )
