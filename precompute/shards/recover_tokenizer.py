"""The tokenizer of a folder: whether it is the one that was scored with, and a new copy of the model's."""

import contextlib
import functools
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from dpo_opt.precompute.shards.model_tokenizer import put_tokenizer
from dpo_opt.precompute.shards.recover_plan import in_one_line, latest_settings
from dpo_opt.precompute.shards.scored_tokenizer import other_tokenizer
from dpo_opt.precompute.shards.write_plan import write_tokenizer
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.schemas.errors import DataError, FingerprintError, quoted
from dpo_opt.schemas.locations import AnyPath, remove
from dpo_opt.schemas.manifest import (
    COMMAND,
    DAMAGED,
    TOKENIZER,
    Manifest,
    Plan,
)
from dpo_opt.schemas.models import find_model, tokenizer_digest
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.storage import file_names


def tokenizer_problem(shards_dir: AnyPath, plan: Plan, manifest: Manifest | None) -> str | None:
    """What is wrong with the tokenizer's files; None if nothing is.

    They are compared with the manifest's hash, if there is one, and then by what they do.
    """
    folder = shards_dir / TOKENIZER
    try:
        if manifest is not None:
            with ShardFolder(shards_dir, manifest).tokenizer():
                pass
        problem = other_tokenizer(shards_dir, plan.fingerprint)
    except DataError as error:
        if error.kind != DAMAGED:
            raise
        return in_one_line(error)
    except FileNotFoundError:
        problem = "no tokenizer can be read from it"
    return problem and f"{quoted(folder)}: {problem}"


def tokenizer_of_model(shards_dir: AnyPath, plan: Plan) -> Callable[[Path], None]:
    """What puts the files of the tokenizer of the model that was scored into an empty folder.

    Raises:
        ConfigError, DataError: It is not there.
        FingerprintError: The model has another tokenizer now.
    """
    model = find_model(latest_settings(shards_dir, lost=f"{TOKENIZER}/")["model"])
    tokenizer = load_tokenizer(model)
    if tokenizer_digest(tokenizer) != plan.fingerprint.tokenizer:
        raise FingerprintError(
            "the model's tokenizer is not the one whose ids were scored",
            where=str(model),
            why=f"it was to replace the damaged files of {TOKENIZER}/",
            fix=f"restore {TOKENIZER}/ from where the folder was copied, or the model that {COMMAND} names",
        )
    return functools.partial(put_tokenizer, model, tokenizer)


def replace_tokenizer(shards_dir: AnyPath, fill: Callable[[Path], None]) -> None:
    """Write a new copy; the old files stay until the new ones are whole."""
    folder = shards_dir / TOKENIZER
    if not isinstance(folder, Path):
        for name in file_names(folder):
            remove(folder / name)
        write_tokenizer(shards_dir, fill)
        return
    # A private name: a repair that is killed here leaves nothing that is taken for a tokenizer.
    aside = folder.with_name(f".{TOKENIZER}.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    try:
        write_tokenizer(shards_dir, fill)
    finally:
        with contextlib.suppress(FileNotFoundError):
            if not folder.exists():
                aside.rename(folder)
            elif aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink()
