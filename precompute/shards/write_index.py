"""The index of a finalized folder: one row per kept pair."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import ShardCommit
from dpo_opt.schemas.shard_folder import verified_file
from dpo_opt.schemas.shards import INDEX_GROUP_ROWS, INDEX_SCHEMA, write_table
from dpo_opt.schemas.storage import publish, sha256_file


def verified_index(shards_dir: AnyPath, commits: Sequence[ShardCommit]) -> pa.Table:
    """One row per kept pair (``shards.INDEX_SCHEMA``), after every byte of the commits' files was hashed.

    Raises:
        DataError: A file is missing, or changed after its commit.
    """
    tables = []
    for commit in commits:
        with verified_file(shards_dir, commit.dropped_file, commit.dropped_sha256):
            pass
        with verified_file(shards_dir, commit.file, commit.sha256) as file:
            tables.append(_index_rows(file, commit.shard))
    return pa.concat_tables(tables)


def write_index(shards_dir: AnyPath, name: str, table: pa.Table) -> tuple[str, str]:
    """Publish the index; returns its name and hash.

    Another ``finalize`` may have published an index of other attempts under this name. That one stays, and
    this one gets a name with its hash.

    Raises:
        DataError: What stands under both names is neither of them.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-opt-") as own:
        file = Path(own) / name
        write_table(file, table, row_group_rows=INDEX_GROUP_ROWS)
        sha256 = sha256_file(file)
        own_name = shards_dir / f"{Path(name).stem}-{sha256[:8]}.parquet"
        for place in (shards_dir / name, own_name):
            try:
                with publish(place, replace=False) as private:
                    shutil.copyfile(file, private)
            except FileExistsError:
                if sha256_file(place) != sha256:
                    continue
            return place.name, sha256
    raise DataError(
        "the index was damaged after it was written",
        where=str(own_name),
        why="the manifest would name it",
        fix=f"rm {quoted(own_name)}, then dpo-opt finalize --shards {quoted(shards_dir)}",
    )


def _index_rows(path: Path, shard: int) -> pa.Table:
    names = [n for n in INDEX_SCHEMA.names if n not in ("shard", "row_group")]
    with pq.ParquetFile(path) as file:
        parts = []
        for group in range(file.num_row_groups):
            part = file.read_row_group(group, columns=names)
            part = part.append_column("shard", pa.array([shard] * len(part), pa.int32()))
            parts.append(part.append_column("row_group", pa.array([group] * len(part), pa.int32())))
    if not parts:
        return INDEX_SCHEMA.empty_table()
    return pa.concat_tables(parts).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
