#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter(combination_type="linear") of two copies of one LoRA adapter with the weights 0.5 and 0.5
# is twice that adapter. It sums the As and the Bs, each times the root of its weight, and multiplies the sums, so half
# of the result is products of one adapter's A with the other's B. For two adapters that have nothing in common it is
# as far from their average as that average is from nothing. The documentation calls it a rough approximation; one would
# expect an average of equal things to be that thing, and weights that sum to 1 to keep the scale. "cat" is exact.
#
# Random adapters of rank 4 on one layer of 32 x 32; seen with torch 2.13.0 on a CPU:
#   linear, an adapter with its copy: 2.00 times the adapter
#   linear, two adapters: off by 0.99 of their average
#   cat, an adapter with its copy: 1.00 times the adapter
#   cat, two adapters: off by 0.00 of their average
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0 peft==0.21.2
"$work/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
settings = LoraConfig(target_modules=["0"], r=4, lora_alpha=4, init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(32, 32, bias=False)), settings, adapter_name="first")
for name in ("second", "copy"):
    model.add_adapter(name, settings)
layer = model.base_model.model[0]
for matrix in (layer.lora_A, layer.lora_B):
    matrix["copy"].load_state_dict(matrix["first"].state_dict())
found = {}
with torch.no_grad():
    first, second = (layer.get_delta_weight(name) for name in ("first", "second"))
    for kind in ("linear", "cat"):
        for other in ("copy", "second"):
            model.add_weighted_adapter(["first", other], [0.5, 0.5], f"{kind} {other}", combination_type=kind)
        same, mixed = (layer.get_delta_weight(f"{kind} {other}") for other in ("copy", "second"))
        average = (first + second) / 2
        scale, error = float(same.norm() / first.norm()), float((mixed - average).norm() / average.norm())
        found[kind] = scale, error
        print(f"{kind}, an adapter with its copy: {scale:.2f} times the adapter")
        print(f"{kind}, two adapters: off by {error:.2f} of their average")
assert abs(found["linear"][0] - 2) < 1e-4 and found["linear"][1] > 0.7, "the behaviour has changed"
assert abs(found["cat"][0] - 1) < 1e-4 and found["cat"][1] < 1e-4, "cat is not exact"
PY
