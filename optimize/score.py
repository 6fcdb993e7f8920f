"""A frozen model through transformers: the trainer's own forward as scorer, sampler and oracle.

It scores references where vLLM cannot run, scores any checkpoint on any shards, and is what vLLM's
numbers are compared with.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from dpo_opt.optimize.architecture import decoder_of
from dpo_opt.optimize.attention import PADDED_ATTENTION, SEGMENT_ATTENTION
from dpo_opt.optimize.identity import require_same_model
from dpo_opt.optimize.packing import Group, pair_group
from dpo_opt.optimize.policy import Policy, default_device, load_policy
from dpo_opt.optimize.precision import computing_in
from dpo_opt.schemas.fingerprint import TOKENIZER_FIELDS
from dpo_opt.schemas.locations import AnyPath
from dpo_opt.schemas.manifest import ShardFolder
from dpo_opt.schemas.model_config import load_model_config
from dpo_opt.schemas.models import checkpoint_dtype, context_length, find_model
from dpo_opt.schemas.pair_logps import PairLogps, write_pair_logps
from dpo_opt.schemas.pairs import (
    Completion,
    IdArray,
    LogpArray,
    Numerics,
    ScoredPair,
    TokenSequence,
)
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.rope import FIXED, describe_rope

# Rows per forward without gradients: enough to keep the cores busy, small in memory.
_BATCH_ROWS = 2048
_SAMPLING_BATCH = 64


class HfScorer:
    """A model that scores and samples through transformers; loaded at first use.

    Args:
        folder: The model.
        dtype: Compute dtype, such as ``float32``; log-probs are those of training in it from fp32 parameters.
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
        """See ``Scorer``: adjacent sequences of one prompt share its forward."""
        groups = _by_prompt(sequences)
        found: list[list[LogpArray]] = [[] for _ in groups]
        for members in self.policy.bins(groups, _BATCH_ROWS):
            logps = iter(_forward(self.policy, [groups[i] for i in members]))
            for i in members:
                found[i] = [next(logps) for _ in groups[i]]
        return [logps for group in found for logps in group]

    def sample(
        self,
        prompts: Sequence[IdArray],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Completion]]:
        """See ``Sampler``. Left-padded batches through ``generate``; vLLM is faster where it runs."""
        model = self.policy.model
        declared = model.generation_config
        eos = _eos_ids(declared.eos_token_id)
        # What the checkpoint declares beyond its EOS (repetition penalty, top-k, ...) would fill every gap of
        # a call, and the samples would not be the model's own.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(eos) or None,
            pad_token_id=0,
        )
        # The packed attention has no key-value cache; generation needs the stock one.
        if self.policy.packs:
            decoder_of(model).set_attn_implementation(PADDED_ATTENTION)
        torch.manual_seed(seed)
        jobs = [prompt for prompt in prompts for _ in range(num_samples)]
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
                with computing_in(self.policy.dtype, model, self.policy.device):
                    out = model.generate(
                        input_ids=torch.from_numpy(ids).to(self.policy.device),
                        attention_mask=torch.from_numpy(mask).to(self.policy.device),
                    )
                written += [_completion(row, eos) for row in out[:, width:].cpu().numpy()]
        finally:
            model.generation_config = declared
            if self.policy.packs:
                decoder_of(model).set_attn_implementation(SEGMENT_ATTENTION)
        return [written[i : i + num_samples] for i in range(0, len(written), num_samples)]


def score_shards(
    shards: AnyPath, *, model: str, output: Path, dtype: str, progress: Progress | None = None
) -> int:
    """Score every pair of a folder under a checkpoint and write the pair log-prob table.

    Args:
        shards: Folder of reference shards; their ids are scored as they are.
        model: Any checkpoint that reads the same ids.
        output: Parquet file, rows of phase ``score`` with token log-probs.
        dtype: Dtype of the model, or ``auto`` for the one its checkpoint declares.
        progress: Told of every scored pair.

    Returns:
        Number of pairs.

    Raises:
        ConfigError: There is no such model.
        DataError: The shards are incomplete or damaged.
        FingerprintError: The checkpoint's tokenizer is not that of the shards.
    """
    progress = progress or Silent()
    folder = ShardFolder.open(shards)
    model_folder = find_model(model)
    require_same_model(
        folder,
        model_folder,
        fields=TOKENIZER_FIELDS,
        fix="pass a checkpoint with the tokenizer of the shards",
    )
    scorer = HfScorer(
        model_folder,
        dtype=checkpoint_dtype(model_folder) if dtype == "auto" else dtype,
        max_length=folder.manifest.fingerprint.max_length,
    )
    step, epoch = _trained(model_folder)
    progress.start("scoring", total=folder.manifest.kept, unit="pairs")

    def batches() -> Iterator[list[PairLogps]]:
        for shard in folder.manifest.shards:
            for pairs in folder.row_groups(shard.shard):
                yield _score_pairs(scorer, pairs, step=step, epoch=epoch, checkpoint=str(model))
                progress.advance(len(pairs))

    write_pair_logps(output, batches())
    progress.finish()
    return folder.manifest.kept


def _trained(model_folder: Path) -> tuple[int, float]:
    """Steps and epochs of the run that a checkpoint belongs to, (0, 0.0) where it belongs to none."""
    state = model_folder.parent / "trainer_state.json"
    if not state.is_file():
        return 0, 0.0
    values = json.loads(state.read_text(encoding="utf-8"))
    return int(values["global_step"]), float(values["epoch"])


def _score_pairs(
    scorer: HfScorer, pairs: Sequence[ScoredPair], *, step: int, epoch: float, checkpoint: str
) -> list[PairLogps]:
    logps = scorer.token_logps([s for pair in pairs for s in pair_group(pair)])
    return [
        PairLogps(
            row=pair.row,
            pair_id=pair.pair_id,
            step=step,
            epoch=epoch,
            phase="score",
            checkpoint=checkpoint,
            chosen_logps=float(chosen.sum(dtype=np.float64)),
            rejected_logps=float(rejected.sum(dtype=np.float64)),
            chosen_length=len(chosen),
            rejected_length=len(rejected),
            chosen_token_logps=chosen,
            rejected_token_logps=rejected,
        )
        for pair, chosen, rejected in zip(pairs, logps[0::2], logps[1::2], strict=True)
    ]


@torch.no_grad()
def _forward(policy: Policy, groups: Sequence[Group]) -> Iterator[LogpArray]:
    for logps in policy.sequence_logps(groups):
        yield logps.cpu().numpy()


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
