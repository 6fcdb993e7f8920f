#!/usr/bin/env bash
# TRL 1.16.0: `f_alpha_divergence_coef` is one minus the alpha of f-DPO (Wang et al. 2023, arXiv 2309.16240, table 1), though
# its help describes it as that alpha ("the α-divergence u^-α regularizer"). There f'(u) = (1 - u^-alpha) / alpha: alpha near
# 0 is reverse KL, plain DPO, and alpha 1 is forward KL. In TRL the coefficient 1 is reverse KL and 0 is forward KL. At the
# default, 0.5, both readings agree, so nobody notices until a value of a paper is tried: 0.1, nearly DPO there, is nearly
# forward KL here.
#
# A random model of one layer against a reference with other random weights, one step of 4 pairs, beta 0.1; the loss of
# the formula is computed from the log-ratios. Seen with torch 2.13.0 on a CPU:
#   coefficient 0.1: TRL 2.0809, formula with alpha 0.1 0.8516, formula with alpha 0.9 2.0809
#   coefficient 0.5: TRL 0.9921, formula with alpha 0.5 0.9921, formula with alpha 0.5 0.9921
#   coefficient 0.9: TRL 0.8516, formula with alpha 0.9 2.0809, formula with alpha 0.1 0.8516
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
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

vocabulary = {f"t{i}": i for i in range(40)} | {"<pad>": 40, "<eos>": 41}
base = Tokenizer(models.WordLevel(vocabulary, "t0"))
base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>")
prompts = ["t1 t2", "t3 t4", "t5 t6", "t7 t8"]
chosen = ["t9 t10 t11", "t12 t13 t14", "t15 t16 t17", "t18 t19 t20"]
rejected = ["t21 t22 t23", "t24 t25 t26", "t27 t28 t29", "t30 t31 t32"]
beta = 0.1


def model(seed):
    torch.manual_seed(seed)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=42, initializer_range=0.5, **shape))


def trl_loss(coefficient):
    rows = [{"prompt": p + " ", "chosen": c, "rejected": r} for p, c, r in zip(prompts, chosen, rejected)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model(1), model(2), processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
            args=DPOConfig(
                folder, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient, beta=beta,
                per_device_train_batch_size=4, max_steps=1, logging_steps=1, save_strategy="no",
                report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            ),
        )
        trainer.train()
    return next(line["loss"] for line in trainer.state.log_history if "loss" in line)


@torch.no_grad()
def log_ratio(prompt, completion):
    first = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([first + tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]])
    def logp(seed):
        table = model(seed)(ids).logits[0, :-1].log_softmax(-1)
        return table[range(len(first) - 1, ids.shape[1] - 1), ids[0, len(first):]].sum()
    return logp(1) - logp(2)


def formula(alpha):  # f'(u) = (1 - u^-alpha) / alpha, u the ratio of the policy to the reference
    slope = lambda log_u: (1 - torch.exp(-alpha * log_u)) / alpha
    margins = [
        slope(log_ratio(p, c)) - slope(log_ratio(p, r)) for p, c, r in zip(prompts, chosen, rejected)
    ]
    return -logsigmoid(beta * torch.stack(margins)).mean().item()


for coefficient in (0.1, 0.5, 0.9):
    seen, as_named, other = trl_loss(coefficient), formula(coefficient), formula(1 - coefficient)
    print(f"coefficient {coefficient}: TRL {seen:.4f}, formula with alpha {coefficient} {as_named:.4f}, "
          f"formula with alpha {1 - coefficient:.1f} {other:.4f}")
    assert abs(seen - other) < 1e-3
    assert coefficient == 0.5 or abs(seen - as_named) > 0.02
PY
