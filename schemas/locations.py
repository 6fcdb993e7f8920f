"""Where a folder of shards stands: a path of this machine, or a URL of an object store.

Both are used through the methods of ``pathlib.Path``; what differs is here. An object appears whole or not at
all, so a file is finished on this machine and put there in one request. Listings are never cached: another
worker's commit shows at the next look.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator
from upath import UPath

from dpo_opt.schemas.errors import ConfigError, DpoOptError

AnyPath = Path | UPath
_EXTRA_OF_PROTOCOL = {"s3": "s3", "s3a": "s3"}


def location(name: str | Path | UPath) -> AnyPath:
    """The path or URL that a name means.

    Raises:
        ConfigError: Nothing here reads such URLs.
    """
    if isinstance(name, UPath):
        return name
    if not isinstance(name, str | Path):
        raise ValueError("not a path")
    if isinstance(name, Path) or "://" not in name:
        return Path(name)
    protocol = name.partition("://")[0]
    try:
        return UPath(name.rstrip("/"), use_listings_cache=False)
    except ImportError as error:
        extra = _EXTRA_OF_PROTOCOL.get(protocol)
        fix = f"pip install 'dpo-opt[{extra}]'" if extra else "pip install the package that it names"
        raise ConfigError(f"cannot be read without another package ({error})", where=name, fix=fix) from error
    except ValueError as error:
        raise ConfigError(
            f"URLs of {protocol}:// are not known", where=name, fix="pass a path, or a URL such as s3://"
        ) from error


Location = Annotated[AnyPath, PlainValidator(location), PlainSerializer(str, return_type=str)]
"""A setting that names a file or folder, on this machine or in a store."""


def store_errors() -> tuple[type[Exception], ...]:
    """What a store may raise: clients have errors of their own, with no common base."""
    botocore = sys.modules.get("botocore.exceptions")
    return (OSError, *([botocore.BotoCoreError, botocore.ClientError] if botocore else []))


@contextlib.contextmanager
def explained(path: AnyPath) -> Iterator[None]:
    """Say a store's refusal by its URL; errors of this machine's paths are left as they are.

    Raises:
        DpoOptError: The store does not answer, or refuses.
    """
    try:
        yield
    except store_errors() as error:
        if isinstance(path, Path):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DpoOptError(
            f"the store refuses or does not answer ({reason})",
            where=str(path),
            why="what was committed there is not touched",
            fix="check the URL and the credentials in the environment, then run the same command again",
        ) from error


def put_file(file: Path, path: UPath) -> None:
    """Send a finished file; a small one takes one request, a large one shows when its last part is there."""
    with explained(path):
        path.fs.put_file(str(file), path.path)


def sizes(folder: AnyPath) -> dict[str, int]:
    """File name to bytes, for the files of a folder now; empty where there is no such folder."""
    if isinstance(folder, Path):
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                # One that has just been replaced or removed is not there.
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found
    with explained(folder):
        try:
            listed = folder.fs.ls(folder.path, detail=True)
        except FileNotFoundError:
            return {}
    return {item["name"].rpartition("/")[2]: item["size"] for item in listed if item["type"] == "file"}


def read_all(folder: AnyPath, names: Sequence[str]) -> list[bytes]:
    """The bytes of some files of a folder; a store is asked for all of them at once."""
    if isinstance(folder, Path) or not names:
        return [(folder / name).read_bytes() for name in names]
    paths = [(folder / name).path for name in names]
    with explained(folder):
        found = folder.fs.cat(paths)
    return [found[path] for path in paths]


@contextlib.contextmanager
def on_this_machine(path: AnyPath) -> Iterator[Path]:
    """A file or folder as a path of this machine, fetched for as long as it is used.

    Raises:
        DpoOptError: The store does not answer, or refuses.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dpo-opt-") as folder:
        fetched = Path(folder) / path.name
        with explained(path):
            path.fs.get(path.path, str(fetched), recursive=path.is_dir())
        yield fetched


def cache_path(path: UPath, sha256: str) -> Path:
    """Where this user's cache keeps a store's file of that hash: a changed file is another one."""
    base = os.environ.get("DPO_OPT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dpo-opt"
    return Path(base).expanduser() / sha256[:2] / f"{sha256}{path.suffix}"
