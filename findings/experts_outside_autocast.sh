#!/usr/bin/env bash
# transformers 5.19.0: torch.autocast(dtype=bfloat16) does not reach the experts of a mixture-of-experts model with
# fp32 weights. transformers computes them by default with torch's grouped_mm, which autocast does not know: the linear
# layers around them compute in bf16, and the experts, most of the model's products, in fp32. The "eager" experts of the
# same layer do compute in bf16, so the two implementations differ in precision (and fp32 products are the slower ones
# on a GPU). One would expect autocast to reach whatever multiplies matrices, or both implementations to agree.
#
# One layer with random weights; seen with torch 2.13.0 on a CPU:
#   default experts: grouped_mm
#   q_proj under autocast: torch.bfloat16
#   grouped_mm, autocast against fp32: 0.0
#   eager, autocast against fp32: 4.0e-03 of the largest
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.manual_seed(0)
model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )
).float().eval()
layer = model.model.layers[0]
for parameter in layer.mlp.parameters():
    torch.nn.init.normal_(parameter, std=0.15)
default = model.config._experts_implementation
print("default experts:", default)

states = torch.randn(32, 64)
chosen = torch.randint(0, 4, (32, 2))
weights = torch.full((32, 2), 0.5)


def experts(implementation, mixed):
    model.set_experts_implementation(implementation)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        return layer.mlp.experts(states, chosen, weights).float()


def loss_of_precision(implementation):
    exact = experts(implementation, False)
    return float((experts(implementation, True) - exact).abs().max() / exact.abs().max())


with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
    dense = layer.self_attn.q_proj(states).dtype
print("q_proj under autocast:", dense)
grouped, eager = loss_of_precision("grouped_mm"), loss_of_precision("eager")
print("grouped_mm, autocast against fp32:", grouped)
print(f"eager, autocast against fp32: {eager:.1e} of the largest")
assert default == "grouped_mm"
assert dense == torch.bfloat16
assert grouped == 0.0
assert eager > 1e-4
PY
