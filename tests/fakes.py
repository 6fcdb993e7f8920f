"""Small real stand-ins, usable without torch."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.manifest import MANIFEST, load_manifest
from dpo_opt.schemas.pairs import IdArray, LogpArray, Numerics, ScoredPair, TokenSequence
from dpo_opt.schemas.sidecars import COLUMNS, read_column

NUMERICS = Numerics(engine="scripted", engine_version="1", strategy="hash", dtype="float32")

FINGERPRINT = Fingerprint(
    schema_version=1,
    weights="a" * 64,
    model_config_digest="b" * 64,
    tokenizer="c" * 64,
    chat_template="none",
    text_to_ids="1",
    max_length=512,
    truncation="keep_start",
    engine="vllm",
    engine_version="0.32.0",
    strategy="prompt_logprobs",
    dtype="float32",
    engine_options="{}",
)


class ScriptedScorer:
    """A ``Scorer`` whose log-probs are a pure function of the ids before and at each position.

    Args:
        numerics: What it claims to compute with.
        before_call: Called with the number of finished calls before each call; raise there to interrupt.
        spoil: Changes the answers before they are returned.
    """

    def __init__(
        self,
        *,
        numerics: Numerics = NUMERICS,
        before_call: Callable[[int], None] | None = None,
        spoil: Callable[[list[LogpArray]], list[LogpArray]] | None = None,
    ) -> None:
        self.numerics = numerics
        self.calls: list[list[TokenSequence]] = []
        self._before_call = before_call
        self._spoil = spoil

    @property
    def scored(self) -> list[TokenSequence]:
        """Every sequence of every finished call."""
        return list(itertools.chain.from_iterable(self.calls))

    def token_logps(self, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
        if self._before_call is not None:
            self._before_call(len(self.calls))
        found = [scripted_logps(s.prompt_ids, s.completion_ids) for s in sequences]
        self.calls.append(list(sequences))
        return found if self._spoil is None else self._spoil(found)


def scripted_logps(prompt_ids: IdArray, completion_ids: IdArray) -> LogpArray:
    """The log-probs that ``ScriptedScorer`` gives: between -8 and 0, different for every context."""
    context = hashlib.sha256(np.asarray(prompt_ids, dtype="<i4").tobytes())
    values = []
    for token in completion_ids:
        context.update(int(token).to_bytes(4, "little"))
        values.append(-8 * int.from_bytes(context.digest()[:4], "little") / 2**32)
    return np.array(values, dtype=np.float32)


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    """Write a dataset."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def column_of(shards: Path, name: str, *, rows: IdArray, default: float) -> LogpArray:
    """A column of a finished folder, or of one that is planned and not finished."""
    record = load_manifest(shards) if (shards / MANIFEST).is_file() else read_plan(shards)
    found = read_column(shards, name, files=record.columns, rows=rows, default=default)
    assert found is not None
    return found


def weight_file(shards: Path) -> Path:
    """The one column of a folder."""
    (file,) = (shards / COLUMNS).glob("weight-*.parquet")
    return file


def preference_rows(count: int) -> list[dict[str, object]]:
    """Rows that all differ; every third prompt is that of the row before."""
    return [
        {
            "prompt": f"Question {i - (i % 3 == 2)}?",
            "chosen": f" The answer is {i}.",
            "rejected": f" No {i}",
            "source": ["web", "books"][i % 2],
        }
        for i in range(count)
    ]


def scored_pairs(*lengths: tuple[int, int, int]) -> list[ScoredPair]:
    """Pairs of random tokens, with so many of prompt, chosen and rejected, whose log-probs are all 0."""
    rng = np.random.default_rng(0)
    return [
        ScoredPair(
            row=row,
            source=None,
            prompt_ids=rng.integers(3, 100, size=prompt).astype(np.int32),
            chosen_ids=rng.integers(3, 100, size=chosen).astype(np.int32),
            rejected_ids=rng.integers(3, 100, size=rejected).astype(np.int32),
            ref_chosen_token_logps=np.zeros(chosen, dtype=np.float32),
            ref_rejected_token_logps=np.zeros(rejected, dtype=np.float32),
        )
        for row, (prompt, chosen, rejected) in enumerate(lengths)
    ]
