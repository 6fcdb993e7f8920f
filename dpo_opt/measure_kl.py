"""KL divergence measured where it is defined: on completions that the policy itself samples.

The policy writes, then both models score what it wrote through the same forward. Only this composition
needs two models, and it holds one at a time.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.datasets import read_prompts
from dpo_opt.precompute.tokens.template_date import ChosenDate, chosen_date
from dpo_opt.precompute.tokens.tokenize import PairTokenizer, encoder, prompt_ids
from dpo_opt.schemas.errors import ConfigError, DataError, quoted
from dpo_opt.schemas.kl_samples import KLSample, write_kl_samples
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.models import checkpoint_dtype, context_length, find_model
from dpo_opt.schemas.pairs import (
    Completion,
    IdArray,
    PreferencePair,
    Sampler,
    TokenSequence,
    content_hash,
)
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.scorers import make_engine

if TYPE_CHECKING:
    from dpo_opt.commands.kl import KLConfig


def measure_kl(config: "KLConfig", *, progress: Progress | None = None) -> dict[str, Any]:
    """Sample, score twice, write the samples, and return the estimates with their intervals.

    Raises:
        ConfigError: A model is missing, or a prompt leaves no room for a completion.
        DataError: The prompts cannot be read.
    """
    progress = progress or Silent()
    policy_folder, reference_folder = find_model(config.model), find_model(config.reference)
    dtype = checkpoint_dtype(policy_folder) if config.dtype == "auto" else config.dtype
    date, found = _prompts(config, policy_folder)
    prompts = _spread(found, config.num_prompts)
    longest = max(len(p) for p in prompts) + config.max_new_tokens
    context = context_length(policy_folder)
    if context is not None and longest > context:
        raise ConfigError(
            f"the longest prompt and --max-new-tokens {config.max_new_tokens} take {longest} tokens, "
            f"the model's context has {context}",
            fix="pass a smaller --max-new-tokens, or shorter prompts",
        )
    progress.start("measuring KL", total=3, unit="stages")
    # In a process of its own: to run a model that it has no class for, vLLM changes that of transformers,
    # which then works in the engine alone. And no engine is left in memory.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as apart:
        completions = apart.submit(_sample, config, policy_folder, dtype, prompts).result()
    progress.advance(1, "sampled")
    from dpo_opt.optimize.transformers_scorer import HfScorer

    flat = [(p, n, c) for p, cs in zip(prompts, completions, strict=True) for n, c in enumerate(cs)]
    sequences = [TokenSequence(p, c.completion_ids) for p, _, c in flat]
    policy_logps = HfScorer(policy_folder, dtype=dtype, max_length=longest).token_logps(sequences)
    progress.advance(1, "scored under the policy")
    reference_logps = HfScorer(reference_folder, dtype=dtype, max_length=longest).token_logps(sequences)
    progress.advance(1, "scored under the reference")
    progress.finish()
    write_kl_samples(
        config.output,
        [
            KLSample(
                prompt_id=content_hash(prompt),
                sample=number,
                finished=completion.finished,
                prompt_ids=prompt,
                completion_ids=completion.completion_ids,
                policy_token_logps=own,
                ref_token_logps=reference,
            )
            for (prompt, number, completion), own, reference in zip(
                flat, policy_logps, reference_logps, strict=True
            )
        ],
    )
    from dpo_opt.analysis.intervals import Interval
    from dpo_opt.analysis.kl import estimate_kl
    from dpo_opt.analysis.load import scan_kl_samples

    estimate = estimate_kl(scan_kl_samples(config.output))._asdict()
    plain = {
        name: value._asdict() if isinstance(value, Interval) else value for name, value in estimate.items()
    }
    return {"output": str(config.output), **date.as_record(), **plain}


def _sample(
    config: "KLConfig", policy_folder: Path, dtype: str, prompts: list[IdArray]
) -> list[list[Completion]]:
    longest = max(len(p) for p in prompts) + config.max_new_tokens
    sampler: Sampler = make_engine(policy_folder, backend=config.backend, dtype=dtype, max_length=longest)
    return sampler.sample(
        prompts,
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=1.0,
        seed=config.seed,
    )


def _prompts(config: "KLConfig", policy_folder: Path) -> tuple[ChosenDate, list[IdArray]]:
    """Distinct prompts, in order, and the date that they were rendered with."""
    found: Iterator[IdArray]
    if config.prompts.is_dir():
        if config.template_date is not None:
            raise ConfigError(
                "--template-date is given for prompts that are ids already",
                where=str(config.prompts),
                why="shards are rendered with the date of their folder",
                fix="leave --template-date out",
            )
        folder = ShardFolder.open(config.prompts)
        date = ChosenDate(folder.manifest.fingerprint.template_date, quoted(config.prompts))
        found = (pair.prompt_ids for pair in folder.pairs())
    else:
        data = DataConfig(
            data=[str(config.prompts)], column=config.column, ignore_column=config.ignore_column
        )
        date = chosen_date(
            encoder(policy_folder).tokenizer, given=config.template_date, shards=_trained_on(policy_folder)
        )
        found = _ids_of_prompts(data, encoder(policy_folder, date.date))
    return date, list({ids.tobytes(): ids for ids in found}.values())


def _trained_on(policy_folder: Path) -> AnyPath | None:
    """The shards of the run that the policy is the result of, where both are there."""
    from dpo_opt.analysis.run_files import CONFIG, shards_of_run

    run = policy_folder.absolute().parent
    if not (run / CONFIG).is_file():
        return None
    # Moved away with the run's other inputs: the result says which date was taken.
    with contextlib.suppress(ConfigError):
        return shards_of_run(run)
    return None


def _ids_of_prompts(data: DataConfig, tokenizer: PairTokenizer) -> Iterator[IdArray]:
    """Ids of each row's prompt: those that ``precompute`` gives it where the row is a pair."""
    for row in read_prompts(data):
        if isinstance(row, PreferencePair):
            (whole,) = tokenizer.encode([row])
            if isinstance(whole, DataError):
                raise whole
            yield whole.prompt
        else:
            yield prompt_ids(
                row.prompt,
                tokenizer.tokenizer,
                where=row.where,
                date=tokenizer.template_date,
                tools=row.tools,
                row_settings=row.chat_template_kwargs,
            )


def _spread(prompts: list[IdArray], count: int) -> list[IdArray]:
    spread = np.unique(np.linspace(0, len(prompts) - 1, min(count, len(prompts))).astype(int))
    return [prompts[i] for i in spread]
