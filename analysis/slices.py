"""Joins tables with the reference in slices of neighbouring pairs: memory does not grow with their number.

Training visits pairs in random order. So a table is first divided among the slices, on disk, and the
reference's numbers are copied out of the shards once, for all that joins with them.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from dpo_opt.analysis.load import refuse, scan_versions, verified_files
from dpo_opt.analysis.unpaired_rows import is_unpaired, own_sides, require_pairs
from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.locations import AnyPath, location
from dpo_opt.schemas.manifest import ShardCommit, load_manifest
from dpo_opt.schemas.shards import SHARD_SCHEMA, UNPAIRED_SCHEMA

_SLICE_ROWS = 125_000
_MAX_SLICES = 80
_ROWS_AT_ONCE = 500_000
"""Of a table, while it is divided."""
_POLICY = (
    "row",
    "step",
    "epoch",
    "phase",
    "chosen_logps",
    "rejected_logps",
    "chosen_length",
    "rejected_length",
)


class ShardSlice(NamedTuple):
    """Some neighbouring shards, verified, and the rows of other tables that belong to them."""

    files: list[Path]
    start: int | None
    """First row number that belongs to this slice; None for the first slice, which takes all below too."""
    stop: int | None
    """The first one that does not; None for the last slice."""
    unpaired: bool = False
    """The rows have one completion and a label each."""
    copied: Path | None = None
    """Copy of :attr:`reference`; None where it is read from the shards."""

    @property
    def shards(self) -> pl.LazyFrame:
        """A new scan at each access: a scan that is kept holds its files' footers, megabytes per slice.

        Of unpaired rows, the reference's log-prob of the completion that answers another prompt is null.
        """
        scan = scan_versions(self.files, UNPAIRED_SCHEMA if self.unpaired else SHARD_SCHEMA)
        return own_sides(scan) if self.unpaired else scan

    @property
    def reference(self) -> pl.LazyFrame:
        """What pairs are joined with.

        Columns: ``row``, ``reference_pair`` and ``prompt`` (hashes of pair_id and prompt_id), ``source`` and
        the two ``ref_`` log-probs.
        """
        if self.copied is not None:
            return pl.scan_parquet(self.copied, glob=False)
        return self.shards.select(
            "row",
            "source",
            "ref_chosen_logps",
            "ref_rejected_logps",
            # Hashes, because ids as text are most of what a join would hold.
            reference_pair=pl.col("pair_id").hash(),
            prompt=pl.col("prompt_id").hash(),
        )

    @property
    def rows(self) -> pl.Expr:
        """True for the rows of another table that belong to this slice."""
        row = pl.col("row")
        at_least = pl.lit(True) if self.start is None else row >= self.start
        return at_least if self.stop is None else at_least & (row < self.stop)


def shard_slices(shards_dir: AnyPath | str) -> list[ShardSlice]:
    """The pairs of ``scan_shards`` in at most 80 slices, so that a join never holds the whole reference.

    Together the slices cover all row numbers, also those that no shard has. So a row that is not in the
    shards reaches :func:`with_reference` in some slice and is refused there.

    Raises:
        DataError: See ``scan_shards``.
    """
    shards_dir = location(shards_dir)
    manifest = load_manifest(shards_dir)
    commits, unpaired = manifest.shards, is_unpaired(manifest)
    wanted = max(_SLICE_ROWS, -(-sum(c.rows for c in commits) // _MAX_SLICES))
    groups: list[list[ShardCommit]] = [[]]
    for commit in commits:
        if sum(c.rows for c in groups[-1]) >= wanted:
            groups.append([])
        groups[-1].append(commit)
    starts = [group[0].start for group in groups[1:]]
    return [
        ShardSlice(verified_files(shards_dir, group), start, stop, unpaired)
        for group, start, stop in zip(groups, [None, *starts], [*starts, None], strict=True)
    ]


def copy_reference(slices: Sequence[ShardSlice], folder: Path) -> list[ShardSlice]:
    """The same slices, whose :attr:`~ShardSlice.reference` is read from files of about 40 bytes per pair.

    Args:
        slices: From :func:`shard_slices`.
        folder: An empty folder, which stays as long as the slices are used.
    """
    copied = []
    for number, part in enumerate(slices):
        file = folder / f"{number:05d}.parquet"
        part.reference.collect(engine="streaming").write_parquet(file, compression="uncompressed")
        copied.append(part._replace(copied=file))
    return copied


def by_slice(
    table: pl.LazyFrame,
    slices: Sequence[ShardSlice],
    folder: Path | None = None,
    *,
    state: pl.Expr | None = None,
) -> Iterator[pl.LazyFrame]:
    """The rows of a table of pair log-probs that belong to each slice, for :func:`with_reference`.

    Args:
        table: From ``scan_pair_logps``, in any order of rows.
        slices: From :func:`shard_slices`.
        folder: A folder that does not exist yet, where about 45 bytes per row are written until the last part
            was used. None reads the whole table for each slice.
        state: True for the rows that are wanted; None for all.

    Yields:
        For each slice the columns of ``PAIR_LOGPS_SCHEMA`` without ``pair_id``, which is hashed as ``pair``,
        ``checkpoint`` and the lists of token log-probs.
    """
    wanted = pl.lit(True) if state is None else state
    numbers = (*_POLICY, pl.col("pair_id").hash().alias("pair"))
    if folder is None or len(slices) == 1:
        yield from (table.filter(wanted, part.rows).select(numbers) for part in slices)
        return
    folder.mkdir()
    files: list[list[Path]] = [[] for _ in slices]
    starts = pl.Series([part.start for part in slices[1:]], dtype=pl.Int64)
    total = table.select(pl.len()).collect(engine="streaming").item()
    for first in range(0, max(total, 1), _ROWS_AT_ONCE):
        # After the slice: a table that is filtered first is read from its beginning each time.
        some = (
            table.slice(first, _ROWS_AT_ONCE)
            .filter(wanted)
            .select(numbers)
            .collect(engine="streaming")
            .sort("row")
        )
        ends = [0, *some["row"].search_sorted(starts).to_list(), len(some)]
        for number, (begin, end) in enumerate(itertools.pairwise(ends)):
            if end > begin or not first:
                file = folder / f"{number:05d}-{first:012d}.parquet"
                some[begin:end].write_parquet(file, compression="uncompressed")
                files[number].append(file)
    # One after the other: a scan that is kept holds its files' footers.
    yield from (pl.scan_parquet(of_slice, glob=False) for of_slice in files)
    shutil.rmtree(folder)


def with_reference(rows: pl.LazyFrame, reference: pl.LazyFrame, *, where: str) -> pl.DataFrame:
    """Some pair log-probs beside the reference's, in memory.

    Args:
        rows: Of one slice, from :func:`by_slice`: ``row``, ``pair`` and any other columns that are needed.
        reference: :attr:`ShardSlice.reference` of that slice, or those columns of it that are needed.
        where: Name of the pair log-probs, for the message.

    Returns:
        The columns of both; ``pair`` is left out.

    Raises:
        DataError: A row is not in the shards, or is another pair there.
    """
    joined = rows.join(reference, on="row", how="left").collect(engine="streaming")
    foreign = joined.filter(~pl.col("reference_pair").eq_missing(pl.col("pair")))
    if len(foreign):
        row, reference_pair = foreign.select("row", "reference_pair").row(0)
        state = "no such row" if reference_pair is None else "another pair at this row"
        refuse(f"there are log-probs of row {row}, but the shards have {state}", where=where)
    return joined.drop("pair", "reference_pair")


def pair_ids(slices: Sequence[ShardSlice], rows: Sequence[int]) -> dict[int, str]:
    """The ids of some pairs, by row; only the shards that hold one of them are opened."""
    wanted = pl.DataFrame({"row": rows}, schema={"row": pl.Int64})
    found: dict[int, str] = {}
    for part in slices:
        if len(here := wanted.filter(part.rows)):
            ids = part.shards.filter(pl.col("row").is_in(here["row"].implode())).select("row", "pair_id")
            found.update(ids.collect(engine="streaming").iter_rows())
    return found


def kept_pairs(shards_dir: AnyPath | str, *columns: str | pl.Expr) -> pl.DataFrame:
    """Some columns of every kept pair, slice by slice: only the result is in memory whole.

    Raises:
        ConfigError: The rows are no pairs.
        DataError: See ``scan_shards``; or no pair was kept.
    """
    require_pairs(shards_dir, fix="pass --shards with a folder of pairs")
    slices = shard_slices(shards_dir)
    pairs = pl.concat([s.shards.select(*columns).collect(engine="streaming") for s in slices])
    if not len(pairs):
        raise DataError(
            "no pair was kept",
            where=str(shards_dir),
            why="there are no log-probs of the reference to look at",
            fix=f"dpo-opt status --shards {quoted(shards_dir)}",
        )
    return pairs
