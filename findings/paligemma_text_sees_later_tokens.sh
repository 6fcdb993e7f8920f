#!/usr/bin/env bash
# transformers 5.19.0: PaliGemma given text alone (no image, no token_type_ids) has two meanings. With the eager
# attention a token sees what stands before it; with sdpa, the default, it sees later tokens as well, because no
# mask is made for a plain causal text and the kernel asks the layer, which says that it is not causal. One would
# expect an attention implementation to change speed and rounding only.
#
# Random weights, the last of 24 tokens changed; seen with torch 2.13.0 on a CPU:
#   eager: logits of earlier tokens change by 0.0
#   sdpa: logits of earlier tokens change by 0.9
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

text = dict(
    model_type="gemma", vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0,
)
vision = dict(
    model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, image_size=28, patch_size=14,
)
torch.manual_seed(0)
config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=99, projection_dim=64)
model = PaliGemmaForConditionalGeneration(config).eval()
for parameter in model.parameters():
    if parameter.ndim >= 2:
        torch.nn.init.normal_(parameter, std=0.15)
ids = torch.randint(3, 90, (1, 24))
other = ids.clone()
other[0, -1] = 3 + (ids[0, -1] - 2) % 80
found = {}
for attention in ("eager", "sdpa"):
    model.set_attn_implementation(attention)
    with torch.no_grad():
        change = (model(input_ids=ids).logits - model(input_ids=other).logits)[0, :-1].abs().max()
    found[attention] = float(change)
    print(f"{attention}: logits of earlier tokens change by {found[attention]:.1f}")
assert found["eager"] == 0 and found["sdpa"] > 0.5, "the behaviour has changed"
PY
