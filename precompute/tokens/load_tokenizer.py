"""The tokenizer in a model folder, and how many ids the model knows."""

from pathlib import Path
from typing import TYPE_CHECKING

from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.model_config import load_model_config
from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.plain_data import json_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# What transformers reads beside tokenizer.json, keeps, and writes again with the tokenizer.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer in a model folder, without running code from it.

    Raises:
        ConfigError: There is none, it cannot be read, it is a slow one, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    fix = "put the model's own tokenizer there: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            "there is no tokenizer.json",
            where=str(folder),
            why="without it transformers builds a tokenizer with an empty vocabulary and says nothing",
            fix=fix,
        )
    try:
        for name in _SETTINGS:
            if (folder / name).is_file():
                json_of((folder / name).read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of the tokenizers library often that very class
        if (folder / "config.json").is_file():
            load_model_config(folder)  # which it reads too, and whose fault it may be
        raise ConfigError(
            f"the tokenizer cannot be loaded ({first_line(error)})", where=str(folder), fix=fix
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} is not a fast tokenizer",
            where=str(folder),
            why="a slow one has no serialization to fingerprint",
            fix="use a model whose tokenizer has a tokenizer.json that transformers loads as it is",
        )
    if tokenizer.eos_token is None:
        raise ConfigError(
            "the tokenizer has no EOS token",
            where=str(folder),
            why="a completion must end with it, or the model never learns to stop",
            fix='set "eos_token" in tokenizer_config.json',
        )
    return tokenizer


def model_vocab_size(folder: Path) -> int:
    """How many ids the model knows.

    Raises:
        ConfigError: Its config.json does not say.
    """
    config = read_config(folder)
    try:
        return int((config.get("text_config") or config)["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "config.json does not say how large the vocabulary is (vocab_size)",
            where=str(folder),
            why="ids beyond it would be scored as something else",
            fix="save the model again with save_pretrained",
        ) from error
