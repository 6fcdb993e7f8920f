"""Whether a folder is finished: its manifest covers the plan, and the files that readers need are there."""

from collections.abc import Iterator, Mapping

from dpo_opt.precompute.shards.read_plan import ranges_of
from dpo_opt.schemas.counts import are, counted
from dpo_opt.schemas.locations import AnyPath, is_file, sizes
from dpo_opt.schemas.manifest import (
    DATA,
    DROPPED,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Plan,
    damaged,
    load_manifest,
)
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import column_path
from dpo_opt.schemas.storage import file_names

_MISSING = "the file is missing"


def is_finalized(shards_dir: AnyPath, plan: Plan) -> bool:
    """Whether a manifest covers the plan, and its files are there.

    While a folder grows, readers follow its earlier manifest, which covers fewer rows than the plan.

    Raises:
        DataError: The manifest is damaged, or a file of it is lost.
    """
    if not is_file(shards_dir / MANIFEST):
        return False
    manifest = load_manifest(shards_dir)
    if not covers(manifest, plan):
        return False
    require_all_there(shards_dir, manifest)
    return True


def covers(manifest: Manifest, plan: Plan) -> bool:
    """Whether a manifest is of this fingerprint, this data and these shards."""
    of_manifest = (manifest.fingerprint, manifest.dataset_digest, ranges_of(manifest))
    return of_manifest == (plan.fingerprint, plan.dataset_digest, plan.shards)


def require_all_there(shards_dir: AnyPath, manifest: Manifest) -> None:
    """Check that no file of a finished folder is lost or cut.

    Raises:
        DataError: One is; the message says how many others are.
    """
    lost = list(lost_files(shards_dir, manifest))
    if lost:
        name, problem = lost[0]
        more = len(lost) - 1
        others = f" ({counted(more, 'other file')} {are(more)} lost or cut as well)" if more else ""
        why = "the manifest names it, so readers of the folder would miss it"
        raise damaged(f"{problem}{others}", shards_dir / name, shards_dir, why=why)
    for name in manifest.columns or ():
        ShardFolder(shards_dir, manifest).has_column(name)


def lost_columns(shards_dir: AnyPath, manifest: Manifest) -> list[tuple[str, str]]:
    """Weights and margins that the manifest names and that are not there, each with what is wrong."""
    files = manifest.columns or {}
    return [
        (file, _MISSING) for name, file in files.items() if not is_file(column_path(shards_dir, name, files))
    ]


def lost_files(shards_dir: AnyPath, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Files of a finished folder that are lost or cut, each with what is wrong; read is none of them.

    They are those that readers need: shards, dropped rows, the index and the tokenizer's files. What changed
    and kept its size is noticed by whoever reads it.
    """
    there = sizes(shards_dir)
    for folder in (DATA, DROPPED):
        there |= {f"{folder}/{name}": size for name, size in sizes(shards_dir / folder).items()}
    for commit in manifest.shards:
        size = there.get(commit.file)
        if size is None:
            yield commit.file, _MISSING
        elif size != commit.bytes:
            yield commit.file, f"the file has {size} bytes of {commit.bytes}"
        if not there.get(commit.dropped_file):
            yield commit.dropped_file, _lost(commit.dropped_file, there)
    if not there.get(manifest.index_file):
        yield manifest.index_file, _lost(manifest.index_file, there)
    named = manifest.tokenizer_files
    files = set(file_names(shards_dir / TOKENIZER))
    if named is None and not files:
        yield TOKENIZER, "it is missing or empty"
    yield from ((f"{TOKENIZER}/{name}", _MISSING) for name in named or () if name not in files)


def _lost(name: str, there: Mapping[str, int]) -> str:
    """No record states these files' sizes, but none of them is ever empty."""
    return "the file is empty" if name in there else _MISSING
