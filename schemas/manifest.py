"""The records of a shard folder, its plan, commits and manifest: readers trust the manifest alone.

A Parquet file with a readable footer may still be half a shard, and a flipped bit inside a page goes
unnoticed by most readers. So a file counts only if the manifest names it, and only with the bytes the
manifest says.

    plan.json        what will be scored: row ranges, dataset digest, fingerprint (byte-deterministic)
    commits/*.json   one per finished attempt, written after its data is durable and was read back
    manifest.json    one attempt per shard, exact coverage; written last
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from dpo_opt.schemas.errors import DataError, quoted
from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.locations import (
    AnyPath,
    is_file,
    read_all,
)
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.shards import UNPAIRED_VERSION
from dpo_opt.schemas.sidecars import ColumnFile
from dpo_opt.schemas.storage import write_text

PLAN = "plan.json"
COMMAND = "precompute.yaml"
"""Settings of the latest run, for people and for ``--config``. Nothing is compared with them."""
MANIFEST = "manifest.json"
INDEX = "index.parquet"
COMMITS = "commits"
DATA = "data"
DROPPED = "dropped"
TOKENIZER = "tokenizer"
SLURM = "slurm"
"""Scripts, settings and logs of jobs."""
DAMAGED = "damaged"
"""Kind of the errors that ``dpo-opt repair`` mends."""
COUNTS = {"kept", "dropped", "truncated", "prompts_truncated", "tokens"}
"""What commands say of a manifest."""
_ONLY_RECORD = "nothing else says which files belong to the folder"
R = TypeVar("R", bound=BaseModel)
_SAFE_FILE = re.compile(rf"(({DATA}|{DROPPED})/)?[A-Za-z0-9][A-Za-z0-9._-]*")


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 as lower-case hex digits, and nothing else: the cache names files by it."""


class _Record(BaseModel):
    # A later version may add keys. If readers must not ignore one, it raises `schema_version`.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ShardRange(_Record):
    """Source rows ``start`` (included) to ``stop`` (excluded)."""

    shard: int
    start: int
    stop: int
    not_in_share: int = 0
    """How many of them ``--data-share`` leaves out."""
    rows_digest: Sha256
    """SHA-256 of these rows' content, in order. A worker that reads other rows stops."""

    @property
    def used(self) -> int:
        """How many of the rows are kept or dropped."""
        return self.stop - self.start - self.not_in_share


class Plan(_Record):
    """What a folder is going to hold; the same input always gives the same bytes."""

    fingerprint: Fingerprint
    dataset_digest: Sha256
    """SHA-256 of the source rows' content, in order."""
    rows: int
    """Source rows."""
    pairs_per_shard: PositiveInt | None = None
    """What a full shard holds; one that holds less was the last when it was planned. Null in older plans."""
    columns: dict[str, ColumnFile] | None = None
    """The files of the numbers that the data gives its rows. Null in older plans."""
    shards: list[ShardRange]

    @property
    def used(self) -> int:
        """Source rows, without those that ``--data-share`` leaves out."""
        return sum(shard.used for shard in self.shards)


class ShardCommit(ShardRange):
    """One finished attempt at one shard, with the range that the plan states."""

    attempt: str
    file: str
    """Relative to the folder."""
    rows: int
    bytes: int
    sha256: Sha256
    dropped_file: str
    dropped_sha256: Sha256
    dropped: dict[str, int]
    """Reason to number of rows."""
    truncated: int
    """Kept pairs with at least one completion cut."""
    prompts_truncated: int | None = None
    """Kept pairs whose prompt was cut; null in records from before it was counted."""
    tokens: int
    """Prompts count twice."""
    unique_sequences: int
    """Sequences that were scored; equal ones are scored once."""
    fingerprint: Fingerprint
    host: str | None = None
    """Name of the machine that scored it. Here and below: null in records from before it was kept."""
    worker: int | None = None
    """Number of the worker that scored it; null for the only one."""
    finished: AwareDatetime | None = None
    """When it was committed, in UTC, by that machine's clock."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """From its first row to its commit."""


class Manifest(_Record):
    """The cover of a folder: exactly one committed attempt per shard of the plan."""

    fingerprint: Fingerprint
    dataset_digest: Sha256
    rows: int
    kept: int
    dropped: dict[str, int]
    truncated: int
    prompts_truncated: int | None = None
    """This and the one before as those of the shards add up; null where one of theirs is."""
    tokens: int
    pairs_per_shard: PositiveInt | None = None
    columns: dict[str, ColumnFile] | None = None
    """This and the one before as the plan states them."""
    shards: Annotated[list[ShardCommit], Field(min_length=1)]
    index_file: str
    index_sha256: Sha256
    tokenizer_sha256: Sha256
    tokenizer_files: list[str] | None = None
    """Only these are fetched from a store; None in a manifest from before they were named."""


def all_prompts_truncated(commits: Sequence[ShardCommit]) -> int | None:
    """Kept pairs of some shards whose prompt was cut; None where one of the shards does not say it."""
    counts = [commit.prompts_truncated for commit in commits]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def repair_command(shards_dir: AnyPath) -> str:
    """The command that heals a folder with damaged or lost files."""
    return f"dpo-opt repair --shards {quoted(shards_dir)}"


def damaged(what: str, where: AnyPath, shards_dir: AnyPath, *, why: str) -> DataError:
    """The error of a file that ``dpo-opt repair`` mends."""
    return DataError(what, where=str(where), why=why, fix=repair_command(shards_dir), kind=DAMAGED)


def no_shards(missing: str, shards_dir: AnyPath) -> DataError:
    """The error of a place where no shards are.

    Args:
        missing: The file that a folder of shards would have.
        shards_dir: As it was given.
    """
    if is_file(shards_dir):
        return DataError(
            "this is a file, not a folder of reference shards",
            where=str(shards_dir),
            why="its pairs have no reference log-probs yet",
            fix=f"dpo-opt precompute --model M --data {quoted(shards_dir)} --shards SHARDS, then pass SHARDS",
        )
    return DataError(
        f"there is no {missing}",
        where=str(shards_dir),
        why="this is not a folder of reference shards",
        fix=f"dpo-opt precompute --model M --data DATA --shards {quoted(shards_dir)}",
    )


def resume_command(shards_dir: AnyPath) -> str:
    """The command that continues a folder where it is now; its settings name where it was planned."""
    settings = shards_dir / COMMAND
    how = f"--config {quoted(settings)}" if is_file(settings) else "--model M --data DATA"
    return f"dpo-opt precompute {how} --shards {quoted(shards_dir)}"


def score_again(shards_dir: AnyPath, *, model: object, into: object) -> str:
    """The command that scores a folder's data under another model, or otherwise, into another folder.

    Args:
        shards_dir: The folder; its settings name the data.
        model: A name, or a word that stands for one.
        into: Likewise, of the folder to be made.
    """
    settings = shards_dir / COMMAND
    how = f"--config {quoted(settings)}" if is_file(settings) else "--data DATA"
    return f"dpo-opt precompute --model {quoted(model)} {how} --shards {quoted(into)}"


def to_json(record: BaseModel) -> str:
    """A record as it is written: keys are sorted, so equal records are equal bytes."""
    # Pydantic's own JSON would turn an infinity into null.
    values = record.model_dump()
    text = json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False, default=datetime.isoformat)
    return text + "\n"


def write_manifest(
    shards_dir: AnyPath, manifest: Manifest, *, name: str = MANIFEST, replace: bool = True
) -> None:
    """Publish the manifest with the hash of its own body.

    Args:
        shards_dir: Folder of reference shards.
        manifest: What is written.
        name: Of the file.
        replace: Otherwise a file of that name stays.

    Raises:
        FileExistsError: There is one, and it must not be replaced.
        DpoOptError: The disk is full, or the store refuses.
    """
    body = json.loads(to_json(manifest))
    text = json.dumps({**body, "sha256": _body_hash(body)}, sort_keys=True, indent=1, ensure_ascii=False)
    write_text(shards_dir / name, text + "\n", replace=replace)


def load_manifest(shards_dir: AnyPath) -> Manifest:
    """Read and check a folder's manifest.

    Raises:
        DataError: There is no manifest, it was changed after it was written, it names a file outside the
            folder, or it is of a later version.
    """
    path = shards_dir / MANIFEST
    body = _body(shards_dir)
    _require_known_version(body, shards_dir)
    manifest = _parse_body(body, shards_dir)
    named = [name for shard in manifest.shards for name in (shard.file, shard.dropped_file)]
    for name in [*named, manifest.index_file]:
        if not _SAFE_FILE.fullmatch(name):
            raise DataError(f"the manifest names the file {name!r}, outside the folder", where=str(path))
    return manifest


def _require_known_version(body: Mapping[str, object], shards_dir: AnyPath) -> None:
    """Refuse a later version before anything else is read, because its keys may mean something else."""
    fingerprint = body.get("fingerprint")
    version = fingerprint.get("schema_version") if isinstance(fingerprint, dict) else None
    if isinstance(version, int) and version > UNPAIRED_VERSION:
        raise DataError(
            f"the folder has format version {version}, this program reads up to {UNPAIRED_VERSION}",
            where=str(shards_dir),
            why="its files may mean something else than what would be read from them",
            fix="use the version of dpo-opt that wrote it, or a later one",
        )


def _parse_body(body: dict[str, object], shards_dir: AnyPath) -> Manifest:
    """Read a manifest whose hash is right.

    Raises:
        DataError: It holds something else all the same, as another program may write it.
    """
    path = shards_dir / MANIFEST
    try:
        return parse(Manifest, json.dumps(body), where=path)
    except DataError as error:
        raise damaged(error.what, path, shards_dir, why=_ONLY_RECORD) from error


def _body(shards_dir: AnyPath) -> dict[str, object]:
    """The manifest without its hash, after the hash was checked. It covers all keys, also unknown ones."""
    path = shards_dir / MANIFEST
    text = read_all(shards_dir, [MANIFEST]).get(MANIFEST)
    if text is None:
        if not is_file(shards_dir / PLAN):
            raise no_shards(MANIFEST, shards_dir)
        raise DataError(
            f"there is no {MANIFEST}",
            where=str(shards_dir),
            why="scoring has not finished, so some pairs have no reference log-probs",
            fix=f"dpo-opt finalize --shards {quoted(shards_dir)}",
        )
    try:
        body: dict[str, object] = json_of(text.decode("utf-8"))
        stated, right = body.pop("sha256"), _body_hash(body)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged("not readable as a manifest", path, shards_dir, why=_ONLY_RECORD) from error
    if stated != right:
        why = "it was edited or damaged after it was written"
        raise damaged("the manifest does not match its own hash", path, shards_dir, why=why)
    return body


def parse(kind: type[R], text: str | bytes, *, where: AnyPath, fix: str | None = None) -> R:
    """Read a record.

    Raises:
        DataError: The text is not such a record; the message names the field, and the fix.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{field}: {first['msg']}", where=str(where), fix=fix) from error


def _body_hash(body: dict[str, object]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
