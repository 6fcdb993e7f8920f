"""Prints reward and KL of the policy after each round, on openings that no round trained on.

``python measure.py MODEL FOLDER`` reads ``FOLDER/kl/round-*.parquet``, which ``dpo-opt kl`` wrote.
"""

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
from sentiment import sentiment
from transformers import AutoTokenizer

from dpo_opt.analysis import estimate_kl, scan_kl_samples


def reward(samples: pl.DataFrame, tokenizer) -> tuple[float, float]:
    """Mean reward of the samples, and its standard error with prompts as clusters."""
    prompts, completions = (
        tokenizer.batch_decode(samples[name].to_list(), skip_special_tokens=True)
        for name in ("prompt_ids", "completion_ids")
    )
    scores = samples.select("prompt_id", reward=pl.Series(sentiment(prompts, completions)))
    means = scores.group_by("prompt_id", maintain_order=True).agg(pl.mean("reward"))["reward"].to_numpy()
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


if __name__ == "__main__":
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for path in sorted((folder / "kl").glob("round-*.parquet")):
        mean, error = reward(scan_kl_samples(path).collect(), tokenizer)
        kl = estimate_kl(scan_kl_samples(path)).k1_sequence
        found.append({"policy": path.stem, "reward": mean, "standard_error": error, "kl": kl.value})
        print(f"{path.stem}  reward {mean:+.3f} (standard error {error:.3f})", end="  ")
        print(f"KL from the first model {kl.value:.2f} nats per completion ({kl.low:.2f} to {kl.high:.2f})")
    (folder / "rounds.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
