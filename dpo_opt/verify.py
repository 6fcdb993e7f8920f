"""Is a folder of shards whole, and are its numbers those of a given model?

Integrity needs no model (integrity.py). Parity loads the model and compares with the trainer's own forward
(optimize/parity.py). The verdict stays beside the manifest, naming the manifest and the weights it is about.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_opt import __version__
from dpo_opt.folder_notes import VERDICT, folder_notes
from dpo_opt.integrity import integrity_problems
from dpo_opt.precompute.shards.scored_tokenizer import other_tokenizer
from dpo_opt.schemas.errors import DataError, DpoOptError
from dpo_opt.schemas.fingerprint import MODEL_FIELDS
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import MANIFEST, TOKENIZER, Manifest, load_manifest, repair_command
from dpo_opt.schemas.models import find_model, read_config
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.storage import write_text

if TYPE_CHECKING:
    from dpo_opt.optimize.parity import Parity


class Verdict(NamedTuple):
    """Result of a verification."""

    shards: AnyPath
    manifest: Manifest
    manifest_sha256: str
    """The manifest's hash of its own body."""
    problems: list[str]
    notes: list[str]
    """What is unusual and harms no reader."""
    model: str | None
    """As it was given."""
    versions: dict[str, str]
    """What computed the own values; empty where none were."""
    parity: "Parity | None"
    """None where no model was given, or the integrity failed."""

    @property
    def ok(self) -> bool:
        return not self.problems and (self.parity is None or self.parity.ok)

    def as_dict(self) -> dict[str, Any]:
        """In the shape that ``--json`` prints and ``verify.json`` holds."""
        parity = None
        if self.parity is not None:
            checks = [check._asdict() for check in self.parity.checks]
            parity = {**self.parity._asdict(), "checks": checks, **self.versions}
        found: dict[str, Any] = {
            "ok": self.ok,
            "integrity": {"ok": not self.problems, "problems": self.problems},
            "parity": parity,
            "notes": self.notes,
            "manifest_sha256": self.manifest_sha256,
            # The weights' digest, wherever the model stood: require_same_model has compared it.
            "weights": None if self.parity is None else self.manifest.fingerprint.weights,
            "dpo_opt": __version__,
        }
        finite: dict[str, Any] = _finite(found)
        return finite

    def require_ok(self) -> None:
        """Turn a bad verdict into its error.

        Raises:
            DataError: Integrity failed.
            FingerprintError: Parity failed.
        """
        if self.problems:
            raise DataError(
                f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}",
                where=str(self.shards),
                why="log-probs that changed on disk would train towards a wrong reference",
                fix=f"{repair_command(self.shards)}; what it leaves was written so: score it into another "
                "folder",
            )
        if self.parity is not None:
            from dpo_opt.optimize.parity import require_parity

            require_parity(self.parity, shards=str(self.shards), model=str(self.model))


def verify(shards: AnyPath, *, model: str | None, num_pairs: int, dtype: str) -> Verdict:
    """Verify a folder and write ``verify.json`` beside its manifest.

    Args:
        shards: The folder.
        model: With it, parity is measured too.
        num_pairs: Pairs to compare, spread over all shards.
        dtype: Compute dtype of the comparison, or ``auto``.

    Raises:
        ConfigError: There is no such model.
        DataError: There is no readable manifest.
        FingerprintError: The model is not the one that was scored.
    """
    manifest = load_manifest(shards)
    body = json.loads((shards / MANIFEST).read_text(encoding="utf-8"))
    model_folder = None
    if model is not None:
        # First: reading terabytes to say at the end that the model is another one helps nobody.
        model_folder = find_model(model)
        _require_model(ShardFolder(shards, manifest), model_folder)
    problems = integrity_problems(shards, manifest)
    if model is not None and not problems and (problem := other_tokenizer(shards, manifest.fingerprint)):
        problems = [f"{shards / TOKENIZER}: {problem}"]
    notes = folder_notes(shards, manifest)
    verdict = Verdict(shards, manifest, body["sha256"], problems, notes, model, {}, None)
    if model_folder is not None and not problems:
        versions, parity = _parity(ShardFolder(shards, manifest), model_folder, num_pairs, dtype)
        verdict = verdict._replace(versions=versions, parity=parity)
    return _recorded(verdict)


def _recorded(verdict: Verdict) -> Verdict:
    try:
        write_text(verdict.shards / VERDICT, json.dumps(verdict.as_dict(), indent=1) + "\n")
    except (DpoOptError, OSError) as error:
        # Whoever verifies may only be allowed to read.
        reason = error.what if isinstance(error, DpoOptError) else error.strerror
        return verdict._replace(notes=[*verdict.notes, f"{VERDICT} could not be written ({reason})"])
    return verdict


def _require_model(folder: ShardFolder, model_folder: Path) -> None:
    from dpo_opt.optimize.identity import require_same_model

    require_same_model(
        folder, model_folder, fields=MODEL_FIELDS, fix="pass the model that was scored as --model"
    )


def _parity(
    folder: ShardFolder, model_folder: Path, num_pairs: int, dtype: str
) -> tuple[dict[str, str], "Parity"]:
    from importlib.metadata import version

    from dpo_opt.optimize.forward.load_policy import load_policy
    from dpo_opt.optimize.forward.policy import compute_dtype, default_device
    from dpo_opt.optimize.measure_parity import measure_parity
    from dpo_opt.optimize.parity_sample import spread_pairs

    device = default_device()
    # As training holds it; what is quantized is never trained.
    trainable = "quantization_config" not in read_config(model_folder)
    policy = load_policy(
        model_folder,
        dtype=compute_dtype(dtype, device),
        device=device,
        trainable=trainable,
        max_length=folder.manifest.fingerprint.max_length,
    )
    pairs = spread_pairs(folder, num_pairs)
    parity = measure_parity(policy, pairs, cached_dtype=folder.manifest.fingerprint.dtype)
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {**versions, "device": str(device), "layout": "packed" if policy.packs else "padded"}, parity


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
