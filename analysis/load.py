"""Loads shards, pair log-probs and on-policy samples as polars frames, and joins pairs with the reference.

All other files of this stage work on these frames. Scans are lazy: token lists are read only if a query uses
them.
"""

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

import polars as pl
import pyarrow as pa

from dpo_opt.analysis.run_files import finished_tables, shards_of_run
from dpo_opt.analysis.table_checks import require_table
from dpo_opt.analysis.unpaired_rows import is_unpaired, own_sides
from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.kl_samples import KL_SAMPLES_SCHEMA, LATER_COLUMNS
from dpo_opt.schemas.locations import AnyPath, location
from dpo_opt.schemas.manifest import ShardCommit, load_manifest
from dpo_opt.schemas.pair_logps import PAIR_LOGPS_SCHEMA
from dpo_opt.schemas.run_layout import KL, PAIR_LOGPS
from dpo_opt.schemas.shard_folder import check_file
from dpo_opt.schemas.shards import SHARD_SCHEMA, UNPAIRED_SCHEMA


def scan_shards(shards_dir: AnyPath | str) -> pl.LazyFrame:
    """Every kept pair with its reference log-probs in nats: the columns of ``SHARD_SCHEMA``, in row order.

    Unpaired rows have the column ``label`` too.

    Raises:
        DataError: The folder has no valid manifest, or a file is not the one the manifest names.
    """
    shards_dir = location(shards_dir)
    manifest = load_manifest(shards_dir)
    schema = UNPAIRED_SCHEMA if is_unpaired(manifest) else SHARD_SCHEMA
    return scan_versions(verified_files(shards_dir, manifest.shards), schema)


def scan_pair_logps(path: Path | str) -> pl.LazyFrame:
    """Policy log-probs in nats: the columns of ``PAIR_LOGPS_SCHEMA``.

    Args:
        path: A Parquet file, a folder of them, or a run folder (its ``pair_logps/``).

    Raises:
        DataError: There is no such file, or one is not a table of pair log-probs.
    """
    return _scan(parquet_files(path, inside=PAIR_LOGPS), PAIR_LOGPS_SCHEMA, what="pair log-probs")


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
        parquet_files(path, inside=KL),
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
        row, pair_id, reference_hash = foreign.row(0)
        state = "no such row" if reference_hash is None else "another pair at this row"
        refuse(f"row {row} is pair {quoted(pair_id)}, but the shards have {state}", where=where)
    # The policy's lengths stay: they are of the tokens that count.
    own = ["pair_id", "chosen_length", "rejected_length"]
    return pair_logps.join(shards.drop(own, strict=False), on="row")


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
    # A link to nothing is refused as such where the tables are looked at.
    if path.is_file() or (path.is_symlink() and not path.exists()):
        return [path]
    folder = path / inside if (path / inside).is_dir() else path
    files = finished_tables(folder)
    if not files:
        raise DataError(
            "there is no Parquet file",
            where=str(folder),
            fix=f"name a .parquet file, a folder of them, or a run folder with {inside}/",
        )
    return files


def refuse(what: str, *, where: str) -> NoReturn:
    """Refuse log-probs that do not belong to the shards.

    Raises:
        DataError: Always.
    """
    raise DataError(
        what,
        where=where,
        why="the difference of log-probs of two different pairs would mean nothing",
        fix="score again with `dpo-opt score --model CKPT --shards SHARDS --output FILE.parquet`, "
        "or pass the shards that these log-probs belong to",
    )


def verified_files(shards_dir: AnyPath, commits: Sequence[ShardCommit]) -> list[Path]:
    """The data files of some shards of a folder.

    Raises:
        DataError: A file is not the one the manifest names.
    """
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
        require_table(file, schema, what=what, later=later)
    return scan_versions(files, schema) if later else _lazy(files, schema)


def scan_versions(files: Sequence[Path], schema: pa.Schema) -> pl.LazyFrame:
    """The tables of some files, of which older ones may lack a column, and newer ones have more."""
    if not files:
        return _lazy(files, schema)
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
