#!/usr/bin/env bash
# torch 2.13.0: a module whose two layers share one parameter keeps that tie when it moves to another real device or dtype,
# but not when it moves to the device "meta" or is made there and given memory by `to_empty`: each layer gets a parameter
# of its own. A language model with tied embeddings that is laid out on "meta" before its weights are read then trains an
# output layer that no longer follows the embedding. Loading by `load_state_dict` does not tell: both names are in the state
# dict, and both get the right values. Only the number of parameters shows it.
#
# Seen on a CPU, for an embedding and an output layer that share their weight:
#   made: 1 parameter, 40 numbers
#   to(torch.float64): 1 parameter, 40 numbers
#   to_empty from the CPU to the CPU: 1 parameter, 40 numbers
#   to("meta"): 2 parameters, 80 numbers
#   made on "meta": 1 parameter, 40 numbers
#   made on "meta", to_empty, load_state_dict without a missing name: 2 parameters, 80 numbers
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PY'
import torch
from torch import nn


def tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "output": nn.Linear(4, 10, bias=False)})
    model.output.weight = model.embedding.weight
    return model


def count(what, model):
    parameters = list(model.parameters())
    numbers = sum(parameter.numel() for parameter in parameters)
    print(f"{what}: {len(parameters)} parameter{'s' * (len(parameters) > 1)}, {numbers} numbers")
    return len(parameters)


assert count("made", tied()) == 1
assert count("to(torch.float64)", tied().to(torch.float64)) == 1
assert count("to_empty from the CPU to the CPU", tied().to_empty(device="cpu")) == 1
assert count('to("meta")', tied().to("meta")) == 2
with torch.device("meta"):
    model = tied()
assert count('made on "meta"', model) == 1
weights = tied().state_dict()
model.to_empty(device="cpu").load_state_dict(weights, strict=True)
assert torch.equal(model.output.weight, weights["embedding.weight"])
assert count('made on "meta", to_empty, load_state_dict without a missing name', model) == 2
PY
