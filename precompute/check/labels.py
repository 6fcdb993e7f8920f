"""Labels of unpaired rows: how many of each there are, and which weights make up for it."""

import numpy as np

from dpo_opt.precompute.check.pair_statistics import EXAMPLES, Facts
from dpo_opt.precompute.check.problems import problem
from dpo_opt.schemas.audit_record import Example, LabelCounts, Problem

_MOST = 4 / 3  # of the weighted share of desirable to undesirable rows (KTO, arXiv 2402.01306, eq. 8)


def label_counts(facts: Facts) -> LabelCounts | None:
    """How many rows have which label; None where all are pairs."""
    counts = LabelCounts(desirable=int(facts.desirable.sum()), undesirable=int(facts.undesirable.sum()))
    return counts if counts.desirable or counts.undesirable else None


def label_problems(facts: Facts) -> list[Problem]:
    """Unpaired rows beside pairs, and labels of which one is rare."""
    counts = label_counts(facts)
    if counts is None:
        return []
    desirable, undesirable = counts.desirable, counts.undesirable
    if desirable + undesirable < len(facts):
        pairs = np.flatnonzero(~(facts.desirable | facts.undesirable))[:EXAMPLES]
        examples = [Example(where=facts.places[int(i)], detail="a pair") for i in pairs]
        return [problem("two_kinds", len(facts) - desirable - undesirable, examples)]
    if undesirable <= desirable <= _MOST * undesirable:
        return []
    found = Example(where="all data", detail=f"{desirable} desirable, {undesirable} undesirable")
    if not desirable or not undesirable:
        return [problem("one_label", len(facts), [found])]
    least = undesirable / desirable
    fix = f"`--desirable-weight {least:.2g}` to `{_MOST * least:.2g}` of `dpo-opt train` balances them"
    return [problem("label_balance", max(desirable, undesirable), [found], fix=fix)]
