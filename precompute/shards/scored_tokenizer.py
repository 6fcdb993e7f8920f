"""Whether the tokenizer in a folder is the one whose ids were scored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.fingerprint import Fingerprint
from dpo_opt.schemas.locations import AnyPath, on_this_machine
from dpo_opt.schemas.manifest import TOKENIZER, repair_command
from dpo_opt.schemas.models import tokenizer_digest
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.storage import sha256_folder

_UNREADABLE = "no tokenizer can be read from it"


def other_tokenizer(shards_dir: AnyPath, fingerprint: Fingerprint) -> str | None:
    """What is wrong with the folder's tokenizer, by what it does; None if it is that of the fingerprint.

    The manifest's hash is of the files that ``finalize`` found, so it says nothing of what changed before.
    Without transformers nothing can be compared, and nothing is wrong: what trains or scores has it.
    """
    try:
        with on_this_machine(shards_dir / TOKENIZER) as local:
            return _difference(local, fingerprint)
    except FileNotFoundError:
        return _UNREADABLE


def _difference(folder: Path, fingerprint: Fingerprint) -> str | None:
    # First without transformers, whose loading takes seconds.
    if _stated_digest(folder) == fingerprint.tokenizer:
        return None
    try:
        if tokenizer_digest(load_tokenizer(folder)) == fingerprint.tokenizer:
            return None
    except ModuleNotFoundError:
        return None
    except ConfigError:
        return _UNREADABLE
    return "it is not the tokenizer whose ids were scored"


@dataclass
class _Saved:
    """A tokenizer as its files state it; transformers may make something else of them."""

    backend_tokenizer: Any
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    split_special_tokens: bool


def _stated_digest(folder: Path) -> str | None:
    """The digest by the files alone; None where they do not say enough."""
    try:
        return tokenizer_digest(_saved(folder))
    except (ModuleNotFoundError, OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _saved(folder: Path) -> _Saved:
    from tokenizers import Tokenizer

    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    json_of(text)  # whose errors are known; those of the library are bare Exceptions
    settings = json_of((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = [settings.get(name) for name in ("bos_token", "eos_token", "unk_token")]
    bos, eos, unk = [token["content"] if isinstance(token, dict) else token for token in tokens]
    return _Saved(Tokenizer.from_str(text), bos, eos, unk, bool(settings.get("split_special_tokens")))


def scored_tokenizer_sha256(shards_dir: AnyPath, fingerprint: Fingerprint) -> str:
    """Hash of the tokenizer's files, for the manifest.

    Raises:
        DataError: They are not those of the tokenizer whose ids were scored.
    """
    sha256, problem = "", None
    try:
        with on_this_machine(shards_dir / TOKENIZER) as local:
            # Taken first: what changes after the comparison has another hash.
            sha256, problem = sha256_folder(local, whole=shards_dir), _difference(local, fingerprint)
    except FileNotFoundError:
        problem = _UNREADABLE
    if problem:
        raise DataError(
            problem,
            where=str(shards_dir / TOKENIZER),
            why="it turns the folder's ids back into text, and becomes that of the trained model",
            fix=repair_command(shards_dir),
        )
    return sha256
