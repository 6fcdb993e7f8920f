"""What a report takes in CPU seconds, and in which memory, from 100 thousand pairs to 10 million.

    python bench/analysis.py

A run is made up: short pairs whose log-probs are random, all of them scored, each trained on once, a part of
them evaluated five times. Its files have the row groups that the toolkit's own writers make. "CPU" is that of
all threads; pages of the files are in memory, as they are after training.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import run

from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.manifest import Manifest, ShardCommit, write_manifest
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA
from dpo_opt.schemas.shards import SHARD_SCHEMA, write_table
from dpo_opt.schemas.storage import sha256_file

PAIRS_PER_SHARD = 50_000
PAIRS_PER_PROMPT = 2
STEPS = 1000
EVALUATIONS = 5
HELD_OUT = 50
"""One prompt in this many is held out."""
FINGERPRINT = Fingerprint(
    schema_version=1,
    weights="a" * 64,
    model_config_digest="b" * 64,
    tokenizer="c" * 64,
    chat_template="none",
    text_to_ids="1",
    max_length=512,
    truncation="keep_start",
    engine="none",
    engine_version="1",
    strategy="random",
    dtype="float32",
    engine_options="{}",
)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where the runs are made, and kept for another time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        print(
            "| pairs | rows read | files, GB | CPU seconds | seconds | peak GB |\n|---|---|---|---|---|---|"
        )
        for rows in arguments.rows:
            run_dir = folder / str(rows) / "run"
            if not run_dir.exists():
                make_run(folder / str(rows), rows)
            _measure(run_dir, rows)


def _measure(run_dir: Path, rows: int) -> None:
    files = list(run_dir.parent.rglob("*.parquet"))
    # The children's times are of the whole bench so far, so the command says its own.
    code = (
        "import resource, sys; from pathlib import Path; from dpo_opt.analysis import report;"
        "report([Path(sys.argv[1])], Path(sys.argv[2]));"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)"
    )
    taken = run([sys.executable, "-c", code, str(run_dir), str(run_dir.parent / "report.html")])
    read = rows * 2 + (rows // HELD_OUT) * EVALUATIONS + rows
    size = sum(path.stat().st_size for path in files) / 1e9
    print(
        f"| {rows:,} | {read:,} | {size:.2f} | {float(taken.output):.1f} | {taken.seconds:.1f} "
        f"| {taken.gigabytes:.2f} |",
        flush=True,
    )


def make_run(folder: Path, rows: int) -> None:
    """Write ``shards/`` and ``run/`` of so many pairs into a folder, shard by shard."""
    run_dir = folder / "run"
    commits = [
        _write_part(folder, number, start, min(start + PAIRS_PER_SHARD, rows), steps_of=rows)
        for number, start in enumerate(range(0, rows, PAIRS_PER_SHARD))
    ]
    manifest = Manifest(
        fingerprint=FINGERPRINT,
        dataset_digest="d" * 64,
        rows=rows,
        kept=rows,
        dropped={},
        truncated=0,
        tokens=sum(c.tokens for c in commits),
        shards=commits,
        index_file="index.parquet",
        index_sha256="0" * 64,
        tokenizer_sha256="0" * 64,
    )
    write_manifest(folder / "shards", manifest)
    config = {"shards": str(folder / "shards"), "model": "none", "beta": 0.1, "loss_type": "sigmoid"}
    (run_dir / "config.resolved.yaml").write_text(json.dumps(config | {"eval_split": 1 / HELD_OUT}))
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    metrics = [
        json.dumps({"step": step, **dict.fromkeys(names, 0.69 - step / STEPS / 2)})
        for step in range(1, STEPS + 1)
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    (run_dir / "final").mkdir()


def _write_part(folder: Path, number: int, start: int, stop: int, *, steps_of: int) -> ShardCommit:
    """One shard, and its pairs' rows of ``scores/`` and ``pair_logps/``."""
    random = np.random.default_rng(number)
    rows = np.arange(start, stop)
    count = len(rows)
    prompts = rows // PAIRS_PER_PROMPT
    pair_ids, prompt_ids = _hex(rows, 1), _hex(prompts, 2)
    lengths = {name: random.integers(4, 13, count) for name in ("prompt", "chosen", "rejected")}
    logps = {s: -random.gamma(2, 0.7, lengths[s].sum()).astype(np.float32) for s in ("chosen", "rejected")}
    sums = {s: np.add.reduceat(logps[s].astype(np.float64), _offsets(lengths[s])[:-1]) for s in logps}
    table = pa.table(
        {
            "row": rows,
            "pair_id": pair_ids,
            "prompt_id": prompt_ids,
            "source": pa.array(np.array([f"source {i}" for i in range(8)])[prompts % 8]),
            "id": pa.nulls(count, pa.string()),
            **{
                f"{n}_ids": _lists(random.integers(0, 500, k.sum()), k, pa.int32())
                for n, k in lengths.items()
            },
            **{f"ref_{s}_token_logps": _lists(logps[s], lengths[s], pa.float32()) for s in logps},
            **{f"ref_{s}_logps": sums[s] for s in logps},
            **{f"{n}_length": pa.array(k, pa.int32()) for n, k in lengths.items()},
            **{f"{s}_truncated": np.zeros(count, bool) for s in logps},
            **{f"{s}_mask": pa.nulls(count, pa.list_(pa.bool_())) for s in logps},
        },
        schema=SHARD_SCHEMA,
    )
    file = f"data/{number:05d}-a.parquet"
    write_table(folder / "shards" / file, table)
    held_out = prompts % HELD_OUT == 0
    # Each step trains on pairs of every shard, as a shuffled stream does.
    order = random.permutation(count)
    visited = np.sort(random.integers(0, STEPS, count))
    columns = {"random": random, "pair_ids": pair_ids, "sums": sums, "lengths": lengths, "start": start}
    parts = [("pair_logps", "train", order, visited)]
    for evaluation in range(1, EVALUATIONS + 1):
        at = np.full(held_out.sum(), evaluation * STEPS // EVALUATIONS)
        parts.append(("pair_logps", "eval", np.flatnonzero(held_out), at))
    parts.append(("scores", "score", np.arange(count), np.full(count, STEPS)))
    for i, (name, phase, picked, steps) in enumerate(parts):
        values = _logps(picked, steps, phase=phase, **columns)
        path = folder / "run" / name / f"{number:05d}-{i}.parquet"
        write_table(path, values, row_group_rows=16_384)
    path = folder / "shards" / file
    return ShardCommit(
        shard=number,
        start=start,
        stop=stop,
        attempt="a",
        file=file,
        rows=count,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        dropped_file=f"dropped/{number:05d}-a.parquet",
        dropped_sha256="0" * 64,
        dropped={},
        rows_digest="d" * 64,
        truncated=0,
        tokens=int(sum(k.sum() for k in lengths.values())),
        unique_sequences=2 * count,
        fingerprint=FINGERPRINT,
    )


def _logps(picked, steps, *, phase, random, pair_ids, sums, lengths, start) -> pa.Table:  # type: ignore[no-untyped-def]
    """Rows of the table of pair log-probs: the rejected completion falls twice as fast as the chosen one."""
    progress = steps / STEPS
    drift = {"chosen": random.normal(-0.5, 2, len(picked)), "rejected": random.normal(-1, 2, len(picked))}
    nothing = pa.nulls(len(picked), pa.list_(pa.float32()))
    return pa.table(
        {
            "row": start + picked,
            "pair_id": pair_ids[picked],
            "step": steps,
            "epoch": progress,
            "phase": pa.array([phase] * len(picked)),
            "checkpoint": pa.array(["final" if phase == "score" else None] * len(picked), pa.string()),
            **{f"{s}_logps": sums[s][picked] + progress * drift[s] for s in sums},
            **{f"{s}_length": pa.array(lengths[s][picked], pa.int32()) for s in sums},
            **{f"{s}_token_logps": nothing for s in sums},
        },
        schema=PAIR_LOGPS_SCHEMA,
    )


def _hex(numbers: np.ndarray, salt: int) -> np.ndarray:  # type: ignore[type-arg]
    """Digests as the ids are: 32 hex digits that hardly compress, equal for equal numbers."""
    words = np.empty((len(numbers), 2), dtype=np.uint64)
    for i in range(2):
        mixed = (numbers.astype(np.uint64) + np.uint64(1 + i + 2 * salt)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
        words[:, i] = mixed * np.uint64(0xBF58476D1CE4E5B9)
    text = words.tobytes().hex()
    return np.array([text[i : i + 32] for i in range(0, len(text), 32)], dtype=object)


def _lists(values: np.ndarray, lengths: np.ndarray, kind: pa.DataType) -> pa.ListArray:  # type: ignore[type-arg]
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths), pa.int32()), pa.array(values, kind))


def _offsets(lengths: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([[0], np.cumsum(lengths)])


if __name__ == "__main__":
    main()
