#!/usr/bin/env bash
# TRL 1.16.0: the loss `aot` sorts the margins of a micro-batch, not of a step. So gradient accumulation changes what is
# optimized: the same 8 pairs of one step have another loss in micro-batches of 8, 2 and 1. In micro-batches of 1 nothing
# is left to sort, and `aot` is `sigmoid`, plain DPO, without a word. Alignment by optimal transport compares two
# distributions, those of a step's margins; one would expect per_device_train_batch_size and gradient_accumulation_steps
# to trade memory for time as they do for `sigmoid`, whose loss is the same in both.
#
# A random model of one layer, against a reference with other random weights; seen with torch 2.13.0 on a CPU:
#   aot, 8 pairs a step in micro-batches of 8: 1.4938
#   aot, 8 pairs a step in micro-batches of 2: 2.2227
#   aot, 8 pairs a step in micro-batches of 1: 2.3334
#   sigmoid, 8 pairs a step in micro-batches of 8: 2.3334
#   sigmoid, 8 pairs a step in micro-batches of 1: 2.3334
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0 trl==1.16.0
TQDM_DISABLE=1 CUDA_VISIBLE_DEVICES= "$work/venv/bin/python" - <<'PY'
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)} | {"<pad>": 60, "<eos>": 61}, "w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
sizes = dict(
    vocab_size=62, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    initializer_range=0.3,
)
text = lambda first, length: " ".join(f"w{(first * 7 + 3 * i) % 60}" for i in range(length))
pairs = [{"prompt": text(n, 3) + " ", "chosen": text(n + 11, 5), "rejected": text(n + 23, 5)} for n in range(8)]


def first_loss(loss_type, per_device):
    models = []
    for seed in (1, 2):  # policy and reference differ, or every margin would be 0
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(LlamaConfig(**sizes)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            models[0], models[1], processing_class=tokenizer, train_dataset=Dataset.from_list(pairs),
            args=DPOConfig(
                folder, loss_type=[loss_type], per_device_train_batch_size=per_device,
                gradient_accumulation_steps=8 // per_device, max_steps=1, logging_steps=1, beta=0.5,
                report_to="none", use_cpu=True, save_strategy="no", bf16=False, gradient_checkpointing=False,
            ),
        )
        trainer.train()
    return next(line["loss"] for line in trainer.state.log_history if "loss" in line)


aot = {size: first_loss("aot", size) for size in (8, 2, 1)}
sigmoid = {size: first_loss("sigmoid", size) for size in (8, 1)}
for size, loss in aot.items():
    print(f"aot, 8 pairs a step in micro-batches of {size}: {loss:.4f}")
for size, loss in sigmoid.items():
    print(f"sigmoid, 8 pairs a step in micro-batches of {size}: {loss:.4f}")
assert abs(sigmoid[8] - sigmoid[1]) < 1e-4
assert abs(aot[8] - aot[1]) > 1e-2
assert abs(aot[1] - sigmoid[1]) < 1e-4
PY
