"""Keeps a second run of this machine out of a run's folder."""

import fcntl
import os
from pathlib import Path

from dpo_opt.schemas.errors import ConfigError, quoted


def claim_folder(path: Path) -> int:
    """Claim a folder for the run of this process; it is created.

    Returns:
        A descriptor; whoever closes it lets other runs in.

    Raises:
        ConfigError: Another run is at work there.
    """
    path.mkdir(parents=True, exist_ok=True)
    # The folder itself, so that no file more lies in it. The kernel lets go of it however this process ends.
    claim = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(claim)
        raise ConfigError(
            f"another run is at work in {quoted(path)}",
            why="both would write the same files, and neither would be one run",
            fix="let it end, or pass another --output-dir",
        ) from error
    except OSError:
        pass  # a file system without locks
    return claim
