#!/usr/bin/env bash
# Mistral-Nemo-Instruct-2407's chat template (from llama-cpp-python 0.3.36), transformers 5.19.0: the system text is
# written only where the conversation's last message is the user's.
# A good engineer would guess that a prompt rendered with its answer begins with the prompt rendered for generation,
# so that a trainer may cut the answer off behind the prompt. Here the rendered whole has no system text at all:
# the model is asked with it, and trained without it.
# Output seen:
#   prompt: <s>[INST]Speak like a pirate.\n\nWho are you?[/INST]
#   whole:  <s>[INST]Who are you?[/INST]Arr, I be Nemo.</s>
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.19.0 tokenizers==0.23.3 jinja2
cd "$work"
"$work/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz --strip-components=5 --wildcards '*/templates/mistralai-Mistral-Nemo-Instruct-2407.jinja'
"$work/venv/bin/python" - <<'PY'
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
)
tokenizer.chat_template = Path("mistralai-Mistral-Nemo-Instruct-2407.jinja").read_text(encoding="utf-8")
asked = [
    {"role": "system", "content": "Speak like a pirate."},
    {"role": "user", "content": "Who are you?"},
]
answered = [*asked, {"role": "assistant", "content": "Arr, I be Nemo."}]
prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
whole = tokenizer.apply_chat_template(answered, tokenize=False)
print("prompt:", prompt.replace("\n", "\\n"))
print("whole: ", whole.replace("\n", "\\n"))
assert "pirate" in prompt, prompt
assert "pirate" not in whole and "Arr, I be Nemo." in whole, whole
assert not whole.startswith(prompt)
PY
