"""Completions of prompts: joins the reader of preference data, an engine, and the table of completions."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dpo_opt.feedback.sample_prompts import Prompt, sample_prompts
from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.engine.option_rules import read_engine_options
from dpo_opt.precompute.read.datasets import read_prompts
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.template_date import chosen_date
from dpo_opt.precompute.tokens.templates import chat_templates
from dpo_opt.precompute.tokens.tokenize import prompt_ids
from dpo_opt.precompute.workers.assignment import worker_from_environment
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.models import (
    checkpoint_dtype,
    config_digest,
    context_length,
    find_model,
    pinned_name,
    template_digest,
    tokenizer_digest,
)
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.weights import weights_digest
from dpo_opt.scorers import make_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dpo_opt.commands.sample import SampleConfig


def sample(config: "SampleConfig", *, progress: Progress | None = None) -> dict[str, Any]:
    """Sample completions of all prompts into ``config.output``, and count them.

    Prompts with equal ids are sampled once; those that leave no room for a completion are left out.

    Raises:
        ConfigError: The model is missing, or no prompt leaves room for a completion.
        DataError: A row has no usable prompt.
        FingerprintError: The folder was begun otherwise.
    """
    folder = find_model(config.model)
    tokenizer = load_tokenizer(folder)
    date = chosen_date(tokenizer, given=config.template_date, shards=None)
    context = context_length(folder)
    most = None if context is None else context - config.max_new_tokens
    read = 0
    distinct: dict[bytes, Prompt] = {}
    for prompt in _read(config, tokenizer, date.date):
        read += 1
        distinct.setdefault(prompt.ids.tobytes(), prompt)
    prompts = [p for p in distinct.values() if most is None or len(p.ids) <= most]
    if not prompts:
        raise ConfigError(
            f"none of {len(distinct)} prompts leaves room for --max-new-tokens {config.max_new_tokens}",
            why=f"the model's context has {context} tokens",
            fix="pass a smaller --max-new-tokens, or shorter prompts",
        )
    dtype = checkpoint_dtype(folder) if config.dtype == "auto" else config.dtype
    sampler = make_engine(
        folder,
        backend=config.backend,
        dtype=dtype,
        max_length=max(len(p.ids) for p in prompts) + config.max_new_tokens,
        engine_options=read_engine_options(config.engine_option),
    )
    counts = sample_prompts(
        prompts,
        sampler=sampler,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        folder=config.output,
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        about={
            "model": pinned_name(config.model, folder),
            "weights_sha256": weights_digest(folder),
            "config_sha256": config_digest(folder),
            "tokenizer_sha256": tokenizer_digest(tokenizer),
            "template_sha256": template_digest(chat_templates(tokenizer)),
            "template_date": date.date,
            **sampler.numerics._asdict(),
        },
        worker=_worker(config),
        progress=progress or Silent(),
    )
    return {
        "output": str(config.output),
        "prompts": len(prompts),
        "prompts_repeated": read - len(distinct),
        "prompts_too_long": len(distinct) - len(prompts),
        **counts,
        **date.as_record(),
    }


def _worker(config: "SampleConfig") -> tuple[int, int]:
    """This worker's number and their count: as the options say, else as the scheduler does."""
    if config.num_workers is not None:
        return config.worker_index or 0, config.num_workers
    return worker_from_environment(os.environ) or (0, 1)


def _read(config: "SampleConfig", tokenizer: "PreTrainedTokenizerFast", date: str | None) -> Iterator[Prompt]:
    """Each row's prompt, with the ids that the model is shown for it."""
    data = DataConfig(data=config.prompts, column=config.column, ignore_column=config.ignore_column)
    for found in read_prompts(data):
        beside = {"tools": found.tools, "chat_template_kwargs": found.chat_template_kwargs}
        ids = prompt_ids(
            found.prompt,
            tokenizer,
            where=found.where,
            date=date,
            tools=found.tools,
            row_settings=found.chat_template_kwargs,
        )
        yield Prompt(ids, {"prompt": found.prompt, **{k: v for k, v in beside.items() if v is not None}})
