"""Loads shards, pair log-probs and on-policy samples as polars frames, and joins pairs with the reference.

All other files of this stage work on these frames. Scans are lazy: token lists are read only if a query uses
them.
"""

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.analysis.run_files import shards_of_run
from dpo_opt.analysis.unpaired_rows import is_unpaired, own_sides, require_pairs
from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import DataError, first_line, quoted
from dpo_opt.schemas.kl_samples import KL_SAMPLES_SCHEMA, LATER_COLUMNS
from dpo_opt.schemas.locations import AnyPath, location
from dpo_opt.schemas.manifest import ShardCommit, load_manifest
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA
from dpo_opt.schemas.shard_folder import check_file
from dpo_opt.schemas.shards import SHARD_SCHEMA, UNPAIRED_SCHEMA

PAIR_LOGPS_FOLDER = "pair_logps"
KL_FOLDER = "kl"

_SLICE_ROWS = 25_000
_MAX_SLICES = 40
_SORTED_ROWS = 250_000
UNREADABLE = (
    pl.exceptions.ComputeError,
    pl.exceptions.SchemaError,
    pl.exceptions.InvalidOperationError,
)
"""What a query raises where a table's pages are damaged, or a column holds another type."""


class ShardSlice(NamedTuple):
    """Some neighbouring shards, verified, and a filter for the rows of other tables that belong to them."""

    files: list[Path]
    rows: pl.Expr
    """True for the rows of a pair log-prob table that belong to this slice."""
    unpaired: bool = False
    """The rows have one completion and a label each."""

    @property
    def shards(self) -> pl.LazyFrame:
        """A new scan at each access: a scan that is kept holds its files' footers, megabytes per slice.

        Of unpaired rows, the reference's log-prob of the completion that answers another prompt is null.
        """
        scan = _lazy_of_versions(self.files, UNPAIRED_SCHEMA if self.unpaired else SHARD_SCHEMA)
        return own_sides(scan) if self.unpaired else scan


def scan_shards(shards_dir: AnyPath | str) -> pl.LazyFrame:
    """Every kept pair with its reference log-probs in nats: the columns of ``SHARD_SCHEMA``, in row order.

    Unpaired rows have the column ``label`` too.

    Raises:
        DataError: The folder has no valid manifest, or a file is not the one the manifest names.
    """
    shards_dir = location(shards_dir)
    manifest = load_manifest(shards_dir)
    schema = UNPAIRED_SCHEMA if is_unpaired(manifest) else SHARD_SCHEMA
    return _lazy_of_versions(_verified(shards_dir, manifest.shards), schema)


def shard_slices(shards_dir: AnyPath | str) -> list[ShardSlice]:
    """The pairs of :func:`scan_shards` in at most 40 slices, so that a join never holds the whole reference.

    Together the slices cover all row numbers, also those that no shard has. So a row that is not in the
    shards reaches :func:`join_reference` in some slice and is refused there.

    Raises:
        DataError: See :func:`scan_shards`.
    """
    shards_dir = location(shards_dir)
    manifest = load_manifest(shards_dir)
    commits, unpaired = manifest.shards, is_unpaired(manifest)
    # Each slice is one pass over the other table, whose rows may be in any order.
    wanted = max(_SLICE_ROWS, -(-sum(c.rows for c in commits) // _MAX_SLICES))
    groups: list[list[ShardCommit]] = [[]]
    for commit in commits:
        if sum(c.rows for c in groups[-1]) >= wanted:
            groups.append([])
        groups[-1].append(commit)
    starts = [group[0].start for group in groups[1:]]
    bounds = zip([None, *starts], [*starts, None], strict=True)
    return [
        ShardSlice(_verified(shards_dir, group), _between(start, stop), unpaired)
        for group, (start, stop) in zip(groups, bounds, strict=True)
    ]


def kept_pairs(shards_dir: AnyPath | str, *columns: str | pl.Expr) -> pl.DataFrame:
    """Some columns of every kept pair, slice by slice: only the result is in memory whole.

    Raises:
        ConfigError: The rows are no pairs.
        DataError: See :func:`scan_shards`; or no pair was kept.
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


def scan_pair_logps(path: Path | str) -> pl.LazyFrame:
    """Policy log-probs in nats: the columns of ``PAIR_LOGPS_SCHEMA``.

    Args:
        path: A Parquet file, a folder of them, or a run folder (its ``pair_logps/``).

    Raises:
        DataError: There is no such file, or one is not a table of pair log-probs.
    """
    return _scan(parquet_files(path, inside=PAIR_LOGPS_FOLDER), PAIR_LOGPS_SCHEMA, what="pair log-probs")


def scan_run(path: Path | str) -> pl.LazyFrame:
    """Every pair log-prob of a run beside its reference: what the expressions of ``rewards`` read.

    Args:
        path: A run folder, or a Parquet file in one (such as ``RUN/scores/final.parquet``).

    Returns:
        The columns of ``PAIR_LOGPS_SCHEMA``, and those columns of ``SHARD_SCHEMA`` that it has not. Of
        unpaired rows also ``label``; the reference's log-prob of a mismatched completion is null.

    Raises:
        ConfigError: It is not a run folder, or its shards are not found.
        DataError: There are no pair log-probs, or they are not those of the run's shards.
    """
    path = Path(path)
    folder = shards_of_run(path.parent.parent if path.is_file() else path)
    shards = scan_shards(folder)
    if is_unpaired(load_manifest(folder)):
        shards = own_sides(shards)
    return join_reference(scan_pair_logps(path), shards, where=str(path))


def scan_kl_samples(path: Path | str) -> pl.LazyFrame:
    """Completions sampled from the policy, scored under both models: the columns of ``KL_SAMPLES_SCHEMA``.

    What a table of an earlier version does not have is null.

    Args:
        path: A Parquet file, a folder of them, or a run folder (its ``kl/``).

    Raises:
        DataError: There is no such file, or one is not a table of on-policy samples.
    """
    return _scan(
        parquet_files(path, inside=KL_FOLDER),
        KL_SAMPLES_SCHEMA,
        what="on-policy samples",
        later=LATER_COLUMNS,
    )


def join_reference(
    pair_logps: pl.LazyFrame, shards: pl.LazyFrame, *, where: str = "pair log-probs"
) -> pl.LazyFrame:
    """Join the policy's log-probs with the reference's, on (row, pair_id).

    Checks the rows of ``pair_logps`` before it returns, which reads two columns of each table once.

    Args:
        pair_logps: Columns ``row``, ``pair_id`` and any others that are needed.
        shards: From :func:`scan_shards`; ``row``, ``pair_id`` and any other columns that are needed.
        where: Name of the pair log-probs, for the message.

    Raises:
        DataError: A row is not in the shards, or is another pair there.
    """
    # Hashes, because a million pair_ids as text are 50 MB in the table that the join builds.
    found = shards.select("row", reference_hash=pl.col("pair_id").hash())
    policy_hash = pl.col("pair_id").hash()
    foreign = (
        pair_logps.select("row", "pair_id")
        .join(found, on="row", how="left")
        .filter(pl.col("reference_hash").is_null() | (pl.col("reference_hash") != policy_hash))
        .head(1)
        .collect(engine="streaming")
    )
    if len(foreign):
        _refuse(foreign, where)
    # The policy's lengths stay: they are of the tokens that count.
    own = ["pair_id", "chosen_length", "rejected_length"]
    return pair_logps.join(shards.drop(own, strict=False), on="row")


def collect_joined(
    pair_logps: pl.LazyFrame, shards: pl.LazyFrame, *, where: str = "pair log-probs"
) -> pl.DataFrame:
    """:func:`join_reference` in memory, with the same checks: each table is read once.

    Args: see :func:`join_reference`.

    Raises:
        DataError: A row is not in the shards, or is another pair there.
    """
    own = ["pair_id", "chosen_length", "rejected_length"]
    reference = shards.with_columns(reference_hash=pl.col("pair_id").hash()).drop(own, strict=False)
    joined = pair_logps.join(reference, on="row", how="left").collect(engine="streaming")
    known = joined["reference_hash"].eq_missing(joined["pair_id"].hash())
    if not known.all():
        _refuse(joined.filter(~known).select("row", "pair_id", "reference_hash"), where)
    return joined.drop("reference_hash")


def sorted_by_row(pair_logps: pl.LazyFrame, folder: Path) -> pl.LazyFrame:
    """A table whose slices are read without the rest of it: the same rows, ordered in parts.

    Training visits pairs in random order, so a slice of the shards would need a pass over the whole table.

    Args:
        pair_logps: From :func:`scan_pair_logps`; the lists of token log-probs are left out.
        folder: An empty folder, which stays as long as the table is used.
    """
    columns = [name for name in PAIR_LOGPS_SCHEMA.names if not name.endswith("token_logps")]
    rows = pair_logps.select(pl.len()).collect(engine="streaming").item()
    for start in range(0, max(rows, 1), _SORTED_ROWS):
        part = pair_logps.select(columns).slice(start, _SORTED_ROWS).sort("row")
        part.collect(engine="streaming").write_parquet(
            folder / f"{start:012d}.parquet", compression="lz4", row_group_size=_SORTED_ROWS // _MAX_SLICES
        )
    return pl.scan_parquet(sorted(folder.glob("*.parquet")), glob=False)


def counted_tokens(side: str) -> pl.Expr:
    """How many tokens of ``chosen`` or ``rejected`` count, of a scan of shards."""
    counting = pl.col(f"{side}_mask").list.sum().cast(pl.Int32)
    # The sum of no list is no number in some releases of polars, and 0 in others.
    masked = pl.col(f"{side}_mask").is_not_null()
    return pl.when(masked).then(counting).otherwise(f"{side}_length").alias(f"{side}_length")


def parquet_files(path: Path | str, *, inside: str) -> list[Path]:
    """The Parquet files of a path: the file itself, those in a folder, or those in its folder ``inside``.

    Files whose names start with a dot are still being written, and are left out.

    Raises:
        DataError: There is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    folder = path / inside if (path / inside).is_dir() else path
    files = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))
    if not files:
        raise DataError(
            "there is no Parquet file",
            where=str(folder),
            fix=f"name a .parquet file, a folder of them, or a run folder with {inside}/",
        )
    return files


def _refuse(foreign: pl.DataFrame, where: str) -> NoReturn:
    row, pair_id, reference_hash = foreign.row(0)
    state = "no such row" if reference_hash is None else "another pair at this row"
    raise DataError(
        f"row {row} is pair {quoted(pair_id)}, but the shards have {state}",
        where=where,
        why="the difference of log-probs of two different pairs would mean nothing",
        fix="score again with `dpo-opt score --model CKPT --shards SHARDS --output FILE.parquet`, "
        "or pass the shards that these log-probs belong to",
    )


def _between(start: int | None, stop: int | None) -> pl.Expr:
    rows = pl.col("row")
    at_least = pl.lit(True) if start is None else rows >= start
    return at_least if stop is None else at_least & (rows < stop)


def _verified(shards_dir: AnyPath, commits: Sequence[ShardCommit]) -> list[Path]:
    files = []
    for commit in commits:
        file = shards_dir / commit.file
        # A local file may change under its name; a file from a store is read from the cache, by its hash.
        state = file.stat() if isinstance(file, Path) and file.is_file() else None
        touched = (state.st_mtime_ns, state.st_size) if state else None
        files.append(_check_once(shards_dir.absolute(), commit.file, commit.sha256, touched))
    return files


@cache
def _check_once(shards_dir: AnyPath, name: str, sha256: str, state: tuple[int, int] | None) -> Path:
    # `state` is only a part of the cache's key: a file that was touched is hashed again.
    return check_file(shards_dir, name, sha256)


def _scan(
    files: Sequence[Path], schema: pa.Schema, *, what: str, later: Collection[str] = ()
) -> pl.LazyFrame:
    """The tables of some files, of which earlier versions lack the columns ``later``."""
    for file in files:
        try:
            with arrow_file(file) as raw:
                names = pq.read_schema(raw).names
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"not readable as Parquet ({first_line(error)})",
                where=str(file),
                why="the file is truncated, damaged or not Parquet",
            ) from error
        missing = [name for name in schema.names if name not in names and name not in later]
        if missing:
            raise DataError(
                f"this is not a table of {what}: it lacks the columns {', '.join(missing)}", where=str(file)
            )
    return _lazy_of_versions(files, schema) if later else _lazy(files, schema)


def _lazy_of_versions(files: Sequence[Path], schema: pa.Schema) -> pl.LazyFrame:
    if not files:
        return _lazy(files, schema)
    # Older tables lack a column, newer ones may have more.
    return pl.scan_parquet(
        [file.absolute() for file in files],
        schema=pl.DataFrame(pl.from_arrow(schema.empty_table())).schema,
        missing_columns="insert",
        extra_columns="ignore",
        glob=False,
        hive_partitioning=False,
    )


def _lazy(files: Sequence[Path], schema: pa.Schema) -> pl.LazyFrame:
    if not files:
        return pl.LazyFrame(pl.from_arrow(schema.empty_table()))
    # Not as a pattern: folder names may hold [ or *. A relative name such as file:1 would be a URL.
    whole = [file.absolute() for file in files]
    return pl.scan_parquet(whole, glob=False, hive_partitioning=False).select(schema.names)
