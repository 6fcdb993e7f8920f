"""A causal language model as this toolkit uses it: batches in, token log-probs out.

Loading checks, by measurement, that the packed forward is exact for this very model; where it is not
(recurrent layers, soft-capped attention, a head this file does not know), padded rows are used instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_opt.optimize.attention import SEGMENT_ATTENTION
from dpo_opt.optimize.logps import Head, token_logps
from dpo_opt.optimize.packing import Batch, Group, pack, packed_size, pad
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence

# fp32 forwards of the same numbers in another order differ by about 1e-6 nats; a wrong mask by 0.1.
_EXACT_WITHIN = 1e-3


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

    def size(self, group: Group) -> int:
        """Rows the group takes in this layout."""
        if self.packs:
            return packed_size(group)
        return sum(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in group)

    def batch_logps(self, batch: Batch) -> Tensor:
        """(S,) float32 log-probs, in nats, of the batch's targets; differentiable."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.model.dtype != self.dtype):
            output = self.model.base_model(input_ids=batch.input_ids, use_cache=False, **batch.model_kwargs)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.scored_rows]
        # Outside autocast: the head's tile is fp32, since bf16 logits are off by up to 0.06 nats.
        return token_logps(hidden, head_of(self.model), batch.targets)

    def sequence_logps(self, groups: Sequence[Group]) -> list[Tensor]:
        """One (C,) tensor of token log-probs per sequence, on the policy's device."""
        batch = self.layout(groups).to(self.device)
        return list(torch.split(self.batch_logps(batch), batch.lengths))


def load_policy(folder: Path, *, dtype: torch.dtype, device: torch.device, trainable: bool) -> Policy:
    """Load a model from safetensors.

    Args:
        folder: In the Hugging Face layout.
        dtype: Compute dtype. Parameters of a trainable policy are fp32 masters whatever this is: at DPO's
            learning rates plain bf16 parameters ignore most updates.
        device: Where it goes.
        trainable: Whether gradients will be taken.

    Raises:
        ConfigError: transformers cannot load the folder.
    """
    # Its bars for reading and writing files would stand between ours.
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if trainable else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"transformers cannot load the model ({str(error).splitlines()[0]})",
            where=str(folder),
            fix='check the folder with `python -c "from transformers import AutoConfig"` and its config.json',
        ) from error
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
    # In half precision the layouts round differently; a wrong mask is still far outside this.
    within = _EXACT_WITHIN if model.dtype == torch.float32 else 0.25

    def exact(policy: Policy) -> bool:
        found = torch.cat(policy.sequence_logps([group]))
        return bool((found - expected).abs().max() <= within)

    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if layer_types <= {"full_attention", "sliding_attention"}:
        try:
            model.set_attn_implementation(SEGMENT_ATTENTION)
            if exact(Policy(model, device, model.dtype, packs=True)):
                return True
        except (NotImplementedError, TypeError, ValueError):
            pass  # The model does not go through the attention interface: padded rows below.
        model.set_attn_implementation(stock)
    if not exact(Policy(model, device, model.dtype, packs=False)):
        raise ConfigError(
            f"the log-probs of {type(model).__name__} cannot be reproduced from its hidden states",
            why="its head does something this toolkit does not know, so every log-prob would be wrong",
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
