"""Trains policies with PPO by TRL 0.11: ``python ppo.py JOBS.json``, with that release first on the path.

The file has the runs of one seed. Each is written whole or not at all, so the same command trains what is
left. Nothing here is an algorithm: sampling, the KL penalty and its target, advantages, clipping and the
updates of policy and value head are TRL's.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prompts import read_prompts
from transformers import AutoTokenizer, PreTrainedTokenizerFast, set_seed
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from dpo_opt.feedback.samples import read_samples
from dpo_opt.optimize.reward_model import RewardModel
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.storage import publish_folder
from dpo_opt.user_function import load_user_function

Ids = Sequence[int]
Reward = Callable[[list[Ids], list[Ids]], list[float]]
"""Prompts and completions, as ids, to rewards."""


def train(jobs: dict[str, Any], run: dict[str, Any]) -> None:
    """Train one run and write its checkpoints, ``step-NNNNNNNN``."""
    set_seed(run["seed"])
    settings = jobs["settings"]
    tokenizer = AutoTokenizer.from_pretrained(jobs["model"])
    # Of the sequences that are shorter than others; TRL masks it.
    tokenizer.pad_token = tokenizer.eos_token
    reward = standardised(named_reward(run, tokenizer), Path(jobs["samples"]))
    policy, reference = (
        AutoModelForCausalLMWithValueHead.from_pretrained(jobs["model"], dtype=torch.float32)
        for _ in range(2)
    )
    config = PPOConfig(
        batch_size=settings["batch_size"],
        mini_batch_size=settings["mini_batch_size"],
        ppo_epochs=settings["ppo_epochs"],
        init_kl_coef=settings["init_kl_coef"],
        horizon=settings["horizon"],
        target=run["target_kl"],
        learning_rate=run["learning_rate"],
        seed=run["seed"],
    )
    trainer = PPOTrainer(config, policy, reference, tokenizer)
    batches = prompt_batches(Path(jobs["prompts"]), tokenizer, settings["batch_size"], seed=run["seed"])
    every = settings["steps"] // jobs["checkpoints"]
    with publish_folder(Path(run["output"])) as private:
        log = []
        for step in range(1, settings["steps"] + 1):
            prompts = next(batches)
            completions = trainer.generate(
                prompts,
                return_prompt=False,
                batch_size=settings["batch_size"],
                max_new_tokens=jobs["max_new_tokens"],
                do_sample=True,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            rewards = reward([p.tolist() for p in prompts], [c.tolist() for c in completions])
            found = trainer.step(prompts, completions, [torch.tensor(value) for value in rewards])
            log.append(
                {
                    "step": step,
                    "reward": float(np.mean(rewards)),
                    "kl": float(found["objective/kl"]),
                    "kl_coef": float(found["objective/kl_coef"]),
                }
            )
            if step % every == 0:
                folder = private / f"step-{step:08}"
                trainer.accelerator.unwrap_model(policy).pretrained_model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        (private / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def named_reward(run: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Reward:
    """The ground truth, or the learned reward model, whichever the run names."""
    if run["reward_function"] is not None:
        rate = load_user_function(run["reward_function"])

        def of_texts(prompts: list[Ids], completions: list[Ids]) -> list[float]:
            return rate(
                *(tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, completions))
            )

        return of_texts
    model = RewardModel(Path(run["reward_model"]), dtype="float32")
    return lambda prompts, completions: model.rewards(
        [np.array([*p, *c], dtype=np.int32) for p, c in zip(prompts, completions, strict=True)]
    )


def standardised(reward: Reward, samples: Path) -> Reward:
    """The reward less its mean, divided by its standard deviation, both over the reference's samples.

    So that the KL coefficient means the same for rewards of different scales.
    """
    found = list(read_samples(samples))
    rewards = reward([list(s.prompt_ids) for s in found], [list(s.completion_ids) for s in found])
    mean, deviation = float(np.mean(rewards)), float(np.std(rewards))
    return lambda prompts, completions: [(r - mean) / deviation for r in reward(prompts, completions)]


def prompt_batches(
    file: Path, tokenizer: PreTrainedTokenizerFast, size: int, *, seed: int
) -> Iterator[list[torch.Tensor]]:
    """The ids of prompts without end: every prompt once, in a new order, before one comes again."""
    prompts = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in read_prompts(file)]
    order = np.random.default_rng(seed)
    waiting: list[torch.Tensor] = []
    while True:
        while len(waiting) < size:
            waiting += [prompts[at] for at in order.permutation(len(prompts))]
        yield waiting[:size]
        waiting = waiting[size:]


if __name__ == "__main__":
    named = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    named["model"] = str(find_model(named["model"]))
    for number, each in enumerate(named["runs"], 1):
        print(f"PPO run {number} of {len(named['runs'])}: {Path(each['output']).name}", flush=True)
        train(named, each)
