"""Samples the completions of prompts, part by part, so that a stopped run continues with the next part."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_opt.feedback.samples import Sample, count_cut, finished_parts, write_part
from dpo_opt.feedback.work_folder import begin_or_resume, require_own
from dpo_opt.schemas.pairs import Completion, IdArray, Sampler, content_hash, sampling_seed
from dpo_opt.schemas.progress import Progress

# Completions of a part: enough to fill an engine, few enough that little is lost when a run is stopped.
_PART = 512

Decode = Callable[[list[int]], str]
"""Ids to text without special tokens."""


class Prompt(NamedTuple):
    """A prompt to complete."""

    ids: IdArray  # (P,)
    row: Mapping[str, object]
    """What the data says: ``prompt``, and ``tools`` and ``chat_template_kwargs`` where it has them."""


def sample_prompts(
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler,
    decode: Decode,
    folder: Path,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    about: Mapping[str, Any],
    worker: tuple[int, int],
    progress: Progress,
) -> dict[str, int]:
    """Write the completions of all prompts, or a worker's share of them, into a folder, and count them.

    Args:
        prompts: Prompts with different ids.
        sampler: The model.
        decode: Its tokenizer's.
        folder: New, or begun by the same call.
        num_samples: Completions per prompt.
        max_new_tokens: Longest completion.
        temperature: See ``Sampler``, also for ``seed``.
        seed: Seed of the run.
        about: What else decides the completions, such as the model's digests: of plain JSON.
        worker: This worker's number, from 0, and how many there are. All of them share the folder.
        progress: Shown the completions.

    Raises:
        ConfigError, FingerprintError: The folder is another's, or was begun otherwise.
        DataError: A part that is there cannot be read.
        EngineStopped: The engine broke.
    """
    size = max(1, _PART // num_samples)
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    settings = {
        **about,
        "num_samples": num_samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "prompts": len(prompts),
        "prompts_sha256": _digest(prompts),
        "parts": len(parts),
    }
    there = finished_parts(folder)
    begin_or_resume(folder, settings, kind="parts", has_results=bool(there))
    own = dict(list(enumerate(parts))[worker[0] :: worker[1]])
    total = sum(map(len, own.values())) * num_samples
    before = sum(len(part) for number, part in own.items() if number in there) * num_samples
    progress.start("sampling", total=total, unit="completions", done=before)
    for number, part in own.items():
        if number in there:
            continue
        written = sampler.sample(
            [prompt.ids for prompt in part],
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        samples = [
            _sample(prompt, n, completion, seed, decode)
            for prompt, completions in zip(part, written, strict=True)
            for n, completion in enumerate(completions)
        ]
        # Another process may have begun the folder otherwise before the first part was there.
        require_own(folder, settings, kind="parts", has_results=True)
        write_part(folder, number, samples, settings)
        progress.advance(len(samples))
    progress.finish()
    return {
        "completions": total,
        "completions_cut": count_cut(folder, list(own)),
        "completions_before": before,
        "parts_missing": len(parts) - len(finished_parts(folder)),
    }


def _sample(prompt: Prompt, number: int, completion: Completion, seed: int, decode: Decode) -> Sample:
    shown = decode(prompt.ids.tolist())
    text = _text_behind(prompt.ids.tolist(), completion.completion_ids.tolist(), shown, decode)
    return Sample(
        prompt_id=content_hash(prompt.ids),
        sample=number,
        seed=sampling_seed(seed, prompt.ids) + number,
        prompt=shown,
        # Bytes of a character that was cut off in its middle.
        completion=text if completion.finished else text.rstrip("\ufffd"),
        finished=completion.finished,
        prompt_ids=prompt.ids,
        completion_ids=completion.completion_ids,
        row=json.dumps(prompt.row, ensure_ascii=False),
    )


def _text_behind(prompt: list[int], completion: list[int], shown: str, decode: Decode) -> str:
    """The completion's text as it stands behind its prompt."""
    whole = decode([*prompt, *completion])
    # Alone, a completion loses the space that some tokenizers take from the first word of a text.
    return whole.removeprefix(shown) if whole.startswith(shown) else decode(completion)


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(content_hash(prompt.ids).encode())
        digest.update(json.dumps(prompt.row, sort_keys=True).encode())
    return digest.hexdigest()
