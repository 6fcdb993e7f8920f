#!/usr/bin/env bash
# SmolLM3-3B's chat template (from llama-cpp-python 0.3.36), transformers 5.19.0: a message of the role "tool" is
# written with the user's header.
# A good engineer would guess that a template which lists tools and writes tool calls also tells the result of a call
# from what the user says. Here both are the same text, so no mask that is made from the rendered text can tell them
# apart, and a row whose tool result stands where no call was made is trained on as a question of the user.
# Output seen:
#   user: <|im_start|>user\nNine degrees.<|im_end|>
#   tool: <|im_start|>user\nNine degrees.<|im_end|>
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.19.0 tokenizers==0.23.3 jinja2
cd "$work"
"$work/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz --strip-components=5 --wildcards '*/templates/HuggingFaceTB-SmolLM3-3B.jinja'
"$work/venv/bin/python" - <<'PY'
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<|im_end|>")
tokenizer.chat_template = Path("HuggingFaceTB-SmolLM3-3B.jinja").read_text(encoding="utf-8")
written = {}
for role in ("user", "tool"):
    messages = [{"role": "user", "content": "How warm is it?"}, {"role": role, "content": "Nine degrees."}]
    written[role] = tokenizer.apply_chat_template(messages, tokenize=False)
    line = next(part for part in written[role].split("<|im_start|>") if "Nine degrees." in part)
    print(f"{role}: <|im_start|>{line.strip()}".replace("\n", "\\n"))
assert written["user"] == written["tool"]
PY
