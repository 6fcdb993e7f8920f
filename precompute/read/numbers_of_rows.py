"""The numbers of a row: its weight, its margin, and how its completions were rated."""

import math
from decimal import Decimal

from dpo_opt.precompute.read.shape_parts import RATINGS, Values
from dpo_opt.precompute.read.strict_json import FIX_ROW, kind_of
from dpo_opt.schemas.errors import DataError

_LARGEST = 1e30  # no weight or margin is; a whole number of hundreds of digits is no float at all


def number_of(value: object, key: str, where: str, *, least: float = -math.inf) -> float | None:
    """A number that a row gives; None where it gives none.

    Raises:
        DataError: It is none, or not finite, or below ``least``.
    """
    if value is None:
        return None
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(key, kind_of(value), where, why="it must be a number")
    number = -math.inf if value < -_LARGEST else math.inf if value > _LARGEST else float(value)
    if not (math.isfinite(number) and number >= least):
        why = f"it must be finite and at least {least:g}" if math.isfinite(least) else "it must be finite"
        raise _refused(key, f"{number:g}", where, why=why)
    return number


def margin_of(values: Values, where: str) -> float | None:
    """The row's own margin, or how much better the chosen completion was scored.

    Raises:
        DataError: A number of it is none, or not finite.
    """
    if "margin" in values or "score_chosen" not in values or "score_rejected" not in values:
        return number_of(values.get("margin"), "margin", where)
    chosen = number_of(values["score_chosen"], "score_chosen", where)
    rejected = number_of(values["score_rejected"], "score_rejected", where)
    return None if chosen is None or rejected is None else chosen - rejected


def ratings_of(values: Values) -> float | None:
    """How much better the chosen completion was rated, at the least; None where nothing rates both."""
    if values.keys().isdisjoint(RATINGS):
        return None
    given = [(_rating(values.get(chosen)), _rating(values.get(other))) for chosen, other in RATINGS.items()]
    return min((a - b for a, b in given if a is not None and b is not None), default=None)


def _rating(value: object) -> float | None:
    """A rating; texts and lists of them are compared by nobody."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else None


def _refused(key: str, found: str, where: str, *, why: str) -> DataError:
    fix = f"{FIX_ROW}; or pass --ignore-column {key} to read the data without it"
    return DataError(f'"{key}" is {found}', where=where, why=why, fix=fix, kind="number")
