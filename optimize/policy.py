"""A causal language model as this toolkit uses it: batches in, token log-probs out.

Loading checks, by measurement, that the packed forward is exact for this very model; where it is not
(recurrent layers, soft-capped attention, a head this file does not know), padded rows are used instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_opt.optimize.attention import SEGMENT_ATTENTION
from dpo_opt.optimize.logps import Head, Objective, token_logps
from dpo_opt.optimize.packing import Batch, Group, pack, packed_size, pad, plan_bins, plan_padded_bins
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence

# Largest difference: fp32 forwards of the same numbers in another order differ by about 1e-6 nats, a wrong
# mask by 0.1.
_EXACT_WITHIN = 1e-3
# Mean difference, in half precision: SmolLM2-135M in bf16 has 0.04 to 0.06 (one token up to 0.27), with a
# wrong mask 0.4 to 1.9.
_EXACT_WITHIN_HALF = 0.2


@dataclass(frozen=True, slots=True)
class Policy:
    """A loaded model, and how batches are laid out for it."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    """Compute dtype of the forward; parameters keep their own."""
    packs: bool
    """False where only padded rows are exact for this model."""

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
                objective is not None and objective.in_place and embedding.weight is head.weight
            )
        mixed = any(parameter.dtype != self.dtype for parameter in self.model.parameters())
        # Each weight is used once per forward: cached casts would only keep a second copy of the model.
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed, cache_enabled=False):
            output = self.model.base_model(input_ids=batch.input_ids, use_cache=False, **batch.model_kwargs)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.scored_rows]
        # Outside autocast: the head's tile is fp32, since bf16 logits are off by up to 0.06 nats.
        return token_logps(hidden, head, batch.targets, objective=objective)

    def sequence_logps(self, groups: Sequence[Group]) -> list[Tensor]:
        """One (C,) tensor of token log-probs per sequence, on the policy's device."""
        batch = self.layout(groups).to(self.device)
        return list(torch.split(self.batch_logps(batch), batch.lengths))


def load_policy(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trainable: bool,
    param_dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
) -> Policy:
    """Load a model from safetensors.

    Args:
        folder: In the Hugging Face layout.
        dtype: Compute dtype.
        device: Where it goes.
        trainable: Whether gradients of these weights will be taken.
        param_dtype: What parameters are stored in where they are trainable; otherwise it is ``dtype``.
        options: More arguments of ``from_pretrained``; with a ``device_map`` they say where the model goes.

    Raises:
        ConfigError: transformers cannot load the folder, weights are missing, or no layout is exact.
    """
    # Its bars for reading and writing files would stand between ours.
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=param_dtype if trainable else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **(options or {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"transformers cannot load the model ({str(error).splitlines()[0]})",
            where=str(folder),
            fix='check the folder with `python -c "from transformers import AutoConfig"` and its config.json',
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"the checkpoint lacks {len(missing)} of the model's weights, such as {missing[0]}",
            where=str(folder),
            why="transformers fills them with random numbers",
            fix="copy the whole model, or save it again from the model that was trained",
        )
    if not options or "device_map" not in options:
        model.to(device)
    # Dropout must be off: the reference was scored without it, so with it policy != reference at step 0.
    model.eval()
    model.requires_grad_(trainable)
    packs = _packing_is_exact(model, device)
    return Policy(model, device, dtype, packs)


def head_of(model: PreTrainedModel) -> Head:
    """The head's parameters and the scalars that some architectures apply to its logits."""
    projection = model.get_output_embeddings()
    config = model.config.get_text_config()
    divide_by = getattr(config, "logits_scaling", None)  # Granite
    scale = getattr(config, "logit_scale", None)  # Cohere
    if divide_by:
        scale = 1 / divide_by
    return Head(
        weight=projection.weight,
        bias=getattr(projection, "bias", None),
        scale=float(scale) if scale else 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
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


@torch.no_grad()
def _packing_is_exact(model: PreTrainedModel, device: torch.device) -> bool:
    """Compare log-probs of both layouts with the model's own logits on a few random tokens.

    Leaves the model with the attention that the result calls for.

    Raises:
        ConfigError: Neither layout gives the model's own log-probs.
    """
    stock = model.config._attn_implementation
    vocab = model.get_output_embeddings().weight.shape[0]
    tokens = np.random.default_rng(0).integers(0, vocab, size=24, dtype=np.int32)
    group = (TokenSequence(tokens[:9], tokens[9:14]), TokenSequence(tokens[:9], tokens[14:]))
    expected = torch.cat([_stock_logps(model, sequence, device) for sequence in group])

    def exact(*, packs: bool) -> bool:
        try:
            found = torch.cat(Policy(model, device, model.dtype, packs=packs).sequence_logps([group]))
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return False  # The model does not take what this layout needs, or its decoder is hidden.
        difference = (found - expected).abs()
        if model.dtype == torch.float32:
            return bool(difference.max() <= _EXACT_WITHIN)
        return bool(difference.mean() <= _EXACT_WITHIN_HALF)

    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if layer_types <= {"full_attention", "sliding_attention"}:
        try:
            model.set_attn_implementation(SEGMENT_ATTENTION)
        except ValueError:
            pass  # The model does not go through the attention interface.
        else:
            if exact(packs=True):
                return True
            model.set_attn_implementation(stock)
    if not exact(packs=False):
        raise ConfigError(
            f"the log-probs of {type(model).__name__} cannot be reproduced from its hidden states",
            why="its decoder or head does something unknown here, so every log-prob would be wrong",
            fix="train a supported architecture (Llama, Qwen, Mistral, Gemma, Phi, OLMo, Granite, ...)",
        )
    return False


def _stock_logps(model: PreTrainedModel, sequence: TokenSequence, device: torch.device) -> Tensor:
    joined = np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64)
    ids = torch.from_numpy(joined).to(device)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(sequence.prompt_ids) - 1 : -1].float()
    targets = ids[0, len(sequence.prompt_ids) :, None]
    logps: Tensor = logits.log_softmax(-1).gather(1, targets).squeeze(1)
    return logps
