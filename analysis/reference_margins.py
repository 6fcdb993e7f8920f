"""How the cached reference ranks the pairs before training: accuracy, margins, the hardest pairs, by source.

A reference that ranks nearly all pairs correctly leaves little to learn. DPO hardly ever flips pairs that the
reference ranks wrongly by hundreds of nats (Chen et al., arXiv 2405.19534), and some of these pairs are
labelled the wrong way round.
"""

import math

import polars as pl

from dpo_opt.analysis import rewards
from dpo_opt.analysis.load import counted_tokens, scan_shards
from dpo_opt.analysis.outcomes import means_by_source, shares_over_prompts
from dpo_opt.analysis.slices import kept_pairs
from dpo_opt.analysis.token_texts import TokenDecoder, pair_texts, plain
from dpo_opt.schemas.audit_record import HardPair, ReferenceView, SourceRanking
from dpo_opt.schemas.locations import AnyPath

_QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}


def reference_view(shards_dir: AnyPath, *, hardest: int = 8) -> ReferenceView:
    """Summarize the reference's log-probs of all kept pairs: about 50 bytes per pair in memory.

    With only one prompt there is no interval. Quantiles between two pairs' margins are interpolated linearly.
    If no pair names its source, there is no table of sources.

    Args:
        shards_dir: A finalized folder of shards.
        hardest: How many of the pairs with the lowest ranking margin to show, at least 1.

    Raises:
        DataError: The folder has no valid manifest, a file is not the one the manifest names, or no pair
            was kept.
    """
    pairs = _reference_pairs(shards_dir)
    normalised = rewards.normalised_reference_ranking_accuracy()
    margin = rewards.reference_margin()
    _, (accuracy,) = shares_over_prompts(pairs.lazy(), rewards.reference_ranking_accuracy())
    spread = {name: margin.quantile(q, interpolation="linear") for name, q in _QUANTILES.items()}
    decoder = TokenDecoder(shards_dir)
    return ReferenceView(
        pairs=len(pairs),
        ranking_accuracy=accuracy.value,
        ranking_accuracy_interval=(accuracy.low, accuracy.high) if math.isfinite(accuracy.low) else None,
        normalised_ranking_accuracy=pairs.select(normalised.mean()).item(),
        margin_quantiles=pairs.select(**spread).row(0, named=True),
        hardest=_hardest(pairs, shards_dir, decoder, count=hardest),
        text_problem=decoder.problem,
        sources=_by_source(pairs),
    )


def _reference_pairs(shards_dir: AnyPath) -> pl.DataFrame:
    return kept_pairs(
        shards_dir,
        "row",
        pl.col("prompt_id").hash().alias("prompt"),
        pl.col("source").cast(pl.Categorical),
        "ref_chosen_logps",
        "ref_rejected_logps",
        counted_tokens("chosen"),
        counted_tokens("rejected"),
    )


def _by_source(pairs: pl.DataFrame) -> list[SourceRanking]:
    table = means_by_source(
        pairs.lazy(),
        rewards.reference_ranking_accuracy().alias("ranking_accuracy"),
        rewards.reference_margin().alias("mean_ranking_margin"),
    )
    return [SourceRanking(**row) for row in table.iter_rows(named=True)]


def _hardest(
    pairs: pl.DataFrame, shards_dir: AnyPath, decoder: TokenDecoder, *, count: int
) -> list[HardPair]:
    columns = ("row", "source", "ranking_margin", "chosen_length", "rejected_length")
    lowest = (
        pairs.lazy()
        .with_columns(pl.col("source").cast(pl.String), ranking_margin=rewards.reference_margin())
        .bottom_k(count, by=["ranking_margin", "row"])
        .sort("ranking_margin", "row")
        .select(columns)
        .collect(engine="streaming")
    )
    texts = pair_texts(scan_shards(shards_dir), lowest["row"].to_list(), decoder)
    return [
        HardPair(**row, prompt=text.prompt, chosen=plain(text.chosen), rejected=plain(text.rejected))
        for row in lowest.iter_rows(named=True)
        for text in [texts[row["row"]]]
    ]
