"""A file's rows, read strictly and in blocks: JSON here, others in ``csv_rows``, ``tables``, ``arrow_files``.

A block is small whatever the file's size, and raw, so that another process can parse it.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO, cast

import pyarrow as pa

from dpo_opt.precompute.read.arrow_files import arrow_blocks
from dpo_opt.precompute.read.csv_rows import csv_blocks
from dpo_opt.precompute.read.file_kinds import kind_of_file, other_kind, refuse_other_kind
from dpo_opt.precompute.read.row_blocks import LONGEST_ROW, Block, TextBlock, too_long
from dpo_opt.precompute.read.sources import SUFFIXES, open_file, reading_errors, reason_of
from dpo_opt.precompute.read.strict_json import quote
from dpo_opt.precompute.read.tables import table_blocks
from dpo_opt.schemas.errors import DataError, quoted

_BLOCK_BYTES = 2**21
_TABLES = {".parquet": table_blocks, ".arrow": arrow_blocks}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OBJECT_OVER_LINES = re.compile(rb'\s*\{[ \t\r]*\n[ \t]*"')
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def read_blocks(
    file: str, *, column: Mapping[str, str], ignored: frozenset[str] = frozenset()
) -> Iterator[Block]:
    """The rows of one file, in order.

    Args:
        file: A path or URL whose name ends in one of ``SUFFIXES``.
        column: From a part of a row to the column that it is read from; tables load no others but those that
            some form of row reads.
        ignored: Columns that are not read.

    Raises:
        DataError: The file cannot be read, or not to its end, or has no rows.
    """
    suffix = next((suffix for suffix in SUFFIXES if file.endswith(suffix)), None)
    if suffix is None:
        kind = kind_of_file(file)
        raise DataError(
            "the file name does not say what the file holds",
            where=file,
            why=f"it must end in one of {', '.join(SUFFIXES)}{f'; the file is {kind.name}' if kind else ''}",
            fix=kind.fix if kind else "write its pairs as JSON Lines: one JSON object per line",
            kind="unreadable_file",
        )
    blocks: Iterator[Block]
    if suffix in _TABLES:
        blocks = _TABLES[suffix](file, frozenset(column.values()), ignored)
    else:
        blocks = _text_blocks(file, suffix, column)
    empty = True
    for block in blocks:
        empty = False
        yield block
    if empty:
        raise DataError(
            "the file has no rows",
            where=file,
            why="there is nothing to score",
            fix="check the command that wrote it",
            kind="unreadable_file",
        )


def _text_blocks(file: str, suffix: str, column: Mapping[str, str]) -> Iterator[TextBlock]:
    compression = next((name for end, name in _COMPRESSION.items() if suffix.endswith(end)), None)
    place = file
    try:
        with open_file(file) as raw, _decompressed(raw, compression, file) as stream:
            for block in _divided(file, suffix, stream, column):
                place = f"{block.prefix}{block.numbers[-1]}" if block.texts else place
                if block.texts:
                    yield block
    except reading_errors() as error:
        other = other_kind(file) if place == file else None
        raise DataError(
            f"cannot be read after this ({reason_of(error)})",
            where=place,
            why=f"the file is {other.name}, whatever its name says"
            if other
            else "the file is cut off, damaged or not readable for this user",
            fix=other.fix if other else "copy or download the file again",
            kind="unreadable_file",
        ) from error


def _divided(file: str, suffix: str, stream: BinaryIO, column: Mapping[str, str]) -> Iterator[TextBlock]:
    if suffix[:4] in _DELIMITERS:
        return csv_blocks(file, stream, _DELIMITERS[suffix[:4]], column)
    chunk = stream.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
    if _OBJECT_OVER_LINES.match(chunk):
        raise DataError(
            "one JSON object over several lines",
            where=f"{file}:1",
            why="each line is one row",
            fix='python -c "import json, sys; print(json.dumps(json.load(sys.stdin)))" '
            f"< {quoted(file)} > NEW.jsonl",
            kind="unreadable_file",
        )
    is_array = not suffix.startswith(".jsonl") and _begins_array(chunk)
    return (_elements if is_array else _lines)(file, chunk, stream)


def _decompressed(raw: BinaryIO, compression: str | None, file: str) -> BinaryIO:
    if compression is None:
        refuse_other_kind(raw, file)
        return raw
    # Arrow's stream notices a cut-off end in both formats and reads files of several members.
    stream = pa.input_stream(pa.PythonFile(raw, mode="r"), compression=compression)
    return cast(BinaryIO, io.BufferedReader(stream, _BLOCK_BYTES))


def _begins_array(chunk: bytes) -> bool:
    return chunk.lstrip()[:1] == b"["


def _lines(file: str, chunk: bytes, stream: BinaryIO) -> Iterator[TextBlock]:
    """Lines that are not blank, numbered from 1, as an editor numbers them."""
    number, rest = 1, b""
    while chunk:
        *lines, tail = chunk.split(b"\n")
        if lines:
            lines[0] = rest + lines[0]
            rest = b""
            if len(lines[0]) > LONGEST_ROW:
                raise too_long(f"{file}:{number}", "line", "write one JSON object per line")
            numbered = [(i, line) for i, line in enumerate(lines, number) if line and not line.isspace()]
            number += len(lines)
            yield TextBlock(file, f"{file}:", [i for i, _ in numbered], [line for _, line in numbered])
        rest += tail
        if len(rest) > LONGEST_ROW:
            raise too_long(f"{file}:{number}", "line", "write one JSON object per line")
        chunk = stream.read(_BLOCK_BYTES)
    if rest and not rest.isspace():
        yield TextBlock(file, f"{file}:", [number], [rest])


# Finds where elements end; a number of thousands of digits is refused with its element, not here.
_SCANNER = json.JSONDecoder(parse_int=str)


def _elements(file: str, chunk: bytes, stream: BinaryIO) -> Iterator[TextBlock]:
    """Elements of one array, counted from 1; what they hold is checked when they are parsed."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    text = decoder.decode(chunk).lstrip().removeprefix("[")
    prefix, first = f"{file}:element ", 1
    while True:
        texts, position, failure, final = _whole_elements(text)
        if texts:
            yield TextBlock(file, prefix, range(first, first + len(texts)), texts)
        first += len(texts)
        text = text[position:]
        if text.startswith("]"):
            break
        if len(text) > LONGEST_ROW:
            raise too_long(f"{prefix}{first}", "element", "write JSON Lines: one JSON object per line")
        # As much again as is left, so that a long element is not scanned many times over.
        wanted = min(max(_BLOCK_BYTES, len(text)), LONGEST_ROW + _BLOCK_BYTES - len(text))
        more = b"" if final else stream.read(wanted)
        if not more:
            raise _bad_array(f"{prefix}{first}", f"not readable as JSON from here ({quote(failure)})")
        text += decoder.decode(more)
    is_more = bool(text[1:].strip() or decoder.decode(b"", final=True))
    # To the file's very end, where a compressed one says whether it is whole.
    while not is_more and (more := stream.read(_BLOCK_BYTES)):
        is_more = bool(more.strip())
    if is_more:
        raise _bad_array(f"{prefix}{first}", "there is something after the end of the array")


def _whole_elements(text: str) -> tuple[list[bytes], int, str, bool]:
    """The elements that ``text`` holds whole, where the rest begins, why, and whether for good.

    Only after the end of an object is it sure that more text would not help.
    """
    texts: list[bytes] = []
    position = _after_space(text, 0)
    while position < len(text) and text[position] != "]":
        try:
            _, end = _SCANNER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            return texts, position, str(error), False
        after = _after_space(text, end)
        if after == len(text):
            break  # a number may go on
        if text[after] not in ",]":
            failure = "no comma and no end of the array follows the element"
            return texts, position, failure, text[end - 1] == "}"
        texts.append(text[position:end].encode("utf-8", errors="surrogateescape"))
        position = _after_space(text, after + 1) if text[after] == "," else after
    return texts, position, "the array does not end", False


def _bad_array(where: str, what: str) -> DataError:
    return DataError(
        what,
        where=where,
        why="what follows cannot be told apart into elements, so none of it would be read",
        fix="correct the file, or write JSON Lines, where a bad row stays alone",
        kind="unreadable_file",
    )


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
