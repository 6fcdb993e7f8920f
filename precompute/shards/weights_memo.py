"""The digest of a model's weights, stored next to the shards, because hashing a large model takes minutes.

It is used while the path, size, modification time and inode of every weights file are those that the planning
run saw. A node that sees other files, or the same files under another path, hashes them itself.
"""

import json
from pathlib import Path
from typing import Any

from dpo_opt.schemas.locations import AnyPath
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
            }
        )
    return found


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
