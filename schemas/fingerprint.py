"""What must match for cached log-probs to mean what a reader thinks they mean.

A cache keyed by a model's name or by a row's position goes stale in silence. Here every shard carries
the content digests of everything its numbers depend on, and each command compares the fields that
matter to it, by name.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from dpo_opt.schemas.errors import FingerprintError, quoted
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.rope import FIXED


class Fingerprint(BaseModel):
    """Identity of a shard's numbers: only shards with equal fingerprints may be in one folder."""

    # Keys of a later version are kept: records that differ in one are not equal, and are copied whole.
    model_config = ConfigDict(frozen=True, extra="allow")

    schema_version: int
    """Version of the folder format (FORMAT.md)."""
    weights: str
    """Digest of the reference's tensors, independent of how they are split into files."""
    model_config_digest: str
    """Digest of config.json without names and versions."""
    tokenizer: str
    """Digest of the tokenizer's behaviour."""
    chat_template: str
    """Digest of the chat template; ``none`` without one."""
    text_to_ids: str
    """Version of the rules that turn text into ids (precompute/tokens/tokenize.py)."""
    max_length: int
    """Most tokens of prompt plus completion."""
    truncation: str
    """``keep_start``, ``keep_end`` or ``drop``."""
    engine: str
    engine_version: str
    strategy: str
    dtype: str
    engine_options: str
    """Arguments passed through to the engine, as compact JSON with sorted keys; ``{}`` for none.

    Without those of ``MEMORY_OPTIONS``; folders from before that was so hold them too, and are compared
    without them.
    """
    rope: str = FIXED
    """What ``max_length`` makes of the rotary embedding (``schemas.rope``); ``fixed`` for most models."""
    template_date: str | None = None
    """Date that the chat template was told, such as ``2026-03-31``; None for one that does not ask for it."""
    train_on: str | None = None
    """Which of the assistant's turns count: ``all``, ``last`` or ``first-difference``.

    None in folders from before it was kept, where everything in a completion counts."""
    rows: str | None = None
    """What a row is: ``unpaired`` for one completion and its label; None for a pair."""
    architecture: str | None = None
    """The class that the reference's config.json names; compared where both sides name one."""

    @property
    def noun(self) -> str:
        """What messages call one of its rows: an unpaired one is no pair."""
        return "pair" if self.rows is None else "row"

    @property
    def unknown(self) -> list[str]:
        """Keys of a later version that are not null; a null key means the same as an absent one."""
        return sorted(name for name, value in (self.model_extra or {}).items() if value is not None)


MEMORY_OPTIONS = frozenset(
    {
        "block_size",
        "cpu_offload_gb",
        "cpu_offload_params",
        "cudagraph_capture_sizes",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_cudagraph_capture_size",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "num_gpu_blocks_override",
        "swap_space",  # of older releases
    }
)
"""Arguments of vLLM's engine that say how much is computed at a time, and where it is kept.

They move a log-prob as much as another batch does, and must be changed where a GPU's memory does not suffice.
"""

MODEL_FIELDS = ("schema_version", "weights", "model_config_digest", "tokenizer", "rope", "architecture")
"""Compared by ``train`` and ``verify``: the numerics are settled by measured parity instead."""

TOKENIZER_FIELDS = ("schema_version", "tokenizer")
"""Compared by ``score``, which may use any model that reads the same ids."""

_LONGEST_VALUE = 200
"""Characters of a value that a message shows."""

ALL_FIELDS = tuple(Fingerprint.model_fields)
"""Compared by a worker that adds shards to a folder."""


def refuse_differences(
    *,
    cached: Fingerprint,
    current: Fingerprint,
    fields: Iterable[str],
    where: str,
    fix: str,
    config_keys: Mapping[str, tuple[object, object]] | None = None,
) -> None:
    """Compare two fingerprints field by field.

    Args:
        cached: The folder's fingerprint.
        current: What this run would need.
        fields: The fields that matter to this command.
        where: The folder, for the message.
        fix: The command that resolves the difference.
        config_keys: What differs where ``model_config_digest`` does: by key, both values. Nothing: the
            digests are two spellings of the same model. None: only the digests are known.

    Raises:
        FingerprintError: At least one field differs; the message lists each with both values. Or all fields
            matter, and the folder has some of a later version.
    """
    fields = tuple(fields)
    if cached.unknown and set(fields) == set(ALL_FIELDS):
        raise FingerprintError(
            "the folder's fingerprint says more than this program understands "
            f"({', '.join(map(quoted, cached.unknown))})",
            where=where,
            why="whether shards of this run would belong there cannot be told",
            fix="pip install --upgrade dpo-opt",
        )
    if config_keys is not None and not config_keys:
        current = current.model_copy(update={"model_config_digest": cached.model_config_digest})
    differing = [name for name in fields if not _agree(name, getattr(cached, name), getattr(current, name))]
    if not differing:
        return
    rows = [("field", "cached", "this run")]
    for name in differing:
        if name == "model_config_digest" and config_keys:
            rows += [
                (short_value(f"config.{key}"), short_value(a), short_value(b))
                for key, (a, b) in config_keys.items()
            ]
        else:
            rows.append((name, short_value(getattr(cached, name)), short_value(getattr(current, name))))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    table = "\n".join(f"    {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
    same = ", ".join(name for name in fields if name not in differing) or "nothing else"
    raise FingerprintError(
        f"the cached log-probs were not computed for this run\n{table}\n    same: {same}",
        where=where,
        why="numbers computed for another model or other ids would train towards the wrong reference",
        fix=fix,
    )


def follows(cached: Fingerprint, current: Fingerprint) -> bool:
    """Whether a folder's fingerprint stands for a run's as well, though it may be spelled otherwise."""
    return not cached.unknown and all(
        _agree(name, getattr(cached, name), getattr(current, name)) for name in ALL_FIELDS
    )


def without_memory_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's arguments that its numbers depend on."""
    return {name: value for name, value in options.items() if name not in MEMORY_OPTIONS}


def _agree(name: str, cached: object, current: object) -> bool:
    if name == "engine_options":
        return _identity_of_options(cached) == _identity_of_options(current)
    if name == "architecture" and None in (cached, current):
        return True
    return cached == current


def _identity_of_options(text: object) -> object:
    try:
        options = json_of(str(text))
    except ValueError:
        return text
    return without_memory_options(options) if isinstance(options, dict) else options


def short_value(value: object) -> str:
    """A value as a line of a message shows it: the beginning of a hash or of a long text."""
    text = str(value)
    if not text.isprintable():
        text = quoted(text)
    if len(text) > _LONGEST_VALUE:
        return f"{text[:_LONGEST_VALUE]}..."
    return f"{text[:16]}..." if len(text) == 64 else text
