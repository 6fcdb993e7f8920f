import datetime
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from messages import assistant, user
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from dpo_opt.precompute.config import DataConfig, Truncation
from dpo_opt.precompute.read.datasets import read_pairs
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.templates import render
from dpo_opt.precompute.tokens.texts import rendered_texts
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.precompute.tokens.truncation import DROP_REASONS, DropReason, PairIds
from dpo_opt.schemas.errors import ConfigError, DataError
from dpo_opt.schemas.pairs import PreferencePair, Text, TokenizedPair
from dpo_opt.schemas.shards import DroppedRow

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real model and the human pairs are not beside the repository"
)

BOS, EOS = 0, 1
# Every character is a token, except that "n" and "g" merge across whatever boundary lies between them.
LETTERS = "abcdefghijklmnopqrstuvwxyz .:!"
VOCABULARY = {"<s>": BOS, "</s>": EOS, **{c: i for i, c in enumerate(LETTERS, start=2)}}
VOCABULARY["ng"] = len(VOCABULARY)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{{ m['role'][0] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def make_tokenizer(*, adds_bos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[("n", "g")]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def ids_of(text: str) -> list[int]:
    """Ids by hand: one per letter, none merged."""
    return [VOCABULARY[c] for c in text]


def pair_of(prompt: Text, chosen: Text, rejected: Text) -> PreferencePair:
    return PreferencePair(3, prompt, chosen, rejected, "made", "data.jsonl:4")


def run(
    pair: PreferencePair,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int = 10_000,
    truncation: Truncation = "keep_start",
    vocab_size: int = len(VOCABULARY),
) -> TokenizedPair | DroppedRow:
    return PairTokenizer(tokenizer, max_length=max_length, truncation=truncation, vocab_size=vocab_size)(pair)


def kept(pair: PreferencePair, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> TokenizedPair:
    result = run(pair, tokenizer, **settings)
    assert isinstance(result, TokenizedPair)
    return result


def lists(pair: TokenizedPair) -> tuple[list[int], list[int], list[int]]:
    return pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()


def shared_start(a: list[int], b: list[int]) -> list[int]:
    return [x for x, _ in itertools.takewhile(lambda xy: xy[0] == xy[1], zip(a, b, strict=False))]


def test_text_becomes_bos_prompt_completion_eos() -> None:
    pair = kept(pair_of("hi", " yes", " no"), make_tokenizer())
    assert lists(pair) == ([BOS, *ids_of("hi")], [*ids_of(" yes"), EOS], [*ids_of(" no"), EOS])
    assert (pair.row, pair.source) == (3, "made")
    assert {ids.dtype for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)} == {np.dtype("int32")}
    assert not pair.chosen_truncated
    assert not pair.rejected_truncated


def test_eos_is_not_written_twice() -> None:
    tokenizer = make_tokenizer()
    with_eos = kept(pair_of("hi", " yes</s>", " no"), tokenizer)
    assert lists(with_eos) == lists(kept(pair_of("hi", " yes", " no"), tokenizer))


def test_tokens_that_merge_across_the_boundary_belong_to_the_completions() -> None:
    # "thin" + "g" reads t h i ng: no token ends where the prompt does, so both sides take the "n".
    pair = kept(pair_of("thin", "g", "k"), make_tokenizer())
    assert lists(pair) == (
        [BOS, *ids_of("thi")],
        [VOCABULARY["ng"], EOS],
        [*ids_of("nk"), EOS],
    )


def test_an_empty_prompt_is_kept_where_the_tokenizer_writes_bos() -> None:
    assert kept(pair_of("", "yes", "no"), make_tokenizer()).prompt_ids.tolist() == [BOS]


def test_messages_become_what_the_template_renders() -> None:
    tokenizer = make_tokenizer(template=TEMPLATE)
    pair = kept(pair_of([user("hi")], [assistant("yes")], [assistant("no")]), tokenizer)
    assert lists(pair) == (
        [BOS, *ids_of("u:hia:")],
        [*ids_of("yes"), EOS],
        [*ids_of("no"), EOS],
    )


def test_messages_get_the_ids_of_the_tokenizers_own_template_call() -> None:
    tokenizer = make_tokenizer(template=TEMPLATE)
    prompt = [user("sing"), assistant("la"), user("thin")]
    pair = kept(pair_of(prompt, [assistant("gnu")], [assistant("ox")]), tokenizer)

    def called(messages: list[dict[str, object]], **settings: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)[
            "input_ids"
        ]
        return ids

    prompt_ids, chosen_ids, rejected_ids = lists(pair)
    assert prompt_ids == called(prompt, add_generation_prompt=True)
    assert prompt_ids + chosen_ids == called([*prompt, assistant("gnu")])
    assert prompt_ids + rejected_ids == called([*prompt, assistant("ox")])


def test_a_generation_prompt_that_the_conversation_lacks_is_no_part_of_the_prompt() -> None:
    # Some templates open an empty thought before an answer and leave it out of a finished conversation.
    template = TEMPLATE.replace("a:{% endif %}", "a:think{% endif %}")
    pair = kept(
        pair_of([user("hi")], [assistant("yes")], [assistant("no")]), make_tokenizer(template=template)
    )
    assert pair.prompt_ids.tolist() == [BOS, *ids_of("u:hia:")]
    assert pair.chosen_ids.tolist() == [*ids_of("yes"), EOS]


DATED = "{{ strftime_now('%Y-%m-%d %H:%M') }} " + TEMPLATE
PAIR_OF_MESSAGES = pair_of([user("hi")], [assistant("yes")], [assistant("no")])


def test_a_template_that_asks_for_the_time_is_told_midnight_of_the_date() -> None:
    clock = DATED.removesuffix(TEMPLATE)
    in_a_macro = "{% macro now() %}" + clock + "{% endmacro %}{{ now() }}" + TEMPLATE
    for template in (DATED, in_a_macro, "{% if strftime_now is defined %}" + DATED + "{% endif %}"):
        texts = rendered_texts(PAIR_OF_MESSAGES, make_tokenizer(template=template), date="2026-03-31")
        assert [text[:16] for text in texts] == ["2026-03-31 00:00"] * 3


def test_without_a_date_a_template_is_told_today() -> None:
    tokenizer = make_tokenizer(template=DATED.replace(" %H:%M", ""))
    before = str(datetime.date.today())
    (text,) = render([[user("hi")]], tokenizer, where="here")
    assert before <= text[:10] <= str(datetime.date.today())
    assert text == tokenizer.apply_chat_template([user("hi")], tokenize=False, add_generation_prompt=True)


def test_a_date_that_the_row_sets_comes_first() -> None:
    template = "{{ date_string if date_string is defined else strftime_now('%d') }}" + TEMPLATE
    pair = PAIR_OF_MESSAGES._replace(chat_template_kwargs={"date_string": "long ago"})
    texts = rendered_texts(pair, make_tokenizer(template=template), date="2026-03-31")
    assert all(text.startswith("long ago") for text in texts)


@pytest.mark.parametrize(("template", "date"), [(DATED, "2026-03-31"), (TEMPLATE, None), (None, None)])
def test_a_tokenizer_knows_its_date_only_where_the_template_asks(
    template: str | None, date: str | None
) -> None:
    tokenizer = make_tokenizer(template=template)
    settings: dict[str, Any] = {"max_length": 99, "truncation": "drop", "vocab_size": len(VOCABULARY)}
    assert PairTokenizer(tokenizer, **settings, template_date="2026-03-31").template_date == date
    other = PairTokenizer(tokenizer, **settings).on("2026-03-31")
    assert (other.template_date, other.on(None).template_date) == (date, date)
    if date:
        assert PairTokenizer(tokenizer, **settings).template_date == str(datetime.date.today())


@pytest.mark.parametrize(
    "drawn",
    [
        "{{ range(1000) | random }}",
        "{{ [range(1000)] | map('random') | join }}",
        "{{ lipsum(n=1) }}",
    ],
)
def test_a_template_that_draws_at_random_gives_the_same_text_each_time(drawn: str) -> None:
    tokenizer = make_tokenizer(template=TEMPLATE.replace("{{ bos_token }}", drawn))
    random.seed(1)
    first = rendered_texts(PAIR_OF_MESSAGES, tokenizer)
    random.seed(2)
    assert rendered_texts(PAIR_OF_MESSAGES, tokenizer) == first
    assert first[1].startswith(first[0])


def test_rendering_leaves_the_programs_own_random_numbers_alone() -> None:
    tokenizer = make_tokenizer(template="{{ [1, 2] | random }}" + TEMPLATE)
    random.seed(7)
    expected = [random.random(), random.random()]
    random.seed(7)
    found = [random.random()]
    rendered_texts(PAIR_OF_MESSAGES, tokenizer)
    assert [*found, random.random()] == expected


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(ConfigError, match="no chat template") as caught:
        run(pair_of([user("hi")], [assistant("yes")], [assistant("no")]), make_tokenizer())
    assert caught.value.where == "data.jsonl:4"
    assert caught.value.fix


def test_messages_that_the_template_refuses_are_named() -> None:
    pair = pair_of([user("hi")], [user("yes")], [assistant("no")])
    with pytest.raises(DataError, match="roles must alternate") as caught:
        run(pair, make_tokenizer(template=TEMPLATE))
    assert caught.value.where == "data.jsonl:4"


def test_an_id_beyond_the_models_vocabulary_is_refused() -> None:
    pair = pair_of("thin", "g", "k")
    assert VOCABULARY["ng"] == len(VOCABULARY) - 1
    with pytest.raises(DataError, match=f"token id {VOCABULARY['ng']} is outside") as caught:
        run(pair, make_tokenizer(), vocab_size=len(VOCABULARY) - 1)
    assert caught.value.where == "data.jsonl:4"


# Lengths of PAIR by hand: prompt 1 + 4, chosen 6 + 1, rejected 2 + 1.
PAIR = pair_of("abcd", "efghij", "kl")


def test_keep_start_cuts_the_completions_end() -> None:
    pair = kept(PAIR, make_tokenizer(), max_length=9)
    assert lists(pair) == ([BOS, *ids_of("abcd")], ids_of("efgh"), [*ids_of("kl"), EOS])
    assert (pair.chosen_truncated, pair.rejected_truncated) == (True, False)
    pair = kept(PAIR, make_tokenizer(), max_length=7)
    assert lists(pair) == ([BOS, *ids_of("abcd")], ids_of("ef"), ids_of("kl"))
    assert (pair.chosen_truncated, pair.rejected_truncated) == (True, True)


def test_keep_end_takes_the_same_tokens_from_both_prompts() -> None:
    pair = kept(PAIR, make_tokenizer(), max_length=9, truncation="keep_end")
    assert lists(pair) == (ids_of("cd"), [*ids_of("efghij"), EOS], [*ids_of("kl"), EOS])
    assert (pair.chosen_truncated, pair.rejected_truncated) == (False, False)


@pytest.mark.parametrize("truncation", get_args(Truncation))
def test_a_pair_that_fits_exactly_is_left_as_it_is(truncation: Truncation) -> None:
    pair = kept(PAIR, make_tokenizer(), max_length=12, truncation=truncation)
    assert lists(pair) == lists(kept(PAIR, make_tokenizer()))


@pytest.mark.parametrize("truncation", get_args(Truncation))
def test_no_kept_sequence_is_longer_than_max_length_or_without_a_token(truncation: Truncation) -> None:
    tokenizer = make_tokenizer()
    for max_length in range(1, 14):
        result = run(PAIR, tokenizer, max_length=max_length, truncation=truncation)
        if isinstance(result, TokenizedPair):
            prompt, chosen, rejected = lists(result)
            assert min(len(prompt), len(chosen), len(rejected)) >= 1
            assert len(prompt) + max(len(chosen), len(rejected)) <= max_length
        else:
            assert max_length < 12


# A template that renders nothing after the prompt's own text leaves the completion without a token.
SILENT = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("pair", "tokenizer", "settings", "reason"),
    [
        (pair_of("", "yes", "no"), make_tokenizer(adds_bos=False), {}, "empty_prompt"),
        (pair_of("n", "g", "gg"), make_tokenizer(adds_bos=False), {}, "empty_prompt"),
        (
            pair_of([user("hi")], [assistant("")], [assistant("")]),
            make_tokenizer(template=SILENT),
            {},
            "empty_completion",
        ),
        (pair_of("hi", "yes", "yes</s>"), make_tokenizer(), {}, "identical_completions"),
        (PAIR, make_tokenizer(), {"max_length": 5}, "prompt_fills_max_length"),
        (PAIR, make_tokenizer(), {"max_length": 4}, "prompt_fills_max_length"),
        (
            PAIR,
            make_tokenizer(),
            {"max_length": 7, "truncation": "keep_end"},
            "completion_fills_max_length",
        ),
        (PAIR, make_tokenizer(), {"max_length": 11, "truncation": "drop"}, "longer_than_max_length"),
        (
            pair_of("hi", "same then a", "same then b"),
            make_tokenizer(),
            {"max_length": 8},
            "identical_after_truncation",
        ),
    ],
)
def test_a_pair_without_use_is_dropped_with_its_reason(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], reason: str
) -> None:
    assert run(pair, tokenizer, **settings) == DroppedRow(3, "made", reason, "data.jsonl:4")


def test_every_reason_is_explained() -> None:
    assert tuple(DROP_REASONS) == get_args(DropReason)


def test_a_saved_tokenizer_loads_and_gives_the_same_ids(tmp_path: Path) -> None:
    saved = make_tokenizer(template=TEMPLATE)
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for pair in (PAIR, pair_of([user("hi")], [assistant("yes")], [assistant("no")])):
        assert lists(kept(pair, loaded)) == lists(kept(pair, saved))


def test_padding_and_truncation_left_in_a_tokenizer_file_change_nothing(tmp_path: Path) -> None:
    saved = make_tokenizer()
    saved.backend_tokenizer.enable_truncation(4)
    saved.backend_tokenizer.enable_padding(length=30, pad_id=EOS, pad_token="</s>")
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 4
    assert lists(kept(PAIR, load_tokenizer(tmp_path))) == lists(kept(PAIR, make_tokenizer()))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    # transformers makes a Llama tokenizer of three tokens from this, which reads every text as nothing.
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ConfigError, match=r"no tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.exit_code == 2
    assert caught.value.fix


def test_a_damaged_tokenizer_file_is_refused(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_what_the_tokenizers_library_refuses_is_refused(tmp_path: Path) -> None:
    """By an error of no class of its own."""
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"WordPuzzle"'))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no EOS token") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.fix


@pytest.fixture(scope="module")
def stories() -> PreTrainedTokenizerFast:
    return load_tokenizer(SHARED / "models" / "stories260K")


def human_pairs(name: str, **rows: int) -> Iterator[PreferencePair]:
    return read_pairs(DataConfig(data=[str(SHARED / "pairs" / name)]), **rows)


@needs_shared
def test_real_pairs_get_the_ids_that_the_rule_says(stories: PreTrainedTokenizerFast) -> None:
    """The rule in four lines; it is also TRL's, so its ids are TRL's."""
    for pair in human_pairs("human_pairs.jsonl.gz", start=2200, stop=2500):
        prompt = stories.encode(str(pair.prompt))
        chosen = stories.encode(f"{pair.prompt}{pair.chosen}</s>")
        rejected = stories.encode(f"{pair.prompt}{pair.rejected}</s>")
        shared = min(shared_start(prompt, chosen), shared_start(prompt, rejected), key=len)
        length = len(shared)
        assert lists(kept(pair, stories, vocab_size=512)) == (shared, chosen[length:], rejected[length:])


@needs_shared
def test_transcripts_and_explicit_prompts_give_the_same_ids(stories: PreTrainedTokenizerFast) -> None:
    transcripts = {(p.prompt, p.chosen, p.rejected): p for p in human_pairs("hh_harmless_base_test.jsonl.gz")}
    compared = 0
    for pair in human_pairs("human_pairs.jsonl.gz", stop=400):
        transcript = transcripts[(pair.prompt, pair.chosen, pair.rejected)]
        ours = run(transcript, stories, max_length=512, vocab_size=512)
        other = run(pair, stories, max_length=512, vocab_size=512)
        if isinstance(other, DroppedRow):
            assert isinstance(ours, DroppedRow)
            assert ours.reason == other.reason
        else:
            assert isinstance(ours, TokenizedPair)
            assert lists(ours) == lists(other)
            assert ours.pair_id == other.pair_id
            compared += 1
    assert compared > 300


@needs_shared
@pytest.mark.parametrize(
    ("name", "truncation", "expected"),
    [
        (
            "human_pairs.jsonl.gz",
            "keep_start",
            {"whole": 2113, "cut": 744, "prompt_fills_max_length": 442, "identical_after_truncation": 3},
        ),
        ("human_pairs.jsonl.gz", "keep_end", {"whole": 2886, "completion_fills_max_length": 416}),
        ("human_pairs.jsonl.gz", "drop", {"whole": 2113, "longer_than_max_length": 1189}),
        (
            "hh_harmless_base_test.jsonl.gz",
            "keep_start",
            {"whole": 1613, "cut": 327, "prompt_fills_max_length": 370, "identical_after_truncation": 2},
        ),
    ],
)
def test_every_real_row_is_accounted_for(
    stories: PreTrainedTokenizerFast, name: str, truncation: Truncation, expected: dict[str, int]
) -> None:
    tokenizer = PairTokenizer(stories, max_length=512, truncation=truncation, vocab_size=512)
    counts: Counter[str] = Counter()
    for pair in human_pairs(name):
        result = tokenizer(pair)
        if isinstance(result, TokenizedPair):
            counts["cut" if result.chosen_truncated or result.rejected_truncated else "whole"] += 1
            longest = max(len(result.chosen_ids), len(result.rejected_ids))
            assert len(result.prompt_ids) + longest <= 512
        else:
            counts[result.reason] += 1
    assert counts == expected


MEASURE = """
import resource, sys
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.schemas.pairs import PreferencePair
from pathlib import Path

tokenizer = PairTokenizer(load_tokenizer(Path(sys.argv[1])), max_length=256, truncation="keep_start",
                          vocab_size=10**6)
rows, each = int(sys.argv[2]), int(sys.argv[3])
pairs = [PreferencePair(i, "the wing and " * (each // 13), " yes", " no", None, "here") for i in range(rows)]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
tokenizer.encode([pairs[0]._replace(prompt="hi")])
before = peak()
found = tokenizer.encode(pairs)
assert len(found) == rows and all(len(ids.prompt) > each // 10 for ids in found)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("rows", "characters", "most"),
    [pytest.param(1, 10_000_000, 400, marks=pytest.mark.slow), (1, 1_200_000, 130), (30, 100_000, 700)],
)
def test_long_rows_take_memory_for_a_part_of_their_texts(
    tiny_model: Path, rows: int, characters: int, most: int
) -> None:
    """In MiB: whole in the engine's own form, a character takes up to 300 bytes."""
    command = [sys.executable, "-c", MEASURE, str(tiny_model), str(rows), str(characters)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < most


def test_texts_get_the_same_ids_whatever_they_are_tokenized_with(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PairTokenizer(
        make_tokenizer(template=TEMPLATE), max_length=99, truncation="drop", vocab_size=len(VOCABULARY)
    )
    pairs = [pair_of("thin" * n, "g", "ok" * n) for n in range(1, 9)]
    pairs += [pair_of([user("thin")], [assistant("g" * n)], [assistant("ok")]) for n in range(1, 5)]
    alone = [tokenizer.encode([pair])[0] for pair in pairs]
    for characters in (1, 40, 2**20):
        monkeypatch.setattr("dpo_opt.precompute.tokens.tokenize._CHARACTERS_AT_ONCE", characters)
        for found, expected in zip(tokenizer.encode(pairs), alone, strict=True):
            assert isinstance(found, PairIds)
            assert isinstance(expected, PairIds)
            assert [part.tolist() for part in found[:3]] == [part.tolist() for part in expected[:3]]
