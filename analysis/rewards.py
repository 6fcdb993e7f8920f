"""DPO's quantities (implicit reward, margin, accuracy) as polars expressions over pairs with their reference.

They read the columns ``chosen_logps`` and ``rejected_logps`` (policy), ``ref_chosen_logps`` and
``ref_rejected_logps`` (reference): sums over the completion, in nats. The per-token variants also read
``chosen_length`` and ``rejected_length``, in tokens that count. Equations are those of Rafailov et al. 2023
(arXiv 2305.18290). Names are TRL's if TRL has one.
"""

from typing import Literal

import polars as pl

Side = Literal["chosen", "rejected"]


def chosen_logratio() -> pl.Expr:
    """log policy(chosen) - log reference(chosen), in nats."""
    return pl.col("chosen_logps") - pl.col("ref_chosen_logps")


def rejected_logratio() -> pl.Expr:
    """log policy(rejected) - log reference(rejected), in nats."""
    return pl.col("rejected_logps") - pl.col("ref_rejected_logps")


def chosen_logratio_per_token() -> pl.Expr:
    """:func:`chosen_logratio` divided by the completion's tokens, in nats per token."""
    return chosen_logratio() / pl.col("chosen_length")


def rejected_logratio_per_token() -> pl.Expr:
    """:func:`rejected_logratio` divided by the completion's tokens, in nats per token."""
    return rejected_logratio() / pl.col("rejected_length")


def implicit_reward(beta: float, *, side: Side = "chosen") -> pl.Expr:
    """Implicit reward of one completion, beta x log-ratio (eq. 5 without the prompt's constant)."""
    return beta * (chosen_logratio() if side == "chosen" else rejected_logratio())


def margin(beta: float) -> pl.Expr:
    """Chosen reward minus rejected reward, TRL's ``rewards/margins``."""
    return beta * (chosen_logratio() - rejected_logratio())


def effective_weight(beta: float) -> pl.Expr:
    """sigma(-margin), a pair's weight in DPO's gradient (eq. 7): 1/2 at first, 0 once it is learned."""
    return 1 / (1 + margin(beta=beta).exp())


def sigmoid_loss(beta: float) -> pl.Expr:
    """-log sigma(margin), DPO's loss of a pair in nats (eq. 7), whatever loss is trained; at first ln 2."""
    # The larger of 0 and -margin is taken out, so that no exponential overflows.
    value = margin(beta=beta)
    return (-value).clip(lower_bound=0) + (-value.abs()).exp().log1p()


def distance_per_token() -> pl.Expr:
    """Mean size of both log-ratios per token: how far the policy is from its reference, in nats per token."""
    return (chosen_logratio_per_token().abs() + rejected_logratio_per_token().abs()) / 2


def accuracy() -> pl.Expr:
    """True if the margin is above 0, for any beta; a tie is False."""
    return _above_zero(chosen_logratio() - rejected_logratio())


def ranking_margin() -> pl.Expr:
    """log policy(chosen) - log policy(rejected), in nats."""
    return pl.col("chosen_logps") - pl.col("rejected_logps")


def ranking_accuracy() -> pl.Expr:
    """True if the policy itself finds the chosen completion more likely (Chen et al., arXiv 2405.19534)."""
    return _above_zero(ranking_margin())


def reference_margin() -> pl.Expr:
    """log reference(chosen) - log reference(rejected), in nats: known before any training."""
    return pl.col("ref_chosen_logps") - pl.col("ref_rejected_logps")


def reference_ranking_accuracy() -> pl.Expr:
    """True if the reference already finds the chosen completion more likely."""
    return _above_zero(reference_margin())


def reference_margin_per_token() -> pl.Expr:
    """Mean log-prob of chosen's tokens minus that of rejected's, in nats per token."""
    chosen = pl.col("ref_chosen_logps") / pl.col("chosen_length")
    return chosen - pl.col("ref_rejected_logps") / pl.col("rejected_length")


def normalised_reference_ranking_accuracy() -> pl.Expr:
    """:func:`reference_ranking_accuracy` per token, so that a completion gains nothing by being short."""
    return _above_zero(reference_margin_per_token())


def chosen_fell() -> pl.Expr:
    """True if the chosen completion is less likely under the policy than under the reference."""
    return _above_zero(-chosen_logratio())


def displacement() -> pl.Expr:
    """True if the chosen completion became less likely although the margin grew (arXiv 2410.08847)."""
    return chosen_fell() & accuracy()


def rejected_fell() -> pl.Expr:
    """True if the rejected completion is less likely under the policy than under the reference."""
    return _above_zero(-rejected_logratio())


def length_difference() -> pl.Expr:
    """Chosen length minus rejected length, in tokens."""
    return pl.col("chosen_length").cast(pl.Int64) - pl.col("rejected_length")


def _above_zero(value: pl.Expr) -> pl.Expr:
    # polars orders NaN above every number, so a diverged run would count as right.
    return (value > 0) & value.is_not_nan()
