"""What a file is by its first bytes, where its name says nothing or something else: with how to read it."""

import contextlib
from typing import BinaryIO, NamedTuple

from dpo_opt.precompute.read.sources import open_file, reading_errors
from dpo_opt.schemas.errors import DataError, quoted

_HEAD = 16  # bytes


class FileKind(NamedTuple):
    """A kind of file."""

    name: str
    """In words."""
    ends: tuple[str, ...]
    """How the name of a data file of this kind ends; none where no such file is read."""
    fix: str
    """What makes data of it; ``FILE`` stands for its name."""


_RENAME = "rename the file, so that its name ends in "
_THEN = "then pass what it makes"
_KINDS = {
    b"\x1f\x8b": FileKind("gzip", (".gz",), _RENAME + ".jsonl.gz or .csv.gz"),
    b"\x28\xb5\x2f\xfd": FileKind("Zstandard", (".zst",), _RENAME + ".jsonl.zst"),
    b"PAR1": FileKind("Parquet", (".parquet",), _RENAME + ".parquet"),
    b"ARROW1": FileKind("Arrow", (".arrow",), _RENAME + ".arrow"),
    b"PK\x03\x04": FileKind(
        "a ZIP archive (or a spreadsheet, which is one)",
        (),
        f"unzip FILE -d NEW, {_THEN}; or save the spreadsheet as CSV in UTF-8",
    ),
    b"BZh": FileKind("bzip2", (), "bunzip2 -c FILE > NEW.jsonl"),
    b"\xfd7zXZ\x00": FileKind("xz", (), "unxz -c FILE > NEW.jsonl"),
    b"7z\xbc\xaf\x27\x1c": FileKind("a 7z archive", (), f"7z x FILE, {_THEN}"),
    b"SQLite format 3": FileKind("an SQLite database", (), "write its rows as JSON Lines or CSV"),
    b"\x80\x04\x95": FileKind("a pickle, which can run code", (), "write its rows as JSON Lines or Parquet"),
    b"\x80\x05\x95": FileKind("a pickle, which can run code", (), "write its rows as JSON Lines or Parquet"),
    b"%PDF": FileKind("a PDF", (), "write the pairs as JSON Lines: one JSON object per line"),
    b"{": FileKind("JSON by its first sign", (".jsonl", ".json"), _RENAME + ".jsonl"),
    b"[": FileKind("JSON by its first sign", (".json",), _RENAME + ".json"),
}


def kind_of_file(file: str) -> FileKind | None:
    """The kind of a file, with its own name in the fix; None where its first bytes are of no known kind.

    Args:
        file: A path or URL.
    """
    head = b""
    with contextlib.suppress(*reading_errors()), open_file(file) as raw:
        head = raw.read(_HEAD)
    return _kind_of(head, file)


def other_kind(file: str) -> FileKind | None:
    """The kind of a file that its name does not say; None where the name is right, or nothing is known."""
    return _unless_named_so(kind_of_file(file), file)


def refuse_other_kind(raw: BinaryIO, file: str) -> None:
    """Refuse a file whose name says that it is plain text, and that is of another kind.

    Args:
        raw: Its bytes, at the beginning; they are there again afterwards.
        file: Its name.

    Raises:
        DataError: It is.
        OSError: It cannot be read.
    """
    head = raw.read(_HEAD)
    raw.seek(0)
    found = _unless_named_so(_kind_of(head, file), file)
    if found is not None:
        raise DataError(
            f"the file is {found.name}, whatever its name says",
            where=file,
            why="it would be read as text",
            fix=found.fix,
            kind="unreadable_file",
        )


def _kind_of(head: bytes, file: str) -> FileKind | None:
    found = next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), None)
    return found and found._replace(fix=found.fix.replace("FILE", quoted(file)))


def _unless_named_so(found: FileKind | None, file: str) -> FileKind | None:
    if found is None or file.endswith(found.ends or ("\0",)) or found.name.startswith("JSON"):
        return None
    return found
