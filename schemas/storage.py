"""How a file becomes visible: whole and durable, or not at all.

Every file that another process may read is written under a private name, synced, and then given its
final name in one step. A crash leaves at most a private file, which no reader looks at.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from dpo_opt.schemas.errors import DpoOptError


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a private path to write; on success it replaces ``path`` durably, on any error it is removed.

    Raises:
        DpoOptError: The disk is full or over quota; nothing was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    private = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _out_of_space(path.parent):
            yield private
            with private.open("rb+") as handle:
                os.fsync(handle.fileno())
            private.replace(path)
            _sync_folder(path.parent)
    finally:
        private.unlink(missing_ok=True)


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Like ``publish``, for a folder that does not exist yet.

    Raises:
        DpoOptError: The disk is full or over quota; nothing was written.
    """
    private = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _out_of_space(path.parent):
            private.mkdir(parents=True)
            yield private
            for file in private.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as handle:
                        os.fsync(handle.fileno())
            private.replace(path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextlib.contextmanager
def _out_of_space(folder: Path) -> Iterator[None]:
    """Say a full disk by name.

    Raises:
        DpoOptError: The disk is full or over quota.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DpoOptError(
                f"the disk is full ({os.strerror(error.errno)})",
                where=str(folder),
                why="what was being written could not be written whole, so nothing of it was kept",
                fix="free some space and run the same command again",
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Publish a small text file."""
    with publish(path) as private:
        private.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, as ``sha256sum`` prints it."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_folder(folder: Path) -> str:
    """One hash of the names and bytes of a folder's files, independent of listing order."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{sha256_file(files[name])}  {name}\n".encode())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
