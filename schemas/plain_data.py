"""JSON and YAML that others wrote: what is wrong with a text is a ValueError, also if it is nested deeply.

Python reads a text of some hundred levels or ends in a RecursionError, depending on how deep its caller is.
What was read then fails later, where it is copied or written. So more levels than any honest file has are
refused.
"""

import json
from typing import Any

from dpo_opt.schemas.errors import first_line

MOST_LEVELS = 100


def json_of(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: Not UTF-8, not JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise _too_deep() from error
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) > MOST_LEVELS:  # type: ignore[arg-type]
        _require_flat(value)
    return value


def yaml_of(text: str | bytes) -> Any:
    """The value of a YAML text, without objects of Python.

    Raises:
        ValueError: Not UTF-8, not YAML, a value that is not of the kind that its tag or its form says, or
            nested too deeply.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except RecursionError as error:
        raise _too_deep() from error
    # PyYAML raises the last ones for values such as a month 13.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(first_line(error, named=False)) from error
    _require_flat(value)
    return value


def is_number(value: object) -> bool:
    """Whether a value is one in JSON and YAML, where true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def levels(value: object) -> int:
    """How deep lists and objects stand in each other; what an alias of YAML repeats counts once."""
    level, depth, seen = [value], 0, set[int]()
    while level := [v for v in level if isinstance(v, dict | list) and id(v) not in seen]:
        depth += 1
        seen.update(map(id, level))
        level = [member for v in level for member in (v.values() if isinstance(v, dict) else v)]
    return depth


def _require_flat(value: object) -> None:
    if levels(value) > MOST_LEVELS:
        raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested too deeply, more than {MOST_LEVELS} levels")
