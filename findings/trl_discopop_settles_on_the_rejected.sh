#!/usr/bin/env bash
# TRL 1.16.0: loss_type="discopop" teaches the opposite of its pairs. Where every run begins, at a margin of 0, its loss
# rises with the margin at the defaults (slope 0.78 of beta times the log-ratios' difference, discopop_tau 0.05), so the
# first step ranks the rejected completion higher. There it stays: the loss has a minimum at a margin of -0.12, and a hill
# up to +0.07 lies between it and the side on which the chosen one wins. TRL writes the formula as the paper has it (Lu et
# al. 2024, arXiv 2406.08414, equation 5), and what comes out of that lies in the numbers. One would expect any loss of
# preferences to raise the margin of pairs that are trained on alone.
#
# A random model of one layer, 4 pairs, 60 steps; seen with torch 2.13.0 on a CPU:
#   sigmoid: margin +2.48 after 60 steps, 100% of the pairs ranked as they say
#   discopop: margin -0.12 after 60 steps, 0% of the pairs ranked as they say
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0 trl==1.16.0
TQDM_DISABLE=1 CUDA_VISIBLE_DEVICES= "$work/venv/bin/python" - <<'PY'
import copy
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

names = ["<pad>", "<eos>", *(f"n{number}" for number in range(50))]
made = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, "<pad>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
pairs = Dataset.from_list(
    [{"prompt": f"n{i} n9 ", "chosen": f"n{i + 10} n{i + 20}", "rejected": f"n{i + 30} n{i + 40}"} for i in range(4)]
)
torch.manual_seed(0)
start = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
)


def last_logged(loss_type):
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            folder, loss_type=[loss_type], learning_rate=2e-3, lr_scheduler_type="constant", max_steps=60,
            per_device_train_batch_size=4, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
            bf16=False, gradient_checkpointing=False,
        )
        trainer = DPOTrainer(
            copy.deepcopy(start), copy.deepcopy(start), args=settings, train_dataset=pairs, processing_class=tokenizer
        )
        trainer.train()
    return [line for line in trainer.state.log_history if "rewards/margins" in line][-1]


found = {}
for loss_type in ("sigmoid", "discopop"):
    line = last_logged(loss_type)
    found[loss_type] = margin, ranked = line["rewards/margins"], line["rewards/accuracies"]
    print(f"{loss_type}: margin {margin:+.2f} after 60 steps, {ranked:.0%} of the pairs ranked as they say")
assert found["sigmoid"][0] > 0.5 and found["sigmoid"][1] == 1, "the pairs cannot be learned"
assert abs(found["discopop"][0] + 0.1186) < 0.02 and found["discopop"][1] == 0, "the behaviour has changed"
PY
