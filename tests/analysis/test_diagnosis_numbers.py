"""The numbers that speak for a finding, computed a second time from the files of a run."""

import polars as pl
from diagnosis_numbers import EXPECTED, displacement, numbers, pairs_of, precision_lost, wilson
from report_numbers import differences, rows_of

from dpo_opt.analysis.diagnosis.diagnose import diagnose
from dpo_opt.schemas.pair_logps import write_pair_logps

BETA = 0.1


def pairs_from_files(logged, shards):
    reference = {row["row"]: row for row in rows_of(shards / "data")}
    names = ("ref_chosen_logps", "ref_rejected_logps")
    found = {
        row["row"]: row
        | {name: reference[row["row"]][name] for name in names}
        | {"prompt": reference[row["row"]]["prompt_id"]}
        for row in logged
    }
    return pairs_of([found[row] for row in sorted(found)], BETA)


def first_epoch(run):
    """The later half of the first epoch, after the run's table was cut to the first visit of each pair."""
    table = pl.concat([pl.read_parquet(file) for file in sorted((run / "pair_logps").iterdir())])
    once = table.unique(["row", "phase", "step"], maintain_order=True)
    once = once.filter((pl.col("phase") == "eval") | pl.struct("row", "phase").is_first_distinct())
    for file in (run / "pair_logps").iterdir():
        file.unlink()
    once.write_parquet(run / "pair_logps" / "00000.parquet")
    trained = once.filter(pl.col("phase") == "train").to_dicts()
    half = min(1.0, max(row["epoch"] for row in trained)) / 2
    return [row for row in trained if row["step"] > 0 and half <= row["epoch"] < 1]


def finding_of(run, cause):
    return next(found for found in diagnose(run).findings if found.cause == cause)


def test_pairs_of_the_first_epoch_are_read_from_the_files(tmp_path, shards_writer, run_writer, texts):
    pairs = shards_writer(tmp_path / "shards", texts(400, prompts=250))
    run = run_writer(tmp_path / "run", tmp_path / "shards", pairs, strength=-3.0, scored=False, eval_every=0)
    fresh = pairs_from_files(first_epoch(run), tmp_path / "shards")
    expected = EXPECTED["learning_rate_too_high"]({"fresh": fresh}, None)
    assert differences(expected, numbers(finding_of(run, "learning_rate_too_high"))) == []


def test_a_saved_model_is_compared_with_the_last_evaluation(
    tmp_path, shards_writer, run_writer, texts, fake_policy
):
    pairs = shards_writer(tmp_path / "shards", texts(400))
    run = run_writer(tmp_path / "run", tmp_path / "shards", pairs, scored=False)
    rows = fake_policy(pairs, strength=0.05).rows([p.row for p in pairs], step=60, steps=60, phase="score")
    write_pair_logps(run / "scores" / "final.parquet", [rows])
    evaluated = [r for r in rows_of(run / "pair_logps") if r["phase"] == "eval" and r["step"] == 60]
    held_out = {row["row"] for row in evaluated}
    scored = [row for row in rows_of(run / "scores") if row["row"] in held_out]
    expected = precision_lost(*(pairs_from_files(of, tmp_path / "shards") for of in (evaluated, scored)))
    assert differences(expected, numbers(finding_of(run, "precision_lost"))) == []


def test_near_identical_pairs_are_found_by_their_tokens(tmp_path, shards_writer, run_writer, texts):
    same = [
        (prompt, chosen, chosen + "!" if i % 2 else rejected)
        for i, (prompt, chosen, rejected) in enumerate(texts(400, prompts=250))
    ]
    pairs = shards_writer(tmp_path / "shards", same, sources=[None])
    run = run_writer(tmp_path / "run", tmp_path / "shards", pairs, beta=BETA)
    unseen = {r["row"] for r in rows_of(run / "pair_logps") if r["phase"] == "eval"}
    later = first_epoch(run)
    at_the_end = [r for r in rows_of(run / "scores") if r["row"] in unseen]
    judged = pairs_from_files([*at_the_end, *later], tmp_path / "shards")
    overlap = {p.row: dice(p.chosen_ids, p.rejected_ids) for p in pairs}
    alike = [p for p in judged if overlap[p["row"]] >= 0.9]
    assert 0.2 < len(alike) / len(judged) < 0.8
    found = finding_of(run, "likelihood_displacement")
    assert differences(displacement(judged, alike), numbers(found)) == []


def test_cut_completions_are_counted_in_the_shards(tmp_path, shards_writer, run_writer, texts):
    pairs = shards_writer(tmp_path / "shards", texts(400), cut_every=3)
    run = run_writer(tmp_path / "run", tmp_path / "shards", pairs)
    rows = rows_of(tmp_path / "shards" / "data")
    cut = [row["row"] for row in rows if row["chosen_truncated"] or row["rejected_truncated"]]
    found = finding_of(run, "truncated_completions")
    assert differences([wilson(len(cut) / len(rows), len(rows))], numbers(found)) == []
    assert set(found.rows) <= set(cut)


def dice(one, other):
    one, other = set(one.tolist()), set(other.tolist())
    return 2 * len(one & other) / (len(one) + len(other))
