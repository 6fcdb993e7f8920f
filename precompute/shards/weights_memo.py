"""The digest of a model's weights, stored next to the shards, because hashing a large model takes minutes.

It is used while the path, size, inode and times of every weights file are those that the planning run saw.
The time of the last change counts too (ctime), because a program can set the modification time back. A node
that sees other files, or the same files under another path, hashes them itself.
"""

import json
from pathlib import Path
from typing import Any

from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.models import config_digest
from dpo_opt.schemas.storage import write_text
from dpo_opt.schemas.store_errors import store_errors
from dpo_opt.schemas.weights import weights_digest

WEIGHTS = "weights.json"


def weight_files(folder: Path) -> list[dict[str, Any]]:
    """What identifies the weights files of a model folder, and the index of them, without reading them."""
    found = []
    for path in sorted(folder.glob("*.safetensors*")):
        state = path.stat()
        found.append(
            {
                "path": str(path.absolute()),
                "size": state.st_size,
                "mtime_ns": state.st_mtime_ns,
                "inode": state.st_ino,
                "ctime_ns": state.st_ctime_ns,
            }
        )
    return found


class ScoringModel:
    """The files of the model that scores, as they were before its fingerprint was taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = weight_files(folder)
        self._config = config_digest(folder)

    def require_unchanged(self, weights: str) -> None:
        """Check that what an engine has loaded since is what was fingerprinted.

        The weights are read again only if one of their files was touched.

        Args:
            weights: Their digest, by the folder's plan.

        Raises:
            ConfigError: The files cannot be read any more.
            FingerprintError: They changed.
        """
        files = weight_files(self.folder)
        same_weights = files == self._files or weights_digest(self.folder) == weights
        if not same_weights or config_digest(self.folder) != self._config:
            what = "settings" if same_weights else "weights"
            raise FingerprintError(
                f"the model's {what} changed after they were fingerprinted",
                where=str(self.folder),
                why="the log-probs would be those of another model than the folder's",
                fix="restore the model that the folder was planned for, then run the same command again",
            )
        self._files = files


def known_weights_digest(folder: Path, shards_dir: AnyPath) -> str:
    """The digest of a model's weights (``weights_digest``): remembered where its files are, else computed.

    Raises:
        ConfigError: A file must be read, and is truncated or damaged.
    """
    remembered = _read(shards_dir)
    if remembered is not None and remembered["files"] == weight_files(folder):
        return str(remembered["weights"])
    return weights_digest(folder)


def remember_weights(shards_dir: AnyPath, *, digest: str, files: list[dict[str, Any]]) -> None:
    """Keep a digest for other workers.

    Args:
        shards_dir: The folder of shards.
        digest: Of the weights.
        files: As ``weight_files`` gave them before the digest was taken: a file that changed meanwhile is
            then another one.
    """
    memo = {"weights": digest, "files": files}
    if _read(shards_dir) != memo:
        write_text(shards_dir / WEIGHTS, json.dumps(memo, sort_keys=True, indent=1) + "\n")


def _read(shards_dir: AnyPath) -> dict[str, Any] | None:
    """The stored digest; None if it cannot be read, because the weights files can be hashed again."""
    unreadable: tuple[type[Exception], ...] = (*store_errors(), ValueError, RecursionError)
    try:
        memo = json.loads((shards_dir / WEIGHTS).read_text(encoding="utf-8"))
    except unreadable:
        return None
    return memo if isinstance(memo, dict) and {"weights", "files"} <= set(memo) else None
