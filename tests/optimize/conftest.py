"""A small scored folder, other models beside the tiny one, and log-probs computed the long way."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchrun_steps
from processes import torchrun
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.schemas.pairs import TokenSequence
from dpo_opt.schemas.storage import sha256_folder

FullLogps = Callable[[PreTrainedModel, TokenSequence], Tensor]
WORDS = ["the", "cat", "sat", "and", "then", "it", "ran", "out", "of", "town", "with", "nine", "red", "hats"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread, also where a vLLM engine in this process asked for more: the order of sums depends on it.

    Tiny models gain nothing from others, and on a busy machine threads mostly wait for each other.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def full_logps() -> FullLogps:
    """Token log-probs as the textbook has them: one sequence, all logits, float64; differentiable."""

    def compute(model: PreTrainedModel, sequence: TokenSequence) -> Tensor:
        joined = np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64)
        logits = model(input_ids=torch.from_numpy(joined)[None], use_cache=False).logits[0, :-1].double()
        logps = logits.log_softmax(-1).gather(1, torch.from_numpy(joined[1:, None])).squeeze(1)
        return logps[len(sequence.prompt_ids) - 1 :]

    return compute


@pytest.fixture(scope="session")
def stock_model(tiny_model: Path) -> PreTrainedModel:
    """The tiny model as transformers loads it, with its own attention."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    """The tiny model as a policy in fp32."""
    return load_policy(tiny_model, dtype=torch.float32, device=torch.device("cpu"), trainable=True)


def write_pairs(path: Path, *, pairs: int, prompts: int) -> None:
    """Made-up pairs; several share a prompt, and some completions begin with the same words."""
    rng = random.Random(7)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    asked = [f"{words(2, 9)} {i}?" for i in range(prompts)]
    rows = []
    for i in range(pairs):
        opening = words(1, 3) if i % 3 == 0 else ""
        rows.append(
            {
                "prompt": asked[i % prompts],
                "chosen": f" {opening} {words(1, 8)} {i}.",
                "rejected": f" {opening} {words(1, 8)} {i}!",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def score(model: Path, folder: Path, *, dtype: str) -> Path:
    """28 pairs of 10 prompts in 4 shards, scored through transformers."""
    folder.mkdir()
    write_pairs(folder / "pairs.jsonl", pairs=28, prompts=10)
    config = PrecomputeConfig(
        model=str(model),
        data=folder / "pairs.jsonl",
        shards=folder / "shards",
        dtype=dtype,
        pairs_per_shard=8,
    )
    manifest = precompute(config, scorer=HfScorer(model, dtype=dtype))
    assert manifest.kept == 28
    return config.shards


@pytest.fixture(scope="session")
def shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder scored in fp32; shared, so copy it before changing a file."""
    return score(tiny_model, tmp_path_factory.mktemp("fp32") / "scored", dtype="float32")


@pytest.fixture(scope="session")
def bf16_shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs scored in bf16."""
    return score(tiny_model, tmp_path_factory.mktemp("bf16") / "scored", dtype="bfloat16")


@pytest.fixture(scope="session")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shape and tokenizer with other weights."""
    folder = tmp_path_factory.mktemp("other-model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    for file in tiny_model.iterdir():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    assert sha256_folder(folder) != sha256_folder(tiny_model)
    return folder


@pytest.fixture(scope="session")
def torchrun_folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What ``torchrun_steps`` wrote, by number of processes: alone in this one, others started by torchrun.

    Each but the first also loaded the state that the one before it had saved.
    """
    root = tmp_path_factory.mktemp("torchrun")
    shutil.copytree(tiny_model, root / "models/untied")
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(root / "models/tied")
    folders = {size: root / str(size) for size in (1, 2, 3)}
    for folder in folders.values():
        folder.mkdir()
    torchrun_steps.take_steps(root / "models", folders[1], torchrun_steps.ALONE, None)
    for size in (2, 3):
        torchrun(size, torchrun_steps.__file__, root / "models", folders[size], folders[size - 1])
    return folders


@pytest.fixture(scope="session")
def settings(shards: Path, tiny_model: Path) -> dict[str, Any]:
    """Of a run worth interrupting: several micro-batches in a step, a shorter step at the end of an epoch;
    lines of metrics, evaluations and checkpoints at different steps.
    """
    return {
        "shards": shards,
        "model": str(tiny_model),
        "batch_size": 8,
        "learning_rate": 1e-3,
        "micro_batch_tokens": 120,
        "num_train_epochs": 2,
        "logging_steps": 2,
        "eval_split": 0.2,
        "eval_steps": 3,
        "save_steps": 2,
        "metric_for_best_model": "eval_loss",
    }
