"""Analysis of shards and training runs: frames, metrics, estimates, figures, diagnosis, reports.

Names are imported when they are first used, so that importing the package is fast: polars and matplotlib are
loaded only with the functions that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_opt.analysis.check_page import write_check_page
    from dpo_opt.analysis.diagnosis.diagnose import diagnose
    from dpo_opt.analysis.diagnosis.finding import Diagnosis, Finding
    from dpo_opt.analysis.figures.curves import (
        accuracy_curve,
        logratio_curves,
        loss_curve,
        margin_curve,
        reward_curves,
        update_curves,
    )
    from dpo_opt.analysis.figures.distributions import (
        margin_by_length,
        margin_histogram,
        reward_margin_histogram,
    )
    from dpo_opt.analysis.figures.frontier import frontier_figure
    from dpo_opt.analysis.frontier import FrontierPoint, read_frontier
    from dpo_opt.analysis.intervals import Interval, ratio_interval, share_interval, wilson
    from dpo_opt.analysis.kl import KLEstimate, KLFile, estimate_kl, kl_of_run
    from dpo_opt.analysis.load import (
        join_reference,
        scan_kl_samples,
        scan_pair_logps,
        scan_run,
        scan_shards,
    )
    from dpo_opt.analysis.outcomes import means_over_prompts, shares_over_prompts
    from dpo_opt.analysis.page import report
    from dpo_opt.analysis.reference_margins import reference_view
    from dpo_opt.analysis.rewards import (
        accuracy,
        chosen_fell,
        chosen_logratio,
        displacement,
        distance_per_token,
        effective_weight,
        implicit_reward,
        length_difference,
        margin,
        ranking_accuracy,
        reference_margin,
        rejected_logratio,
        sigmoid_loss,
    )
    from dpo_opt.analysis.run_files import open_run
    from dpo_opt.analysis.summary import Summary
    from dpo_opt.analysis.triage import token_overlap

__all__ = [
    "Diagnosis",
    "Finding",
    "FrontierPoint",
    "Interval",
    "KLEstimate",
    "KLFile",
    "Summary",
    "accuracy",
    "accuracy_curve",
    "chosen_fell",
    "chosen_logratio",
    "diagnose",
    "displacement",
    "distance_per_token",
    "effective_weight",
    "estimate_kl",
    "frontier_figure",
    "implicit_reward",
    "join_reference",
    "kl_of_run",
    "length_difference",
    "logratio_curves",
    "loss_curve",
    "margin",
    "margin_by_length",
    "margin_curve",
    "margin_histogram",
    "means_over_prompts",
    "open_run",
    "ranking_accuracy",
    "ratio_interval",
    "read_frontier",
    "reference_margin",
    "reference_view",
    "rejected_logratio",
    "report",
    "reward_curves",
    "reward_margin_histogram",
    "scan_kl_samples",
    "scan_pair_logps",
    "scan_run",
    "scan_shards",
    "share_interval",
    "shares_over_prompts",
    "sigmoid_loss",
    "token_overlap",
    "update_curves",
    "wilson",
    "write_check_page",
]

_NAMES = {
    "check_page": ("write_check_page",),
    "diagnosis.diagnose": ("diagnose",),
    "diagnosis.finding": ("Diagnosis", "Finding"),
    "figures.curves": (
        "accuracy_curve",
        "logratio_curves",
        "loss_curve",
        "margin_curve",
        "reward_curves",
        "update_curves",
    ),
    "figures.distributions": ("margin_by_length", "margin_histogram", "reward_margin_histogram"),
    "figures.frontier": ("frontier_figure",),
    "frontier": ("FrontierPoint", "read_frontier"),
    "intervals": ("Interval", "ratio_interval", "share_interval", "wilson"),
    "kl": ("KLEstimate", "KLFile", "estimate_kl", "kl_of_run"),
    "load": ("join_reference", "scan_kl_samples", "scan_pair_logps", "scan_run", "scan_shards"),
    "outcomes": ("means_over_prompts", "shares_over_prompts"),
    "page": ("report",),
    "reference_margins": ("reference_view",),
    "rewards": (
        "accuracy",
        "chosen_fell",
        "chosen_logratio",
        "displacement",
        "distance_per_token",
        "effective_weight",
        "implicit_reward",
        "length_difference",
        "margin",
        "ranking_accuracy",
        "reference_margin",
        "rejected_logratio",
        "sigmoid_loss",
    ),
    "run_files": ("open_run",),
    "summary": ("Summary",),
    "triage": ("token_overlap",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
