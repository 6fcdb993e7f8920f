"""Failures of Python and of the system as errors that name a fix: paths, full disks, missing packages."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from dpo_opt.schemas.errors import AGAIN, ConfigError, DpoOptError, quoted

_NOT_ALLOWED = ("this user may not do there what the command must", "ls -ld {path}")
_NO_ROOM = ("what was being written could not be written whole", f"free some space there, then {AGAIN}")
# What a system says of a path, which its user can mend: why it stops the command, and what to do.
_PATH_ERRORS = {
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.ENOTDIR: ("a file stands where a folder is needed", "ls -ld {path}, then pass another path"),
    errno.EISDIR: ("a folder stands where a file is needed", "ls -ld {path}, then pass another path"),
    errno.EEXIST: ("what is there would be replaced", "pass another path, or move that one away"),
    errno.ENAMETOOLONG: ("the file system has no names of that length", "pass a shorter path"),
    errno.ELOOP: ("following links there never ends", "ls -l {path}, then remove the link"),
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: ("the file system has no files of that size", "pass a path on another file system"),
    errno.EIO: ("the disk or its server failed", f"see what `dmesg | tail` says of it, then {AGAIN}"),
    errno.ESTALE: (
        "the server of that file system no longer knows the file",
        f"mount it anew, then {AGAIN}",
    ),
    errno.ETIMEDOUT: ("the server of that file system does not answer", f"see that it is up, then {AGAIN}"),
    errno.ENOTCONN: ("the server of that file system is gone", f"mount it anew, then {AGAIN}"),
    errno.EMFILE: (
        "the process may not open as many files",
        f"ulimit -n 65536, then {AGAIN}",
    ),
}
# Raised by a file that is open, too, which does not say what it is called.
_WITHOUT_A_NAME = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EFBIG}
_EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "safetensors": "train",
    "peft": "peft",
    "polars": "analysis",
    "matplotlib": "analysis",
    "jinja2": "analysis",
}


def explained(error: Exception) -> DpoOptError | None:
    """An error of Python or of the system in the four parts of a ``DpoOptError``; None where it is a bug."""
    if isinstance(error, DpoOptError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return _of_package((error.name or "").partition(".")[0])
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return ConfigError(
            "a path begins with ~ and a name that is no user's here",
            why="that stands for a user's own folder, and there is none",
            fix="write the whole path, from / on",
        )
    return _of_path(error) if isinstance(error, OSError) else None


@contextlib.contextmanager
def going_on_by(command: Callable[[], str | None]) -> Iterator[None]:
    """Let fixes of errors that leave the block name another command than the same one again.

    Args:
        command: Asked where something failed. None: the same command goes on.

    Raises:
        DpoOptError: As ``explained`` gives it, with the other command in its fix.
    """
    try:
        yield
    # Of any class: `explained` knows which have a fix, and all others are raised as they are.
    except Exception as error:
        known = explained(error)
        if known is None or known.fix is None or AGAIN not in known.fix:
            raise
        other = command()
        if other is None:
            raise
        known.fix = known.fix.replace(AGAIN, other)
        if known is error:
            raise
        raise known from error


def _of_package(package: str) -> DpoOptError | None:
    if package not in _EXTRAS:
        return None
    return ConfigError(f"{package} is not installed", fix=f"pip install 'dpo-opt[{_EXTRAS[package]}]'")


def _of_path(error: OSError) -> DpoOptError | None:
    """A path that cannot be read or written is the user's to mend; the rest is a bug to report."""
    if error.errno == errno.ENOENT and "temporary directory" in str(error.strerror):
        return DpoOptError(
            "no folder for temporary files can be written",
            where=os.environ.get("TMPDIR"),
            why="files are finished there before they are put where they belong",
            fix="free some space there, or set TMPDIR to a folder that can be written",
        )
    if error.errno not in _PATH_ERRORS or (error.filename is None and error.errno not in _WITHOUT_A_NAME):
        return None
    why, fix = _PATH_ERRORS[error.errno]
    where = None if error.filename is None else str(error.filename)
    fix = fix.format(path=quoted(where))
    if where is not None and error.errno in (errno.EACCES, errno.EROFS):
        why, fix = _not_allowed(Path(where).absolute(), read_only=error.errno == errno.EROFS)
    return DpoOptError(str(error.strerror), where=where, why=why, fix=fix)


def _not_allowed(path: Path, *, read_only: bool) -> tuple[str, str]:
    """Why a path must be read or written, and what lets it be.

    What is written has a private name at first, so the folder is named in which it was to be.

    Args:
        path: Absolute; may not exist.
        read_only: Its file system takes nothing, whatever the modes are.
    """
    # Not `Path.exists`, which raises where a folder may not be entered.
    folder = next(parent for parent in path.parents if os.access(parent, os.F_OK))
    for closed, mode in ((folder, os.X_OK), (path, os.R_OK)):
        if os.access(closed, os.F_OK) and not os.access(closed, mode):
            return "the command reads what is there", f"chmod u+rX {quoted(closed)}"
    from dpo_opt.schemas.manifest import MANIFEST, PLAN

    for shards in (folder, *folder.parents):
        if any(os.access(shards / name, os.F_OK) for name in (PLAN, MANIFEST)):
            if read_only:
                fix = f"cp -rL {quoted(shards)} COPY, then pass --shards COPY"
            else:
                fix = f"chmod -R u+w {quoted(shards)}"
            return "this command changes the folder; what only reads it needs no leave to write", fix
    elsewhere = "pass a path that can be written"
    return (
        "the command writes there",
        elsewhere if read_only else f"chmod u+w {quoted(folder)}, or {elsewhere}",
    )
