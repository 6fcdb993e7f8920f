"""Where training ends with references from vLLM's cache, and with references from the trainer's own forward.

    python bench/cached_reference.py --model MODEL --output FOLDER

The task is that of examples/rounds: completions of story openings, ranked by VADER's compound score. The
same pairs are scored by vLLM and by the forward that trains (``--backend hf``), in fp32 and in bf16, and a
policy is trained from each with the same seeds. Reward and KL are of held-out openings, whose random streams
are the same for all policies; so the difference between both references is taken prompt by prompt. Samples of
all seeds are pooled, and intervals are over prompts.

Steps that are finished are not done again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import yaml

from dpo_opt.analysis.intervals import Interval, ratio_interval
from dpo_opt.analysis.load import scan_kl_samples
from dpo_opt.user_function import load_user_function

EXAMPLE = Path(__file__).parents[1] / "examples" / "rounds"
DTYPES, BACKENDS = ("float32", "bfloat16"), ("vllm", "hf")
SETTINGS = {"beta": 0.1, "learning_rate": 2e-4, "batch_size": 16, "num_train_epochs": 1}
SAMPLES, LONGEST = 8, 24
Floats = npt.NDArray[np.float64]


class Point(NamedTuple):
    """Where the policies of one reference ended, prompt by prompt in one order."""

    reward: Floats
    """(prompts,) mean over seeds and samples."""
    kl: Floats
    """(prompts,) in nats per completion."""


def main() -> None:
    """Do what was not done before, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    model, output = arguments.model.resolve(), arguments.output
    prepare(model, output)
    print("| dtype | reference | reward | KL, nats per completion |\n|---|---|---|---|")
    for dtype in DTYPES:
        cached, own = (point(model, output, dtype, backend, arguments.seeds) for backend in BACKENDS)
        print(f"| {dtype} | vLLM's cache | {_shown(cached.reward)} | {_shown(cached.kl)} |")
        print(f"| {dtype} | the trainer's forward | {_shown(own.reward)} | {_shown(own.kl)} |")
        reward, kl = _shown(cached.reward - own.reward), _shown(cached.kl - own.kl)
        print(f"| {dtype} | difference | {reward} | {kl} |", flush=True)


def prepare(model: Path, output: Path) -> None:
    """Openings, completions and their ranking: the same for all policies."""
    subprocess.run([sys.executable, EXAMPLE / "prompts.py", output], check=True)
    words = ["--num-samples", 3, "--max-new-tokens", LONGEST, "--backend", "hf"]
    command(
        "sample",
        "--model",
        model,
        "--prompts",
        output / "prompts.jsonl",
        "--output",
        output / "samples",
        *words,
    )
    judge = f"{EXAMPLE / 'sentiment.py'}:sentiment"
    command("judge", "--samples", output / "samples", "--output", output / "judged", "--function", judge)


def point(model: Path, output: Path, dtype: str, backend: str, seeds: list[int]) -> Point:
    """Score, train and sample with one engine, and read where it ended."""
    folder = output / f"{dtype}-{backend}"
    shards, sweep, grid = folder / "shards", folder / "sweep", folder / "grid.yaml"
    data = output / "judged" / "ranked.jsonl"
    words = ["--backend", backend, "--dtype", dtype]
    command("precompute", "--model", model, "--data", data, "--shards", shards, *words)
    grid.write_text(yaml.safe_dump({**SETTINGS, "dtype": dtype, "grid": {"seed": seeds}}), encoding="utf-8")
    command("sweep", "--shards", shards, "--model", model, "--config", grid, "--output-dir", sweep)
    words = ["--num-prompts", 36, "--num-samples", SAMPLES, "--max-new-tokens", LONGEST]
    words += ["--backend", "hf", "--dtype", "float32"]
    command("kl", sweep, "--prompts", output / "held_out.jsonl", *words)
    tables = sorted((sweep / "runs").glob("*/kl/final.parquet"))
    assert len(tables) == len(seeds), tables
    samples = pl.concat([scan_kl_samples(table) for table in tables]).collect()
    sentiment = load_user_function(f"{EXAMPLE / 'sentiment.py'}:sentiment")
    rewards = sentiment(samples["prompt"].to_list(), samples["completion"].to_list())
    by_prompt = (
        samples.select("prompt_id", pl.Series("reward", rewards), kl=pl.col("token_kl").list.sum())
        .group_by("prompt_id")
        .mean()
        .sort("prompt_id")
    )
    found = Point(by_prompt["reward"].to_numpy(), by_prompt["kl"].cast(pl.Float64).to_numpy())
    (folder / "point.json").write_text(json.dumps({name: v.tolist() for name, v in found._asdict().items()}))
    return found


def command(*words: object) -> None:
    """Run a command, whose errors and progress are seen."""
    subprocess.run([sys.executable, "-m", "dpo_opt", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def _shown(by_prompt: Floats) -> str:
    found: Interval = ratio_interval(numerators=by_prompt, denominators=np.ones(len(by_prompt)))
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


if __name__ == "__main__":
    main()
