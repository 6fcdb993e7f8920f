"""Renders the HTML templates, with one environment for all pages, so that all escape text in the same way.

Strings from models, datasets and file names lose their control characters here, and the template escapes
them. An undefined value is an error, not a gap in the page.
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
        template: File name in ``templates``.
        values: What the template shows, in addition to ``version`` (of this package) and ``written`` (now).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
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
        points=_points,
        points_bounds=_points_bounds,
        bounds=_bounds,
    )
    # Every string from outside passes through this, including names of folders and sources.
    environment.finalize = lambda value: printable(value) if type(value) is str else value
    return environment.get_template(template).render(
        version=version("dpo-opt"), written=datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"), **values
    )


def _count(value: int) -> str:
    return f"{value:,}"


def _amount(value: float) -> str:
    """A number that is never negative and may be large, without an exponent."""
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
    """A difference of summed log-probs, to a tenth of a nat: hundreds of nats are common."""
    text = f"{value:+,.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def _pct(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{decimals}%}"


def _pct_bounds(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return "one prompt: no interval"
    return f"{100 * interval.low:.1f} to {interval.high:.1%}"


def _points(share: float | None) -> str:
    """A difference of two shares, in percentage points."""
    if share is None or not math.isfinite(share):
        return "–"
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def _points_bounds(bounds: Interval) -> str:
    if bounds.low is None or not math.isfinite(bounds.low):
        return "one prompt: no interval"
    return f"{_points(bounds.low)} to {_points(bounds.high)}"


def _bounds(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return "one prompt: no interval"
    return f"{_num(interval.low)} to {_num(interval.high)}"
