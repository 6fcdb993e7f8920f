"""Small real runs, by the schemas' own writers: shards, metrics, pair log-probs, scores and samples."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml
from fakes import FINGERPRINT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dpo_opt.schemas.kl_samples import KLSample, write_kl_samples
from dpo_opt.schemas.manifest import Manifest, ShardCommit, write_manifest
from dpo_opt.schemas.pair_logps import PairLogps, write_pair_logps
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shards import write_shard
from dpo_opt.schemas.storage import sha256_file


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that any text survives the way to ids and back."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_shards(
    path: Path,
    texts: Sequence[tuple[str, str, str]],
    *,
    seed: int = 0,
    pairs_per_shard: int = 100,
    tokenizer: Tokenizer | None = None,
    sources: Sequence[str | None] = ("helpful", "harmless"),
    dropped: dict[str, int] | None = None,
    masked: bool = False,
    cut_every: int = 17,
) -> list[ScoredPair]:
    """A finalized folder; returns its pairs. Log-probs are random and longer completions less likely.

    With ``masked``, every other chosen completion counts from its middle on. One in ``cut_every`` was cut.
    """
    tokenizer = tokenizer or byte_tokenizer()
    random = np.random.default_rng(seed)
    pairs = []
    for row, (prompt, chosen, rejected) in enumerate(texts):
        p, c, r = (np.array(tokenizer.encode(t).ids, dtype=np.int32) for t in (prompt, chosen, rejected))
        level = random.normal(1.5, 0.25)
        pairs.append(
            ScoredPair(
                row=row,
                source=sources[row % len(sources)],
                prompt_ids=p,
                chosen_ids=c,
                rejected_ids=r,
                chosen_truncated=row % cut_every == 0,
                chosen_mask=np.arange(len(c)) >= len(c) // 2 if masked and row % 2 else None,
                ref_chosen_token_logps=-random.gamma(2, level / 2, len(c)).astype(np.float32),
                ref_rejected_token_logps=-random.gamma(2, level / 2, len(r)).astype(np.float32),
            )
        )
    commits = []
    for shard, start in enumerate(range(0, max(len(pairs), 1), pairs_per_shard)):
        part = pairs[start : start + pairs_per_shard]
        name = f"data/{shard:05d}-a.parquet"
        write_shard(path / name, part, fingerprint=FINGERPRINT, shard=shard)
        commits.append(
            ShardCommit(
                shard=shard,
                start=start,
                stop=start + len(part),
                attempt="a",
                file=name,
                rows=len(part),
                bytes=(path / name).stat().st_size,
                sha256=sha256_file(path / name),
                dropped_file=f"dropped/{shard:05d}-a.parquet",
                dropped_sha256="0" * 64,
                dropped={},
                rows_digest="d" * 64,
                truncated=sum(q.chosen_truncated for q in part),
                tokens=0,
                unique_sequences=2 * len(part),
                fingerprint=FINGERPRINT,
            )
        )
    dropped = dropped or {}
    tokens = sum(2 * len(q.prompt_ids) + len(q.chosen_ids) + len(q.rejected_ids) for q in pairs)
    write_manifest(
        path,
        Manifest(
            fingerprint=FINGERPRINT,
            dataset_digest="d" * 64,
            rows=len(pairs) + sum(dropped.values()),
            kept=len(pairs),
            dropped=dropped,
            truncated=sum(q.chosen_truncated for q in pairs),
            tokens=tokens,
            shards=commits,
            index_file="index.parquet",
            index_sha256="0" * 64,
            tokenizer_sha256="0" * 64,
        ),
    )
    (path / "tokenizer").mkdir()
    tokenizer.save(str(path / "tokenizer" / "tokenizer.json"))
    return pairs


@dataclass
class FakePolicy:
    """Log-probs that drift from the reference's as training does: rejected down fast, chosen down slowly."""

    pairs: Sequence[ScoredPair]
    seed: int = 1
    strength: float = 1.0
    drift: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        length = np.array([[len(p.chosen_ids), len(p.rejected_ids)] for p in self.pairs])
        pull = random.normal([-0.03, -0.11], 0.09, (len(self.pairs), 2))
        self.drift = self.strength * pull * np.minimum(length, 150)

    def logps(self, row: int, *, progress: float) -> tuple[float, float]:
        pair, moved = self.pairs[row], (1 - math.exp(-2.5 * progress)) * self.drift[row]
        return min(pair.ref_chosen_logps + moved[0], 0.0), min(pair.ref_rejected_logps + moved[1], 0.0)

    def rows(self, rows: Sequence[int], *, step: int, steps: int, phase: str) -> list[PairLogps]:
        found = []
        for row in rows:
            pair = self.pairs[row]
            chosen, rejected = self.logps(row, progress=step / steps)
            found.append(
                PairLogps(
                    row=row,
                    pair_id=pair.pair_id,
                    step=step,
                    epoch=step / steps,
                    phase=phase,
                    checkpoint="final" if phase == "score" else None,
                    chosen_logps=chosen,
                    rejected_logps=rejected,
                    chosen_length=len(pair.chosen_ids),
                    rejected_length=len(pair.rejected_ids),
                )
            )
        return found


def write_run(
    path: Path,
    shards: Path,
    pairs: Sequence[ScoredPair],
    *,
    steps: int = 60,
    batch_size: int = 8,
    beta: float = 0.1,
    eval_every: int = 10,
    strength: float = 1.0,
    scored: bool = True,
    kl: bool = True,
    parity: bool = True,
    finished: bool = True,
) -> Path:
    """A run on the pairs; every fifth prompt is held out."""
    policy = FakePolicy(pairs, strength=strength)
    held_out = [p.row for p in pairs if int(p.prompt_id, 16) % 5 == 0] if eval_every else []
    trained = [p.row for p in pairs if p.row not in set(held_out)]
    path.mkdir(parents=True)
    config = {
        "shards": str(shards),
        "model": "models/base-7b",
        "output_dir": str(path),
        "beta": beta,
        "loss_type": "sigmoid",
        "label_smoothing": 0.0,
        "learning_rate": 5e-7,
        "batch_size": batch_size,
        "num_train_epochs": 2,
        "max_steps": None,
        "seed": 42,
        "eval_split": 0.2 if eval_every else 0.0,
        "dtype": "bfloat16",
        "optim": "adamw",
    }
    (path / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    random = np.random.default_rng(0)
    lines, rows = [], []
    for step in range(1, steps + 1):
        batch = random.choice(trained, min(batch_size, len(trained)), replace=False).tolist()
        values = policy.rows(batch, step=step - 1, steps=steps, phase="train")
        rows += values
        epoch = round(step * batch_size / len(trained), 4)
        speed = {"learning_rate": 5e-7, "grad_norm": 3.0, "num_tokens": 900 * step, "pairs_per_second": 5.0}
        lines.append({"step": step, "epoch": epoch, **metrics(values, pairs, beta), **speed})
        if held_out and (step % eval_every == 0 or step == steps):
            values = policy.rows(held_out, step=step, steps=steps, phase="eval")
            rows += values
            evaluated = {f"eval_{k}": v for k, v in metrics(values, pairs, beta).items()}
            lines.append({"step": step, "epoch": epoch, **evaluated})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_pair_logps(path / "pair_logps" / "00000.parquet", [rows[: len(rows) // 2]])
    write_pair_logps(path / "pair_logps" / "00001.parquet", [rows[len(rows) // 2 :]])
    if scored:
        every = [p.row for p in pairs]
        scores = policy.rows(every, step=steps, steps=steps, phase="score")
        write_pair_logps(path / "scores" / "final.parquet", [scores], dtype="float32")
    if kl:
        write_kl_samples(path / "kl" / "final.parquet", sampled(pairs[:40]))
    if parity:
        measured = {"pairs": 32, "tokens": 4096, "mean": 1e-4, "sd": 0.031, "p99": 0.11, "max": 0.6}
        (path / "parity.json").write_text(json.dumps({**measured, "floor_sd": 0.02, "ok": True}))
    if finished:
        (path / "final").mkdir()
    return path


def metrics(rows: Sequence[PairLogps], pairs: Sequence[ScoredPair], beta: float) -> dict[str, float]:
    """What training logs of a batch, computed from its definition."""
    chosen = np.array([beta * (r.chosen_logps - pairs[r.row].ref_chosen_logps) for r in rows])
    rejected = np.array([beta * (r.rejected_logps - pairs[r.row].ref_rejected_logps) for r in rows])
    return {
        "loss": float(np.log1p(np.exp(-(chosen - rejected))).mean()),
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/accuracies": float((chosen > rejected).mean()),
        "logps/chosen": float(np.mean([r.chosen_logps for r in rows])),
        "logps/rejected": float(np.mean([r.rejected_logps for r in rows])),
    }


def sampled(pairs: Sequence[ScoredPair]) -> list[KLSample]:
    """Two samples for each prompt."""
    random = np.random.default_rng(3)
    samples = []
    for pair in pairs:
        for number in range(2):
            ref = -random.gamma(2, 0.7, 48).astype(np.float32)
            policy = np.minimum(ref + random.normal(0.03, 0.2, 48), 0).astype(np.float32)
            ids = random.integers(0, 256, 48).astype(np.int32)
            samples.append(
                KLSample(
                    prompt_id=pair.prompt_id,
                    sample=number,
                    finished=number == 0 or len(pair.chosen_ids) % 2 == 0,
                    prompt_ids=pair.prompt_ids,
                    completion_ids=ids,
                    policy_token_logps=policy,
                    ref_token_logps=ref,
                )
            )
    return samples


def plain_texts(count: int, *, prompts: int | None = None) -> list[tuple[str, str, str]]:
    """Distinct pairs of different lengths; ``prompts`` of them share prompts in turn."""
    prompts = prompts or count
    texts = []
    for i in range(count):
        # Digits of a hash, so that the lengths of the sides have nothing to do with each other.
        chosen, rejected = hashlib.sha256(str(i).encode()).digest()[:2]
        prompt = f"Question {i % prompts}: what follows?"
        texts.append((prompt, f"Yes {i} " + "a" * (chosen % 40), f"No {i} " + "b" * (rejected % 40)))
    return texts


@pytest.fixture(scope="session")
def shards_writer() -> Callable[..., list[ScoredPair]]:
    return write_shards


@pytest.fixture(scope="session")
def run_writer() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[tuple[str, str, str]]]:
    return plain_texts


@pytest.fixture(scope="session")
def fake_policy() -> type[FakePolicy]:
    return FakePolicy


@pytest.fixture(scope="session")
def kl_samples() -> Callable[..., list[KLSample]]:
    return sampled
