"""Analysis of shards and training runs: polars frames, estimates, figures and HTML reports.

Names are imported when they are first used, so that importing the package is fast: polars and matplotlib are
loaded only with the functions that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_opt.analysis.check_page import write_check_page
    from dpo_opt.analysis.intervals import Interval, ratio_interval, share_interval, wilson
    from dpo_opt.analysis.kl import KLEstimate, estimate_kl
    from dpo_opt.analysis.load import join_reference, scan_kl_samples, scan_pair_logps, scan_shards
    from dpo_opt.analysis.page import report
    from dpo_opt.analysis.reference_margins import reference_view
    from dpo_opt.analysis.summary import Summary

__all__ = [
    "Interval",
    "KLEstimate",
    "Summary",
    "estimate_kl",
    "join_reference",
    "ratio_interval",
    "reference_view",
    "report",
    "scan_kl_samples",
    "scan_pair_logps",
    "scan_shards",
    "share_interval",
    "wilson",
    "write_check_page",
]

_HOMES = {
    "Interval": "intervals",
    "KLEstimate": "kl",
    "Summary": "summary",
    "ratio_interval": "intervals",
    "share_interval": "intervals",
    "estimate_kl": "kl",
    "join_reference": "load",
    "reference_view": "reference_margins",
    "report": "page",
    "scan_kl_samples": "load",
    "scan_pair_logps": "load",
    "scan_shards": "load",
    "wilson": "intervals",
    "write_check_page": "check_page",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
