"""Finds the parts of a transformers model: the class that loads it, its decoder, layers and head.

Only text is scored and trained. A model that also takes images or audio is loaded whole, so that it can be
saved whole, but only its text decoder runs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from dpo_opt.optimize.forward.logps import Head
from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.model_config import load_model_config, model_errors

# Names in configurations of the number that logits are multiplied or divided by.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, MuseGlimmer
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def auto_class(config: PretrainedConfig) -> Any:
    """The ``Auto`` class that loads this model with everything that its checkpoint holds."""
    declared = set(getattr(config, "architectures", None) or ())
    kind = type(config)
    wrappers: Any = AutoModelForImageTextToText._model_mapping
    plain = AutoModelForCausalLM._model_mapping
    if kind in wrappers and (kind not in plain or wrappers[kind].__name__ in declared):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def model_without_weights(
    folder: Path, *, config: PretrainedConfig | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model on the ``meta`` device, in evaluation mode: shapes, no data.

    Args:
        folder: The model's.
        config: Its configuration; None: that of its folder as it is.
        dtype: Dtype of its parameters.

    Raises:
        ConfigError: transformers cannot build the model from its config.json.
    """
    config = config or load_model_config(folder)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    except model_errors() as error:
        raise ConfigError(
            f"transformers cannot make this model ({first_line(error)})",
            where=str(folder / "config.json"),
            fix="correct that value, or copy the model's own config.json again",
        ) from error
    return model.eval()


def decoder_of(model: PreTrainedModel) -> Any:
    """The module that turns token ids into the hidden states that the head reads.

    It is the model itself if the model does not expose its decoder.
    """
    wraps = model.config.get_text_config() is not model.config
    # get_decoder returns any module called "decoder", which in a few text models is the head.
    found = model.get_decoder() if wraps or model.base_model is model else model.base_model
    # Text models cut out of a wrapper (Llama 4, Mllama) keep the wrapper's base_model_prefix.
    return getattr(model, "model", model) if found is model else found


def decoder_layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The decoder layers: entries of the outermost module lists, not of lists inside a layer."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from decoder_layers(child)


def projection_of(model: PreTrainedModel) -> Any:
    """The module that makes logits of hidden states; None where the model has none."""
    return model.get_output_embeddings()


def head_of(model: PreTrainedModel) -> Head:
    """The head's parameters and the scalars that some architectures apply to its logits.

    Raises:
        AttributeError: The model has no head of the usual kind.
    """
    projection = projection_of(model)
    config = model.config.get_text_config()
    return Head(
        weight=projection.weight,
        bias=getattr(projection, "bias", None),
        scale=_scale(config),
        softcap=next((float(cap) for name in _SOFTCAPS if (cap := getattr(config, name, None))), None),
    )


def _scale(config: PretrainedConfig) -> float:
    multiplies = config.model_type.startswith(_MULTIPLIES_BY_LOGITS_SCALING)
    found = 1.0
    for name in (*_MULTIPLIERS, *_DIVISORS):
        value = getattr(config, name, None)
        if value:
            found *= value if name in _MULTIPLIERS or multiplies else 1 / value
    return float(found)


def special_ids(config: PretrainedConfig) -> set[int]:
    """Ids of tokens that are not text, such as the placeholder of an image."""

    def walk(values: Mapping[Any, Any]) -> Iterator[int]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from walk(value)
            elif str(name).endswith(("_token_id", "_token_index", "_token_ids")):
                yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))

    return set(walk(config.to_dict()))
