"""Which files of a folder are its tokenizer's, and copies of them, byte for byte.

Saved anew by a library, a tokenizer would be that library's reading of it: another class, other settings.
What trains, serves and shows text later would then depend on the version that once read it.
"""

import shutil
from pathlib import Path

from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.locations import is_plain_name

CONFIG = "config.json"
"""Stands beside a tokenizer in a folder of shards where transformers makes another one of it without."""

# What transformers 5.19 reads or keeps beside a tokenizer.json. Names under which weights, configurations and
# code stand are not among them.
_PATTERNS = (
    "tokenizer.json",
    "tokenizer.*.json",  # by version of transformers (fast_tokenizer_files)
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "tekken.json",
    "*.model",  # SentencePiece, tiktoken
    "tokenizer.model.*",
    "*.spm",
    "*.tiktoken",
)


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer's files in a folder, relative to it, in order.

    Links are followed, as transformers follows them: the Hub's cache has nothing else. What is no file, such
    as a pipe, is left out.

    Raises:
        ConfigError: A name cannot stand in a folder of shards.
    """
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(found):
        if not is_plain_name(path.name):
            raise ConfigError(
                f"a file of the tokenizer is called {quoted(path.name)}",
                where=quoted(path.parent),
                why="shards are read on other systems too, where that is no name of a file",
                fix="give it a name without backslash and colon, in UTF-8, in a copy of the folder",
            )
    return sorted(path.relative_to(folder).as_posix() for path in found)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files into another folder, without their modes: the source may be read-only.

    Raises:
        ConfigError: As ``tokenizer_files``.
    """
    for name in tokenizer_files(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
