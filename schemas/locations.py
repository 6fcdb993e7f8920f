"""Where a folder of shards stands: a path of this machine, or a URL of an object store.

Both are used through the methods of ``pathlib.Path``; what differs is here. An object appears whole or not at
all, so a file is finished on this machine and put there in one request. Listings are never cached: another
worker's commit shows at the next look.
"""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import PlainSerializer, PlainValidator
from upath import UPath

from dpo_opt.schemas.errors import ConfigError, DataError, first_line, quoted
from dpo_opt.schemas.full_disk import room_on_disk
from dpo_opt.schemas.store_errors import explained, nothing_there, store_errors

AnyPath = Path | UPath
EXTRA_OF_PROTOCOL = {"s3": "s3", "s3a": "s3"}
"""Beginning of a URL to the extra of this package that reads it."""
_ON_THIS_MACHINE = ("file", "local")
# What is left of a URL that went through pathlib, or was mistyped: a folder "s3:" would be made for it.
_ONE_SLASH = re.compile(r"[a-z][a-z0-9+]+:/(?!/)")
# A separator or a drive of another system, and what ends a name for the system's own calls.
_NOT_IN_A_NAME = re.compile(r"[\\:\x00]")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
"""Python's sign for a byte of a file's name that is not UTF-8."""


def location(name: str | Path | UPath) -> AnyPath:
    """The path or URL that a name means; ``~`` and ``file://`` are paths.

    Raises:
        ConfigError: It is no usable URL, or nothing here reads such URLs; or the path is not UTF-8.
    """
    if not isinstance(name, str | Path | UPath):
        raise ValueError("not a path")
    if _ONE_SLASH.match(str(name)):
        raise ConfigError(
            "a URL needs two slashes",
            where=str(name),
            why="a folder of that name would be made on this machine",
            fix="pass the URL as text, such as s3://BUCKET/FOLDER",
        )
    if not isinstance(name, Path) and "://" in str(name):
        return _store_path(name)
    path = Path(str(name))
    if _NOT_UTF8.search(str(path)):
        raise ConfigError(
            "the name is not UTF-8",
            where=quoted(path),
            why="the libraries that read and write tokenizers and tables refuse such names",
            fix="pass a path whose name is UTF-8",
        )
    # Only one's own: a folder may really be called ~somebody.
    return path.expanduser() if path.parts[:1] == ("~",) else path


def _store_path(name: str | UPath) -> AnyPath:
    protocol, _, rest = str(name).partition("://")
    if protocol in _ON_THIS_MACHINE:
        return Path(rest)
    if urlsplit(str(name)).password is not None:
        raise ConfigError(
            f"a password inside a {quoted(protocol)}:// URL",
            why="the folder's records and messages would show it",
            fix="pass credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    try:
        if not rest.strip("/"):
            raise ValueError("it names no bucket or folder")
        found = UPath(name.rstrip("/") if isinstance(name, str) else name, use_listings_cache=False)
        # Imports the store's package.
        _ = found.fs
    except ImportError as error:
        extra = EXTRA_OF_PROTOCOL.get(protocol)
        fix = f"pip install 'dpo-opt[{extra}]'" if extra else "pip install the package that it names"
        raise ConfigError(
            f"cannot be read without another package ({first_line(error)})", where=str(name), fix=fix
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"not a URL that can be used here ({first_line(error)})",
            where=str(name),
            fix="pass a path, or a URL such as s3://BUCKET/FOLDER",
        ) from error
    return found


Location = Annotated[AnyPath, PlainValidator(location), PlainSerializer(str, return_type=str)]
"""A setting that names a file or folder, on this machine or in a store."""


def inside(folder: AnyPath, name: str, *, whole: AnyPath | None = None) -> AnyPath:
    """The place of a file below a folder, for a name that a listing or a record gives.

    Whoever may write one object or one record of a folder could otherwise name any file of its readers. A
    file that is a link to another place is refused too. The folder may be a link, and so may those directly
    in it: people move a whole folder, or its ``data``, to another disk.

    Args:
        folder: Path or URL.
        name: Relative to it.
        whole: The folder that a user knows, if ``folder`` is a part of it. Its other files may be links too.

    Raises:
        DataError: The name leaves the folder, or is a link that does.
    """
    parts = name.split("/")
    if not all(map(_stays, parts)):
        raise DataError(
            f"the file name {name!r} does not stay inside the folder",
            where=str(folder),
            why="following it could read or write any file of this machine",
            fix="do not use the folder: ask whoever wrote it, and who else may write there",
        )
    path = folder / name
    if isinstance(folder, Path):
        places = [folder, folder / parts[0]] if len(parts) > 1 else [folder]
        if not any(_is_below(os.path.realpath(folder / name), os.path.realpath(place)) for place in places):
            raise DataError(
                "the file is a link that leads out of the folder",
                where=str(path),
                why="what it leads to is not the folder's, and may be any file of this machine",
                fix=f"where you trust the links: cp -rL {quoted(whole or folder)} COPY, then pass COPY",
            )
    return path


def is_plain_name(name: str) -> bool:
    """Whether a file may have this name in a folder of shards: on every system it is that of a file in it."""
    return _stays(name) and not _NOT_UTF8.search(name)


def _stays(name: str) -> bool:
    return name not in ("", ".", "..") and not _NOT_IN_A_NAME.search(name)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def put_file(file: Path, path: UPath, *, replace: bool = True) -> None:
    """Send a finished file; a small one takes one request, a large one shows when its last part is there.

    Raises:
        FileExistsError: Something is there, and must not be replaced. A store that cannot refuse by itself
            is asked first, so of two that come at once the later one may still win.
        DpoOptError: The store does not answer, or refuses.
    """
    if not replace:
        with contextlib.suppress(*store_errors()):
            path.fs.put_file(str(file), path.path, mode="create")
            return
        # Stores differ in how they refuse, and some do not know such a request.
        if is_file(path):
            raise FileExistsError(str(path))
    with explained(path):
        path.fs.put_file(str(file), path.path)


def is_file(path: AnyPath) -> bool:
    """Whether a file is there: a store that does not answer has not said no, unlike with ``Path.is_file``.

    Raises:
        DpoOptError: The store does not answer, or refuses.
    """
    if isinstance(path, Path):
        return path.is_file()
    with explained(path):
        with nothing_there():
            return bool(path.fs.info(path.path)["type"] == "file")
        return False


def remove(path: AnyPath) -> None:
    """Delete a file; one that is gone already is as good.

    Raises:
        DpoOptError: The store does not answer, or refuses.
    """
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
        return
    with explained(path), nothing_there():
        # Not `rm`, which takes [ and * in a folder's name for a pattern.
        path.fs.rm_file(path.path)


def sizes(folder: AnyPath, *, prefix: str = "") -> dict[str, int]:
    """File name to bytes, for the files of a folder now; empty where there is no such folder.

    Names that no file of ours can have are left out, as every file is that no record names.

    Args:
        folder: Path or URL.
        prefix: Only names that begin so; of these alone a store is asked.
    """
    if isinstance(folder, Path):
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                # One that has just been replaced or removed is not there.
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.startswith(prefix) and entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found
    listed: Iterable[Any] = ()
    with explained(folder), nothing_there():
        if prefix:
            listed = folder.fs.find(folder.path, maxdepth=1, detail=True, prefix=prefix).values()
        else:
            listed = folder.fs.ls(folder.path, detail=True)
    named = {item["name"].rpartition("/")[2]: item["size"] for item in listed if item["type"] == "file"}
    return {name: size for name, size in named.items() if name.startswith(prefix) and _stays(name)}


def read_all(folder: AnyPath, names: Sequence[str]) -> dict[str, bytes]:
    """The bytes of those of some files that are there; a store is asked for all of them at once.

    Raises:
        DataError: A name leaves the folder.
        DpoOptError: The store does not answer, or refuses.
    """
    if isinstance(folder, Path):
        texts = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                texts[name] = inside(folder, name).read_bytes()
        return texts
    for name in names:
        inside(folder, name)
    paths = [(folder / name).path for name in names]
    found = {}
    with explained(folder):
        # Not `cat`, which takes [ and * in a folder's name for a pattern; from byte 0, because s3fs asks
        # for the size of a file that is wanted whole.
        answers = folder.fs.cat_ranges(paths, 0, None)
        for name, path, answer in zip(names, paths, answers, strict=True):
            if isinstance(answer, OSError) and answer.errno == errno.EINVAL:
                # An empty file has no byte 0.
                found[name] = folder.fs.cat_file(path)
            elif isinstance(answer, Exception):
                with nothing_there():
                    raise answer
            else:
                found[name] = answer
    return found


def stored_files(folder: UPath) -> list[str]:
    """Names of a store's files below a folder, relative to it, in order.

    Objects that only mark a folder, as a console makes them, are no files: their keys end with a slash.
    """
    base = folder.path.rstrip("/") + "/"
    with explained(folder):
        return sorted(name.removeprefix(base) for name in folder.fs.find(folder.path) if name[-1:] != "/")


def fetch(path: UPath, file: Path, *, names: Sequence[str] | None = None) -> None:
    """A store's file, or a folder's files, as ``file`` on this machine.

    Args:
        path: What is fetched.
        file: Where it is put.
        names: Of a folder, only these, relative to it; those that are missing are left out. None: all that
            is listed.

    Raises:
        FileNotFoundError: There is neither.
        DataError: A name leaves the folder.
        DpoOptError: The store does not answer, or refuses; or the disk is full.
    """
    with room_on_disk(file.parent), explained(path):
        if names is None:
            with nothing_there():
                path.fs.get_file(path.path, str(file))
        if not file.is_file():
            base = path.path.rstrip("/") + "/"
            # All are looked at before the first is fetched.
            listed = stored_files(path) if names is None else names
            parts = {base + name: inside(file, name) for name in listed}
            for name, part in parts.items():
                part.parent.mkdir(parents=True, exist_ok=True)
                # Whoever reads the folder compares the hash of all that is there.
                with nothing_there():
                    path.fs.get_file(name, str(part))
    if not file.exists():
        raise FileNotFoundError(str(path))


@contextlib.contextmanager
def on_this_machine(path: AnyPath, *, names: Sequence[str] | None = None) -> Iterator[Path]:
    """A file or folder as a path of this machine, fetched for as long as it is used.

    Args:
        path: Path or URL.
        names: Of a store's folder, fetch only these.

    Raises:
        FileNotFoundError: A store has nothing of that name.
        DataError: A store lists a name that leaves the folder.
        DpoOptError: The store does not answer, or refuses; or the disk is full.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dpo-opt-") as folder:
        fetched = Path(folder) / path.name
        fetch(path, fetched, names=names)
        yield fetched
