"""What a folder is going to hold, fixed before anything is scored.

Planning reads every row once, so a malformed row is found before any GPU time is spent, and nothing is
written until at least one pair is known to survive tokenization.
"""

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.datasets import read_pairs, row_content
from dpo_opt.precompute.tokenize import TEXT_TO_IDS, PairTokenizer, chat_template, load_tokenizer
from dpo_opt.schemas.errors import ConfigError, DataError, FingerprintError
from dpo_opt.schemas.fingerprint import ALL_FIELDS, Fingerprint, refuse_differences
from dpo_opt.schemas.manifest import PLAN, TOKENIZER, Plan, ShardRange, parse, to_json
from dpo_opt.schemas.models import (
    checkpoint_dtype,
    config_digest,
    context_length,
    find_model,
    read_config,
    template_digest,
    tokenizer_digest,
    weights_digest,
)
from dpo_opt.schemas.pairs import Numerics, TokenizedPair
from dpo_opt.schemas.shards import SCHEMA_VERSION
from dpo_opt.schemas.storage import write_text

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
    context = context_length(folder)
    if config.max_length is not None and context is not None and config.max_length > context:
        raise ConfigError(
            f"--max-length {config.max_length} is beyond the model's context of {context} tokens",
            where=str(folder),
            why="log-probs past the context mean nothing",
            fix=f"pass --max-length {context} or less",
        )
    max_length = config.max_length or min(_DEFAULT_MAX_LENGTH, context or _DEFAULT_MAX_LENGTH)
    dtype = checkpoint_dtype(folder) if config.dtype == "auto" else config.dtype
    return Reference(folder, dtype, max_length)


def make_tokenizer(config: PrecomputeConfig, reference: Reference) -> PairTokenizer:
    """The tokenizer with this configuration's truncation."""
    model_config = read_config(reference.folder)
    return PairTokenizer(
        load_tokenizer(reference.folder),
        max_length=reference.max_length,
        truncation=config.truncation,
        vocab_size=int(model_config.get("text_config", model_config)["vocab_size"]),
    )


def make_plan(
    config: PrecomputeConfig, *, reference: Reference, tokenizer: PairTokenizer, numerics: Numerics
) -> Plan:
    """Count and digest the rows, and divide them into shards.

    Raises:
        DataError: A row is malformed, or no pair survives tokenization.
    """
    digest = hashlib.sha256()
    rows = 0
    survives = False
    reasons: Counter[str] = Counter()
    for pair in read_pairs(config.data):
        content = row_content(pair)
        digest.update(len(content).to_bytes(8, "little") + content)
        rows += 1
        if not survives:
            tokenized = tokenizer(pair)
            survives = isinstance(tokenized, TokenizedPair)
            if not isinstance(tokenized, TokenizedPair):
                reasons[tokenized.reason] += 1
    if not survives:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"none of the {rows} pairs can be used ({counts})",
            where=str(config.data),
            why=f"at --max-length {reference.max_length} nothing would be left to train on",
            fix="pass a larger --max-length, or --truncation keep_end",
        )
    size = config.pairs_per_shard
    return Plan(
        fingerprint=_fingerprint(config, reference, tokenizer, numerics),
        dataset_digest=digest.hexdigest(),
        rows=rows,
        shards=[
            ShardRange(shard=i, start=start, stop=min(start + size, rows))
            for i, start in enumerate(range(0, rows, size))
        ],
    )


def adopt_plan(shards_dir: Path, plan: Plan, tokenizer: Any) -> None:
    """Write the plan, or check that the folder already follows it.

    Raises:
        FingerprintError: The folder was planned for something else.
    """
    path = shards_dir / PLAN
    if not path.is_file():
        _save_tokenizer(shards_dir / TOKENIZER, tokenizer)
        write_text(path, to_json(plan))
        return
    existing = parse(Plan, path.read_text(encoding="utf-8"), where=path)
    fix = "pass another --shards folder, or remove this one to score it again"
    refuse_differences(
        cached=existing.fingerprint,
        current=plan.fingerprint,
        fields=ALL_FIELDS,
        where=str(shards_dir),
        fix=fix,
    )
    if existing != plan:
        different = (
            f"its data has {existing.rows} rows with digest {existing.dataset_digest[:16]}..., this data "
            f"{plan.rows} rows with digest {plan.dataset_digest[:16]}..."
            if existing.dataset_digest != plan.dataset_digest
            else f"it has {len(existing.shards)} shards, --pairs-per-shard now gives {len(plan.shards)}"
        )
        raise FingerprintError(
            f"the folder was planned for another run: {different}",
            where=str(shards_dir),
            why="its shards would not belong together",
            fix=fix,
        )


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
    return parse(Plan, path.read_text(encoding="utf-8"), where=path)


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
    private = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(private, ignore_errors=True)
    tokenizer.save_pretrained(private)
    if not path.exists():
        private.replace(path)
    shutil.rmtree(private, ignore_errors=True)
