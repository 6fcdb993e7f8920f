"""Conversations that begin alike: held out by their whole prompts, they may lie on both sides."""

import numpy as np

from dpo_opt.precompute.check.pair_statistics import EXAMPLES, Facts
from dpo_opt.precompute.check.problems import problem
from dpo_opt.schemas.audit_record import Example, Problem


def shared_openings(facts: Facts) -> list[Problem]:
    """Pairs whose prompt begins with the same message of the user as another prompt; see ``opening_hash``."""
    _, first, prompt = np.unique(facts.prompt, return_index=True, return_inverse=True)
    _, opening, prompts = np.unique(facts.opening[first], return_inverse=True, return_counts=True)
    # Of every pair, how many prompts begin as its own does.
    alike = prompts[opening[prompt]]
    pairs = np.flatnonzero(alike > 1)
    if not len(pairs):
        return []
    examples = [
        Example(where=facts.places[int(i)], detail=f"{alike[i]:,} prompts begin with its first message")
        for i in pairs[:EXAMPLES]
    ]
    return [problem("shared_opening", len(pairs), examples)]
