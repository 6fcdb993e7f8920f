"""Decides which layers get a LoRA adapter (``--lora-target-modules``); refuses names that would do nothing.

peft ignores a name that matches no layer as long as another name matches. An adapter on a layer that is never
called would stay untrained. Such layers are the head, whose weight is only read, and all layers for images
and sound, because pairs are text.
"""

from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_opt.optimize.forward.architecture import decoder_of
from dpo_opt.schemas.errors import ConfigError

# In a model with experts, peft turns any layer of these names into adapters of all experts.
_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "classifier"}
# Exact class names: some routers are subclasses of a linear layer, and return more than one tensor.
_LINEAR = {"Linear", "FalconLinear"}
# Parts of names in a decoder of layers that text does not run, or that no gradient reaches: image and sound
# towers (Phi-4-multimodal), image experts (Ernie 4.5 VL), attention to an encoder, key and patch selectors.
_UNREACHED = (
    *("vision", "visual", "image", "audio", "speech", "cross", "encoder_attn", "encoder_decoder"),
    *("indexer", "patcher"),
)
# Model types in which peft refuses the layer called ``_REFUSED_BY_PEFT``.
_STATE_SPACE = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_REFUSED_BY_PEFT = "out_proj"
_READ = "dt_proj"
"""The step size of state-space layers: the model reads the layer's weight and never calls the layer."""
_IDLE = "not run by text alone, and nothing else is trained"


def has_experts(model: nn.Module) -> bool:
    """Whether the model has experts as one 3-D tensor, as in transformers 5. They get no adapter here."""
    return any(parameter.ndim == 3 and ".experts." in name for name, parameter in model.named_parameters())


def offered_layers(model: PreTrainedModel) -> Mapping[str, nn.Module]:
    """Linear layers that can get an adapter, by their names in the model.

    These are layers of the text decoder. The head, and layers that peft refuses or would mistake for experts,
    are left out.
    """
    experts = has_experts(model)
    return {n: m for n, m in _run_by_text(model).items() if _obstacle(model, n, m, experts) is None}


def chosen_layers(model: PreTrainedModel, targets: Iterable[str]) -> tuple[str, ...]:
    """The layers whose names end with one of ``targets``, in the model's order.

    If a name matches both layers that text runs and layers that it does not run, the latter are skipped.

    Raises:
        ConfigError: A target matches no layer, or matches one that cannot get an adapter.
    """
    offered, run, experts = offered_layers(model), _run_by_text(model), has_experts(model)
    chosen: set[str] = set()
    for target in targets:
        named = {n: m for n, m in model.named_modules() if n == target or n.endswith(f".{target}")}
        running = named.keys() & run.keys()
        wrong = next((n for n in named if n not in offered and (n in running or not running)), None)
        if wrong is not None or not named:
            if wrong is None:
                what = f"the model has no layer named {target!r}"
            else:
                what = f"{wrong} is {_obstacle(model, wrong, named[wrong], experts) or _IDLE}"
            raise ConfigError(
                f"--lora-target-modules {target}: {what}",
                why="it would silently stay untrained, or the adapter would not load in vLLM",
                fix=f"pass some of: {short_names(offered)}",
            )
        chosen |= running
    return tuple(name for name in offered if name in chosen)


def left_out(model: PreTrainedModel) -> str | None:
    """Which linear layers the default leaves out, in words; None if it is only the head."""
    notes, run, head = [], _run_by_text(model), model.get_output_embeddings()
    if has_experts(model):
        notes.append("the experts get no adapter, nor do their router and the layers next to them")
    if model.config.model_type in _STATE_SPACE:
        notes.append(f"the {_REFUSED_BY_PEFT} of state-space layers gets no adapter: peft refuses it there")
    idle = [n for n, m in model.named_modules() if _is_linear(m) and m is not head and n not in run]
    if idle:
        notes.append(f"layers that text alone does not run get no adapter, such as {idle[0]}")
    return "; ".join(notes) or None


def _run_by_text(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder's modules that run when a sequence is only text, by their names in the model."""
    decoder = decoder_of(model)
    inside = {id(module) for module in decoder.modules()}
    for layer in decoder.modules():
        if hasattr(layer, "cross_attn") and not hasattr(layer, "self_attn"):
            # Mllama skips such a layer where there is no image.
            inside -= {id(module) for module in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and not any(part in name for part in _UNREACHED)
    }


def _obstacle(model: PreTrainedModel, name: str, module: nn.Module, experts: bool) -> str | None:
    """Why a module can get no adapter, as the end of "it is ..."; None if it can get one."""
    if module is model.get_output_embeddings():
        return "the head"
    if module is model.get_input_embeddings():
        return "an embedding"
    if experts and _leaf(name) in _EXPERT_NAMES:
        return "in a model with experts, whose adapters are not supported"
    if not _is_linear(module):
        return "not a plain linear layer"
    if model.config.model_type in _STATE_SPACE and _leaf(name) == _REFUSED_BY_PEFT:
        return "in a state-space layer, where peft refuses it"
    if _leaf(name) == _READ:
        return "a layer whose weight is read without calling it"
    return None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or type(module).__name__ in _LINEAR


def short_names(layers: Iterable[str]) -> str:
    """The last parts of the layers' names, as ``--lora-target-modules`` takes them."""
    return " ".join(sorted({_leaf(name) for name in layers}))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
