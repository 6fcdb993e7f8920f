"""Rows that stand inside another object: refused, with the command that takes them out."""

import re

from dpo_opt.precompute.read.shape_parts import Values
from dpo_opt.precompute.read.shapes import find_shape
from dpo_opt.schemas.errors import DataError

_PLAIN_KEY = re.compile(r"[\w -]+")


def refuse_wrapped(values: Values, where: str) -> None:
    """Refuse a row that is no pair, and one of whose values is a pair or a list of them.

    Raises:
        DataError: It is such a row.
    """
    for key, value in values.items():
        if not _PLAIN_KEY.fullmatch(key):
            continue
        first = value[0] if isinstance(value, list) and value else None
        what = taken = None
        if _is_pair(value):
            what = f'the pair stands inside the object "{key}"'
            taken = f"json.loads(line)['{key}'])) for line in sys.stdin"
        elif _is_pair(first) or (isinstance(first, dict) and any(map(_is_pair, first.values()))):
            what = f'the rows stand in the list "{key}" of one object'
            taken = f"row)) for line in sys.stdin for row in json.loads(line)['{key}']"
        if what is not None:
            raise DataError(
                what,
                where=where,
                why="each row is one pair, with its parts as keys of its own",
                fix=f'python -c "import json, sys; [print(json.dumps({taken}]" < FILE > NEW.jsonl',
                kind="wrapped",
            )


def _is_pair(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return {"chosen", "rejected"} <= value.keys() or find_shape(value) is not None
