"""The tokenizer in a model folder, and how many ids the model knows."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_opt.precompute.tokens.special_tokens import stated_special_tokens
from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.model_config import load_model_config
from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.tokenizer_files import tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE = (
    "Where is the town?\n\n  It is in\tEurope, 1234567 km away.\r\nÉté, naïve; 中文。 Ωμέγα 🙂\n"
    "def f(x):\n        return {'a': x**2}  # don't\n<think>\n</think> "
)
"""A text on which tokenizers that divide text differently give different ids."""


# What transformers reads beside tokenizer.json, keeps, and writes again with the tokenizer.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer in a model folder, without running code from it.

    Raises:
        ConfigError: There is none, it cannot be read, it is a slow one, it has no EOS token, a file of it
            cannot stand in a folder of shards, or transformers makes another tokenizer of the files than
            tokenizer.json is.
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
    tokenizer_files(folder)
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
    _refuse_other_ids(tokenizer, folder)
    return tokenizer


def _refuse_other_ids(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Refuse a tokenizer that transformers rebuilt as the class that the folder declares, with other ids.

    Raises:
        ConfigError: The ids of a text differ from those of tokenizer.json, or those that are added to it do.
    """
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = copy.deepcopy(tokenizer.backend_tokenizer)
    for backend in (own, loaded):
        backend.no_truncation()
        backend.no_padding()
    # Each by itself, so that what differs is shown short.
    special = stated_special_tokens(folder)[:_SPECIAL]
    texts = [*_PROBE.splitlines(keepends=True), _PROBE, *(f"a {token} b" for token in special)]
    for text in texts:
        ids, other = own.encode(text).ids, loaded.encode(text).ids
        if ids != other:
            declared = declared_class(folder) or "no class"
            raise ConfigError(
                f"transformers loads another tokenizer than tokenizer.json is: of {text[:40]!r} "
                f"it gives {other[:_SHOWN]}, tokenizer.json {ids[:_SHOWN]}",
                where=str(folder),
                why=f"tokenizer_config.json declares {declared}, as which transformers rebuilt it as "
                f"{type(tokenizer).__name__}; the model was trained on one of the two",
                fix='set "tokenizer_class" to "PreTrainedTokenizerFast" in tokenizer_config.json of a copy '
                "of the folder, which makes it tokenizer.json",
            )


_SPECIAL = 32  # special tokens that are compared; some models have thousands that are alike
_SHOWN = 8  # ids in a message


def declared_class(folder: Path) -> str | None:
    """The class that a tokenizer's settings name, if they name one."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(settings.get("tokenizer_class") or "") or None


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
