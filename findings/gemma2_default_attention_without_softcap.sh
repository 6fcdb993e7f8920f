#!/usr/bin/env bash
# transformers 5.19.0: Gemma 2's soft-capping of attention scores (attn_logit_softcapping, 50 in the released
# models) is left out by the attention that the model loads with by default, sdpa, and nothing is said. The eager
# attention applies it. One would expect a default to compute what the configuration says, or a warning.
#
# Random weights, a cap of 1 so that it shows on them; seen with torch 2.13.0 on a CPU:
#   default attention: sdpa
#   sdpa, capped against not capped: 0.0
#   eager, capped against not capped: 2.2
#   sdpa against eager: 2.2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

sizes = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=64,
)
ids = torch.randint(3, 100, (1, 32), generator=torch.Generator().manual_seed(0))


def logits(cap, attention=None):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_logit_softcapping=cap)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    if attention:
        model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(ids, use_cache=False).logits, model.config._attn_implementation


capped, default = logits(1.0)
sdpa = float((capped - logits(1e9)[0]).abs().max())
eager = float((logits(1.0, "eager")[0] - logits(1e9, "eager")[0]).abs().max())
apart = float((capped - logits(1.0, "eager")[0]).abs().max())
print("default attention:", default)
print(f"sdpa, capped against not capped: {sdpa:.1f}")
print(f"eager, capped against not capped: {eager:.1f}")
print(f"sdpa against eager: {apart:.1f}")
assert default == "sdpa" and sdpa == 0 and eager > 0.5 and apart > 0.5, "the behaviour has changed"
PY
