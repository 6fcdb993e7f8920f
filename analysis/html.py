"""Templates to HTML pages: one environment for all of them, so that escaping is decided in one place.

Strings of models, data sets and file systems lose their control characters here and are escaped by the
template; what is left undefined is an error, not a gap in a page.
"""

import math
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jinja2

from dpo_opt.analysis.intervals import Interval
from dpo_opt.schemas.safe_text import printable


def render(template: str, **values: object) -> str:
    """A whole page.

    Args:
        template: The name of a file beside this one.
        values: What the template shows, besides ``version`` of this package and the time it was ``written``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=_count,
        amount=_amount,
        num=_num,
        signed=_signed,
        nats=_nats,
        pct=_pct,
        pct_bounds=_pct_bounds,
        bounds=_bounds,
    )
    # Every string that is not made here passes through this, names of folders and sources included.
    environment.finalize = lambda value: printable(value) if type(value) is str else value
    return environment.get_template(template).render(
        version=version("dpo-opt"), written=datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"), **values
    )


def _count(value: int) -> str:
    return f"{value:,}"


def _amount(value: float) -> str:
    """Something that is never negative and may be large: no exponents."""
    if 0 < value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if value >= 100 else _num(value)


def _num(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    # A minus sign is as wide as the digits, a hyphen is not.
    return f"{value:.{digits}g}".replace("-", "−")


def _signed(value: float | None, digits: int = 3) -> str:
    text = _num(value, digits)
    return text if value is None or text[0] in "–−" or value == 0 else f"+{text}"


def _nats(value: float) -> str:
    """A difference of summed log-probs: hundreds of nats are common, a tenth says nothing."""
    text = f"{value:+,.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def _pct(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{decimals}%}"


def _pct_bounds(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return "one prompt: no interval"
    return f"{100 * interval.low:.1f} to {interval.high:.1%}"


def _bounds(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return "one prompt: no interval"
    return f"{_num(interval.low)} to {_num(interval.high)}"
