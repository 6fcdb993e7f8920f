"""How often the longer completion is the chosen one, and where that alone tells which one is."""

import numpy as np
import numpy.typing as npt

from dpo_opt.precompute.check.pair_statistics import EXAMPLES
from dpo_opt.precompute.check.problems import problem
from dpo_opt.schemas.audit_record import Example, LengthBias, Problem, SourceCount

_BIASED = 0.6  # a length that wins this share of pairs predicts the preference well on its own
_LEAST_UNEQUAL = 50  # pairs; fewer say nothing about a share


def length_bias(lengths: npt.NDArray[np.int32]) -> LengthBias:
    """How often the longer completion is chosen; ``lengths`` is (P, 3)."""
    longer = int((lengths[:, 1] > lengths[:, 2]).sum())
    shorter = int((lengths[:, 1] < lengths[:, 2]).sum())
    unequal = longer + shorter
    return LengthBias(
        longer_chosen=longer / unequal if unequal else None,
        unequal_pairs=unequal,
        equal_pairs=len(lengths) - unequal,
    )


def biased(everything: LengthBias, sources: list[SourceCount]) -> list[Problem]:
    """Length bias of all data and of each source, because opposite biases of two sources may cancel out."""
    groups = {"all data": everything}
    groups |= {f"source {s.source}": s.length_bias for s in sources if s.source is not None}
    biased = {name: bias for name, bias in groups.items() if _is_biased(bias)}
    if not biased:
        return []
    counted = [biased["all data"]] if "all data" in biased else biased.values()
    examples = [Example(where=name, detail=_bias_in_words(bias)) for name, bias in biased.items()]
    return [problem("length_bias", sum(bias.unequal_pairs for bias in counted), examples[:EXAMPLES])]


def _is_biased(bias: LengthBias) -> bool:
    share = bias.longer_chosen
    return share is not None and bias.unequal_pairs >= _LEAST_UNEQUAL and max(share, 1 - share) >= _BIASED


def _bias_in_words(bias: LengthBias) -> str:
    share = bias.longer_chosen or 0.0
    wins, who = (share, "longer") if share > 0.5 else (1 - share, "shorter")
    return f"the {who} completion wins {wins:.1%} of {bias.unequal_pairs:,} pairs of unequal length"
