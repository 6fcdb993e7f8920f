"""Finds pairs that are worth a look before any training, from the reference's log-probs and the token ids.

Where CHES scores were computed from the reference's hidden states (``optimize/ches.py``), they are read too.

Nothing here says that a pair is wrong. A base model prefers short, plain texts, and what it ranks wrongly may
be exactly what training is for: read a few pairs of each kind before any is weighted down.
"""

import math
from typing import NamedTuple

import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.load import counted_tokens
from dpo_opt.analysis.slices import kept_pairs
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import CHES, CHES_NORMALISED

HARD_TO_FLIP = "hard_to_flip"
SUSPECT_LABEL = "suspect_label"
NEAR_IDENTICAL = "near_identical"
NO_INFORMATION = "no_information"
HIGH_CHES = "high_ches"

_LEAST_SHARE = 0.01
MOST_OVERLAP = 0.9
_LEAST_MARGIN = 0.5

KINDS = {
    HARD_TO_FLIP: "the reference ranks it wrongly by so much that its gradient is below 1% of its first one "
    "before the ranking turns (Chen et al., arXiv 2405.19534)",
    SUSPECT_LABEL: "per token the rejected completion is much the likelier one: the labels may be swapped "
    "(Kong et al., PerpCorrect, NeurIPS 2024)",
    NEAR_IDENTICAL: "both completions have nearly the same tokens, where likelihood displacement is most "
    "common (Razin et al., arXiv 2410.08847)",
    NO_INFORMATION: "nearly the same tokens and nearly the same log-prob",
    HIGH_CHES: "of the highest length-normalised CHES scores: the hidden states of both completions are so "
    "alike that training lowers the chosen one first of all (Razin et al., arXiv 2410.08847)",
}
"""What each kind of pair is. A pair may be of several."""


class Triage(NamedTuple):
    """Every pair with what was found of it."""

    pairs: pl.DataFrame
    """``row``, ``pair_id``, ``source``, ``reference_margin`` (nats), ``perplexity_difference`` (nats per
    token), ``token_overlap`` (0 to 1), ``ches`` and ``ches_normalised`` (null where they were not computed),
    and a Boolean for each of :data:`KINDS`."""
    suspect_above: float | None
    """The ``perplexity_difference`` above which a label is suspect; None without any."""

    def count(self, kind: str) -> int:
        """How many pairs are of a kind."""
        return int(self.pairs[kind].sum())

    @property
    def without_ches(self) -> int:
        """How many pairs have no CHES score."""
        return self.pairs[CHES_NORMALISED].null_count()


def triage(shards_dir: AnyPath, *, beta: float = 0.1, suspects: float = 0.05) -> Triage:
    """Look at every kept pair of a folder: about 100 bytes per pair in memory.

    Args:
        shards_dir: A finalized folder of shards.
        beta: Of the run to come, which decides what is hard to flip. The DPO gradient of a pair is weighted
            with sigma(-beta d), d being what the policy added to its log-prob margin; where the reference's
            margin is -c the ranking turns at d = c.
        suspects: The largest share of the pairs whose labels are called suspect, from 0 to 1, and the share
            whose CHES is called high. Only pairs whose rejected completion is the likelier one per token are
            suspect.

    Raises:
        DataError: The folder has no valid manifest, a file is not the one the manifest names, or no pair was
            kept.
    """
    pairs = kept_pairs(
        shards_dir,
        "row",
        "pair_id",
        "source",
        "ref_chosen_logps",
        "ref_rejected_logps",
        counted_tokens("chosen"),
        counted_tokens("rejected"),
        token_overlap(),
    ).select(
        "row",
        "pair_id",
        "source",
        rewards.reference_margin().alias("reference_margin"),
        (-rewards.reference_margin_per_token()).alias("perplexity_difference"),
        "token_overlap",
    )
    pairs = pairs.with_columns(_column(shards_dir, name, pairs["row"]) for name in (CHES, CHES_NORMALISED))
    # sigma(-beta c) is a hundredth of its value at the start, 1/2, at this margin.
    hard = -math.log(2 / _LEAST_SHARE - 1) / beta
    difference = pairs["perplexity_difference"]
    above = _bound(difference.filter(difference > 0), int(suspects * len(pairs)))
    high = _bound(pairs[CHES_NORMALISED].drop_nulls(), int(suspects * len(pairs)))
    alike = pl.col("token_overlap") >= MOST_OVERLAP
    return Triage(
        pairs.with_columns(
            (pl.col("reference_margin") < hard).alias(HARD_TO_FLIP),
            _from(above, "perplexity_difference").alias(SUSPECT_LABEL),
            alike.alias(NEAR_IDENTICAL),
            (alike & (pl.col("reference_margin").abs() < _LEAST_MARGIN)).alias(NO_INFORMATION),
            _from(high, CHES_NORMALISED).alias(HIGH_CHES),
        ),
        above,
    )


def token_overlap() -> pl.Expr:
    """How alike two completions are, of a scan of shards: Dice's coefficient of their distinct tokens."""
    chosen, rejected = (pl.col(f"{side}_ids").list.unique() for side in ("chosen", "rejected"))
    shared = chosen.list.set_intersection(rejected).list.len()
    return (2 * shared / (chosen.list.len() + rejected.list.len())).alias("token_overlap")


def _column(shards_dir: AnyPath, name: str, rows: pl.Series) -> pl.Series:
    """A column beside the shards, null where there is no value."""
    values = ShardFolder.open(shards_dir).column(name, rows=rows.to_numpy(), default=math.nan)
    return pl.Series(name, values if values is not None else [None] * len(rows), pl.Float64).fill_nan(None)


def _bound(values: pl.Series, most: int) -> float | None:
    """The lowest of the ``most`` highest values; None if there is none."""
    highest = values.top_k(most)
    return float(highest.min()) if len(highest) else None  # type: ignore[arg-type]


def _from(bound: float | None, name: str) -> pl.Expr:
    """True of values from a bound on."""
    return pl.lit(False) if bound is None else (pl.col(name) >= bound).fill_null(False)
