"""Files that a user names for a command's results: one that something else wrote is never replaced.

Each such file says which command wrote it, in the place that its format has for that: so the same command may
write it again, and a slip of the pen does not cost a run's metrics or a folder's manifest.
"""

import os
from pathlib import Path

from dpo_opt.schemas.errors import ConfigError

PARQUET_KEY = "dpo_opt.output"
"""Of a Parquet file's metadata; its value is :func:`output_mark`."""
# A page or a figure says it in its first lines, a Parquet file in its footer.
_HEAD = 4096
_FOOTER = 65_536


def output_mark(command: str) -> str:
    """What a file says that ``dpo-opt COMMAND`` wrote."""
    return f"[written by dpo-opt {command}]"


def require_own_output(path: Path, *, option: str, command: str, mark: str | None = None) -> None:
    """Refuse to write where something else stands than an earlier output of the same command.

    Args:
        path: The file that is to be written.
        option: The option that named it.
        command: Name of the command.
        mark: What its files say; None for :func:`output_mark`.

    Raises:
        ConfigError: It is a folder, a device or a pipe, or a file that this command did not write.
    """
    if path.is_dir():
        raise ConfigError(
            f"{option} is a folder", where=str(path), why="one file is written", fix="name a file in it"
        )
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"{option} names something that is no file",
            where=str(path),
            why="a finished file takes its place, so a device or a pipe would be gone",
            fix=f"pass another {option}",
        )
    if path.exists() and path.stat().st_size and (mark or output_mark(command)).encode() not in _ends(path):
        raise ConfigError(
            f"{option} names a file that `dpo-opt {command}` did not write",
            where=str(path),
            why="it would be replaced, and what it holds would be lost",
            fix=f"pass another {option}, or move this file away",
        )


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(max(0, file.seek(0, os.SEEK_END) - _FOOTER))
        return head + file.read()
