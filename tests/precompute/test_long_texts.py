"""A text that is encoded in windows has the ids of the whole text, whatever tokenizer and text."""

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_opt.precompute.tokens import long_texts, tokenize
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

WORDS = (
    "the wing and other thing, singing! don't I'LL 1,000.5 x_y e\u0301t\u00e9 "
    "नमस्ते 我们的世界。很大，人民 </s><s>"
)
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# Digits in threes from the end of their run.
DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"


def strange_text(characters: int, seed: int) -> str:
    """Words of several scripts, special tokens, and long runs of one kind of character."""
    draw = random.Random(seed)
    words = WORDS.split(" ")
    text = ""
    while len(text) < characters:
        text += " ".join(draw.choices(words, k=draw.randrange(400)))
        run = draw.choice([" ", "\n", "a", "0123456789", "ing", "\U0001f600", "</s>", "-", "the ", "我"])
        text += run * draw.randrange(500 // len(run))
    return text


def byte_level(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


def byte_level_of_words(_: Path) -> PreTrainedTokenizerFast:
    """Words as Llama 3 and Qwen make them, digits in threes, composed letters, an end token of its own."""
    merges = [("1", "1"), ("11", "1"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g")]
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in (DIGITS, PATTERN)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def one_word(_: Path) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: no words, tokens across spaces, bytes for what is unknown."""
    merges = [
        "t h",
        "th e",
        "i n",
        "in g",
        "▁ th",
        "▁ the",
        "▁ ▁",
        "▁▁ ▁▁",
        "a a",
        "aa aa",
        "▁ a",
        "▁the ▁the",
    ]
    pieces = dict.fromkeys(["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"])
    pieces |= dict.fromkeys("abcdefghijklmnopqrstuvwxyz") | dict.fromkeys(
        merge.replace(" ", "") for merge in merges
    )
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[(left, right) for left, right in map(str.split, merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>", "<unk>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def whole_words(_: Path) -> PreTrainedTokenizerFast:
    """No byte pairs: such a text is encoded as one, because nothing is known of its joints."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "the", "wing", "and", ","])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(
    params=[byte_level, byte_level_of_words, one_word, whole_words], ids=lambda make: make.__name__
)
def tokenizer(request: pytest.FixtureRequest, tiny_model: Path) -> PreTrainedTokenizerFast:
    made: PreTrainedTokenizerFast = request.param(tiny_model)
    return made


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a few thousand characters count as long, and have dozens of joints."""
    monkeypatch.setattr(tokenize, "_CHARACTERS_AT_ONCE", 2000)
    for name, value in (("_WINDOW", 1200), ("_OVERLAP", 600), ("_AGREED", 64)):
        monkeypatch.setattr(long_texts, name, value)


def encoded(tokenizer: PreTrainedTokenizerFast, text: str) -> PairIds | DataError:
    pairs = PairTokenizer(tokenizer, max_length=99, truncation="drop", vocab_size=10**6)
    (found,) = pairs.encode([PreferencePair(0, text, " yes", " no", None, "data.jsonl:1")])
    return found


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("seed", range(3))
def test_a_text_in_windows_has_the_ids_of_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    text = strange_text(40_000, seed)
    found = encoded(tokenizer, text)
    assert isinstance(found, PairIds)
    expected = tokenizer(text + " yes" + tokenizer.eos_token)["input_ids"]
    assert [*found.prompt.tolist(), *found.chosen.tolist()] == expected


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("text", ["Now," + " the" * 3001, "a" * 9001, " " * 9001, "1" * 9001, "我们" * 4001])
def test_a_text_whose_windows_do_not_agree_is_encoded_whole(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    found = encoded(tokenizer, text)
    assert isinstance(found, PairIds)
    expected = tokenizer(text + " yes" + tokenizer.eos_token)["input_ids"]
    assert [*found.prompt.tolist(), *found.chosen.tolist()] == expected


@pytest.mark.usefixtures("small_windows")
def test_what_can_only_be_encoded_whole_is_refused_where_it_would_fill_the_memory(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_texts, "LONGEST_PIECE", 8000)
    monkeypatch.setattr(tokenize, "LONGEST_PIECE", 8000)
    found = encoded(tokenizer, "a" * 9001)
    assert isinstance(found, DataError)
    assert (found.kind, found.where) == ("indivisible_text", "data.jsonl:1")
    assert str(found.fix).startswith("pass --on-bad-row skip")
    assert isinstance(encoded(tokenizer, "a" * 7000), PairIds)
