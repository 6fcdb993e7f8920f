"""Checks that a model is the one that the shards were scored with, by comparing content digests."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from dpo_opt.optimize.adapters.adapter_folder import read_adapter
from dpo_opt.optimize.adapters.merging import merged_digests
from dpo_opt.schemas.config_keys import differing_keys
from dpo_opt.schemas.errors import ConfigError, first_line, quoted
from dpo_opt.schemas.fingerprint import refuse_differences
from dpo_opt.schemas.manifest import score_again
from dpo_opt.schemas.model_config import load_model_config
from dpo_opt.schemas.models import config_digest, read_config, stated_architecture, tokenizer_digest
from dpo_opt.schemas.rope import describe_rope
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import SCHEMA_VERSION, UNPAIRED, UNPAIRED_VERSION
from dpo_opt.schemas.weights import weights_digest


def require_same_model(
    folder: ShardFolder,
    model_folder: Path,
    *,
    fields: Sequence[str],
    fix: str,
    adapter: Path | None = None,
) -> None:
    """Compare a model folder with the fingerprint of the shards.

    Args:
        folder: The shards.
        model_folder: The model.
        fields: ``MODEL_FIELDS`` if the model must be the reference, ``TOKENIZER_FIELDS`` if only the token
            ids must mean the same.
        fix: The fix in the error message if fields differ and there is no adapter.
        adapter: Adapter that is trained further. The reference must be the model with it merged, as
            ``dpo-opt merge`` writes it.

    Raises:
        ConfigError: The model folder has no readable tokenizer, or the adapter is for another model.
        FingerprintError: A field differs.
    """
    cached = folder.manifest.fingerprint
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library often raises plain Exception
        load_model_config(model_folder)  # raises its own error if config.json, which was read too, is broken
        raise ConfigError(
            f"the tokenizer cannot be loaded ({first_line(error)})",
            where=str(model_folder),
            why="without it, nothing can tell whether its ids mean the same as in the shards",
            fix="copy the model's own tokenizer there, or, if it is the same, "
            f"cp {quoted(folder.path)}/tokenizer/* {quoted(model_folder)}",
        ) from error
    version = UNPAIRED_VERSION if cached.rows == UNPAIRED else SCHEMA_VERSION
    found: dict[str, object] = {"schema_version": version, "tokenizer": tokenizer_digest(tokenizer)}
    if "weights" in fields:
        digests = (
            merged_digests(model_folder, read_adapter(adapter))
            if adapter
            else iter([weights_digest(model_folder)])
        )
        for digest in digests:
            found["weights"] = digest
            if digest == cached.weights:
                break
        found["model_config_digest"] = config_digest(model_folder)
        found["architecture"] = stated_architecture(model_folder)
        found["rope"] = describe_rope(load_model_config(model_folder), cached.max_length)
    refuse_differences(
        cached=cached,
        current=cached.model_copy(update=found),
        fields=fields,
        config_keys=differing_keys(
            folder.path, cached_digest=cached.model_config_digest, current=read_config(model_folder)
        )
        if "model_config_digest" in fields
        else None,
        where=str(folder.path),
        fix=fix
        if adapter is None
        else f"dpo-opt merge --model {quoted(model_folder)} --adapter {quoted(adapter)} --output MERGED, "
        f"then {score_again(folder.path, model='MERGED', into='SCORED')}, then the same command with "
        "--shards SCORED",
    )
