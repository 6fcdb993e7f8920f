"""Which layers may get an adapter.

peft ignores a name that matches nothing as long as another one matches, and an adapter on the head would stay
untrained, because the head's weight is read and the layer is not called.
"""

from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_opt.schemas.errors import ConfigError

# peft turns layers of these names into adapters of all experts, wherever in a model with experts they stand.
_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def has_experts(model: nn.Module) -> bool:
    """Whether experts are one tensor of three dimensions, as in transformers 5: they get no adapter here."""
    return any(parameter.ndim == 3 and ".experts." in name for name, parameter in model.named_parameters())


def offered_layers(model: PreTrainedModel) -> Mapping[str, nn.Module]:
    """Linear layers that can get an adapter: not the head, nor what peft would take for an expert."""
    head = model.get_output_embeddings()
    avoided = _EXPERT_NAMES if has_experts(model) else set()
    return {
        name: module
        for name, module in model.named_modules()
        # Not its subclasses: some routers are, and return more than one tensor.
        if type(module) in (nn.Linear, Conv1D) and module is not head and _leaf(name) not in avoided
    }


def chosen_layers(model: PreTrainedModel, targets: Iterable[str]) -> tuple[str, ...]:
    """The layers whose names end with one of ``targets``, in the model's order.

    Raises:
        ConfigError: A target names no layer, or also something else.
    """
    offered = offered_layers(model)
    special = {
        id(model.get_output_embeddings()): "the head",
        id(model.get_input_embeddings()): "an embedding",
    }
    chosen: set[str] = set()
    for target in targets:
        named = {n: m for n, m in model.named_modules() if n == target or n.endswith(f".{target}")}
        wrong = next((name for name in named if name not in offered), None)
        if wrong is not None or not named:
            if wrong is None:
                what = f"the model has no layer named {target!r}"
            else:
                kind = special.get(id(named[wrong]), "no plain linear layer")
                if has_experts(model) and _leaf(wrong) in _EXPERT_NAMES:
                    kind = "in a model with experts, whose adapters are not supported"
                what = f"{wrong} is {kind}"
            raise ConfigError(
                f"--lora-target-modules {target}: {what}",
                why="it would stay untrained in silence, or the adapter would not load in vLLM",
                fix=f"pass some of: {short_names(offered)}",
            )
        chosen |= set(named)
    return tuple(name for name in offered if name in chosen)


def short_names(layers: Iterable[str]) -> str:
    """The last parts of the layers' names, as a person passes them."""
    return " ".join(sorted({_leaf(name) for name in layers}))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
