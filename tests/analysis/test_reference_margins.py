import numpy as np
import polars as pl
import pytest

from dpo_opt.analysis import reference_view
from dpo_opt.analysis.outcomes import reference_accuracy
from dpo_opt.analysis.slices import shard_slices
from dpo_opt.schemas.audit_record import ReferenceView
from dpo_opt.schemas.errors import DataError


@pytest.fixture
def shards(tmp_path, shards_writer, texts):
    """A folder of 120 pairs of 50 prompts, and the same pairs as plain arrays."""
    folder = tmp_path / "shards"
    written = texts(120, prompts=50)
    pairs = shards_writer(folder, written, pairs_per_shard=30, sources=("a", "b", None, "a"))
    arrays = {
        "chosen": np.array([p.ref_chosen_token_logps.astype(float).sum() for p in pairs]),
        "rejected": np.array([p.ref_rejected_token_logps.astype(float).sum() for p in pairs]),
        "chosen_mean": np.array([p.ref_chosen_token_logps.astype(float).mean() for p in pairs]),
        "rejected_mean": np.array([p.ref_rejected_token_logps.astype(float).mean() for p in pairs]),
        "source": np.array([p.source or "" for p in pairs]),
        "prompt": np.array([p.prompt_id for p in pairs]),
    }
    return folder, arrays, written


def test_numbers_are_what_numpy_says_of_the_token_logps(shards):
    folder, of, _ = shards
    view = reference_view(folder)
    margins = of["chosen"] - of["rejected"]
    assert view.pairs == 120
    assert view.ranking_accuracy == pytest.approx((margins > 0).mean())
    assert view.ranking_accuracy == reference_accuracy(shard_slices(folder))
    assert view.normalised_ranking_accuracy == pytest.approx((of["chosen_mean"] > of["rejected_mean"]).mean())
    assert view.normalised_ranking_accuracy != view.ranking_accuracy
    assert list(view.margin_quantiles) == ["p5", "p25", "p50", "p75", "p95"]
    assert list(view.margin_quantiles.values()) == pytest.approx(
        np.quantile(margins, [0.05, 0.25, 0.5, 0.75, 0.95]), abs=1e-4
    )


def test_a_mean_per_token_is_of_the_tokens_that_count(tmp_path, shards_writer, texts):
    pairs = shards_writer(tmp_path / "shards", texts(60, prompts=20), masked=True)
    chosen = [p.ref_chosen_logps / p.chosen_counted for p in pairs]
    rejected = [p.ref_rejected_logps / p.rejected_counted for p in pairs]
    view = reference_view(tmp_path / "shards")
    assert view.normalised_ranking_accuracy == pytest.approx(np.greater(chosen, rejected).mean())
    assert any(p.chosen_counted < len(p.chosen_ids) for p in pairs)
    of_all = [p.ref_chosen_logps / len(p.chosen_ids) for p in pairs]
    assert view.normalised_ranking_accuracy != pytest.approx(np.greater(of_all, rejected).mean())


def test_interval_resamples_prompts(shards):
    folder, of, _ = shards
    right = of["chosen"] > of["rejected"]
    groups = [right[of["prompt"] == p] for p in np.unique(of["prompt"])]
    random = np.random.default_rng(5)
    means = [np.concatenate([groups[i] for i in random.integers(0, 50, 50)]).mean() for _ in range(3000)]
    assert reference_view(folder).ranking_accuracy_interval == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.02
    )


def test_sources_come_largest_first_and_none_is_one_of_them(shards):
    folder, of, _ = shards
    found = reference_view(folder).sources
    assert (found[0].source, found[0].pairs) == ("a", 60)
    assert {s.source for s in found} == {"a", "b", None}
    for s in found:
        margins = (of["chosen"] - of["rejected"])[of["source"] == (s.source or "")]
        assert s.pairs == len(margins)
        assert s.ranking_accuracy == pytest.approx((margins > 0).mean())
        assert s.mean_ranking_margin == pytest.approx(margins.mean(), abs=1e-4)


def test_without_sources_there_is_no_table(tmp_path, shards_writer, texts):
    shards_writer(tmp_path / "s", texts(20), sources=(None,))
    assert reference_view(tmp_path / "s").sources == []


def test_hardest_pairs_have_the_lowest_margins_and_their_own_text(shards):
    folder, of, texts = shards
    margins = of["chosen"] - of["rejected"]
    found = reference_view(folder, hardest=5).hardest
    assert [p.row for p in found] == np.argsort(margins)[:5].tolist()
    for pair in found:
        prompt, chosen, rejected = texts[pair.row]
        assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
        # One byte to a token.
        assert (pair.chosen_length, pair.rejected_length) == (len(chosen), len(rejected))
        assert pair.ranking_margin == pytest.approx(margins[pair.row], abs=1e-4)
        assert (pair.source or "") == of["source"][pair.row]
    assert len(reference_view(folder).hardest) == 8


def test_fewer_pairs_than_asked_for_are_all_shown(tmp_path, shards_writer, texts):
    shards_writer(tmp_path / "s", texts(3))
    view = reference_view(tmp_path / "s")
    assert len(view.hardest) == 3
    assert [p.ranking_margin for p in view.hardest] == sorted(p.ranking_margin for p in view.hardest)


def test_slicing_changes_nothing(shards, monkeypatch):
    folder, _, _ = shards
    whole = reference_view(folder)
    monkeypatch.setattr("dpo_opt.analysis.slices._SLICE_ROWS", 30)
    assert len(shard_slices(folder)) == 4
    assert reference_view(folder) == whole


def test_one_prompt_has_no_interval(tmp_path, shards_writer, texts):
    shards_writer(tmp_path / "s", texts(30, prompts=1))
    assert reference_view(tmp_path / "s").ranking_accuracy_interval is None


def test_the_record_survives_json(shards):
    view = reference_view(shards[0])
    assert ReferenceView.model_validate_json(view.model_dump_json()) == view


def test_control_characters_of_the_text_are_taken_out(tmp_path, shards_writer):
    shards_writer(tmp_path / "s", [("\x1b[2Jask \u202eme", "yes\x07", "no\x00 <b>")])
    (pair,) = reference_view(tmp_path / "s").hardest
    assert (pair.prompt, pair.chosen, pair.rejected) == ("[2Jask me", "yes", "no <b>")


def test_what_scan_shards_refuses_is_refused(tmp_path, shards):
    with pytest.raises(DataError):
        reference_view(tmp_path / "nowhere")
    file = sorted((shards[0] / "data").iterdir())[1]
    damaged = bytearray(file.read_bytes())
    damaged[60] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DataError, match=file.name):
        reference_view(shards[0])


def test_shards_without_a_pair_are_refused(tmp_path, shards_writer):
    shards_writer(tmp_path / "s", [], dropped={"empty_completion": 3})
    with pytest.raises(DataError, match="no pair was kept"):
        reference_view(tmp_path / "s")


def test_the_token_lists_are_read_for_the_shown_pairs_only(shards, monkeypatch):
    read = []
    collect = pl.LazyFrame.collect

    def collecting(frame, **settings):
        result = collect(frame, **settings)
        read.append((len(result), [n for n in result.columns if n.endswith("_ids")]))
        return result

    monkeypatch.setattr(pl.LazyFrame, "collect", collecting)
    reference_view(shards[0], hardest=4)
    assert [rows for rows, lists in read if lists] == [4]
    assert any(rows == 120 for rows, _ in read)
