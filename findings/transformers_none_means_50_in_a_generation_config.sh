#!/usr/bin/env bash
# transformers 5.19.0: `top_k=None` has two meanings. As an argument of generate() it switches top-k off. In a
# GenerationConfig, the model's or one that is passed, it is read as 50 when generate() runs (the documentation states
# this default), and the model goes on to say None. So sampling for an estimate of KL or for on-policy pairs, at
# temperature 1 by a configuration that shows no top_k, never draws from most of the vocabulary. One would expect None, where
# it is shown and where it is passed, to mean one thing; 0 switches top-k off in both places.
#
# A random model, 1,000 tokens nearly alike in probability, 3,000 draws; seen with torch 2.13.0 on a CPU:
#   model.generation_config.top_k: None
#   generate(do_sample=True): 50 different tokens
#   generate(do_sample=True, top_k=None): 945 different tokens
#   GenerationConfig(do_sample=True, top_k=None): 50 different tokens
#   GenerationConfig(do_sample=True, top_k=0): 954 different tokens
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=1000, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
).eval()
prompts = torch.full((3000, 1), 5)


def drawn(**settings):
    return len(model.generate(prompts, **settings)[:, 1].unique())


def passed(top_k):
    return GenerationConfig(do_sample=True, top_k=top_k, max_new_tokens=1, pad_token_id=0)


found = {
    "generate(do_sample=True)": drawn(do_sample=True, max_new_tokens=1),
    "generate(do_sample=True, top_k=None)": drawn(do_sample=True, max_new_tokens=1, top_k=None),
    "GenerationConfig(do_sample=True, top_k=None)": drawn(generation_config=passed(None)),
    "GenerationConfig(do_sample=True, top_k=0)": drawn(generation_config=passed(0)),
}
print("model.generation_config.top_k:", model.generation_config.top_k)
for name, tokens in found.items():
    print(f"{name}: {tokens} different tokens")
default, argument, configured, zero = found.values()
assert model.generation_config.top_k is None
assert default == configured == 50 and argument > 900 and zero > 900, "the behaviour has changed"
PY
