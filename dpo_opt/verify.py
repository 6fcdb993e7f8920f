"""Is a folder of shards whole, and are its numbers those of a given model?

Integrity needs no model: every file's hash, every row's lengths, ids and sums, and exact coverage.
Parity loads the model and compares with the trainer's own forward.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import INDEX, TOKENIZER, Manifest, ShardFolder, check_file, load_manifest
from dpo_opt.schemas.pairs import ScoredPair
from dpo_opt.schemas.shards import inconsistent_columns, read_row_groups
from dpo_opt.schemas.storage import sha256_folder

_MOST_PROBLEMS = 20


class Verdict(NamedTuple):
    """Result of a verification."""

    shards: Path
    problems: list[str]
    parity: Any | None
    """``optimize.parity.Parity``, None where no model was given."""

    def as_dict(self) -> dict[str, Any]:
        """In the shape that ``--json`` prints."""
        return {
            "integrity": {"ok": not self.problems, "problems": self.problems},
            "parity": None if self.parity is None else self.parity._asdict(),
        }

    def require_ok(self) -> None:
        """Turn a bad verdict into its error.

        Raises:
            DataError: Integrity failed.
            FingerprintError: Parity failed.
        """
        if self.problems:
            raise DataError(
                f"{len(self.problems)} problems",
                where=str(self.shards),
                why="log-probs that changed on disk would train towards a wrong reference",
                fix="restore the files named above, or score into a new folder with `dpo-opt precompute`",
            )
        if self.parity is not None:
            from dpo_opt.optimize.parity import require_parity

            require_parity(self.parity, shards=str(self.shards), model="--model")


def verify(shards: Path, *, model: str | None, num_pairs: int, dtype: str) -> Verdict:
    """Verify a folder.

    Args:
        shards: The folder.
        model: With it, parity is measured too.
        num_pairs: Pairs to compare.
        dtype: Compute dtype of the comparison, or ``auto``.

    Raises:
        DataError: There is no readable manifest.
        FingerprintError: The model is not the one that was scored.
    """
    manifest = load_manifest(shards)
    problems = integrity_problems(shards, manifest)
    if model is None or problems:
        return Verdict(shards, problems, None)
    return Verdict(shards, problems, _parity(shards, model, num_pairs, dtype))


def integrity_problems(shards: Path, manifest: Manifest) -> list[str]:
    """Everything that is wrong with a folder's files and rows, each with its place."""
    problems: list[str] = []
    files = [(INDEX, manifest.index_sha256)]
    for shard in manifest.shards:
        files += [(shard.file, shard.sha256), (shard.dropped_file, shard.dropped_sha256)]
    for name, sha256 in files:
        try:
            check_file(shards, name, sha256)
        except DataError as error:
            problems.append(f"{error.where}: {error.what}")
    if not (shards / TOKENIZER).is_dir() or sha256_folder(shards / TOKENIZER) != manifest.tokenizer_sha256:
        problems.append(f"{shards / TOKENIZER}: the tokenizer's files changed")
    if not problems:
        for shard in manifest.shards:
            problems += _row_problems(shards / shard.file, range(shard.start, shard.stop), shard.rows)
    return problems[:_MOST_PROBLEMS]


def _row_problems(path: Path, rows: range, expected: int) -> list[str]:
    problems = []
    seen: set[int] = set()
    for group in read_row_groups(path):
        for pair in group:
            if pair.row not in rows or pair.row in seen:
                problems.append(f"{path}: row {pair.row} does not belong here, or twice")
            seen.add(pair.row)
            if not _is_sound(pair):
                problems.append(f"{path}: row {pair.row} has log-probs that do not fit its ids")
    problems += [
        f"{path}: row {row} has a {name} that does not follow from its ids and log-probs"
        for row, name in inconsistent_columns(path)
    ]
    if len(seen) != expected:
        problems.append(f"{path}: {len(seen)} rows, the manifest says {expected}")
    return problems


def _is_sound(pair: ScoredPair) -> bool:
    sides = (
        (pair.chosen_ids, pair.ref_chosen_token_logps),
        (pair.rejected_ids, pair.ref_rejected_token_logps),
    )
    return len(pair.prompt_ids) > 0 and all(
        len(ids) == len(logps) > 0 and bool(np.isfinite(logps).all()) and float(logps.max()) <= 1e-3
        for ids, logps in sides
    )


def _parity(shards: Path, model: str, num_pairs: int, dtype: str) -> Any:
    import torch

    from dpo_opt.optimize.identity import require_same_model
    from dpo_opt.optimize.parity import measure_parity
    from dpo_opt.optimize.policy import compute_dtype, default_device, load_policy
    from dpo_opt.optimize.stream import PairStream
    from dpo_opt.schemas.fingerprint import MODEL_FIELDS
    from dpo_opt.schemas.models import find_model

    folder = ShardFolder.open(shards)
    model_folder = find_model(model)
    require_same_model(
        folder, model_folder, fields=MODEL_FIELDS, fix="pass the model that was scored as --model"
    )
    device = default_device()
    policy = load_policy(model_folder, dtype=compute_dtype(dtype, device), device=device, trainable=True)
    with torch.no_grad():
        pairs = PairStream(folder, eval_split=0.0).sample(num_pairs)
        return measure_parity(policy, pairs, cached_dtype=folder.manifest.fingerprint.dtype)
