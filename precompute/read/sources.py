"""What ``--data`` names, as a list of files: paths, folders, globs, URLs and Hub datasets.

The order of the files fixes every row's number, so it never depends on how a folder happens to be listed.
"""

import errno
import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import pyarrow as pa

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.dataset_card import splits_of_card
from dpo_opt.precompute.read.hub_datasets import HUB_ID, PROTOCOL, as_named, hub_listing, root_of
from dpo_opt.precompute.read.saved_datasets import only_saved
from dpo_opt.precompute.read.strict_json import quote
from dpo_opt.schemas.errors import ConfigError, DataError, first_line, quoted
from dpo_opt.schemas.hub import connection_errors
from dpo_opt.schemas.locations import EXTRA_OF_PROTOCOL, AnyPath

SUFFIXES = (
    *(f".{kind}{end}" for kind in ("jsonl", "json", "csv", "tsv") for end in ("", ".gz", ".zst")),
    ".parquet",
    ".arrow",
)
"""How the name of a file that holds pairs ends."""

# Files of published datasets that hold no data.
_NOT_DATA_SUFFIXES = (".md", ".txt", ".yaml", ".yml", ".py", ".toml", ".lock", ".crc")
_NOT_DATA_NAMES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "LICENSE"}
# From a word in a file's name to the usual name of the split that it belongs to.
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
}
# As in train-00000-of-00002-a09b74b3ef9c3b56 and train.part-1.
_NUMBERING = re.compile(r"[\W_]+(part|shard|chunk|of|\d+|[0-9a-f]{8,})(?![^\W_])", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")


class Source(NamedTuple):
    """One ``--data`` argument: its files in order, and the share of its pairs that is used."""

    name: str
    files: list[str]
    share: float


def find_sources(config: DataConfig) -> list[Source]:
    """The files that the configuration names.

    Raises:
        ConfigError: The number of shares is not that of the sources, or a package for a URL is missing.
        DataError: A source does not exist, holds no data file, or cannot be listed.
    """
    shares = config.data_share or [1.0] * len(config.data)
    if len(shares) != len(config.data):
        raise ConfigError(
            f"{len(config.data)} --data, but {len(shares)} --data-share",
            why="each share belongs to the source at the same place",
            fix="give as many --data-share as --data, or none",
        )
    named = zip(config.data, shares, strict=True)
    return [Source(name, _files(name, config.reads_once), share) for name, share in named]


def merged_splits(source: Source) -> dict[str, str]:
    """Splits that a source reads as one, such as train and test, with the ``--data`` that names each.

    Told by the dataset's card, in the folder that holds all of its files or in the one above, else by the
    files' names below that folder; empty where there are no two. Where the names know one split alone, what
    else they say tells parts of it apart (``train_prefs`` and ``train_sft``), and files without its name are
    another part.
    """
    files = source.files
    if len(files) < 2:
        return {}
    base = root_of(files[0])
    if "://" not in files[0]:
        base = os.path.commonpath([str(Path(file).parent) for file in files])
    for folder in dict.fromkeys((base, root_of(base) or str(Path(base).parent))) if base else ():
        told = splits_of_card(folder, files, open_file)
        if len(told) > 1:
            return {name: _name_of(source, *told[name]) for name in sorted(told)}
    splits: dict[str, list[str]] = {}
    parts: dict[str, list[str]] = {}
    for file in files:
        words = _WORD.findall(file.removeprefix(base).lower())
        split = next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), None)
        if split is not None:
            splits.setdefault(split, []).append(file)
        parts.setdefault(_part_of(file.removeprefix(base)), []).append(file)
    if len(splits) == 1:
        splits = parts
    if len(splits) < 2:
        return {}
    return {split: _name_of(source, "", sorted(own)) for split, own in sorted(splits.items())}


def _part_of(name: str) -> str:
    """A file's name up to the part of its path that names a split, without what numbers files."""
    suffix = next((end for end in SUFFIXES if name.endswith(end)), "")
    parts = name.removesuffix(suffix).strip("/").split("/")
    named = [i for i, part in enumerate(parts, 1) if _SPLIT_NAMES.keys() & set(_WORD.findall(part.lower()))]
    kept = parts[: max(named, default=len(parts))]
    return "/".join(_NUMBERING.sub("", f"-{part}").removeprefix("-") for part in kept)


def _name_of(source: Source, pattern: str, files: Sequence[str]) -> str:
    """What ``--data`` calls some of a source's files: a pattern that is known for them, or one that fits."""
    if len(files) == 1:
        pattern = files[0]
    elif not pattern:
        suffix = next(end for end in SUFFIXES if files[0].endswith(end))
        # By character, as a pattern is.
        shared = os.path.commonprefix(files)  # noqa: RUF071
        pattern = f"{shared.removesuffix(suffix)}*{suffix}"
    return as_named(source.name, pattern)


def refuse_inside(config: DataConfig, folder: AnyPath, *, option: str) -> None:
    """Refuse to write a folder inside one that is read: its files would be read as data.

    Args:
        config: What is read.
        folder: What is written.
        option: That names it, for the message.

    Raises:
        ConfigError: It is inside the data.
    """
    for name in config.data:
        if isinstance(folder, Path):
            if "://" in name:
                continue
            target, base = os.path.realpath(folder), os.path.realpath(Path(name).expanduser())
            is_folder = Path(base).is_dir()
        else:
            target, base, is_folder = str(folder).rstrip("/"), name.rstrip("/"), True
        if is_folder and f"{target}/".startswith(f"{base}/"):
            raise ConfigError(
                f"{option} {quoted(folder)} stands inside --data {quoted(name)}",
                why="what is written there would be read as preference pairs the next time",
                fix=f"pass another {option} folder, or name the files that are meant, such as "
                f"--data {quoted(name.rstrip('/') + '/*.jsonl')}",
            )


def open_file(name: str) -> BinaryIO:
    """A local file or a URL, for reading from its start.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device.
    """
    if "://" not in name:
        # To open a pipe blocks until another process writes. All data is read more than once, too.
        if not stat.S_ISREG(Path(name).stat().st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        return Path(name).open("rb")
    filesystem, path = _filesystem(name)
    return cast(BinaryIO, filesystem.open(path, "rb", block_size=2**23))


def reading_errors() -> tuple[type[BaseException], ...]:
    """The errors that reading may raise. A store's client has its own, without a common base."""
    botocore = sys.modules.get("botocore.exceptions")
    own = [*connection_errors(), *([botocore.BotoCoreError] if botocore else [])]
    # Names of a table's columns are decoded as they are asked for.
    return (OSError, UnicodeDecodeError, pa.ArrowException, *own)


def reason_of(error: BaseException) -> str:
    """An error of reading, in a line."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return quote(strerror or first_line(error, named=False))


def _files(name: str, streamed: bool) -> list[str]:
    if name.startswith(PROTOCOL):
        return _hub_files(name, streamed)
    if "://" in name:
        return _remote_files(name)
    if not name.strip():
        raise DataError(
            "the name of the data is empty",
            where="--data",
            why="it would be taken for the current folder",
            fix="check the path given to --data",
            kind="no_such_file",
        )
    try:
        path = Path(name).expanduser()
        is_folder, found = path.is_dir(), _local_files(path)
    except (OSError, RuntimeError, ValueError) as error:  # the last two: ~NOBODY, and "**.jsonl"
        raise _not_listed(name, error, "check the path given to --data") from error
    if is_folder:
        return _data_files(name, found, base=str(path))
    hub = None if name.startswith((".", "/", "~")) else HUB_ID.fullmatch(name)
    if hub and not found and (hub["revision"] or not (_has_glob(name) or name.endswith(SUFFIXES))):
        return _hub_files(name, streamed)
    if found or _has_glob(name):
        return _matches(name, found, pattern=str(path))
    raise DataError(
        "there is no such file or folder",
        where=name,
        fix="check the path given to --data; a Hub dataset is named ORGANISATION/NAME@REVISION",
        kind="no_such_file",
    )


def _local_files(path: Path) -> list[str]:
    if path.is_dir():
        return _inside(path)
    if path.exists():
        return [str(path)]
    if not _has_glob(str(path)):
        return []
    pattern = str(path.relative_to(path.anchor))
    return [str(p) for p in Path(path.anchor).glob(pattern) if not p.is_dir()]


def _inside(folder: Path) -> list[str]:
    """All files. A link to a folder is listed too, and not followed, because that might never end."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        found += [Path(parent, file) for file in files]
        found += [link for name in folders if (link := Path(parent, name)).is_symlink()]
    return [str(path) for path in found]


def _not_listed(name: str, error: Exception, fix: str) -> DataError:
    reason = first_line(error, named=True)
    return DataError(f"cannot be listed ({reason})", where=name, fix=fix, kind="no_such_file")


def _remote_files(url: str) -> list[str]:
    filesystem, path = _filesystem(url)
    protocol = url.partition("://")[0]
    try:
        # Listings are never cached: another job may have written since.
        filesystem.invalidate_cache()
        is_file = not _has_glob(path) and filesystem.isfile(path)
        listed = filesystem.glob(path) if _has_glob(path) else filesystem.find(path)
    except Exception as error:
        # A file system of fsspec may raise its own client's errors, which share no base.
        raise _not_listed(url, error, "check the URL and the credentials in the environment") from error
    found = [f"{protocol}://{p}" for p in listed]
    if is_file:
        return [url]
    if _has_glob(path):
        return _matches(url, found, pattern=f"{protocol}://{path}")
    if not found:
        raise DataError(
            "there is no such file or folder", where=url, fix="check the URL", kind="no_such_file"
        )
    return _data_files(url, found, base=f"{protocol}://{path}")


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        extra = EXTRA_OF_PROTOCOL.get(protocol)
        raise ConfigError(
            f"reading {protocol}:// needs a package that is not installed",
            where=url,
            why=first_line(error, named=False),
            fix=f"pip install 'dpo-opt[{extra}]'" if extra else "install the package that fsspec names",
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"not a URL that can be read ({error})", where=url) from error
    return filesystem, path


def _hub_files(name: str, streamed: bool) -> list[str]:
    base, files, pattern = hub_listing(name.removeprefix(PROTOCOL), suffixes=SUFFIXES, streamed=streamed)
    if pattern is None:
        return _data_files(name, files, base=base)
    return _matches(name, files, pattern=f"{base}/{pattern}")


def _has_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _matches(name: str, found: Sequence[str], *, pattern: str) -> list[str]:
    """What a pattern matches, without what a folder's files are read without: names with . or _ first.

    As in a shell with dots, a part of the pattern that begins so matches them.
    """
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if _has_glob(part)), len(parts))
    hidden = tuple({".", "_"} - {part[:1] for part in parts[fixed:]})
    files = sorted(f for f in found if not any(part.startswith(hidden) for part in f.split("/")[fixed:]))
    if not files:
        beside = "; one that is to match names with . or _ first must begin so" if found else ""
        raise DataError("nothing matches", where=name, fix=f"check the pattern{beside}", kind="no_such_file")
    return files


def _data_files(name: str, found: Sequence[str], *, base: str) -> list[str]:
    """The data files of a folder, by name. A file that might be data in another format is refused."""
    visible = [
        file
        for file in sorted(found)
        if not any(part.startswith((".", "_")) for part in file.removeprefix(base).strip("/").split("/"))
    ]
    files = [
        file for file in visible if file.endswith(SUFFIXES) and file.rpartition("/")[2] not in _NOT_DATA_NAMES
    ]
    for file in visible:
        known = file.endswith(SUFFIXES + _NOT_DATA_SUFFIXES) or file.rpartition("/")[2] in _NOT_DATA_NAMES
        if not known:
            raise DataError(
                "the file's name does not say what it holds",
                where=file,
                why="leaving it out could leave out data",
                fix=f"name the files that are meant, such as {name}/*.jsonl, or move this one away",
                kind="no_such_file",
            )
    files = only_saved(files, visible, open_file)
    if not files:
        raise DataError(
            f"the folder holds no file that ends in {', '.join(SUFFIXES)}",
            where=name,
            fix="check the path given to --data",
            kind="no_such_file",
        )
    return files
