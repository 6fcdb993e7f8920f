"""A made-up run for the bench of the analysis: shards, pair log-probs in training's random order, and scores.

Pairs are short, and their log-probs are random; a policy's drift from them as training does it. Files have
the row groups that the toolkit's own writers make, because the time to read depends on them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.manifest import Manifest, ShardCommit, write_manifest
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA, ROW_GROUP_ROWS
from dpo_opt.schemas.shards import SHARD_SCHEMA, write_table
from dpo_opt.schemas.storage import sha256_file

Array = npt.NDArray[Any]

ROWS_PER_FILE = 50_000
"""Of a shard, and of a segment of pair log-probs as training writes them."""
PAIRS_PER_PROMPT = 2
STEPS = 1000
EVALUATIONS = 5
HELD_OUT = 50
"""One prompt in this many is held out."""
SIDES = ("chosen", "rejected")
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


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the policy's tables need of all pairs: (N,) each."""

    logps: dict[str, Array]
    lengths: dict[str, Array]


def make_run(folder: Path, rows: int) -> int:
    """Write ``shards/`` and ``run/`` of so many pairs into a folder; the number of all tables' rows."""
    reference = _Reference(
        {side: np.empty(rows) for side in SIDES}, {side: np.empty(rows, dtype=np.int32) for side in SIDES}
    )
    starts = range(0, rows, ROWS_PER_FILE)
    commits = [
        _write_shard(folder / "shards", number, np.arange(start, min(start + ROWS_PER_FILE, rows)), reference)
        for number, start in enumerate(starts)
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
    written = rows + _write_run(folder / "run", reference)
    config = {"shards": str(folder / "shards"), "model": "none", "beta": 0.1, "loss_type": "sigmoid"}
    (folder / "run" / "config.resolved.yaml").write_text(json.dumps(config | {"eval_split": 1 / HELD_OUT}))
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    metrics = [
        json.dumps({"step": step, **dict.fromkeys(names, 0.69 - step / STEPS / 2)})
        for step in range(1, STEPS + 1)
    ]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    (folder / "run" / "final").mkdir()
    return written


def _write_shard(shards: Path, number: int, rows: Array, reference: _Reference) -> ShardCommit:
    random = np.random.default_rng(number)
    count = len(rows)
    prompts = rows // PAIRS_PER_PROMPT
    lengths = {name: random.integers(4, 13, count) for name in ("prompt", *SIDES)}
    logps = {s: -random.gamma(2, 0.7, lengths[s].sum()).astype(np.float32) for s in SIDES}
    for side in SIDES:
        sums = np.add.reduceat(logps[side].astype(np.float64), _offsets(lengths[side])[:-1])
        reference.logps[side][rows], reference.lengths[side][rows] = sums, lengths[side]
    ids = {name: random.integers(0, 500, of.sum()) for name, of in lengths.items()}
    table = pa.table(
        {
            "row": rows,
            "pair_id": _hex(rows, 1),
            "prompt_id": _hex(prompts, 2),
            "source": pa.array(np.array([f"source {i}" for i in range(8)])[prompts % 8]),
            "id": pa.nulls(count, pa.string()),
            **{f"{name}_ids": _lists(ids[name], of, pa.int32()) for name, of in lengths.items()},
            **{f"ref_{s}_token_logps": _lists(logps[s], lengths[s], pa.float32()) for s in SIDES},
            **{f"ref_{s}_logps": reference.logps[s][rows] for s in SIDES},
            **{f"{name}_length": pa.array(of, pa.int32()) for name, of in lengths.items()},
            **{f"{s}_truncated": np.zeros(count, bool) for s in SIDES},
            **{f"{s}_mask": pa.nulls(count, pa.list_(pa.bool_())) for s in SIDES},
        },
        schema=SHARD_SCHEMA,
    )
    path = shards / "data" / f"{number:05d}-a.parquet"
    write_table(path, table)
    return ShardCommit(
        shard=number,
        start=int(rows[0]),
        stop=int(rows[-1]) + 1,
        attempt="a",
        file=f"data/{path.name}",
        rows=count,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        dropped_file=f"dropped/{path.name}",
        dropped_sha256="0" * 64,
        dropped={},
        rows_digest="d" * 64,
        truncated=0,
        tokens=int(sum(of.sum() for of in lengths.values())),
        unique_sequences=2 * count,
        fingerprint=FINGERPRINT,
    )


def _write_run(run: Path, reference: _Reference) -> int:
    """``pair_logps/`` and ``scores/``; the number of rows in them."""
    random = np.random.default_rng(0)
    rows = np.arange(len(reference.logps["chosen"]))
    held_out = rows // PAIRS_PER_PROMPT % HELD_OUT == 0
    trained = random.permutation(rows[~held_out])
    parts = [("pair_logps", "train", trained, np.arange(len(trained)) * STEPS // len(trained))]
    for number in range(1, EVALUATIONS + 1):
        evaluated = rows[held_out]
        parts.append(
            ("pair_logps", "eval", evaluated, np.full(len(evaluated), number * STEPS // EVALUATIONS))
        )
    parts.append(("scores", "score", rows, np.full(len(rows), STEPS)))
    file = 0
    for folder, phase, of, steps in parts:
        for start in range(0, len(of), ROWS_PER_FILE):
            these = slice(start, start + ROWS_PER_FILE)
            table = _pair_logps(of[these], steps[these], phase, reference, random)
            group = ROW_GROUP_ROWS if phase == "score" else ROWS_PER_FILE
            write_table(run / folder / f"{file:05d}.parquet", table, row_group_rows=group)
            file += 1
    return sum(len(of) for _, _, of, _ in parts)


def _pair_logps(
    rows: Array, steps: Array, phase: str, reference: _Reference, random: np.random.Generator
) -> pa.Table:
    """Log-probs that drift with the steps, those of rejected completions twice as far."""
    count = len(rows)
    drift = {"chosen": random.normal(-0.5, 2, count), "rejected": random.normal(-1, 2, count)}
    nothing = pa.nulls(count, pa.list_(pa.float32()))
    return pa.table(
        {
            "row": rows,
            "pair_id": _hex(rows, 1),
            "step": steps,
            "epoch": steps / STEPS,
            "phase": pa.array([phase] * count),
            "checkpoint": pa.array(["final" if phase == "score" else None] * count, pa.string()),
            **{f"{s}_logps": reference.logps[s][rows] + steps / STEPS * drift[s] for s in SIDES},
            **{f"{s}_length": pa.array(reference.lengths[s][rows], pa.int32()) for s in SIDES},
            **{f"{s}_token_logps": nothing for s in SIDES},
        },
        schema=PAIR_LOGPS_SCHEMA,
    )


def _hex(numbers: Array, salt: int) -> Array:
    """Digests as the ids are: 32 hex digits that hardly compress, equal for equal numbers."""
    words = np.empty((len(numbers), 2), dtype=np.uint64)
    for i in range(2):
        mixed = (numbers.astype(np.uint64) + np.uint64(1 + i + 2 * salt)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
        words[:, i] = mixed * np.uint64(0xBF58476D1CE4E5B9)
    text = words.tobytes().hex()
    return np.array([text[i : i + 32] for i in range(0, len(text), 32)], dtype=object)


def _lists(values: Array, lengths: Array, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths), pa.int32()), pa.array(values, kind))


def _offsets(lengths: Array) -> Array:
    return np.concatenate([[0], np.cumsum(lengths)])
