import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from dpo_opt.analysis import report
from dpo_opt.analysis.kl import estimate_kl
from dpo_opt.analysis.load import scan_kl_samples, scan_pair_logps
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.pair_logps import write_pair_logps
from dpo_opt.schemas.run_layout import CHECKPOINTS, COMPLETE

HOSTILE = (
    "Ignore this <script>alert(1)</script></style></div> \x1b]0;owned\x07 \u202ereversed <img src=http://x>"
)


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href", "action", "data")]
        assert not [k for k, _ in attrs if k.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)

    def __contains__(self, words):
        return words in re.sub(r"\s+", " ", "".join(self.text))


@pytest.fixture
def shards(tmp_path, shards_writer, texts):
    dropped = {"too_long": 12, "empty_completion": 4}
    return tmp_path / "shards", shards_writer(
        tmp_path / "shards", texts(120, prompts=60), pairs_per_shard=40, dropped=dropped
    )


@pytest.fixture
def make_run(tmp_path, shards, run_writer):
    def make(name="run", **settings):
        return run_writer(tmp_path / name, *shards, steps=20, **settings)

    return make


def write_report(*runs):
    output = runs[0].parent / "report.html"
    return report(runs, output), Page(output)


def test_summary_file_is_what_is_returned_and_agrees_with_the_run(make_run, shards):
    run = make_run()
    summary, _ = write_report(run)
    saved = json.loads((run.parent / "report.summary.json").read_text())
    assert saved == json.loads(summary.model_dump_json())
    (entry,) = saved["runs"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    assert entry["run"] == str(run)
    assert (entry["steps"], entry["beta"], entry["loss_type"]) == (20, 0.1, "sigmoid")
    assert entry["first_loss"] == train[0]["loss"]
    assert entry["final"] == train[-1]
    assert entry["eval"] == [line for line in lines if "eval_loss" in line][-1]
    assert entry["parity"]["ok"] is True
    right = [p.ref_chosen_logps > p.ref_rejected_logps for p in shards[1]]
    assert entry["reference_ranking_accuracy"] == pytest.approx(sum(right) / 120)


def test_several_losses_are_named_as_their_sum(make_run):
    run = make_run()
    config = yaml.safe_load((run / "config.resolved.yaml").read_text())
    config |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    summary, page = write_report(run)
    assert summary.runs[0].loss_type == "sigmoid + sft"
    assert "sigmoid + sft, beta 0.1" in page


def test_held_out_pairs_agree_with_the_trainers_own_last_evaluation(make_run):
    summary, _ = write_report(make_run())
    entry = summary.runs[0]
    assert entry.held_out.reward_accuracy == pytest.approx(entry.eval["eval_rewards/accuracies"])
    assert entry.held_out.mean_margin == pytest.approx(entry.eval["eval_rewards/margins"])
    assert entry.held_out.reward_accuracy_low < entry.held_out.reward_accuracy
    assert entry.scored.pairs == 120
    assert entry.held_out.pairs < 120


def test_kl_in_the_summary_is_the_estimate(make_run):
    run = make_run()
    entry = write_report(run)[0].runs[0]
    estimate = estimate_kl(scan_kl_samples(run))
    assert entry.kl.k1_sequence.value == pytest.approx(estimate.k1_sequence.value)
    assert (entry.kl.samples, entry.kl.file) == (80, "final.parquet")


def test_page_shows_every_part(make_run):
    _, page = write_report(make_run())
    for words in (
        "136: 120 pairs kept, 4 dropped (empty_completion), 12 dropped (too_long)",
        "cached and recomputed log-probs agree",
        "Accuracy ends at",
        "Ranked correctly:",
        "When both go down.",
        "2410.08847",
        "Loss ends at",
        "The longer one is chosen in",
        "By source",
        "exact steps per token",
        "This is not a KL",
        "The 6 hardest pairs",
    ):
        assert words in page
    assert page.tags.count("svg") == 12


def test_every_figure_states_n(make_run):
    run = make_run()
    write_report(run)
    captions = re.findall(
        r"<figcaption>(.*?)</figcaption>", (run.parent / "report.html").read_text(), re.DOTALL
    )
    assert len(captions) == 12
    assert all("Healthy:" in caption for caption in captions)
    assert all(re.search(r"n = \d", caption) for caption in captions)


def test_context_inside_a_completion_is_marked(tmp_path, shards_writer, run_writer, texts):
    made = shards_writer(tmp_path / "s", texts(20), masked=True)
    run = run_writer(tmp_path / "run", tmp_path / "s", made, steps=5, eval_every=0)
    _, page = write_report(run)
    text = (tmp_path / "report.html").read_text()
    assert "is context inside a completion" in page
    for article in text.split('<article class="pair"')[1:]:
        row = int(re.search(r"<b>row ([\d,]+)</b>", article)[1])
        chosen, rejected = (
            re.search(
                rf'<div class="{side}">.*?<div class="text" dir="auto">(.*?)</div>', article, re.DOTALL
            )[1]
            for side in ("chosen", "rejected")
        )
        whole = texts(20)[row][1]  # a token for each letter
        half = len(made[row].chosen_ids) // 2
        marked = f'<span class="context">{whole[:half]}</span>{whole[half:]}'
        assert chosen == (marked if row % 2 else whole)
        assert "context" not in rejected


def test_nothing_is_said_of_context_where_there_is_none(make_run):
    _, page = write_report(make_run())
    assert "is context inside a completion" not in page


def test_page_has_no_script_and_reaches_for_nothing(make_run):
    run = make_run()
    _, page = write_report(run)
    text = (run.parent / "report.html").read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert not {"script", "iframe", "object", "embed", "link", "form", "base", "img"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_hostile_text_ends_escaped(tmp_path, shards_writer, run_writer, texts):
    pairs = texts(20)
    pairs = [(HOSTILE, chosen + HOSTILE, rejected + HOSTILE) for _, chosen, rejected in pairs]
    made = shards_writer(tmp_path / "s", pairs, sources=("<b onclick=x>\x1b[2Jsource",))
    run = run_writer(tmp_path / "<script>alert(2)<", tmp_path / "s", made, steps=5, eval_every=0)
    _, page = write_report(run)
    text = (tmp_path / "report.html").read_text()
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "Ignore this <script>alert(1)</script></style></div> ]0;owned reversed <img src=http://x>" in page
    assert "<b onclick=x>[2Jsource" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_dollars_and_angles_in_a_run_name_do_no_harm(make_run):
    summary, page = write_report(make_run("a $x^{2$ & <b>"), make_run("b"))
    assert len(summary.runs) == 2
    assert "a $x^{2$ & <b>" in page


def test_several_runs_are_compared_first(make_run):
    summary, page = write_report(make_run("one"), make_run("two", beta=0.3))
    assert [entry.beta for entry in summary.runs] == [0.1, 0.3]
    assert "Comparison" in page
    assert page.links[:2] == ["#run-1", "#run-2"]
    _, page = write_report(make_run("three"))
    assert "Comparison" not in page


def test_without_scores_the_last_evaluation_stands_in_and_the_command_is_shown(make_run):
    run = make_run(scored=False)
    summary, page = write_report(run)
    assert summary.runs[0].scored is None
    assert summary.runs[0].held_out.mean_margin == pytest.approx(summary.runs[0].eval["eval_rewards/margins"])
    assert "the held-out pairs at the last evaluation (step 20)" in page
    assert f"dpo-opt score --shards {run.parent / 'shards'} --model {run / 'final'}" in page


def test_a_bare_run_says_what_is_missing_and_how_to_get_it(make_run):
    run = make_run(scored=False, kl=False, parity=False, eval_every=0)
    summary, page = write_report(run)
    entry = summary.runs[0]
    assert (entry.scored, entry.held_out, entry.kl, entry.parity, entry.eval) == (None, None, None, None, {})
    assert "No pair's final log-probs are known." in page
    assert "dpo-opt score --shards" in page
    assert f"dpo-opt kl {run} --prompts" in page
    assert "no parity.json" in page


def test_a_run_that_has_only_begun_is_shown(make_run):
    run = make_run(scored=False, kl=False, parity=False)
    (run / "metrics.jsonl").unlink()
    for file in (run / "pair_logps").iterdir():
        file.unlink()
    summary, page = write_report(run)
    assert summary.runs[0].steps is None
    assert "Nothing was logged yet" in page
    shutil.rmtree(run / "final")
    _, page = write_report(run)
    score = f"dpo-opt score --shards {run.parent / 'shards'} --model {run / 'final'}"
    assert f"dpo-opt train --config {run / 'config.resolved.yaml'} --resume && {score}" in page
    assert "There are no log-probs of single pairs" in page


def test_a_line_cut_off_by_a_crash_is_left_out_and_repeated_steps_count_once(make_run):
    run = make_run()
    metrics = run / "metrics.jsonl"
    again = json.dumps({"step": 20, "epoch": 1.5, "loss": 0.125})
    metrics.write_text(metrics.read_text() + again + "\n" + '{"step": 21, "lo')
    entry = write_report(run)[0].runs[0]
    assert (entry.steps, entry.final["loss"]) == (20, 0.125)


def test_a_damaged_line_in_the_middle_is_named(make_run):
    run = make_run()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = "{{{"
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:4"):
        write_report(run)


def test_a_diverged_run_has_nulls_and_no_nan(make_run):
    run = make_run()
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 21, "epoch": 2.0, "loss": NaN, "rewards/margins": Infinity}\n')
    write_report(run)
    text = (run.parent / "report.summary.json").read_text()
    entry = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["runs"][0]
    assert entry["final"]["loss"] is None
    assert entry["final"]["step"] == 21


def test_the_checkpoint_that_was_trained_longest_is_the_result(make_run, shards, fake_policy):
    run = make_run()
    last = write_report(run)[0].runs[0].scored
    early = fake_policy(shards[1]).rows(range(120), step=5, steps=20, phase="score")
    write_pair_logps(run / "scores" / "step-5.parquet", [early])
    assert write_report(run)[0].runs[0].scored == last


def test_scores_of_other_shards_are_refused(tmp_path, make_run, shards_writer, texts, fake_policy):
    run = make_run()
    other = shards_writer(tmp_path / "other", texts(140)[20:])
    rows = fake_policy(other).rows(range(120), step=20, steps=20, phase="score")
    write_pair_logps(run / "scores" / "final.parquet", [rows])
    with pytest.raises(DataError, match="another pair at this row"):
        write_report(run)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError) as error:
        report([tmp_path], tmp_path / "report.html")
    assert "there is no config.resolved.yaml" in str(error.value)
    assert error.value.fix == "pass the folder that `dpo-opt train` had as its --output-dir"
    with pytest.raises(ConfigError, match="no such folder"):
        report([tmp_path / "nowhere"], tmp_path / "report.html")


def test_relative_shards_are_found_from_the_working_folder_or_beside_the_run(make_run, tmp_path, monkeypatch):
    run = make_run()
    config = (run / "config.resolved.yaml").read_text()
    (run / "config.resolved.yaml").write_text(config.replace(str(tmp_path / "shards"), "shards"))
    monkeypatch.chdir("/")
    assert write_report(run)[0].runs[0].scored.pairs == 120
    monkeypatch.chdir(tmp_path)
    assert report([Path("run")], tmp_path / "report.html").runs[0].scored.pairs == 120


def test_moved_shards_are_named_with_the_places_looked_at(make_run, tmp_path):
    run = make_run()
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="were not found"):
        write_report(run)


def test_without_the_tokenizer_ids_are_shown_with_a_line_saying_so(make_run, tmp_path, shards):
    (tmp_path / "shards" / "tokenizer" / "tokenizer.json").unlink()
    _, page = write_report(make_run())
    assert "Token ids are shown because there is no tokenizer/tokenizer.json" in page
    ids = shards[1][0].prompt_ids.tolist()[:5]
    assert " ".join(map(str, ids)) in page


def test_a_second_page_leaves_the_numbers_of_the_first(make_run, tmp_path):
    report([make_run("one")], tmp_path / "one.html")
    first = (tmp_path / "one.summary.json").read_text()
    report([make_run("two", beta=0.3)], tmp_path / "two.html")
    assert (tmp_path / "one.summary.json").read_text() == first
    assert "one.summary.json, next to this page" in Page(tmp_path / "one.html")


def test_a_folder_is_no_page(make_run, tmp_path):
    with pytest.raises(ConfigError, match="--output is a folder"):
        report([make_run()], tmp_path)


def test_a_run_that_was_stopped_says_so_and_how_to_go_on(make_run):
    run = make_run(finished=False, scored=False)
    for name in ("step-00000005", "step-00000010", "step-00000010-keep", "step-00000020"):
        (run / CHECKPOINTS / name).mkdir(parents=True)
        (run / CHECKPOINTS / name / COMPLETE).touch()
    # The newest is being removed, and the user's own copy is none of the run's.
    (run / CHECKPOINTS / "step-00000020" / COMPLETE).unlink()
    summary, page = write_report(run)
    assert not summary.runs[0].finished
    assert f"dpo-opt train --config {run / 'config.resolved.yaml'} --resume" in page
    assert f"--model {run / CHECKPOINTS / 'step-00000010'} --output" in page
    assert "is not finished" not in write_report(make_run("done"))[1]


def test_margins_of_the_size_of_rounding_are_counted(make_run, shards):
    run = make_run()
    parity = json.loads((run / "parity.json").read_text())
    (run / "parity.json").write_text(json.dumps(parity | {"margin_sd": 0.5, "floor_margin_sd": 1.0}))
    summary, page = write_report(run)
    scores = scan_pair_logps(run / "scores" / "final.parquet").collect()
    gained = (scores["chosen_logps"] - scores["rejected_logps"]).to_numpy()
    reference = np.array([p.ref_chosen_logps - p.ref_rejected_logps for p in shards[1]])
    near = np.abs(gained - reference) < 2
    assert summary.runs[0].scored.within_noise == near.sum() > 0
    held_out = [int(p.prompt_id, 16) % 5 == 0 for p in shards[1]]
    assert f"{near[held_out].sum()} of {sum(held_out)} held-out pairs have a margin below 0.2" in page


def test_what_training_found_otherwise_for_the_same_pairs_is_said(make_run):
    run = make_run()
    assert "training itself found" not in write_report(run)[1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["eval_rewards/accuracies"] = 0.123
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, page = write_report(run)
    assert "At step 20 training itself found a reward accuracy of 12.3%" in page
    assert "It computes in bfloat16; this table is in float32" in page


def test_sources_and_lengths_are_those_of_the_held_out_pairs(make_run, shards):
    run = make_run()
    _, page = write_report(run)
    held_out = [p for p in shards[1] if int(p.prompt_id, 16) % 5 == 0]
    longer = [len(p.chosen_ids) > len(p.rejected_ids) for p in held_out]
    unequal = sum(len(p.chosen_ids) != len(p.rejected_ids) for p in held_out)
    assert f"is chosen in {sum(longer) / unequal:.1%} of {unequal} pairs of unequal length" in page
    assert "n counts held-out pairs" in page


def test_samples_of_the_policy_are_shown(make_run):
    _, page = write_report(make_run())
    assert "The first sample of 4 prompts" in page
    assert "Sample, 48 tokens" in page


def test_runs_are_compared_pair_by_pair(make_run, shards):
    summary, page = write_report(make_run("one"), make_run("two", strength=-1.0))
    (found,) = summary.differences
    held_out = [p.row for p in shards[1] if int(p.prompt_id, 16) % 5 == 0]
    scores = [
        scan_pair_logps(page_run / "scores" / "final.parquet").collect()[held_out]
        for page_run in (shards[0].parent / "one", shards[0].parent / "two")
    ]
    reference = np.array([p.ref_chosen_logps - p.ref_rejected_logps for p in shards[1]])[held_out]
    one, two = ((s["chosen_logps"] - s["rejected_logps"]).to_numpy() > reference for s in scores)
    assert (found.run, found.pairs, found.held_out) == ("two", len(held_out), True)
    assert found.reward_accuracy.value == pytest.approx(two.mean() - one.mean())
    assert found.reward_accuracy.low < found.reward_accuracy.value < found.reward_accuracy.high < 0
    assert "Differences from one, pair by pair" in page


def test_equal_runs_differ_by_nothing(make_run):
    (found,) = write_report(make_run("one"), make_run("two"))[0].differences
    assert (found.reward_accuracy.value, found.reward_accuracy.low, found.reward_accuracy.high) == (0, 0, 0)


def test_runs_that_are_not_compared_are_named_with_the_reason(
    make_run, run_writer, shards_writer, texts, tmp_path
):
    shards = shards_writer(tmp_path / "longer" / "shards", texts(60), seed=5)
    apart = run_writer(tmp_path / "longer" / "run", tmp_path / "longer" / "shards", shards, steps=20)
    unknown = make_run("unknown", scored=False, eval_every=0)
    summary, page = write_report(make_run(), apart, unknown)
    assert summary.differences == []
    first = f"{tmp_path.name}/run"
    others = f"it was trained on other shards ({tmp_path}/longer/shards, not {tmp_path}/shards)"
    nothing = "no pair's final log-probs are known of unknown"
    assert [entry.model_dump() for entry in summary.not_compared] == [
        {"run": "longer/run", "reason": others},
        {"run": "unknown", "reason": nothing},
    ]
    for entry in summary.not_compared:
        assert f"{entry.run} is not compared with {first} pair by pair: {entry.reason}." in page


def test_a_damaged_score_file_is_an_explained_error(make_run):
    run = make_run()
    file = run / "scores" / "final.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[40:400] = bytes(360)
    file.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged"):
        write_report(run)
    shutil.rmtree(run / "scores")
    for table in (run / "pair_logps").iterdir():
        pl.read_parquet(table).with_columns(chosen_logps=pl.lit("x")).write_parquet(table)
    with pytest.raises(DataError, match="damaged"):
        write_report(run)


def test_importing_the_package_loads_no_polars():
    code = "import sys, dpo_opt.analysis; sys.exit('polars' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_pair_is_written_with_its_quadrants(make_run, shards, tmp_path):
    run = make_run()
    report([run], tmp_path / "report.html", pairs=tmp_path / "pairs.parquet")
    written = pl.read_parquet(tmp_path / "pairs.parquet").sort("row")
    scores = scan_pair_logps(run / "scores" / "final.parquet").collect().sort("row")
    before = np.array([p.ref_chosen_logps - p.ref_rejected_logps for p in shards[1]])
    after = (scores["chosen_logps"] - scores["rejected_logps"]).to_numpy()
    names = np.array([["stayed wrong", "turned right"], ["turned wrong", "stayed right"]])
    assert written["pair_id"].to_list() == [p.pair_id for p in shards[1]]
    assert written["reference_margin"].to_numpy() == pytest.approx(before)
    assert written["ranking"].to_list() == names[(before > 0).astype(int), (after > 0).astype(int)].tolist()
    assert written["margin"].to_numpy() == pytest.approx(0.1 * (after - before))


def test_pairs_that_are_not_known_are_asked_for_with_the_command(make_run, tmp_path):
    run = make_run(scored=False, eval_every=0)
    with pytest.raises(ConfigError, match="no pairs to write"):
        report([run], tmp_path / "report.html", pairs=tmp_path / "pairs.parquet")
    assert not (tmp_path / "pairs.parquet").exists()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["report.html", "report.summary.json"])
def test_pairs_never_go_where_the_page_or_its_numbers_go(make_run, tmp_path, name):
    with pytest.raises(ConfigError, match="--pairs names a file"):
        report([make_run()], tmp_path / "report.html", pairs=tmp_path / name)
    assert not (tmp_path / name).exists()


def test_runs_are_drawn_over_one_another_where_both_were_evaluated(make_run):
    _, page = write_report(make_run("one"), make_run("two", beta=0.3))
    assert "2 runs, held-out pairs of each, aligned by step" in page
    assert "aligned by KL" not in page  # its tables do not say a step
    _, page = write_report(make_run("three"), make_run("four", eval_every=0))
    assert "aligned by" not in page
