"""The model that scores: where it is, the settings that depend on it, and its fingerprint."""

from pathlib import Path
from typing import NamedTuple

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.shards.weights_memo import known_weights_digest
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer, model_vocab_size
from dpo_opt.precompute.tokens.max_length import resolve_max_length
from dpo_opt.precompute.tokens.template_date import refuse_unused
from dpo_opt.precompute.tokens.templates import chat_templates
from dpo_opt.precompute.tokens.tokenize import TEXT_TO_IDS, PairTokenizer
from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.manifest import Plan
from dpo_opt.schemas.models import (
    checkpoint_dtype,
    config_digest,
    find_model,
    pinned_name,
    stated_architecture,
    template_digest,
    tokenizer_digest,
)
from dpo_opt.schemas.pairs import Numerics
from dpo_opt.schemas.shards import SCHEMA_VERSION, UNPAIRED, UNPAIRED_VERSION


class Reference(NamedTuple):
    """The model that scores, with the settings that depend on it filled in."""

    folder: Path
    dtype: str
    max_length: int
    name: str
    """What ``--model`` must say to mean these files again: a Hub name with its commit."""


def resolve_reference(config: PrecomputeConfig) -> Reference:
    """Find the model and fill in the settings that depend on it.

    Raises:
        ConfigError: There is no such model, or ``max_length`` is beyond its context.
    """
    folder = find_model(config.model)
    dtype = checkpoint_dtype(folder) if config.dtype == "auto" else config.dtype
    max_length = resolve_max_length(folder, config.max_length)
    return Reference(folder, dtype, max_length, pinned_name(config.model, folder))


def pinned(config: PrecomputeConfig, reference: Reference) -> PrecomputeConfig:
    """The settings for workers and later runs, which must find the same files of the model."""
    return config.model_copy(update={"model": reference.name})


def make_tokenizer(config: PrecomputeConfig, reference: Reference) -> PairTokenizer:
    """The tokenizer with this configuration's truncation.

    Raises:
        ConfigError: The model folder has no usable tokenizer, or does not say how many ids there are; or a
            date is given for a chat template that does not ask for it.
    """
    tokenizer = load_tokenizer(reference.folder)
    refuse_unused(config.template_date, tokenizer)
    return PairTokenizer(
        tokenizer,
        max_length=reference.max_length,
        truncation=config.truncation,
        train_on=config.train_on,
        vocab_size=model_vocab_size(reference.folder),
        template_date=config.template_date,
    )


def on_the_day_of(plan: Plan, config: PrecomputeConfig, tokenizer: PairTokenizer) -> PairTokenizer:
    """The tokenizer with the date of a folder's plan, if the user gave none, which is compared with it."""
    return tokenizer.on(plan.fingerprint.template_date if config.template_date is None else None)


def fingerprint_of(
    config: PrecomputeConfig,
    reference: Reference,
    tokenizer: PairTokenizer,
    numerics: Numerics,
    *,
    rows: str | None,
) -> Fingerprint:
    """All that this run's numbers depend on; ``rows`` is what the fingerprint says of the data's.

    Raises:
        ConfigError: The model's weights or settings cannot be read.
    """
    return Fingerprint(
        schema_version=UNPAIRED_VERSION if rows == UNPAIRED else SCHEMA_VERSION,
        rows=rows,
        weights=known_weights_digest(reference.folder, config.shards),
        model_config_digest=config_digest(reference.folder),
        tokenizer=tokenizer_digest(tokenizer.tokenizer),
        chat_template=template_digest(chat_templates(tokenizer.tokenizer)),
        text_to_ids=TEXT_TO_IDS,
        max_length=reference.max_length,
        truncation=config.truncation,
        train_on=config.train_on,
        template_date=tokenizer.template_date,
        architecture=stated_architecture(reference.folder),
        **numerics._asdict(),
    )
