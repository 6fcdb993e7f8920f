"""A causal language model as this toolkit uses it: batches in, token log-probs out.

Loading checks, by measurement (probe.py), that the packed forward is exact for this very model; where it is
not (recurrent layers, soft-capped attention), padded rows are used instead.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_opt.optimize.architecture import auto_class, decoder_of, head_of
from dpo_opt.optimize.attention import PADDED_ATTENTION, SEGMENT_ATTENTION
from dpo_opt.optimize.layout import choose_layout
from dpo_opt.optimize.logps import Objective, token_logps
from dpo_opt.optimize.packing import Batch, Group, pack, packed_size, pad, plan_bins, plan_padded_bins
from dpo_opt.optimize.precision import HALF, computing_in, full_precision_products, narrow_products
from dpo_opt.optimize.probe import Probe, require_same_in_compute_dtype
from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.model_config import load_model_config, model_errors
from dpo_opt.schemas.models import context_length
from dpo_opt.schemas.pairs import TokenSequence
from dpo_opt.schemas.rope import pin_rope
from dpo_opt.schemas.weights import refuse_left_over


@dataclass(frozen=True, slots=True)
class Policy:
    """A loaded model, and how batches are laid out for it."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    """Compute dtype of the forward; parameters keep their own."""
    packs: bool
    """False where only padded rows are exact for this model."""
    probe: Probe | None = None
    """What its layout was chosen by; None where somebody else chose."""

    @property
    def layout(self) -> Callable[[Sequence[Group]], Batch]:
        """``pack``, or ``pad`` where packing is not exact."""
        return pack if self.packs else pad

    def bins(self, groups: Sequence[Group], budget: int) -> list[list[int]]:
        """Which groups share a forward, so that none feeds more than ``budget`` rows, padding included."""
        if self.packs:
            return plan_bins([packed_size(group) for group in groups], budget)
        return plan_padded_bins(groups, budget)

    def batch_logps(self, batch: Batch, *, objective: Objective | None = None) -> Tensor:
        """(S,) float32 log-probs, in nats, of the batch's targets; differentiable.

        ``objective`` makes the head cheaper, see ``token_logps``.
        """
        head = head_of(self.model)
        # Where the head has already added to .grad, adding the few rows that were fed is enough.
        embedding = self.model.get_input_embeddings()
        if isinstance(embedding, torch.nn.Embedding):
            embedding.sparse = (
                objective is not None
                and objective.in_place
                and embedding.weight is head.weight
                # In half precision the head adds nothing in place, and sparse rows would be summed in it.
                and head.weight.dtype == torch.float32
            )
        with full_precision_products():
            with computing_in(self.dtype, self.model, self.device):
                output = decoder_of(self.model)(
                    input_ids=batch.input_ids, use_cache=False, **batch.model_kwargs
                )
            hidden = output.last_hidden_state.flatten(0, 1)[batch.scored_rows]
            # Outside autocast: the head's tile is fp32, since bf16 logits are off by up to 0.06 nats.
            return token_logps(hidden, head, batch.targets, objective=objective)

    def sequence_logps(self, groups: Sequence[Group]) -> list[Tensor]:
        """One (C,) tensor of token log-probs per sequence, on the policy's device."""
        batch = self.layout(groups).to(self.device)
        return list(torch.split(self.batch_logps(batch), batch.lengths))


@contextlib.contextmanager
def one_by_one(policy: Policy) -> Iterator[Callable[[TokenSequence], Tensor]]:
    """Token log-probs, (C,), of a sequence that nothing shares the forward with.

    Through transformers' attention also where the policy packs, so that none of packing's own steps is in it.
    """
    decoder, packed = decoder_of(policy.model), policy.packs
    if packed:
        decoder.set_attn_implementation(PADDED_ATTENTION)
    alone = replace(policy, packs=False)
    try:
        yield lambda sequence: alone.sequence_logps([(sequence,)])[0]
    finally:
        if packed:
            decoder.set_attn_implementation(SEGMENT_ATTENTION)


def load_policy(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trainable: bool,
    max_length: int | None = None,
    param_dtype: torch.dtype | None = torch.float32,
    options: Mapping[str, Any] | None = None,
) -> Policy:
    """Load a model from safetensors.

    Args:
        folder: In the Hugging Face layout.
        dtype: Compute dtype.
        device: Where it goes.
        trainable: Whether gradients of these weights will be taken; of a model that also sees or hears, the
            text model's alone.
        max_length: Most tokens of a sequence in this run, which decides about some rotary embeddings
            (``schemas.rope``); None: the model's context.
        param_dtype: What parameters are stored in. None: in as little memory as leaves every log-prob that of
            fp32 parameters; what is quantized stays so.
        options: More arguments of ``from_pretrained``; with a ``device_map`` they say where the model goes.

    Raises:
        ConfigError: transformers cannot load the folder, weights are missing or left over, or no layout is
            exact.
    """
    config = load_model_config(folder)
    quantized = bool(getattr(config, "quantization_config", None))
    if trainable and quantized:
        raise ConfigError(
            "the checkpoint's weights are quantized",
            where=str(folder),
            why="updates are far smaller than the steps between such numbers",
            fix="train the model that it was made from, or an adapter beside it (--use-peft)",
        )
    longest = max_length or context_length(folder)
    _refuse_chosen_keys(config, longest, folder)
    try:
        with _quiet_transformers():
            model, report = auto_class(config).from_pretrained(
                folder,
                config=config if longest is None else pin_rope(config, longest),
                dtype=dtype if quantized else param_dtype or torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **(options or {}),
            )
    except model_errors() as error:
        raise ConfigError(
            f"transformers cannot load the model ({first_line(error)})",
            where=str(folder),
            why="every log-prob would come from it",
            fix="copy or download the model again, config.json and weights",
        ) from error
    _require_all_weights(report, folder)
    if param_dtype is None and dtype in HALF and not quantized:
        narrow_products(model, dtype)
    if not options or "device_map" not in options:
        model.to(device)
    # Dropout must be off: the reference was scored without it, so with it policy != reference at step 0.
    model.eval()
    model.requires_grad_(False)
    packs, probe = choose_layout(model, device, dtype, folder=folder, longest=longest)
    if trainable:
        for part in (decoder_of(model), model.get_output_embeddings()):
            part.requires_grad_(True)
    policy = Policy(model, device, dtype, packs, probe)
    require_same_in_compute_dtype(policy, where=str(folder))
    return policy


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its bars would stand between ours, and its table of what does not fit is said in one sentence."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _require_all_weights(report: Mapping[str, Any], folder: Path) -> None:
    """Compare what the class has with what the checkpoint holds, but for what the class says is ignorable.

    Raises:
        ConfigError: One has what the other lacks.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {len(missing)} of the model's weights, such as {missing[0]}",
            where=str(folder),
            why="transformers fills them with random numbers",
            fix="copy the whole model, or save it again from the model that was trained",
        )
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise ConfigError(
            f"the checkpoint's {name} is of shape {tuple(stored)}, and config.json makes it {tuple(wanted)}",
            where=str(folder),
            why="transformers fills such weights with random numbers",
            fix="correct config.json (vocabulary, heads, widths) until it fits the weights, or copy it again",
        )
    refuse_left_over(report["unexpected_keys"], folder=folder)


def _refuse_chosen_keys(config: PretrainedConfig, longest: int | None, folder: Path) -> None:
    """Attention to the best k keys alone is exact up to k tokens; beyond, rounding decides which they are.

    Raises:
        ConfigError: Longer sequences are allowed.
    """
    most = getattr(config.get_text_config(), "index_topk", None)
    if most and longest is not None and longest > most:
        raise ConfigError(
            f"the model attends to its {most} best keys, and sequences of {longest} tokens are allowed",
            where=str(folder),
            why="rounding decides which keys these are, so two forwards of one sequence differ by whole nats",
            fix=f"pass --max-length {most} or less to `dpo-opt precompute`, and use its shards",
        )


def default_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` resolved: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
