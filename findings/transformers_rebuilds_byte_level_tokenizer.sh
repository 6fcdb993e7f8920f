#!/usr/bin/env bash
# transformers 5.19.0, tokenizers 0.23.3: a folder whose tokenizer.json is byte-level, and whose tokenizer_config.json says
# "LlamaTokenizerFast" (published models do), is loaded with another pre-tokenizer than tokenizer.json states.
# A good engineer would guess that AutoTokenizer takes tokenizer.json as it is. It gives ids without the spaces,
# and says nothing; what it saves again is the rebuilt one.
# Output seen:
#   tokenizer.json: ['Two', 'Ġwords', 'Ġhere']
#   AutoTokenizer:  ['Two', 'wo', 'rds', 'her', 'e']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.19.0 tokenizers==0.23.3
cd "$work"
"$work/venv/bin/python" - <<'PY'
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

text = "Two words here"
made = Tokenizer(models.BPE())
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=400
)
made.train_from_iterator([text] * 50, trainer)
folder = Path("model")
folder.mkdir()
made.save(str(folder / "tokenizer.json"))
settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))

stated = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens
loaded = AutoTokenizer.from_pretrained(folder)
given = loaded.convert_ids_to_tokens(loaded(text, add_special_tokens=False)["input_ids"])
print("tokenizer.json:", stated)
print("AutoTokenizer: ", given)
assert stated == ["Two", "Ġwords", "Ġhere"], stated
assert given != stated and not any("Ġ" in token for token in given), given
PY
