"""The files of a model's tokenizer, as a folder of shards keeps them."""

import shutil
from pathlib import Path
from typing import Any

from dpo_opt.precompute.shards.scored_tokenizer import states
from dpo_opt.precompute.tokens.load_tokenizer import declared_class, load_tokenizer
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.models import tokenizer_digest
from dpo_opt.schemas.tokenizer_files import CONFIG, copy_tokenizer

_FILE_ITSELF = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes as which transformers takes tokenizer.json as it is."""


def put_tokenizer(model: Path, tokenizer: Any, folder: Path) -> None:
    """Fill an empty folder with the files of a model's tokenizer, byte for byte.

    transformers may choose the tokenizer's class by the type of model that config.json names. Only where the
    files make another tokenizer without it, it goes with them.

    Args:
        model: Folder of the model.
        tokenizer: What was loaded from there.
        folder: To be filled.

    Raises:
        ConfigError: A file has a name that cannot stand in a folder of shards.
    """
    copy_tokenizer(model, folder)
    if not _is_made_alone(folder, tokenizer_digest(tokenizer)):
        shutil.copyfile(model / CONFIG, folder / CONFIG)


def _is_made_alone(folder: Path, digest: str) -> bool:
    # To load a large vocabulary takes seconds, to read it a tenth of that.
    if declared_class(folder) in _FILE_ITSELF and states(folder, digest):
        return True
    try:
        return tokenizer_digest(load_tokenizer(folder)) == digest
    except ConfigError:
        return False
