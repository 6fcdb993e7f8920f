"""The tokenizer in a model folder, and how many ids the model knows."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.model_config import load_model_config
from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.tokenizer_files import copy_tokenizer, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE = (
    "Where is the town?\n\n  It is in\tEurope, 1234567 km away.\r\nÉté, naïve; 中文。 Ωμέγα 🙂\n"
    "def f(x):\n        return {'a': x**2}  # don't\n<think>\n</think> \n"
    # Accents apart, forms that normalizers replace, characters without a width, control characters.
    "Cafe\u0301, E\u0301te\u0301\nनमस्ते\nＡＢＣ ﬁ ½ ² ३४\n"
    "a\u00a0b\u3000c\na\u200bb\ufeffc\u00add\na\x07b\x00c\nDON'T\n▁a ▁"
)
"""A text on which tokenizers that divide or normalize text differently give different ids."""


# What transformers reads beside tokenizer.json, keeps, and writes again with the tokenizer.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path, *, needs_eos: bool = True) -> "PreTrainedTokenizerFast":
    """The fast tokenizer in a model folder, without running code from it.

    Args:
        folder: The model folder.
        needs_eos: The model writes, and must know how to stop. One that reads alone need not.

    Raises:
        ConfigError: There is none, it cannot be read, it is a slow one, it lacks an EOS token that it needs,
            a file of it cannot stand in a folder of shards, or transformers makes another tokenizer of the
            files than tokenizer.json is.
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
    except Exception as error:  # the tokenizers library often raises plain Exception
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
    if needs_eos and not tokenizer.eos_token:
        raise ConfigError(
            "the tokenizer has no EOS token",
            where=str(folder),
            why="a completion must end with it, or the model never learns to stop",
            fix='set "eos_token" in tokenizer_config.json',
        )
    _refuse_other_ids(tokenizer, folder)
    return tokenizer


def _refuse_other_ids(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Refuse a tokenizer that transformers rebuilt as a class of its own choice, with other ids.

    Raises:
        ConfigError: The ids of a text differ from those of tokenizer.json, or those that are added to it do.
    """
    found = _difference(tokenizer, folder)
    if found is None:
        return
    why, fix = _cause(found, tokenizer, folder)
    raise ConfigError(
        f"transformers loads another tokenizer than tokenizer.json is: of {found.text[:40]!r} "
        f"it gives {found.loaded[:_SHOWN]}, tokenizer.json {found.own[:_SHOWN]}",
        where=str(folder),
        why=why,
        fix=fix,
    )


def _cause(found: "_Difference", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> tuple[str, str]:
    """Why the ids differ, and what makes them equal."""
    if tokenizer.split_special_tokens:
        return (
            'tokenizer_config.json has "split_special_tokens": true, so the text of a special token becomes '
            "several ids: the borders of turns and the end of a completion would not be the model's",
            'set "split_special_tokens" to false in tokenizer_config.json of a copy of the folder',
        )
    if found.token is not None and _is_named(found.token, folder):
        return _cause_in_settings(found, found.token, tokenizer)
    return (
        f"tokenizer_config.json declares {declared_class(folder) or 'no class'}, as which transformers "
        f"rebuilt it as {type(tokenizer).__name__}; the model was trained on one of the two",
        'set "tokenizer_class" to "PreTrainedTokenizerFast" in tokenizer_config.json of a copy '
        "of the folder, which makes it tokenizer.json"
        if _is_taken_if_declared(folder)
        else "transformers chooses that class by the model's type, so only what it makes can be used, where "
        "the model was trained on that: AutoTokenizer.from_pretrained(COPY).save_pretrained(COPY) in a "
        "copy of the folder, then pass COPY",
    )


def _cause_in_settings(
    found: "_Difference", token: str, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[str, str]:
    """As ``_cause``, where the settings name a token that tokenizer.json has otherwise or not at all."""
    if found.flags:
        own = ", ".join(f"{name} {str(value).lower()}" for name, value in found.flags.items())
        return (
            f"the settings beside tokenizer.json say otherwise than that file where {token!r} is a token: "
            f"that file has {own}",
            f"set {own} for {token!r} in a copy of the folder wherever tokenizer_config.json and "
            "special_tokens_map.json have it",
        )
    key = next((key for key, named in tokenizer.special_tokens_map.items() if named == token), None)
    return (
        f"the settings beside tokenizer.json make {token!r} a token of its own"
        f"{f' ({key})' if key else ''}, as which that file does not have it; texts are divided around it",
        f'set "{key}" in tokenizer_config.json of a copy of the folder to the model\'s own: one of '
        f"{', '.join(map(repr, found.declared[:_SHOWN]))}"
        if key in _USUAL
        else f"take {token!r} out of the added and special tokens in a copy of the folder: in "
        f"tokenizer_config.json, special_tokens_map.json and added_tokens.json",
    )


def _is_named(token: str, folder: Path) -> bool:
    """Whether the settings beside tokenizer.json have a token's text."""
    text = json.dumps(token)[1:-1]
    files = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    return any(text in json.dumps(json_of(file.read_text(encoding="utf-8"))) for file in files)


class _Difference(NamedTuple):
    """A text, and its ids by tokenizer.json and by transformers."""

    text: str
    own: list[int]
    loaded: list[int]
    declared: list[str]
    """The special tokens of tokenizer.json, by their ids."""
    token: str | None
    """One in the text that tokenizer.json does not have, or has otherwise."""
    flags: dict[str, bool]
    """What tokenizer.json has otherwise of it."""


def _difference(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> _Difference | None:
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = tokenizer.backend_tokenizer
    if loaded.truncation or loaded.padding or tokenizer.split_special_tokens:
        # Made only then: it takes as long as loading.
        loaded = copy.deepcopy(loaded)
        # A copy forgets it, and the tokenizer's own call says it each time.
        loaded.encode_special_tokens = tokenizer.split_special_tokens
        loaded.no_truncation()
        loaded.no_padding()
    own.no_truncation()
    own.no_padding()
    tokens = own.get_added_tokens_decoder()
    declared = [token.content for _, token in sorted(tokens.items()) if token.special]
    odd = _odd_tokens(tokenizer, own, loaded)
    # Each by itself, so that what differs is shown short.
    texts = [*_PROBE.splitlines(keepends=True), _PROBE, *(f"a {token} b" for token in declared[:_SPECIAL])]
    for token in odd:
        texts += (f"a {token} b", f"a{token}b", f"a  {token}  b", f"{token.lower()} {token.upper()} {token}")
    for text in texts:
        ids = own.encode(text).ids, loaded.encode(text).ids
        if ids[0] != ids[1]:
            name = next((token for token in odd if token in text), None)
            return _Difference(text, *ids, declared, name, odd.get(name or "", {}))
    return None


# Those that every tokenizer may have; settings name others too (image_token).
_USUAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def _odd_tokens(tokenizer: "PreTrainedTokenizerFast", own: Any, loaded: Any) -> dict[str, dict[str, bool]]:
    """The added tokens that tokenizer.json has otherwise or not at all, with what it has otherwise of them.

    Whether a token is special changes no id. Many folders name a padding or another usual token in brackets
    that their tokenizer.json does not have, which no text is about; it is left out.
    """
    ours = {token.content: token for token in own.get_added_tokens_decoder().values()}
    named = tokenizer.special_tokens_map
    usual = {named.get(key) for key in _USUAL}
    found: dict[str, dict[str, bool]] = {}
    for token in loaded.get_added_tokens_decoder().values():
        text = token.content
        if text not in ours:
            bare = text[:1].isalnum() or text[-1:].isalnum() or text != text.strip()
            if bare or text not in usual:
                found[text] = {}
        elif flags := {
            name: getattr(ours[text], name)
            for name in _FLAGS
            if getattr(ours[text], name) != getattr(token, name)
        }:
            found[text] = flags
    return dict(sorted(found.items()))


def _is_taken_if_declared(folder: Path) -> bool:
    """Whether transformers takes tokenizer.json as it is, once the settings declare the class for that."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="dpo-opt-") as place:
        copied = Path(place)
        copy_tokenizer(folder, copied)
        if (folder / "config.json").is_file():
            shutil.copyfile(folder / "config.json", copied / "config.json")
        settings = copied / "tokenizer_config.json"
        said = json_of(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        settings.write_text(json.dumps({**said, "tokenizer_class": "PreTrainedTokenizerFast"}))
        again = AutoTokenizer.from_pretrained(copied, trust_remote_code=False, local_files_only=True)
        return _difference(again, copied) is None


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
