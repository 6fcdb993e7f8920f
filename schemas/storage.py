"""How a file becomes visible: whole and durable, or not at all.

Every file that another process may read is written under a private name, synced, and then given its
final name in one step. A crash leaves at most a private file, which no reader looks at. A store shows an
object whole or not at all, so a finished file is sent there.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpo_opt.schemas.errors import AGAIN, DpoOptError
from dpo_opt.schemas.full_disk import room_on_disk
from dpo_opt.schemas.locations import AnyPath, inside, on_this_machine, put_file, stored_files


@contextlib.contextmanager
def publish(path: AnyPath, *, replace: bool = True) -> Iterator[Path]:
    """Yield a private path to write; on success it replaces ``path`` durably, on any error it is removed.

    Args:
        path: Path or URL.
        replace: If false, a file that is there stays, and of several processes that publish at once one wins.
            A link to nothing is no file.

    Raises:
        FileExistsError: Something is there, and must not be replaced.
        DpoOptError: The disk is full or over quota, or the store refuses; nothing was written.
    """
    if not isinstance(path, Path):
        with (
            room_on_disk(Path(tempfile.gettempdir())),
            tempfile.TemporaryDirectory(prefix="dpo-opt-") as own,
        ):
            yield Path(own) / path.name
            put_file(Path(own) / path.name, path, replace=replace)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    private = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with room_on_disk(path.parent):
            yield private
            try:
                with private.open("rb+") as handle:
                    os.fsync(handle.fileno())
                if replace:
                    private.replace(path)
                else:
                    _name_if_free(private, path)
                _sync_folder(path.parent)
            except FileNotFoundError as error:
                raise removed_meanwhile(path) from error
    finally:
        private.unlink(missing_ok=True)


def removed_meanwhile(path: AnyPath) -> DpoOptError:
    """The error of a process whose file is gone before it has any use."""
    return DpoOptError(
        "the file was removed while it was being written",
        where=str(path),
        why="nothing is lost but the work at it; `dpo-opt gc --older-than 0` takes what others are writing",
        fix=f"let gc keep young files, and {AGAIN}",
    )


def _name_if_free(private: Path, path: Path) -> None:
    try:
        path.hardlink_to(private)
    except FileExistsError:
        # Readers take a link to nothing for no file.
        if not path.is_symlink() or path.exists():
            raise
        private.replace(path)
    except OSError:
        # A file system without links. Of two processes that publish at once, the later one may win.
        if path.exists():
            raise FileExistsError(str(path)) from None
        private.replace(path)


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Like ``publish``, for a folder that does not exist yet.

    Raises:
        DpoOptError: The disk is full or over quota; nothing was written.
    """
    private = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with room_on_disk(path.parent):
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
def settle_folder(path: AnyPath, *, last: str) -> Iterator[Path]:
    """Yield a private folder to fill, whose files are then put into ``path``; a whole folder there stays.

    Several processes may do so at once with equal files.

    Args:
        path: Path or URL.
        last: The file that a store gets after all others: where it is, the folder is whole.

    Raises:
        DpoOptError: The disk of the folder, or that of temporary files, is full or over quota.
    """
    if isinstance(path, Path):
        try:
            with publish_folder(path) as private:
                yield private
        except OSError:
            # Another process put the same files there.
            if not path.is_dir():
                raise
        return
    with (
        room_on_disk(Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="dpo-opt-") as own,
    ):
        filled = Path(own) / path.name
        yield filled
        for name in sorted(file_names(filled), key=lambda name: (name == last, name)):
            put_file(filled / name, path / name)


def write_text(path: AnyPath, text: str, *, replace: bool = True) -> None:
    """Publish a small text file.

    Raises:
        FileExistsError, DpoOptError: As ``publish``.
    """
    with publish(path, replace=replace) as private:
        private.write_text(text, encoding="utf-8")


def sha256_file(path: AnyPath) -> str:
    """Hex SHA-256 of a file's bytes, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with on_this_machine(path) as file, file.open("rb") as handle:
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_folder(
    folder: AnyPath, *, names: Sequence[str] | None = None, whole: AnyPath | None = None
) -> str:
    """One hash of the names and bytes of a folder's files, independent of listing order.

    Args:
        folder: Path or URL.
        names: Of a store's folder, only these files.
        whole: The folder that a user knows, if ``folder`` is a part of it.

    Raises:
        DataError: A file's name leaves the folder, or it is a link that does.
    """
    digest = hashlib.sha256()
    with on_this_machine(folder, names=names) as here:
        for name in file_names(here):
            # One that another process has removed since makes it another hash.
            with contextlib.suppress(FileNotFoundError):
                digest.update(f"{sha256_file(inside(here, name, whole=whole))}  {name}\n".encode())
    return digest.hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder of this machine, without what another process removes meanwhile.

    A link to a folder counts as a file, and is not followed.
    """
    # Not `rglob`, which fails at a folder that goes while it looks.
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in [*files, *links])


def file_names(folder: AnyPath) -> list[str]:
    """Names of all files below a folder, relative to it, in order; none where there is no such folder.

    A link to a folder counts as a file and is never followed, because no hash covers the files behind it.

    Raises:
        DataError: A store lists a name that leaves the folder.
        DpoOptError: The store does not answer, or refuses.
    """
    if isinstance(folder, Path):
        found = (p for p in files_below(folder) if p.is_symlink() or p.is_file())
        return sorted(p.relative_to(folder).as_posix() for p in found)
    names = stored_files(folder)
    for name in names:
        inside(folder, name)
    return names


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
