"""Inside a completion of several messages only the assistant's turns count."""

from typing import Any

import numpy as np
import pytest
from messages import assistant, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import IdArray, MaskArray, Message, PreferencePair, TokenizedPair
from dpo_opt.schemas.shards import DroppedRow

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['function'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What Qwen 3 does: an empty thought stands in the last turn alone.
THOUGHT_AT_THE_END = CHATML.replace(
    "\n{{ m['content'] }}",
    "\n{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
# And where thinking is switched off: the prompt for a turn has the thought that no earlier turn keeps.
THOUGHT_OPENED = THOUGHT_AT_THE_END.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "rain", "arguments": {"town": "Rome"}}}]


def tool(content: str) -> Message:
    return {"role": "tool", "content": content}


PROMPT = [user("Hi")]
CHOSEN = [assistant("Hello."), user("More?"), assistant("Yes, more."), user("Thanks")]
REJECTED = [assistant("Hello."), user("What?"), assistant("No.")]


def tokenizer_of(
    template: str, *, merges: list[tuple[str, str]] | None = None, trims: bool = True
) -> PreTrainedTokenizerFast:
    """A token for each byte, and for each merge; offsets leave out spaces, as those of GPT-2's kind do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *("".join(pair) for pair in merges or [])]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges or []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trims)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def pair_of(
    chosen: list[Message], rejected: list[Message], prompt: list[Message] | None = None
) -> PreferencePair:
    return PreferencePair(3, PROMPT if prompt is None else prompt, chosen, rejected, None, "data.jsonl:4")


def encoded(pair: PreferencePair, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> PairIds | DataError:
    (found,) = pairs_tokenizer(tokenizer, **settings).encode([pair])
    return found


def pairs_tokenizer(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> PairTokenizer:
    values: dict[str, Any] = {"max_length": 10**6, "truncation": "drop", "vocab_size": 10**6}
    return PairTokenizer(tokenizer, **values | settings)


def said(tokenizer: PreTrainedTokenizerFast, ids: IdArray, mask: MaskArray | None) -> list[str]:
    """The runs of tokens that count, as text."""
    counts = np.ones(len(ids), dtype=bool) if mask is None else mask
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counts.astype(int), [0]])))
    return [str(tokenizer.decode(ids[a:b])) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def counted(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerFast, **settings: Any
) -> tuple[list[str], list[str]]:
    found = encoded(pair, tokenizer, **settings)
    assert isinstance(found, PairIds), found
    return (
        said(tokenizer, found.chosen, found.chosen_mask),
        said(tokenizer, found.rejected, found.rejected_mask),
    )


@pytest.mark.parametrize(
    ("train_on", "chosen", "rejected"),
    [
        ("all", ["Hello.<|im_end|>\n", "Yes, more.<|im_end|>\n"], ["Hello.<|im_end|>\n", "No.<|im_end|>\n"]),
        ("last", ["Yes, more.<|im_end|>\n"], ["No.<|im_end|>\n"]),
        ("first-difference", ["Yes, more.<|im_end|>\n"], ["No.<|im_end|>\n"]),
    ],
)
def test_what_others_say_and_headers_are_context(
    train_on: str, chosen: list[str], rejected: list[str]
) -> None:
    pair = pair_of(CHOSEN, REJECTED)
    assert counted(pair, tokenizer_of(CHATML), train_on=train_on) == (chosen, rejected)


def test_the_first_turns_that_differ_count_and_no_later_one() -> None:
    tokenizer = tokenizer_of(CHATML)

    def turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[str], list[str]]:
        return counted(pair_of(chosen, rejected), tokenizer, train_on="first-difference")

    a, b, c = (assistant(letter) for letter in "abc")
    assert turns([a, user("x"), b, user("y"), c], [a, user("x"), c, user("y"), c]) == (
        ["b<|im_end|>\n"],
        ["c<|im_end|>\n"],
    )
    assert turns([a, user("x"), b], [c]) == (["a<|im_end|>\n"], ["c<|im_end|>\n"])
    # The result of a tool differs, and then an answer does.
    assert turns([a, tool("1"), a, b], [a, tool("2"), a, c]) == (["b<|im_end|>\n"], ["c<|im_end|>\n"])
    # A side has nothing there, or no turn differs: nothing would count.
    for chosen, rejected in (([a], [a, user("x"), b]), ([a, tool("1"), b], [a, tool("2"), b])):
        fitted = pairs_tokenizer(tokenizer, train_on="first-difference")(pair_of(chosen, rejected))
        assert isinstance(fitted, DroppedRow)
        assert fitted.reason == "empty_completion"


def test_a_tools_answers_are_context_and_calls_are_not() -> None:
    chosen = [assistant("", tool_calls=CALL), tool("wet"), assistant("Yes.")]
    rejected = [assistant("Sure.", tool_calls=CALL), tool("dry"), assistant("No.")]
    call = '{"name": "rain", "arguments": {"town": "Rome"}}<|im_end|>\n'
    assert counted(pair_of(chosen, rejected), tokenizer_of(CHATML)) == (
        [call, "Yes.<|im_end|>\n"],
        ["Sure." + call, "No.<|im_end|>\n"],
    )


def test_the_header_between_two_turns_of_the_assistant_is_context() -> None:
    pair = pair_of([assistant("a"), assistant("b")], [assistant("c")])
    assert counted(pair, tokenizer_of(CHATML)) == (["a<|im_end|>\n", "b<|im_end|>\n"], ["c<|im_end|>\n"])


@pytest.mark.parametrize("train_on", ["all", "last", "first-difference"])
@pytest.mark.parametrize("template", [CHATML, THOUGHT_AT_THE_END, THOUGHT_OPENED, MARKED])
def test_a_completion_of_one_turn_has_no_mask(template: str, train_on: str) -> None:
    found = encoded(pair_of([assistant("a")], [assistant("b")]), tokenizer_of(template), train_on=train_on)
    assert isinstance(found, PairIds)
    assert (found.chosen_mask, found.rejected_mask) == (None, None)


def test_what_follows_the_last_turn_is_left_out() -> None:
    tokenizer = tokenizer_of(CHATML)
    found = encoded(pair_of([assistant("a"), user("Thanks")], [assistant("b"), user("Hm")]), tokenizer)
    alone = encoded(pair_of([assistant("a")], [assistant("b")]), tokenizer)
    assert isinstance(found, PairIds)
    assert isinstance(alone, PairIds)
    assert found.chosen.tolist() == alone.chosen.tolist()
    assert (found.chosen_mask, found.rejected_mask) == (None, None)
    # Sides that differ there alone prefer nothing.
    same = pair_of([assistant("a"), user("Thanks")], [assistant("a"), user("Hm")])
    fitted = pairs_tokenizer(tokenizer)(same)
    assert isinstance(fitted, DroppedRow)
    assert fitted.reason == "identical_completions"


@pytest.mark.parametrize("template", [THOUGHT_AT_THE_END, THOUGHT_OPENED])
def test_a_thought_that_only_the_last_turn_shows_hides_no_turn(template: str) -> None:
    chosen, rejected = counted(pair_of(CHOSEN, REJECTED), tokenizer_of(template))
    assert chosen == ["Hello.<|im_end|>\n", "Yes, more.<|im_end|>\n"]
    thought = "" if template is THOUGHT_OPENED else "<think>\n\n</think>\n\n"
    assert rejected == ["Hello.<|im_end|>\n", f"{thought}No.<|im_end|>\n"]


@pytest.mark.parametrize("trims", [True, False])
def test_a_template_that_marks_what_is_generated_is_believed(trims: bool) -> None:
    tokenizer = tokenizer_of(MARKED, trims=trims)
    found = encoded(pair_of(CHOSEN, REJECTED), tokenizer)
    assert isinstance(found, PairIds)
    theirs = tokenizer.apply_chat_template(
        PROMPT + CHOSEN, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    start, stop = len(found.prompt), len(found.prompt) + len(found.chosen)
    assert theirs["input_ids"][start:stop] == found.chosen.tolist()
    assert found.chosen_mask is not None
    assert found.chosen_mask.tolist() == [bool(x) for x in theirs["assistant_masks"][start:stop]]
    assert not any(theirs["assistant_masks"][stop:])
    assert counted(pair_of(CHOSEN, REJECTED), tokenizer, train_on="last") == (
        ["Yes, more.<|im_end|>"],
        ["No.<|im_end|>"],
    )


HEADER = "<|im_start|>user\n"
# What the next user says, or the header before it, is marked with the assistant's turn or written in it.
MARKS_THE_NEXT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% if not loop.last %}" + HEADER + "{% endif %}NEXT"
    "{% endgeneration %}ELSE{% elif loop.first %}" + HEADER + "{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEXT = "{% if not loop.last %}{{ messages[loop.index]['content'] }}<|im_end|>\n{% endif %}"
EAGER = (
    "{% for m in messages %}{% if loop.first %}" + HEADER + "{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>\n" + HEADER + "{% else %}"
    "{{ m['content'] }}<|im_end|>\n<|im_start|>assistant\n{% endif %}{% endfor %}"
)
REPEATS = MARKED.replace("{% generation %}", "{% generation %}{{ messages[loop.index0 - 1]['content'] }} ")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (MARKS_THE_NEXT.replace("NEXT", NEXT).replace("ELSE", ""), "behind a turn, where more follows"),
        (MARKS_THE_NEXT.replace("NEXT", "").replace("ELSE", NEXT), "behind a turn, where more follows"),
        (REPEATS, 'marks the words of message 1, of the role "user"'),
        (EAGER, "the next user's header, into the turn"),
        (
            EAGER.replace(
                "{{ m['content'] }}<|im_end|>\n" + HEADER,
                "{% generation %}{{ m['content'] }}<|im_end|>\n" + HEADER + "{% endgeneration %}",
            ),
            "the next user's header, into the turn",
        ),
    ],
)
def test_a_turn_that_holds_anothers_words_or_header_is_refused(template: str, says: str) -> None:
    found = encoded(pair_of(CHOSEN[:3], REJECTED), tokenizer_of(template))
    assert isinstance(found, DataError)
    assert found.kind == "turns"
    assert says in found.what


def test_a_turn_may_say_what_another_said() -> None:
    chosen = [assistant("Hi"), user("Hi"), assistant("Hi, More? Hi")]
    turns, _ = counted(pair_of(chosen, REJECTED), tokenizer_of(MARKED))
    assert turns == ["Hi<|im_end|>", "Hi, More? Hi<|im_end|>"]


LAST_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("train_on", ["all", "last", "first-difference"])
def test_a_template_that_marks_the_last_turn_alone_is_not_one_that_marks_each(
    train_on: str,
) -> None:
    differs_first = [assistant("Aha."), *REJECTED[1:]]
    found = encoded(pair_of(CHOSEN, differs_first), tokenizer_of(LAST_MARKED), train_on=train_on)
    assert isinstance(found, DataError)
    assert found.kind == "turns"
    assert "generation" in found.what


BARE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{{ m['content'] }}|"
    "{% else %}U:{{ m['content'] }}|{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
REWRITES = BARE.replace("A:{{ m['content'] }}", "A:{{ (m['content'] ~ '!') if loop.last else m['content'] }}")
# No user may speak twice, so that nothing shows where a turn ends before another.
REWRITES_IN_TURN = (
    "{% for m in messages %}{% if not loop.first and m['role'] == loop.previtem['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + REWRITES
)
REFUSES_PARTS = "{% if messages | length == 4 %}{{ raise_exception('too short') }}{% endif %}" + BARE


@pytest.mark.parametrize(
    ("template", "merges", "chosen", "says"),
    [
        (REWRITES_IN_TURN, [], None, "renders the conversation's beginning differently when more follows"),
        (BARE, [(":", "Y")], None, "the token ':Y' belongs to two turns"),
        (BARE, [("|", "U")], None, "the token '|U' belongs to two turns"),
        (REFUSES_PARTS, [], None, "of a part of the conversation alone, the chat template refuses"),
        (
            "{% set roles = ['user', 'narrator'] %}" + CHATML,
            [],
            [assistant("a"), {"role": "narrator", "content": "b"}, assistant("c")],
            '"narrator"',
        ),
    ],
)
def test_turns_that_cannot_be_told_apart_are_refused_with_the_way_out(
    template: str, merges: list[tuple[str, str]], chosen: list[Message] | None, says: str
) -> None:
    tokenizer = tokenizer_of(template, merges=merges)
    found = encoded(pair_of(chosen or CHOSEN, [assistant("a")]), tokenizer)
    assert isinstance(found, DataError)
    assert says in found.what
    assert (found.kind, found.where) == ("turns", "data.jsonl:4")
    assert found.fix is not None
    assert "first answer that differs" in found.fix
    # Which is what helps: of the conversations up to there no turn has to be found.
    assert isinstance(encoded(pair_of([assistant("Yes")], [assistant("No")]), tokenizer), PairIds)


@pytest.mark.parametrize("expression", ["1 // 0", "range(10 ** 6) | list", "('x' * 3)[9].y", "{}['x'].y"])
def test_whatever_stops_a_template_is_an_error_of_the_row(expression: str) -> None:
    template = CHATML + "{{ " + expression + " }}"
    found = encoded(pair_of([assistant("Yes")], [assistant("No")]), tokenizer_of(template))
    assert isinstance(found, DataError)
    assert found.kind == "template"


OTHER_END = CHATML.replace(
    "<|im_end|>\n{% endfor",
    "{{ '</think>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}{% endfor",
)
# The end of the conversation and all headers begin with the same sign, and with other tokens.
END_OF_ALL = CHATML.replace("{% if add", "{% if not add_generation_prompt %}<think>{% endif %}{% if add")


@pytest.mark.parametrize(
    ("template", "end", "last"),
    [
        (OTHER_END, "<|im_end|>", "</think>"),
        (END_OF_ALL, "<|im_end|>\n", "<|im_end|>\n<think>"),
        (REWRITES, "|", "!|"),
    ],
)
def test_a_turn_that_ends_otherwise_while_it_is_the_last_is_found(template: str, end: str, last: str) -> None:
    chosen, rejected = counted(pair_of(CHOSEN, REJECTED), tokenizer_of(template))
    assert chosen == ["Hello." + end, "Yes, more." + end]
    assert rejected == ["Hello." + end, "No." + last]
    # The same with a tool's answer behind the turn.
    calls = [assistant("", tool_calls=CALL), tool("wet"), assistant("Yes.")]
    if template is not REWRITES:
        call = '{"name": "rain", "arguments": {"town": "Rome"}}'
        found, _ = counted(pair_of(calls, [assistant("No.")]), tokenizer_of(template))
        assert found == [call + end, "Yes." + last]


def test_masks_are_cut_with_the_ids() -> None:
    tokenizer = tokenizer_of(CHATML)
    whole = encoded(pair_of(CHOSEN, REJECTED), tokenizer)
    assert isinstance(whole, PairIds)
    assert whole.chosen_mask is not None
    room = len(whole.prompt)
    for length in range(1, len(whole.chosen) + 1):
        settings = {"max_length": room + length, "truncation": "keep_start"}
        fitted = pairs_tokenizer(tokenizer, **settings).fit(pair_of(CHOSEN, REJECTED), whole)
        if isinstance(fitted, DroppedRow):
            assert fitted.reason == "identical_after_truncation"
            continue
        counting = np.flatnonzero(whole.chosen_mask[:length])
        assert fitted.chosen_ids.tolist() == whole.chosen[: counting[-1] + 1].tolist()
        mask = np.ones(len(fitted.chosen_ids), bool) if fitted.chosen_mask is None else fitted.chosen_mask
        assert mask.tolist() == whole.chosen_mask[: counting[-1] + 1].tolist()
        assert fitted.chosen_truncated == (len(fitted.chosen_ids) < len(whole.chosen))
        assert fitted.chosen_counted == len(counting)


def test_a_pair_whose_turns_are_cut_off_is_left_out() -> None:
    tokenizer = tokenizer_of(CHATML)
    fitted = pairs_tokenizer(tokenizer, max_length=60, truncation="keep_start", train_on="last")(
        pair_of(
            [assistant("a" * 60), user("x"), assistant("b")], [assistant("c" * 60), user("x"), assistant("b")]
        )
    )
    assert isinstance(fitted, DroppedRow)
    assert fitted.reason == "nothing_counts_after_truncation"


def test_keep_end_leaves_masks_as_they_are() -> None:
    tokenizer = tokenizer_of(CHATML)
    whole = encoded(pair_of(CHOSEN, REJECTED), tokenizer)
    assert isinstance(whole, PairIds)
    length = len(whole.chosen) + 3
    fitted = pairs_tokenizer(tokenizer, max_length=length, truncation="keep_end")(pair_of(CHOSEN, REJECTED))
    assert isinstance(fitted, TokenizedPair)
    assert (len(fitted.prompt_ids), fitted.chosen_ids.tolist()) == (3, whole.chosen.tolist())
    assert fitted.chosen_mask is not None
    assert whole.chosen_mask is not None
    assert fitted.chosen_mask.tolist() == whole.chosen_mask.tolist()
