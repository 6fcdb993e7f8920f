"""Reads what a diagnosis looks at: pairs before training, before they were seen, and after it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import polars as pl

from dpo_opt.analysis.diagnosis.finding import Finding, Missing, PairName
from dpo_opt.analysis.final_state import (
    FinalState,
    each_once,
    final_state,
    held_out_rows,
)
from dpo_opt.analysis.load import scan_pair_logps
from dpo_opt.analysis.run_files import Run
from dpo_opt.analysis.slices import ShardSlice, pair_ids, shard_slices, with_reference
from dpo_opt.analysis.triage import token_overlap
from dpo_opt.schemas.manifest import Manifest, load_manifest
from dpo_opt.schemas.run_layout import PAIR_LOGPS

FEWEST = 30
"""Fewer pairs say nothing."""
MOST_PAIRS = 20
"""Of a finding."""
_DRAWN = 250_000
FEW = Missing(f"fewer than {FEWEST} pairs have log-probs from before they were trained on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of a run. All frames have the columns of ``final_pairs``; they may be empty."""

    run: Run
    manifest: Manifest
    start: pl.DataFrame
    """Pairs of the first step, before any update."""
    fresh: pl.DataFrame
    """Pairs of the later half of the first epoch, each before it was trained on: no pair was seen twice."""
    seen: pl.DataFrame
    """Pairs of the last epoch, each trained on in the epochs before; empty if there was one epoch."""
    evaluated: pl.DataFrame
    """Held-out pairs at the last evaluation."""
    final: FinalState | None
    held_out: pl.DataFrame
    """Held-out pairs under :attr:`final`."""
    slices: Sequence[ShardSlice]

    @property
    def unseen(self) -> pl.DataFrame:
        """The pairs that the run is judged by: held-out ones at its end, and in one epoch :attr:`fresh`."""
        # After several epochs the policy is another one than in the first.
        enough = len(self.seen) and len(self.held_out) >= FEWEST
        return self.held_out if enough else pl.concat([self.held_out, self.fresh])

    @property
    def steps(self) -> int:
        """Updates that were logged."""
        return int(self.run.train["step"].max() or 0)  # type: ignore[arg-type]

    @property
    def losses(self) -> list[str]:
        """Names of the losses that were trained."""
        named = self.run.config.get("loss_type")
        return [str(name) for name in (named if isinstance(named, list) else [named])]

    def token_overlaps(self, pairs: pl.DataFrame, *, slices: int | None = None) -> pl.DataFrame:
        """``row`` and ``token_overlap`` of some pairs, from the token ids in the shards.

        Args:
            pairs: Some of the run's pairs.
            slices: Only those in so many slices of the shards, evenly spread over them; None for all.
        """
        every = 1 if slices is None else -(-len(self.slices) // slices)
        rows = pairs["row"].implode()
        found = [
            s.shards.filter(pl.col("row").is_in(rows))
            .select("row", token_overlap())
            .collect(engine="streaming")
            for s in self.slices[every // 2 :: every]
        ]
        return pl.concat(found)

    def truncated_rows(self, most: int) -> list[int]:
        """Some rows of pairs with a completion that was cut."""
        cut = pl.any_horizontal("chosen_truncated", "rejected_truncated")
        found: list[int] = []
        for s in self.slices:
            if len(found) < most:
                cut_here = s.shards.filter(cut).select("row").head(most).collect(engine="streaming")
                found += cut_here["row"].to_list()
        return found[:most]

    def named(self, finding: Finding) -> Finding:
        """The finding with the ids of its first pairs, at most 20."""
        rows = list(finding.rows[:MOST_PAIRS])
        ids = pair_ids(self.slices, rows)
        return replace(
            finding, rows=tuple(rows), pairs=tuple(PairName(row, ids[row]) for row in rows if row in ids)
        )


def gather(run: Run, final: FinalState | None = None, slices: Sequence[ShardSlice] | None = None) -> Evidence:
    """Read a run's tables: about 60 bytes per pair in memory, of at most a quarter of a million.

    Args:
        run: The run.
        final: Its final state, where it is known already.
        slices: From ``shard_slices``, where they are known already.

    Raises:
        DataError: A table is damaged, or its pairs are not those of the run's shards.
    """
    manifest, slices = load_manifest(run.shards), slices or shard_slices(run.shards)
    drawn = pl.col("row").hash(seed=1) % max(1, -(-manifest.kept // _DRAWN)) == 0
    logps = scan_pair_logps(run.path) if run.tables(PAIR_LOGPS) else None
    held_out = held_out_rows(logps)
    final = final or final_state(run, logps, slices, held_out)
    reference = pl.concat([s.reference.filter(drawn).collect(engine="streaming") for s in slices])
    wanted = {name: rows & drawn for name, rows in _parts(logps).items()}
    table = pl.DataFrame(schema=_SCHEMA)
    if logps is not None:
        some = logps.filter(pl.any_horizontal(*wanted.values()))
        table = some.with_columns(pair=pl.col("pair_id").hash()).select(*_SCHEMA).collect(engine="streaming")
    parts: dict[str, pl.DataFrame] = {}
    for name, rows in wanted.items():
        where = str(run.path / PAIR_LOGPS)
        part = table.lazy().filter(rows).drop("step", "epoch", "phase")
        joined = with_reference(part, reference.lazy(), where=where)
        parts[name] = each_once(joined.lazy(), held_out=held_out)
    unseen = (
        final.pairs.filter("held_out", drawn).collect(engine="streaming") if final else parts["fresh"].clear()
    )
    return Evidence(run=run, manifest=manifest, final=final, held_out=unseen, slices=slices, **parts)


_SCHEMA = {
    "row": pl.Int64,
    "pair": pl.UInt64,
    "step": pl.Int64,
    "epoch": pl.Float64,
    "phase": pl.String,
    "chosen_logps": pl.Float64,
    "rejected_logps": pl.Float64,
    "chosen_length": pl.Int32,
    "rejected_length": pl.Int32,
}


def _parts(logps: pl.LazyFrame | None) -> dict[str, pl.Expr]:
    """Which rows of a run's table each frame is made of."""
    trained, step, epoch = pl.col("phase") == "train", pl.col("step"), pl.col("epoch")
    evaluated = pl.col("phase") == "eval"
    last_epoch, last_eval = 0.0, -1
    if logps is not None:
        # By phase, because a filter inside an aggregate would hold whole columns.
        last = (
            logps.group_by("phase")
            .agg(pl.col("epoch").max(), pl.col("step").max())
            .collect(engine="streaming")
            .rows_by_key("phase", unique=True)
        )
        last_epoch = last.get("train", (0.0, 0))[0]
        last_eval = last.get("eval", (0.0, -1))[1]
    return {
        "start": trained & (step == 0),
        "fresh": trained & (step > 0) & (epoch < 1) & (epoch >= min(1.0, last_epoch) / 2),
        # The epoch of the last step that was logged: its pairs were all seen before, at most once less.
        "seen": trained & (epoch >= max(1.0, last_epoch - 1)),
        "evaluated": evaluated & (step == last_eval),
    }
