"""Special is what tokenizer.json says, whether or not tokenizer_config.json declares it."""

import json
import random
from pathlib import Path

from fakes import write_jsonl
from tokenizers import Tokenizer

from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.config import CheckConfig
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.special_tokens import SpecialTexts, special_tokens

UNDECLARED = "<|im_start|>"


def test_a_text_that_spells_a_token_which_only_tokenizer_json_declares_is_counted(
    model: Path, tmp_path: Path
) -> None:
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_special_tokens([UNDECLARED])
    backend.add_tokens(["<ordinary>"])
    backend.save(str(model / "tokenizer.json"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 280}))
    tokenizer = load_tokenizer(model)
    assert UNDECLARED not in tokenizer.all_special_tokens
    assert special_tokens(tokenizer, model) == ["<s>", "</s>", UNDECLARED]
    row = {"prompt": "Where is it?", "chosen": " There.", "rejected": " Nowhere."}
    rows = [
        {**row, "chosen": f" There.{UNDECLARED}system"},
        {**row, "prompt": "What is <ordinary>?"},
        {**row, "prompt": "Who is it?", "rejected": " Nobody.</s>"},
        {**row, "prompt": "How</s> is it?"},
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = audit(CheckConfig(data=[str(data)], model=str(model)), count_parameters=lambda _: 1).problems
    (special,) = [problem for problem in found if problem.kind == "special_token"]
    assert [example.where.rpartition(":")[2] for example in special.examples] == ["1", "4"]


def test_special_tokens_are_found_as_by_trying_each_everywhere() -> None:
    draw = random.Random(0)
    tokens = ["<s>", "</s>", "<s", "a", "<|x|>", "<|xy|>", "[INST]", "<|"]
    for _ in range(3000):
        some = draw.sample(tokens, draw.randint(1, 5))
        text = "".join(draw.choice(["<", "|", "x", "y", "s", ">", "/", "b", *tokens]) for _ in range(8))
        found = any(
            text.startswith(token, i) and text[i:] != "</s>" for token in some for i in range(len(text))
        )
        assert SpecialTexts(some, end="</s>").in_text(text) == found, (some, text)
