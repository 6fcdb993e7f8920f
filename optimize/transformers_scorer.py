"""``HfScorer``: scores and samples with transformers, by the same forward as training (``--backend hf``).

It scores references where vLLM cannot run, scores any checkpoint on any shards, and gives the numbers that
vLLM's are compared with.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dpo_opt.optimize.forward.architecture import decoder_of, head_of
from dpo_opt.optimize.forward.attention import PADDED_ATTENTION, SEGMENT_ATTENTION
from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.optimize.forward.next_tokens import States
from dpo_opt.optimize.forward.packing import Group
from dpo_opt.optimize.forward.policy import Policy, default_device
from dpo_opt.optimize.forward.precision import computing_in
from dpo_opt.optimize.forward.prompt_groups import alike
from dpo_opt.schemas.model_config import load_model_config
from dpo_opt.schemas.models import context_length
from dpo_opt.schemas.pairs import (
    Completion,
    IdArray,
    LogpArray,
    Numerics,
    TokenSequence,
    sampling_seed,
)
from dpo_opt.schemas.rope import FIXED, describe_rope

# Rows per forward without gradients: enough to keep the cores busy, small in memory.
_BATCH_ROWS = 2048
_SAMPLING_BATCH = 64

T = TypeVar("T")


class HfScorer:
    """A model that scores and samples with transformers. It is loaded at first use.

    Args:
        folder: The model folder.
        dtype: Compute dtype, such as ``float32``. Log-probs are those of training in it with fp32 parameters.
        max_length: Most tokens of a sequence in this run; None: the model's context.
    """

    def __init__(self, folder: Path, *, dtype: str, max_length: int | None = None) -> None:
        self._folder = folder
        self._dtype = dtype
        self._max_length = max_length
        self._policy: Policy | None = None

    @property
    def numerics(self) -> Numerics:
        return Numerics(
            engine="transformers",
            engine_version=version("transformers"),
            strategy="packed" if self._dtype == "float32" else "packed-mixed",
            dtype=self._dtype,
            rope=self._rope,
        )

    @functools.cached_property
    def _rope(self) -> str:
        longest = self._max_length or context_length(self._folder)
        return FIXED if longest is None else describe_rope(load_model_config(self._folder), longest)

    @property
    def policy(self) -> Policy:
        """The loaded model."""
        if self._policy is None:
            self._policy = load_policy(
                self._folder,
                dtype=getattr(torch, self._dtype),
                device=default_device(),
                trainable=False,
                max_length=self._max_length,
                param_dtype=None,
            )
        return self._policy

    def token_logps(self, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
        """See ``Scorer``. Adjacent sequences with the same prompt share the prompt's forward.

        Prompts that begin alike share that beginning.
        """
        return self._per_sequence(sequences, _logps)

    def states(self, sequences: Sequence[TokenSequence]) -> States:
        """What the model's head makes the distributions of all the completions' tokens of.

        Sequences are grouped as in ``token_logps``.
        """
        hidden = torch.cat(self._per_sequence(sequences, _hidden))
        return States(hidden, head_of(self.policy.model), self.policy.dtype)

    def state_sums(self, sequences: Sequence[TokenSequence]) -> list[npt.NDArray[np.float64]]:
        """The sum (d,) of the hidden states that predict a completion's wanted tokens, of each sequence.

        They are what the head reads, after the last norm: the first is at the prompt's last token, and none
        is at the completion's. Sequences are grouped as in ``token_logps``.
        """
        return self._per_sequence(sequences, _state_sums)

    def _per_sequence(
        self, sequences: Sequence[TokenSequence], forward: Callable[[Policy, Sequence[Group]], Iterator[T]]
    ) -> list[T]:
        """What a forward of groups gives for each of their sequences, in the order of ``sequences``."""
        groups = _by_prompt(sequences)
        found: list[list[T]] = [[] for _ in groups]
        joined = alike(groups, rows=self.policy.rows, most=_BATCH_ROWS)
        whole: list[Group] = [tuple(s for i in places for s in groups[i]) for places in joined]
        for members in self.policy.bins(whole, _BATCH_ROWS):
            values = forward(self.policy, [whole[number] for number in members])
            for i in (place for number in members for place in joined[number]):
                found[i] = [next(values) for _ in groups[i]]
        return [value for group in found for value in group]

    def sample(
        self,
        prompts: Sequence[IdArray],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Completion]]:
        """See ``Sampler``. Uses transformers' ``generate`` on left-padded batches; vLLM is faster."""
        model = self.policy.model
        declared = model.generation_config
        eos = _eos_ids(declared.eos_token_id)
        # generate() takes every setting it is not given from the checkpoint (repetition penalty, top-k, ...),
        # and the samples would not be the model's own.
        model.generation_config = GenerationConfig(
            do_sample=False,  # ``_OwnStreams`` draws
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(eos) or None,
            pad_token_id=0,
        )
        # The packed attention has no key-value cache; generation needs the stock one.
        if self.policy.packs:
            decoder_of(model).set_attn_implementation(PADDED_ATTENTION)
        jobs = [prompt for prompt in prompts for _ in range(num_samples)]
        seeds = [sampling_seed(seed, prompt) + n for prompt in prompts for n in range(num_samples)]
        written: list[Completion] = []
        try:
            for i in range(0, len(jobs), _SAMPLING_BATCH):
                batch = jobs[i : i + _SAMPLING_BATCH]
                width = max(len(p) for p in batch)
                ids = np.zeros((len(batch), width), dtype=np.int64)
                mask = np.zeros_like(ids)
                for row, prompt in enumerate(batch):
                    ids[row, width - len(prompt) :] = prompt
                    mask[row, width - len(prompt) :] = 1
                drawn = _OwnStreams(seeds[i : i + _SAMPLING_BATCH], temperature, self.policy.device)
                with computing_in(self.policy.dtype, model, self.policy.device):
                    out = cast(Any, model).generate(
                        input_ids=torch.from_numpy(ids).to(self.policy.device),
                        attention_mask=torch.from_numpy(mask).to(self.policy.device),
                        logits_processor=LogitsProcessorList([drawn]),
                    )
                written += [_completion(row, eos) for row in out[:, width:].cpu().numpy()]
        finally:
            model.generation_config = declared
            if self.policy.packs:
                decoder_of(model).set_attn_implementation(SEGMENT_ATTENTION)
        return [written[i : i + num_samples] for i in range(0, len(written), num_samples)]


class _OwnStreams(LogitsProcessor):  # type: ignore[misc]
    """Makes the largest logit of each row a draw from its softmax, by a random stream of the row's own.

    The largest of ``logits / temperature - log E`` with exponential ``E`` is such a draw (Gumbel-max trick;
    Maddison et al. 2014, arXiv 1411.0030, section 2). In float64, since float32 has no small enough ``E``.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._temperature = temperature
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Args: input_ids (B, L), not used; scores (B, V). Returns (B, V)."""
        if self._temperature == 0:
            return scores
        noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for row, stream in zip(noise, self._streams, strict=True):
            row.exponential_(generator=stream)
        return scores.double() / self._temperature - noise.log()


@torch.no_grad()
def _logps(policy: Policy, groups: Sequence[Group]) -> Iterator[LogpArray]:
    for logps in policy.sequence_logps(groups):
        yield logps.cpu().numpy()


@torch.no_grad()
def _hidden(policy: Policy, groups: Sequence[Group]) -> Iterator[Tensor]:
    batch = policy.layout(groups).to(policy.device)
    # One copy to the CPU: of tens of thousands of tokens, a GPU has no room beside a model.
    yield from torch.split(policy.batch_states(batch).cpu(), batch.lengths)


@torch.no_grad()
def _state_sums(policy: Policy, groups: Sequence[Group]) -> Iterator[npt.NDArray[np.float64]]:
    batch = policy.layout(groups).to(policy.device)
    for states in torch.split(policy.batch_states(batch), batch.lengths):
        # On the device, where float64 may be missing; a sum in bf16 would be noise.
        yield states.sum(0, dtype=torch.float32).double().cpu().numpy()


def _by_prompt(sequences: Sequence[TokenSequence]) -> list[Group]:
    groups: list[list[TokenSequence]] = []
    for sequence in sequences:
        if groups and np.array_equal(groups[-1][0].prompt_ids, sequence.prompt_ids):
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return [tuple(group) for group in groups]


def _eos_ids(eos: int | list[int] | None) -> set[int]:
    if eos is None:
        return set()
    return {eos} if isinstance(eos, int) else set(eos)


def _completion(tokens: IdArray, eos: set[int]) -> Completion:
    stops = [i for i, token in enumerate(tokens) if int(token) in eos]
    end = stops[0] + 1 if stops else len(tokens)
    return Completion(tokens[:end].astype(np.int32), finished=bool(stops))
