"""Whether the tokenizer in a folder is the one whose ids were scored."""

from collections.abc import Iterator
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


def files_state_tokenizer(shards_dir: AnyPath, fingerprint: Fingerprint) -> bool:
    """Whether the files alone show that it is the tokenizer of the fingerprint.

    If they do not, ``other_tokenizer`` decides. That one loads transformers, which takes seconds and PyTorch.
    """
    try:
        with on_this_machine(shards_dir / TOKENIZER) as local:
            return states(local, fingerprint.tokenizer)
    except FileNotFoundError:
        return False


def states(folder: Path, digest: str) -> bool:
    """Whether the files of a folder alone show that a tokenizer has this digest."""
    try:
        return tokenizer_digest(_saved(folder)) == digest
    except Exception:
        # The files may hold anything. Where they show nothing, `other_tokenizer` decides, and says why.
        return False


def _saved(folder: Path) -> _Saved:
    """What the files state.

    Raises:
        ValueError: Settings name tokens that tokenizer.json lacks: transformers would add them.
    """
    from tokenizers import Tokenizer

    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    settings = json_of((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {token["content"] for token in json_of(text)["added_tokens"]}
    if unknown := set(_named_tokens(settings)) - added:
        raise ValueError(f"tokenizer.json lacks {unknown}")
    bos, eos, unk = [_content(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token")]
    return _Saved(Tokenizer.from_str(text), bos, eos, unk, bool(settings.get("split_special_tokens")))


def _named_tokens(settings: dict[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if name.endswith("_token") and not name.startswith("add_"):
            listed = [value]
        elif name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
            listed = list(value.values()) if isinstance(value, dict) else value or []
        else:
            continue
        yield from (content for token in listed if (content := _content(token)) is not None)


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def scored_tokenizer_sha256(shards_dir: AnyPath, fingerprint: Fingerprint) -> str:
    """Hash of the tokenizer's files, for the manifest.

    Raises:
        DataError: They are not those of the tokenizer whose ids were scored.
    """
    sha256, problem = "", None
    try:
        with on_this_machine(shards_dir / TOKENIZER) as local:
            # Taken first: what changes after the comparison has another hash.
            sha256 = sha256_folder(local, whole=shards_dir)
            stated = states(local, fingerprint.tokenizer)
            problem = None if stated else _difference(local, fingerprint)
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
