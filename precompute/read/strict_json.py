"""One JSON object, read so that nothing is silently repaired.

``json`` alone accepts NaN, keeps the last of two equal keys, and decodes what an editor saved in another
encoding into other text; each of these reaches the loss as an ordinary number.
"""

import codecs
import json
from collections import Counter
from typing import NoReturn

from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.plain_data import MOST_LEVELS, levels

FIX_ROW = "correct or remove the row; `dpo-opt check DATA` lists every such row at once"
SKIP_ROW = "pass --on-bad-row skip: such rows are left out and listed, and shards that are finished stay"
"""For rows that are pairs, but not for this model: to change them would make other data of the folder's."""

_LONGEST_QUOTE = 60  # a message may quote a key of the user's file, never a whole text
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)  # the first begins like UTF-16


class _RefusedJson(ValueError):
    """Something that the json module accepts and this one refuses."""

    def __init__(self, what: str, kind: str) -> None:
        super().__init__(what)
        self.kind = kind


def parse_object(line: bytes, *, where: str) -> dict[str, object]:
    """The JSON object on one line, or in one element of an array.

    Raises:
        DataError: Not UTF-8, not JSON, no object, nested too deeply, a key twice in an object, or NaN.
    """
    try:
        # A text cut off at the line's end would else read as a bad newline in it.
        text = line.rstrip().decode("utf-8")
        value = parse_json(text)
    except UnicodeDecodeError as error:
        raise _wrong_encoding(line, error, where) from error
    except json.JSONDecodeError as error:
        raise _not_json(line, error, where) from error
    except _RefusedJson as error:
        raise DataError(
            str(error), where=where, why="JSON does not define it", fix=FIX_ROW, kind=error.kind
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(
            f"not readable as JSON ({quote(str(error))})", where=where, fix=FIX_ROW, kind="number"
        ) from error
    except RecursionError as error:
        raise DataError(
            "the JSON value is nested too deeply",
            where=where,
            why="no preference pair looks like that",
            fix=FIX_ROW,
            kind="nesting",
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{kind_of(value)} where a JSON object is expected",
            where=where,
            why='each line is one pair: {"prompt": ..., "chosen": ..., "rejected": ...}',
            fix=FIX_ROW,
            kind="not_an_object",
        )
    return value


def parse_json(text: str) -> object:
    """Any JSON value.

    Raises:
        ValueError: Not JSON, a key twice in an object, or NaN.
        RecursionError: Nested too deeply.
    """
    value: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    if text.count("[") + text.count("{") > MOST_LEVELS and levels(value) > MOST_LEVELS:
        raise RecursionError(f"more than {MOST_LEVELS} levels")
    return value


def quote(text: str) -> str:
    """The beginning of a text, short enough for a message."""
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."


def escape(key: object) -> str:
    """A key as it can be printed: control characters and lone surrogates escaped."""
    return quote(json.dumps(str(key))[1:-1])


def kind_of(value: object) -> str:
    """What a value is, in words."""
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", int: "a number"}
    kinds |= {float: "a number", bytes: "binary data"}
    return "null" if value is None else kinds.get(type(value), f"a value of type {type(value).__name__}")


def _unique(members: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(members)
    if len(values) < len(members):
        ((key, _),) = Counter(key for key, _ in members).most_common(1)
        raise _RefusedJson(f'the key "{escape(key)}" appears twice in one object', "duplicate_key")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedJson(f"{name} is not a JSON value", "number")


def _wrong_encoding(line: bytes, error: UnicodeDecodeError, where: str) -> DataError:
    if line.startswith(_UTF32):
        what, fix = "the file is UTF-32, not UTF-8", "iconv -f UTF-32 -t UTF-8 FILE > NEW.jsonl"
    elif line.startswith(_UTF16):
        what, fix = "the file is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8 FILE > NEW.jsonl"
    else:
        what = f"not valid UTF-8 at byte {error.start + 1} of the line"
        fix = "save the file as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8 FILE`"
    return DataError(
        what, where=where, why="guessing another encoding would change the text", fix=fix, kind="encoding"
    )


def _not_json(line: bytes, error: json.JSONDecodeError, where: str) -> DataError:
    if b"\0" in line:
        return DataError(
            f"a null byte at byte {line.index(0) + 1} of the line",
            where=where,
            why="text holds none: a crash or a full disk left a hole in the file, or it is UTF-16 or binary",
            fix="copy or download the file again",
            kind="null_byte",
        )
    return DataError(
        f"not valid JSON at column {error.colno} ({error.msg})",
        where=where,
        why="each line is one JSON object",
        fix=FIX_ROW,
        kind="json",
    )


def without_nulls(value: object) -> object:
    """Remove the keys whose value is null: a table gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    return [without_nulls(member) for member in value] if isinstance(value, list) else value
