"""Whether two config.json mean the same computation: read as transformers reads them, and compared by key.

The digest in a fingerprint is that of a spelling. transformers 5 spells a model that an earlier release
saved in another way (``rope_theta`` within ``rope_parameters``, defaults written out), and training programs
add keys of their own. So a folder keeps the config.json of its reference; where the digests differ, both are
read by the same release of transformers, and what differs is named.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from dpo_opt.schemas.locations import AnyPath, read_all
from dpo_opt.schemas.model_config import model_errors
from dpo_opt.schemas.models import VOLATILE_CONFIG_KEYS, digest_of_config
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.storage import write_text

MODEL_CONFIG = "model_config.json"
"""The reference's config.json, next to the plan. It counts only if its digest is that of the fingerprint."""

# What no frozen model computes with, beside names and versions: how it was initialised and trained.
_HARMLESS = frozenset({"initializer_range", "problem_type", "chunk_size_feed_forward", "return_dict"})
_HARMLESS_PATTERN = re.compile(
    r".*(dropout|pdrop|layerdrop).*|unsloth_.*|_attn_implementation.*|_commit_hash"
)


def keep_model_config(shards_dir: AnyPath, config: Mapping[str, Any]) -> None:
    """Write the reference's config.json next to a folder's plan."""
    write_text(shards_dir / MODEL_CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")


def kept_model_config(shards_dir: AnyPath, *, digest: str) -> dict[str, Any] | None:
    """The config.json of a folder's reference; None where the folder does not keep it.

    Args:
        shards_dir: The folder.
        digest: ``model_config_digest`` of its fingerprint.
    """
    text = read_all(shards_dir, [MODEL_CONFIG]).get(MODEL_CONFIG)
    with contextlib.suppress(ValueError):
        found = json_of(text or "")
        if isinstance(found, dict) and digest_of_config(found) == digest:
            return found
    return None


def differing_keys(
    shards_dir: AnyPath, *, cached_digest: str, current: Mapping[str, Any] | None
) -> dict[str, tuple[object, object]] | None:
    """The keys in which a model's configuration differs from the one that a folder was scored with.

    Args:
        shards_dir: The folder.
        cached_digest: ``model_config_digest`` of its fingerprint.
        current: The model's config.json; None where it is not known.

    Returns:
        By key, the folder's value and the model's, as transformers understands them; nothing where both are
        the same model. None where one of the two is not known.
    """
    if current is None:
        return None
    if digest_of_config(current) == cached_digest:
        return {}
    kept = kept_model_config(shards_dir, digest=cached_digest)
    if kept is None:
        return None
    one, other = _flat(_as_understood(kept)), _flat(_as_understood(current))
    return {
        key: (one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    }


def _as_understood(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With defaults filled in and names as transformers has them now; as it is, where it does not know it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        found: dict[str, Any] = CONFIG_MAPPING[str(config["model_type"])].from_dict(dict(config)).to_dict()
    except model_errors():
        # What a model's own code refuses is compared as it is written.
        return config
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Every value by the path of its key, without what makes no difference."""
    from transformers import GenerationConfig

    ignored = VOLATILE_CONFIG_KEYS | _HARMLESS | GenerationConfig().to_dict().keys()
    found: dict[str, object] = {}
    for key, value in config.items():
        if key in ignored or _HARMLESS_PATTERN.fullmatch(key):
            continue
        if key == "type" and config.get("rope_type") == value:
            continue  # the former name beside the present one
        if isinstance(value, Mapping):
            found |= _flat({str(name): member for name, member in value.items()}, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
