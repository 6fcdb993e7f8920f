"""Rotary embeddings that depend on more than a token's position, fixed for a whole run.

Two kinds of scaling read how long the longest sequence of a batch is: LongRoPE (Ding et al. 2024, arXiv
2402.13753; Phi-3, Phi-4-mini) takes its long factors for all as soon as one position is beyond the original
context, and dynamic NTK (transformers' ``dynamic``) stretches its base with the longest sequence seen.
Engines differ in whom they ask: transformers the batch, vLLM its own limit. A log-prob would depend on what
shares the batch, or on the engine.

Here the longest sequence that a run allows (``max_length``) decides, once, for vLLM, the transformers scorer
and the trainer alike, and the fingerprint says what it decided.
"""

from collections.abc import Mapping
from typing import Any

FIXED = "fixed"
"""The embedding of a position is the same in every batch."""
PINNED = ("rope_parameters", "max_position_embeddings")
"""Names in a text model's configuration that ``pin_rope`` may change."""
_LONG = ("longrope", "su")


def describe_rope(config: Any, max_length: int) -> str:
    """What a run's longest sequence makes of a model's rotary embedding, as the fingerprint records it.

    Args:
        config: The model's configuration, as transformers reads it.
        max_length: Most tokens of a sequence.

    Returns:
        ``fixed`` where it makes no difference; ``longrope:long`` or ``longrope:short``, the factors in use;
        ``dynamic:N``, the length that the base is stretched for.
    """
    text = config.get_text_config()
    found = set()
    for parameters in _flat(getattr(text, "rope_parameters", None) or {}):
        if _kind(parameters) in _LONG:
            found.add(f"longrope:{_side(parameters, text, max_length)}")
        elif _is_dynamic(parameters):
            found.add(f"dynamic:{max(max_length, text.max_position_embeddings)}")
    return ",".join(sorted(found)) or FIXED


def pin_rope(config: Any, max_length: int) -> Any:
    """Give a model's configuration, before the model is made, an embedding that no batch changes.

    Args:
        config: A transformers configuration; changed in place.
        max_length: Most tokens of a sequence.

    Returns:
        The configuration.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        return config
    if _is_nested(parameters):
        text.rope_parameters = {name: _pinned(value, text, max_length) for name, value in parameters.items()}
    else:
        text.rope_parameters = _pinned(parameters, text, max_length)
    if any(map(_is_dynamic, _flat(parameters))):
        # vLLM makes its table of positions this long.
        text.max_position_embeddings = max(max_length + 1, text.max_position_embeddings)
    return config


def _pinned(parameters: Mapping[str, Any], text: Any, max_length: int) -> dict[str, Any]:
    found = dict(parameters)
    if _kind(found) in _LONG:
        side = _side(found, text, max_length)
        for name in ("factor", "mscale"):
            if f"{side}_{name}" in found:
                found |= {f"{other}_{name}": found[f"{side}_{name}"] for other in ("short", "long")}
    elif _is_dynamic(found):
        factor, context = float(found.pop("factor")), text.max_position_embeddings
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = int(head_dim * found.get("partial_rotary_factor", 1.0))
        # transformers' modeling_rope_utils._compute_dynamic_ntk_parameters, for this length.
        stretch = factor * max(max_length, context) / context - (factor - 1)
        found["rope_theta"] *= stretch ** (width / (width - 2))
        found["rope_type"] = "default"
        found.pop("type", None)  # the older name, which may not say otherwise
    return found


def _side(parameters: Mapping[str, Any], text: Any, max_length: int) -> str:
    original = parameters.get("original_max_position_embeddings")
    original = (
        original or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
    )
    return "long" if max_length > original else "short"


def _is_dynamic(parameters: Mapping[str, Any]) -> bool:
    # With an alpha the base is stretched once and for all (Hunyuan).
    return _kind(parameters) == "dynamic" and "factor" in parameters and not parameters.get("alpha")


def _flat(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(parameters.values()) if _is_nested(parameters) else [parameters]


def _is_nested(parameters: Mapping[str, Any]) -> bool:
    """Whether each kind of layer has its own."""
    return bool(parameters) and all(isinstance(value, Mapping) for value in parameters.values())


def _kind(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "default")
