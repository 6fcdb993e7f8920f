"""Is a folder of shards whole? Every byte, every row, exact coverage; no model is needed.

A hash says that bytes are those that were written; it says nothing of a program that wrote other rows and
hashed them. So the rows are checked too: whether they hold together, belong here, and are all there.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from dpo_opt.folder_notes import planned_rows
from dpo_opt.precompute.shards.scored_tokenizer import files_state_tokenizer, other_tokenizer
from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import DataError, first_line, quoted
from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.locations import AnyPath, inside, on_this_machine, sizes
from dpo_opt.schemas.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardCommit,
    all_prompts_truncated,
    resume_command,
)
from dpo_opt.schemas.pairs import HIGHEST_LOGP, LogpArray, ScoredPair
from dpo_opt.schemas.shard_folder import verified_file
from dpo_opt.schemas.shards import DROPPED_SCHEMA, INDEX_SCHEMA, inconsistent_columns, read_row_groups
from dpo_opt.schemas.sidecars import COLUMNS, WEIGHT, has_planned_values, is_planned_file, own_file
from dpo_opt.schemas.storage import file_names, sha256_folder

_MOST_PER_FILE = 5
_MOST_LISTED = 50


def integrity_problems(shards: AnyPath, manifest: Manifest) -> list[str]:
    """Everything that is wrong with a folder's files and rows, each with its place; at most 50 are listed.

    Raises:
        DpoOptError: A store does not answer.
    """
    problems = list(itertools.islice(_problems(shards, manifest), _MOST_LISTED + 1))
    if len(problems) > _MOST_LISTED:
        problems[_MOST_LISTED:] = [f"{shards}: more problems than are listed here"]
    return problems


def _problems(shards: AnyPath, manifest: Manifest) -> Iterator[str]:
    yield from (f"{shards / MANIFEST}: {problem}" for problem in _record_problems(manifest))
    index = None
    index_path = shards / manifest.index_file
    try:
        with (
            verified_file(shards, manifest.index_file, manifest.index_sha256) as file,
            arrow_file(file) as raw,
        ):
            index = pq.read_table(raw)
    except DataError as error:
        yield f"{error.where}: {error.what}"
    except (pa.ArrowException, OSError) as error:
        yield f"{index_path}: not readable as Parquet ({first_line(error, named=False)})"
    if index is not None and not index.schema.equals(INDEX_SCHEMA):
        yield f"{index_path}: its columns are not those of an index"
        index = None
    if index is not None and len(index) != manifest.kept:
        yield f"{index_path}: {len(index)} rows, the manifest says {manifest.kept}"
    first = 0
    for commit in manifest.shards:
        part = None if index is None else index.slice(first, commit.rows)
        first += commit.rows
        yield from _few(_shard_problems(shards, commit, index_path, part))
    yield from _tokenizer_problems(shards, manifest)
    yield from _column_problems(shards, manifest)


def _few(problems: Iterator[str]) -> Iterator[str]:
    """So that one file does not hide the others."""
    listed = list(itertools.islice(problems, _MOST_PER_FILE + 1))
    yield from listed[:_MOST_PER_FILE]
    if len(listed) > _MOST_PER_FILE:
        yield f"{listed[0].partition(': ')[0]}: and more of this file"


def _record_problems(manifest: Manifest) -> Iterator[str]:
    """What a manifest says of itself must add up."""
    expected = 0
    for number, commit in enumerate(manifest.shards):
        rows = f"rows {commit.start} to {commit.stop}"
        if commit.shard != number:
            yield f"its entry {number} is shard {commit.shard}"
        if commit.start != expected:
            yield f"shard {commit.shard} has {rows}, the shard before ends at {expected}"
        if commit.rows + sum(commit.dropped.values()) != commit.used:
            left_out = f", {commit.not_in_share} not in the share" if commit.not_in_share else ""
            yield (
                f"shard {commit.shard} has {rows}{left_out}, but accounts for {commit.rows} kept and "
                f"{sum(commit.dropped.values())} dropped"
            )
        if commit.fingerprint != manifest.fingerprint:
            yield f"shard {commit.shard} was scored for another fingerprint than the folder's"
        expected = commit.stop
    if expected != manifest.rows:
        yield f"its shards end at row {expected} of {manifest.rows}"
    dropped: dict[str, int] = {}
    for commit in manifest.shards:
        for reason, count in commit.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    if dropped != manifest.dropped:
        yield f"it says dropped {manifest.dropped}, its shards add up to {dropped}"
    sums = {
        "kept": sum(c.rows for c in manifest.shards),
        "truncated": sum(c.truncated for c in manifest.shards),
        "prompts_truncated": all_prompts_truncated(manifest.shards),
        "tokens": sum(c.tokens for c in manifest.shards),
    }
    for name, right in sums.items():
        if (stated := getattr(manifest, name)) != right:
            yield f"it says {name} {stated}, its shards add up to {right}"


def _shard_problems(
    shards: AnyPath, commit: ShardCommit, index_path: AnyPath, index: pa.Table | None
) -> Iterator[str]:
    """One shard's two files, each opened only if its bytes are those that the manifest names."""
    kept: set[int] | None = None
    dropped: set[int] | None = None
    where = shards / commit.file
    try:
        with verified_file(shards, commit.file, commit.sha256) as file:
            if file.stat().st_size != commit.bytes:
                yield f"{where}: {file.stat().st_size} bytes, the manifest says {commit.bytes}"
            kept = set()
            for problem in _row_problems(file, commit, kept):
                yield f"{where}: {problem}"
            if index is not None and (difference := _index_difference(file, commit.shard, index)):
                yield f"{index_path}: {difference} ({where})"
    except DataError as error:
        yield f"{where}: {error.what}"
    except (pa.ArrowException, OSError, KeyError) as error:
        yield f"{where}: not readable as a shard ({first_line(error, named=False)})"
    where_dropped = shards / commit.dropped_file
    try:
        with verified_file(shards, commit.dropped_file, commit.dropped_sha256) as file:
            dropped = set()
            for problem in _dropped_problems(file, commit, dropped):
                yield f"{where_dropped}: {problem}"
    except DataError as error:
        yield f"{where_dropped}: {error.what}"
    except (pa.ArrowException, OSError) as error:
        yield f"{where_dropped}: not readable as Parquet ({first_line(error, named=False)})"
    if kept is not None and dropped is not None:
        yield from (f"{where_dropped}: row {row} is kept as well" for row in sorted(kept & dropped))
        missing = [row for row in range(commit.start, commit.stop) if row not in kept and row not in dropped]
        if commit.not_in_share and len(missing) != commit.not_in_share:
            yield (
                f"{where}: {len(missing)} rows are neither kept nor dropped, and {commit.not_in_share} are "
                "not in the share"
            )
        elif not commit.not_in_share:
            yield from (f"{where}: row {row} is neither kept nor dropped" for row in missing)


def _row_problems(file: Path, commit: ShardCommit, kept: set[int]) -> Iterator[str]:
    """Row by row; ``kept`` collects the rows."""
    yield from _metadata_problems(file, commit)
    before = -1
    truncated = with_the_others = tokens = 0
    for group in read_row_groups(file):
        for pair in group:
            if pair.row in kept or not commit.start <= pair.row < commit.stop:
                yield f"row {pair.row} does not belong here, or twice"
            elif pair.row < before:
                yield f"row {pair.row} comes after row {before}"
            before = pair.row
            kept.add(pair.row)
            truncated += pair.truncated
            with_the_others += pair.chosen_truncated or pair.rejected_truncated
            tokens += 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
            yield from (f"row {pair.row} {problem}" for problem in _pair_problems(pair))
    for row, name in inconsistent_columns(file):
        yield f"row {row} has a {name} that does not follow from its ids and log-probs"
    if commit.truncated == with_the_others:
        # Earlier versions counted what is cut of another row's completion beside an unpaired row, too.
        truncated = with_the_others
    counts = {"rows": len(kept), "truncated": truncated, "tokens": tokens}
    for name, found in counts.items():
        if (stated := getattr(commit, name)) != found:
            yield f"{found} {name}, the manifest says {stated}"


def _metadata_problems(file: Path, commit: ShardCommit) -> Iterator[str]:
    with arrow_file(file) as raw:
        metadata = pq.read_schema(raw).metadata or {}
    if metadata.get(b"dpo_opt.shard", b"").decode() != str(commit.shard):
        yield f"it says it is shard {metadata.get(b'dpo_opt.shard', b'none').decode()}, not {commit.shard}"
    try:
        own = Fingerprint.model_validate_json(metadata.get(b"dpo_opt.fingerprint", b""))
    except ValidationError:
        yield "it does not say what it was scored for (dpo_opt.fingerprint)"
        return
    if own != commit.fingerprint:
        said, stated = own.model_dump(), commit.fingerprint.model_dump()
        names = [name for name in {**said, **stated} if said.get(name) != stated.get(name)]
        yield f"it was scored for another {', '.join(map(quoted, names))} than the manifest says"


def _pair_problems(pair: ScoredPair) -> Iterator[str]:
    if len(pair.prompt_ids) == 0:
        yield "has an empty prompt"
    if min(int(ids.min(initial=0)) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)) < 0:
        yield "has a negative token id"
    yield from _side_problems("chosen", len(pair.chosen_ids), pair.ref_chosen_token_logps)
    yield from _side_problems("rejected", len(pair.rejected_ids), pair.ref_rejected_token_logps)


def _side_problems(side: str, ids: int, logps: LogpArray) -> Iterator[str]:
    if not len(logps) == ids > 0:
        yield f"has {len(logps)} log-probs for {ids} {side} tokens"
        return
    bad = np.flatnonzero(~(np.isfinite(logps) & (logps <= HIGHEST_LOGP)))
    if len(bad):
        yield f"has a log-prob of {logps[bad[0]]} ({side}, token {bad[0]})"


def _index_difference(file: Path, shard: int, index: pa.Table) -> str | None:
    """The first row of which the index says something else than the shard."""
    names = [name for name in INDEX_SCHEMA.names if name not in ("shard", "row_group")]
    with arrow_file(file) as raw, pq.ParquetFile(raw) as opened:
        parts = [opened.read_row_group(group, columns=names) for group in range(opened.num_row_groups)]
    groups = [number for number, part in enumerate(parts) for _ in range(len(part))]
    if len(groups) != len(index):
        return f"{len(index)} rows of shard {shard}, the shard has {len(groups)}"
    if not groups:
        return None
    expected = pa.concat_tables(parts).select(names)
    columns = [*expected.columns, pa.array([shard] * len(groups)), pa.array(groups)]
    for name, column in zip([*names, "shard", "row_group"], columns, strict=True):
        found, right = index[name].to_pylist(), column.to_pylist()
        if found != right:
            place = next(i for i, (a, b) in enumerate(zip(found, right, strict=True)) if a != b)
            return f"row {index['row'][place]} has {name} {found[place]}, its shard says {right[place]}"
    return None


def _dropped_problems(file: Path, commit: ShardCommit, dropped: set[int]) -> Iterator[str]:
    """``dropped`` collects the rows."""
    with arrow_file(file) as raw:
        table = pq.read_table(raw, page_checksum_verification=True)
    if missing := [name for name in DROPPED_SCHEMA.names if name not in table.schema.names]:
        yield f"it lacks the columns {', '.join(missing)}"
        return
    reasons: dict[str, int] = {}
    for row, reason in zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True):
        if row in dropped or not commit.start <= row < commit.stop:
            yield f"row {row} does not belong here, or twice"
        dropped.add(row)
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons != commit.dropped:
        yield f"it lists {reasons}, the manifest says {commit.dropped}"


def _tokenizer_problems(shards: AnyPath, manifest: Manifest) -> Iterator[str]:
    folder = shards / TOKENIZER
    try:
        names, recorded = file_names(folder), manifest.tokenizer_files
        changed = bool(names) and (
            names != (names if recorded is None else recorded)
            or sha256_folder(folder, names=recorded, whole=shards) != manifest.tokenizer_sha256
        )
    except DataError as error:
        yield f"{error.where}: {error.what}"
        return
    if not names:
        yield f"{folder}: the tokenizer's files are missing"
    elif changed:
        yield f"{folder}: a file changed, is missing or is new among {', '.join(names)}"
    elif not files_state_tokenizer(shards, manifest.fingerprint) and (
        problem := other_tokenizer(shards, manifest.fingerprint)
    ):
        yield f"{folder}: {problem}"


def _column_problems(shards: AnyPath, manifest: Manifest) -> Iterator[str]:
    """The hash of a plan's column is in its name. A person's own has none; its rows must be this folder's."""
    rows = planned_rows(shards, manifest)
    planned = manifest.columns or {}
    read_as = {file: name for name, file in planned.items()}
    there = sizes(shards / COLUMNS)
    for planned_name, name in read_as.items():
        if not {planned_name, own_file(name)} & {f"{COLUMNS}/{file}" for file in there}:
            again = resume_command(shards)
            yield f"{shards / planned_name}: missing; {again} takes the {name} from the data again"
    for file_name in sorted(there):
        name = f"{COLUMNS}/{file_name}"
        stem = file_name.removesuffix(".parquet")
        is_own = stem != file_name and not file_name.startswith(".")
        if name not in read_as and (is_planned_file(name) or not is_own):
            continue
        try:
            path = inside(shards, name)
        except DataError as error:
            yield f"{error.where}: {error.what}"
            continue
        with contextlib.suppress(FileNotFoundError), on_this_machine(path) as file:
            problems = _values_problems(file, read_as.get(name, stem), rows, stated=name)
            yield from _few(f"{path}: {problem}" for problem in problems)


def _values_problems(file: Path, name: str, known: int, *, stated: str) -> Iterator[str]:
    try:
        with arrow_file(file) as raw:
            table = pq.read_table(raw, columns=["row", name])
        if table.schema.field("row").type != pa.int64():
            raise TypeError("row is not int64")
        rows = table["row"].to_numpy()
        values = table[name].to_numpy().astype(np.float64)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        yield f'not a column "{name}" by row ({first_line(error, named=False)})'
        return
    if not has_planned_values(stated, name, rows, values):
        yield "its values are not those of the plan, whose hash is in its name"
    foreign = (rows < 0) | (rows >= known)
    yield from (f"row {row} is not in this folder" for row in rows[foreign])
    unique, counts = np.unique(rows, return_counts=True)
    yield from (
        f"row {row} has {count} values" for row, count in zip(unique, counts, strict=True) if count > 1
    )
    bad = ~np.isfinite(values) | ((values < 0) if name == WEIGHT else False)
    yield from (f"row {row} has the value {value}" for row, value in zip(rows[bad], values[bad], strict=True))
