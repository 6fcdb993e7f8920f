"""Which tokens of a conversation count, under every chat template that TRL ships."""

from pathlib import Path

import numpy as np
import pytest
from messages import said
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.precompute.tokens.truncation import PairIds
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

SAYS_OTHER_WORDS_LATER = ["gptoss", "phi3", "phi3_5"]
WANTS_IMAGES = {"llava_next", "llava_next_training", "idefics3", "idefics3_training"}
WANTS_IMAGES |= {"smolvlm", "smolvlm_training"}


PROMPT = [said("user", "Alpha?")]
CHOSEN = [
    said("assistant", "Beta."),
    said("user", "Gamma?"),
    said("assistant", "Delta."),
    said("user", "Zeta"),
]
REJECTED = [said("assistant", "Eta."), said("user", "Theta?"), said("assistant", "Iota.")]
PAIR = PreferencePair(0, PROMPT, CHOSEN, REJECTED, None, "data.jsonl:1")


@pytest.fixture(scope="module")
def templates(peers: None) -> dict[str, str]:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    found = {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}
    assert len(found) > 60
    return {name: text for name, text in found.items() if name not in WANTS_IMAGES}


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """A token for each byte."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def encoded(tokenizer: PreTrainedTokenizerFast) -> PairIds | DataError:
    pairs = PairTokenizer(
        tokenizer, max_length=10**6, truncation="drop", vocab_size=10**6, template_date="2026-03-31"
    )
    (found,) = pairs.encode([PAIR])
    return found


def test_turns_are_found(templates: dict[str, str]) -> None:
    for name, template in templates.items():
        tokenizer = tokenizer_of(template)
        found = encoded(tokenizer)
        assert isinstance(found, PairIds), name
        for ids, mask, wanted, unwanted in (
            (found.chosen, found.chosen_mask, ("Beta.", "Delta."), ("Gamma", "Zeta")),
            (found.rejected, found.rejected_mask, ("Eta.", "Iota."), ("Theta",)),
        ):
            assert mask is not None
            counted, others = (str(tokenizer.decode(ids[part])) for part in (mask, ~mask))
            assert all(words in counted for words in wanted), name
            assert not any(words in counted for words in unwanted), name
            assert unwanted[0] in others


@pytest.mark.parametrize("name", SAYS_OTHER_WORDS_LATER)
def test_a_turn_with_another_end_while_it_is_the_last_is_as_the_training_template_marks_it(
    name: str, templates: dict[str, str]
) -> None:
    tokenizer = tokenizer_of(templates[name])
    plain, marked = encoded(tokenizer), encoded(tokenizer_of(templates[f"{name}_training"]))
    assert isinstance(plain, PairIds)
    assert isinstance(marked, PairIds)
    assert plain.chosen.tolist() == marked.chosen.tolist()
    assert plain.chosen_mask is not None
    assert marked.chosen_mask is not None
    assert not (plain.chosen_mask & ~marked.chosen_mask).any()
    # gpt-oss marks the header that it is opened with, too.
    more = tokenizer.decode(plain.chosen[marked.chosen_mask & ~plain.chosen_mask])
    assert more == ("<|start|>assistant" if name == "gptoss" else "")


def test_a_training_templates_own_mask_is_taken(templates: dict[str, str]) -> None:
    marked = {name: text for name, text in templates.items() if name.endswith("_training")}
    assert len(marked) > 20
    for name, template in marked.items():
        tokenizer = tokenizer_of(template)
        found = encoded(tokenizer)
        assert isinstance(found, PairIds), name
        theirs = tokenizer.apply_chat_template(
            PROMPT + CHOSEN, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        start = len(found.prompt)
        mask = np.array(theirs["assistant_masks"][start:], dtype=bool)
        stop = int(np.flatnonzero(mask)[-1]) + 1
        assert theirs["input_ids"][start:][:stop] == found.chosen.tolist(), name
        assert found.chosen_mask is not None
        assert found.chosen_mask.tolist() == mask[:stop].tolist(), name
