"""What a folder is going to hold, fixed before anything is scored.

Planning reads every row once, so a malformed row is found before any GPU time is spent, and nothing is
written until at least one pair is known to survive tokenization.
"""

import hashlib
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_opt.precompute.blocks import Block
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.datasets import (
    BadFile,
    BadRow,
    Reading,
    parse_block,
    row_digest,
    scan_blocks,
    scan_pairs,
)
from dpo_opt.precompute.parallel import map_in_order
from dpo_opt.precompute.tokenize import (
    TEXT_TO_IDS,
    PairTokenizer,
    chat_template,
    load_tokenizer,
    model_vocab_size,
)
from dpo_opt.schemas.columns import MARGIN, WEIGHT, Column, new_column, write_column
from dpo_opt.schemas.errors import ConfigError, DataError, FingerprintError
from dpo_opt.schemas.fingerprint import ALL_FIELDS, Fingerprint, refuse_differences
from dpo_opt.schemas.manifest import COMMAND, COMMITS, PLAN, TOKENIZER, Plan, ShardRange, parse, to_json
from dpo_opt.schemas.models import (
    checkpoint_dtype,
    config_digest,
    context_length,
    find_model,
    template_digest,
    tokenizer_digest,
    weights_digest,
)
from dpo_opt.schemas.pairs import Numerics, TokenizedPair
from dpo_opt.schemas.shards import SCHEMA_VERSION
from dpo_opt.schemas.storage import sha256_folder, write_text

_DEFAULT_MAX_LENGTH = 1024


class Reference(NamedTuple):
    """The model that scores, with what was left to it resolved."""

    folder: Path
    dtype: str
    max_length: int


def resolve_reference(config: PrecomputeConfig) -> Reference:
    """Find the model and fill in the settings that depend on it.

    Raises:
        ConfigError: There is no such model, or ``max_length`` is beyond its context.
    """
    folder = find_model(config.model)
    dtype = checkpoint_dtype(folder) if config.dtype == "auto" else config.dtype
    return Reference(folder, dtype, resolve_max_length(folder, config.max_length))


def resolve_max_length(folder: Path, max_length: int | None) -> int:
    """The most tokens of prompt plus completion, where it was left to the model too.

    Raises:
        ConfigError: It is beyond the model's context.
    """
    context = context_length(folder)
    if max_length is not None and context is not None and max_length > context:
        raise ConfigError(
            f"--max-length {max_length} is beyond the model's context of {context} tokens",
            where=str(folder),
            why="log-probs past the context mean nothing",
            fix=f"pass --max-length {context} or less",
        )
    return max_length or min(_DEFAULT_MAX_LENGTH, context or _DEFAULT_MAX_LENGTH)


def make_tokenizer(config: PrecomputeConfig, reference: Reference) -> PairTokenizer:
    """The tokenizer with this configuration's truncation.

    Raises:
        ConfigError: The model folder has no usable tokenizer, or does not say how many ids there are.
    """
    return PairTokenizer(
        load_tokenizer(reference.folder),
        max_length=reference.max_length,
        truncation=config.truncation,
        vocab_size=model_vocab_size(reference.folder),
    )


class Planned(NamedTuple):
    """A plan, and what the data says about its rows beside their texts."""

    plan: Plan
    columns: dict[str, Column]
    """``weight`` and ``margin``, where some row has one."""
    bad_rows: list[BadRow]
    """Rows that are left out; empty unless ``on_bad_row`` is ``skip``. At most ``_BAD_ROWS_SHOWN``."""


_BAD_ROWS_SHOWN = 5


def make_plan(
    config: PrecomputeConfig, *, reference: Reference, tokenizer: PairTokenizer, numerics: Numerics
) -> Planned:
    """Count and digest the rows, and divide them into shards.

    Raises:
        DataError: A row is malformed, or no pair survives tokenization.
    """
    _require_a_usable_pair(config, reference, tokenizer)
    size = config.pairs_per_shard
    whole = hashlib.sha256()
    parts: list[RowsDigest] = []
    rows = 0
    columns: dict[str, Column] = {}
    bad_rows: list[BadRow] = []
    for block in map_in_order(_read_block, _good_blocks(config), processes=config.processes):
        for found in block:
            if isinstance(found.error, DataError):
                if config.on_bad_row == "error":
                    raise found.error
                if len(bad_rows) < _BAD_ROWS_SHOWN:
                    bad_rows.append(BadRow(rows, found.error))
            if rows % size == 0:
                parts.append(RowsDigest())
            parts[-1].add(found.digest)
            for name, value in found.numbers.items():
                column = columns.setdefault(name, new_column())
                column.rows.append(rows)
                column.values.append(value)
            whole.update(found.digest)
            rows += 1
    plan = Plan(
        fingerprint=_fingerprint(config, reference, tokenizer, numerics),
        dataset_digest=whole.hexdigest(),
        rows=rows,
        shards=[
            ShardRange(shard=i, start=i * size, stop=min((i + 1) * size, rows), rows_digest=part.hexdigest())
            for i, part in enumerate(parts)
        ],
    )
    return Planned(plan, columns, bad_rows)


def settle_plan(
    config: PrecomputeConfig, *, reference: Reference, tokenizer: PairTokenizer, numerics: Numerics
) -> Plan:
    """The folder's plan, made here or by another run for the same thing.

    One of several workers that finds a plan does not read all data again: it compares the rows of each shard
    with the plan when it reads them.

    Raises:
        DataError: A row is malformed, no pair survives tokenization, or the plan is gone.
        FingerprintError: The folder was planned for something else.
    """
    if config.worker_index is not None and (config.shards / PLAN).is_file():
        plan = read_plan(config.shards)
        _refuse_other_fingerprint(plan, _fingerprint(config, reference, tokenizer, numerics), config.shards)
        return plan
    planned = make_plan(config, reference=reference, tokenizer=tokenizer, numerics=numerics)
    adopt_plan(config, planned, tokenizer.tokenizer)
    return planned.plan


class RowsDigest:
    """SHA-256 of the digests of rows, in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row_digest: bytes) -> None:
        self._digest.update(row_digest)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class _RowFacts(NamedTuple):
    digest: bytes
    numbers: dict[str, float]
    error: DataError | None


def _read_block(task: tuple[Block, Reading]) -> list[_RowFacts]:
    facts = []
    for item in parse_block(*task):
        if isinstance(item, BadRow):
            facts.append(_RowFacts(row_digest(item), {}, item.error))
        else:
            numbers = {WEIGHT: item.weight, MARGIN: item.margin}
            known = {name: value for name, value in numbers.items() if value is not None}
            facts.append(_RowFacts(row_digest(item), known, None))
    return facts


def _good_blocks(config: PrecomputeConfig) -> Iterator[tuple[Block, Reading]]:
    for item in scan_blocks(config):
        if isinstance(item, BadFile):
            raise item.error
        yield item


def _require_a_usable_pair(config: PrecomputeConfig, reference: Reference, tokenizer: PairTokenizer) -> None:
    reasons: Counter[str] = Counter()
    for item in scan_pairs(config):
        if isinstance(item, BadRow):
            if config.on_bad_row == "error":
                raise item.error
            reasons["bad_row"] += 1
            continue
        tokenized = tokenizer(item)
        if isinstance(tokenized, TokenizedPair):
            return
        reasons[tokenized.reason] += 1
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    raise DataError(
        f"none of the {reasons.total()} pairs can be used ({counts})",
        where=", ".join(config.data),
        why=f"at --max-length {reference.max_length} nothing would be left to train on",
        fix="pass a larger --max-length, or --truncation keep_end",
    )


def adopt_plan(config: PrecomputeConfig, planned: Planned, tokenizer: Any) -> None:
    """Write the plan and the columns beside it, or check that the folder already follows it.

    Raises:
        DataError: The folder holds shards, but no plan that says what they are of.
        FingerprintError: The folder was planned for something else.
    """
    plan, shards_dir = planned.plan, config.shards
    path = shards_dir / PLAN
    # Asked first: whoever commits has written the plan before.
    holds_commits = any((shards_dir / COMMITS).glob("*.json"))
    if not path.is_file():
        if holds_commits:
            raise DataError(
                f"the folder holds scored shards, but no {PLAN}",
                where=str(shards_dir),
                why="nothing says which data they belong to",
                fix=f"restore {PLAN}, or pass another --shards folder",
            )
        _save_tokenizer(shards_dir / TOKENIZER, tokenizer)
        for name, column in planned.columns.items():
            write_column(shards_dir, name, column)
        write_text(shards_dir / COMMAND, _command(config))
        write_text(path, to_json(plan))
    existing = read_plan(shards_dir)
    _refuse_other_fingerprint(existing, plan.fingerprint, shards_dir)
    if existing != plan:
        different = (
            f"its data has {existing.rows} rows with digest {existing.dataset_digest[:16]}..., this data "
            f"{plan.rows} rows with digest {plan.dataset_digest[:16]}..."
            if existing.dataset_digest != plan.dataset_digest
            else f"its shards hold {existing.shards[0].stop} rows, --pairs-per-shard now gives "
            f"{plan.shards[0].stop}"
        )
        raise FingerprintError(
            f"the folder was planned for another run: {different}",
            where=str(shards_dir),
            why="its shards would not belong together",
            fix=_OTHER_FOLDER,
        )


_OTHER_FOLDER = "pass another --shards folder, or remove this one to score it again"


def _refuse_other_fingerprint(plan: Plan, current: Fingerprint, shards_dir: Path) -> None:
    refuse_differences(
        cached=plan.fingerprint, current=current, fields=ALL_FIELDS, where=str(shards_dir), fix=_OTHER_FOLDER
    )


def _command(config: PrecomputeConfig) -> str:
    """The settings as a file that ``--config`` reads, for whoever goes on with the folder."""
    # Who runs the workers is not theirs to know: each would launch again.
    launching = {"launcher", "gpus_per_worker", "submit", "job_option", "time_limit", "ray_address"}
    settings = config.model_dump(
        mode="json", exclude={"worker_index", "num_workers", *launching}, exclude_defaults=True
    )
    settings["shards"] = str(config.shards.absolute())
    # What is no path here is a URL, a pattern or a name on the Hub.
    settings["data"] = [_absolute(name) for name in config.data]
    settings["model"] = _absolute(config.model)
    return yaml.safe_dump(settings, sort_keys=False)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def read_plan(shards_dir: Path) -> Plan:
    """The folder's plan.

    Raises:
        DataError: There is none.
    """
    path = shards_dir / PLAN
    if not path.is_file():
        raise DataError(
            f"there is no {PLAN}",
            where=str(shards_dir),
            why="this is not a folder of reference shards",
            fix=f"dpo-opt precompute --model M --data DATA --shards {shards_dir}",
        )
    return parse(Plan, path.read_bytes(), where=path)


def _fingerprint(
    config: PrecomputeConfig, reference: Reference, tokenizer: PairTokenizer, numerics: Numerics
) -> Fingerprint:
    return Fingerprint(
        schema_version=SCHEMA_VERSION,
        weights=weights_digest(reference.folder),
        model_config_digest=config_digest(reference.folder),
        tokenizer=tokenizer_digest(tokenizer.tokenizer),
        chat_template=template_digest(chat_template(tokenizer.tokenizer)),
        text_to_ids=TEXT_TO_IDS,
        max_length=reference.max_length,
        truncation=config.truncation,
        **numerics._asdict(),
    )


def _save_tokenizer(path: Path, tokenizer: Any) -> None:
    """Put the tokenizer in place; a folder that an interrupted run left for another one is replaced."""
    private = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        tokenizer.save_pretrained(private)
        if path.exists() and sha256_folder(path) != sha256_folder(private):
            shutil.rmtree(path)
        try:
            private.replace(path)
        except OSError:
            # Another run, or an earlier one, put the same files there.
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
