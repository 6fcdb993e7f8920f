#!/usr/bin/env bash
# accelerate 1.15.0: where the micro-batches of an epoch do not divide by gradient_accumulation_steps, accumulate() makes the
# epoch's last step with those that are left, as its documentation says. backward() divides each of their losses by
# gradient_accumulation_steps all the same. So that step's gradient is not the mean over what the step holds: of 10
# micro-batches in steps of 4, it is half of it, at the full learning rate and against the same threshold for clipping. One
# would expect the step that one larger batch makes; transformers' Trainer, which is built on accelerate, makes that one
# (it divides by the number that is left).
#
# The derivative of each micro-batch's loss is 1; seen with torch 2.13.0 on a CPU:
#   step of 4 micro-batches: gradient 1.00
#   step of 4 micro-batches: gradient 1.00
#   step of 2 micro-batches: gradient 0.50
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0
"$work/venv/bin/python" - <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
layer = torch.nn.Linear(1, 1, bias=False)
layer, optimizer, batches = accelerator.prepare(
    layer, torch.optim.SGD(layer.parameters(), lr=0.1), DataLoader([torch.ones(1)] * 10, batch_size=1)
)
steps, accumulated = [], 0
for batch in batches:
    with accelerator.accumulate(layer):
        accelerator.backward(layer(batch).mean())
        accumulated += 1
        if accelerator.sync_gradients:
            gradient = float(layer.weight.grad)
            print(f"step of {accumulated} micro-batches: gradient {gradient:.2f}")
            steps.append((accumulated, gradient))
            accumulated = 0
        optimizer.step()
        optimizer.zero_grad()
assert steps == [(4, 1.0), (4, 1.0), (2, 0.5)], "the behaviour has changed"
PY
