"""CSV and TSV, read strictly and handed on as JSON text, so that a row is checked as any other.

Arrow's reader and most others repair silently: they drop a quote, or read on to the file's end for one that
is missing. Python's, told to be strict, refuses both.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NoReturn

from dpo_opt.precompute.read.messages import TEXT_OF_MESSAGES
from dpo_opt.precompute.read.row_blocks import LONGEST_ROW, TextBlock, too_long
from dpo_opt.precompute.read.shape_parts import CARRIED_KEYS, HISTORY_KEYS, MEDIA, RATINGS
from dpo_opt.precompute.read.strict_json import escape, parse_json
from dpo_opt.precompute.read.tables import columns_to_read
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DataError, quoted

_SCORES = frozenset({*RATINGS, *RATINGS.values()})
# Cells of these keys are numbers; all other cells are text.
_NUMBERS = _SCORES | {
    *("weight", "margin", "labels", "better_response_id", "overall_preference", "preference_strength"),
    *("winner_model_a", "winner_model_b", "winner_tie"),
}
_NUMBER = re.compile(r"[+-]?[0-9]+(?P<fraction>\.[0-9]*)?(?P<power>[eE][+-]?[0-9]+)?")
# An empty cell of these keys is no value; of others it is an empty text, as in JSON.
_MAY_BE_ABSENT = _SCORES.union(CARRIED_KEYS)
# Cells of these keys may be the JSON text of a list.
_LISTS = frozenset(
    {*MEDIA, *HISTORY_KEYS, *("completions", "responses", "answers", "ranks", "scores", "rewards")}
)
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_BLOCK_BYTES = 2**20
_FIX_QUOTES = "write a cell that holds separators, quotes or line ends in quotes, and each quote in it twice"


def csv_blocks(file: str, stream: BinaryIO, delimiter: str, column: Mapping[str, str]) -> Iterator[TextBlock]:
    """The rows after the header, counted from 1 without blank ones.

    Args:
        file: Its name, for messages.
        stream: Its bytes.
        delimiter: What stands between cells.
        column: From a part of a row to the column that it is read from.

    Raises:
        DataError: A row cannot be told from its neighbours, or is not UTF-8. The rows before it come first.
    """
    prefix, first, size = f"{file}:row ", 1, 0
    texts: list[bytes] = []
    try:
        for text in _objects(file, stream, delimiter, column):
            texts.append(text)
            size += len(text)
            if size > _BLOCK_BYTES:
                yield TextBlock(file, prefix, range(first, first + len(texts)), texts)
                first, size, texts = first + len(texts), 0, []
    except DataError:
        if texts:
            yield TextBlock(file, prefix, range(first, first + len(texts)), texts)
        raise
    if texts:
        yield TextBlock(file, prefix, range(first, first + len(texts)), texts)


def _objects(file: str, stream: BinaryIO, delimiter: str, column: Mapping[str, str]) -> Iterator[bytes]:
    """Each row as a JSON object."""
    rows = _rows(file, stream, delimiter)
    header = next(rows, None)
    if header is None:
        return
    if len(header) == 1:
        _refuse_other_separator(header[0], file, delimiter)
    names = columns_to_read(header, frozenset(), file, frozenset(column.values()))
    places = [(header.index(name), name) for name in names]
    numbers = _with_sources(_NUMBERS, column)
    lists = _with_sources(_LISTS, column)
    may_be_absent = _with_sources(_MAY_BE_ABSENT, column)
    for number, cells in enumerate(rows, start=1):
        if len(cells) != len(header):
            _refuse(
                f"the row has {counted(len(cells), 'cell')}, but the header has {len(header)}",
                f"{file}:row {number}",
                why="nothing says which cell belongs to which column",
                fix=_FIX_QUOTES,
            )
        row: dict[str, object] = {}
        for place, name in places:
            cell = cells[place]
            if cell or name not in may_be_absent:
                row[name] = _number(cell) if name in numbers else _list(cell) if name in lists else cell
            if number == 1 and TEXT_OF_MESSAGES.match(cell):
                _refuse(
                    f'the column "{escape(name)}" holds messages as text',
                    f"{file}:row 1",
                    why="a cell is text, and this text would be trained on with its brackets and quotes",
                    fix="write the rows as JSON Lines or Parquet, where messages stay messages",
                )
        yield json.dumps(row, ensure_ascii=False).encode("utf-8")


def _refuse_other_separator(header: str, file: str, delimiter: str) -> None:
    """Refuse a table whose cells are separated by another sign, of which the header is one cell."""
    separator = next((sign for sign in ";\t|," if sign != delimiter and sign in header), None)
    if separator is not None:
        shown = {"\t": "\\t"}.get(separator, separator)
        _refuse(
            f'the cells are separated by "{shown}"',
            f"{file}:header",
            why=f"a file of this name is read with {'commas' if delimiter == ',' else 'tabs'} between cells",
            fix='python -c "import csv, sys; csv.writer(sys.stdout).writerows('
            f"csv.reader(sys.stdin, delimiter='{shown}'))\" < {quoted(file)} > NEW.csv",
        )


def _rows(file: str, stream: BinaryIO, delimiter: str) -> Iterator[list[str]]:
    """The header, if there is one, and the rows, as lists of cells."""
    # The limit is the whole process's; the usual one is less than a long answer.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_ROW))
    number = 0
    where = f"{file}:header"
    try:
        for cells in csv.reader(_lines(stream), delimiter=delimiter, strict=True):
            if not cells:
                continue
            for cell in cells:
                if "\0" in cell or (not cell.isascii() and _ESCAPED_BYTE.search(cell)):
                    _refuse_bytes(cell, where)
            yield cells
            number += 1
            where = f"{file}:row {number}"
    except csv.Error as error:
        if "field limit" in str(error):
            raise too_long(where, "row", "check that each quote that opens a cell is closed") from error
        raise DataError(
            f"not readable as CSV ({error})",
            where=where,
            why="a quote is not closed, or stands alone in a cell in quotes; its meaning would be a guess",
            fix=_FIX_QUOTES,
            kind="unreadable_file",
        ) from error


def _lines(stream: BinaryIO) -> Iterator[str]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    while line := text.readline(LONGEST_ROW + 1):
        if len(line) > LONGEST_ROW:
            raise csv.Error("line larger than field limit")  # as csv says of a cell
        yield line


def _with_sources(parts: frozenset[str], column: Mapping[str, str]) -> frozenset[str]:
    return parts.union(key for part, key in column.items() if part in parts)


def _number(cell: str) -> int | float | str:
    """The number that a cell is; other text stays text, and is refused where a number is wanted."""
    found = _NUMBER.fullmatch(cell)
    if found is None:
        return cell
    is_whole = found["fraction"] is None and found["power"] is None
    return int(cell) if is_whole and len(cell) < 18 else float(cell)


def _list(cell: str) -> object:
    """The list whose JSON text a cell is; other text stays text."""
    if not cell.startswith("["):
        return cell
    try:
        found = parse_json(cell)
    except (ValueError, RecursionError):
        return cell
    return found


def _refuse_bytes(cell: str, where: str) -> NoReturn:
    if "\0" in cell:
        _refuse(
            "a null byte in a cell",
            where,
            why="text holds none: a crash left a hole in the file, or it is UTF-16 or binary",
            fix="copy the file again, or save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE",
        )
    _refuse(
        "a cell that is not valid UTF-8",
        where,
        why="guessing another encoding would change the text",
        fix="save the file as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8 FILE`",
    )


def _refuse(what: str, where: str, *, why: str, fix: str) -> NoReturn:
    raise DataError(what, where=where, why=why, fix=fix, kind="unreadable_file")
