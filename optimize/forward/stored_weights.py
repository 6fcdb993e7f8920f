"""A model whose parameters have no numbers yet, and where in its files each of them lies.

So several processes each read only their own part of it, and its layers may be filled one at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from dpo_opt.optimize.forward.architecture import decoder_layers
from dpo_opt.optimize.forward.around_forward import around_forward
from dpo_opt.optimize.forward.precision import HALF
from dpo_opt.schemas.errors import ConfigError, first_line
from dpo_opt.schemas.weights import loaded_tensors

_FLOATS = {"F64", "F32", "F16", "BF16"}


class _Place(NamedTuple):
    """Where a model has a parameter. A tied one has several places."""

    module: torch.nn.Module
    attribute: str
    name: str
    """Of the tensor in the model's files."""


class StoredWeights:
    """The parameters of a model on the ``meta`` device, as its files hold them.

    The places stay known when an adapter is put around the model's layers, and when the model is sharded.
    """

    def __init__(self, model: PreTrainedModel, files: Mapping[str, Path]) -> None:
        self._model = model
        self._files = files
        first: dict[int, str] = {}
        self._places = []
        for full, parameter in model.named_parameters(remove_duplicate=False):
            name = first.setdefault(id(parameter), full)
            owner, _, attribute = full.rpartition(".")
            self._places.append(_Place(model.get_submodule(owner), attribute, name))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of the files, in main memory and in the dtype that it is stored in there.

        Args:
            name: Of the tensor.
            rows: The part along its first dimension; only that is read. None: the whole tensor.
        """
        # Opened for each tensor: what was read of a file stays in this process until it is closed.
        with safe_open(self._files[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
            return found.clone()

    def fill_buffers(self, device: torch.device) -> None:
        """Give the model's buffers their numbers: those of its files, and those that it computes."""
        for module in self._model.modules():
            for name in module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
                    # transformers computes them with a module's other numbers, and each module's once.
                    module._is_hf_initialized = False
        self._model.initialize_weights()
        for full, buffer in _kept_buffers(self._model).items():
            owner, _, name = full.rpartition(".")
            self._model.get_submodule(owner)._buffers[name] = self.read(full).to(buffer.dtype)
        for buffer in self._model.buffers():
            buffer.data = buffer.to(device)

    def fill(self, filled: Callable[[str, torch.nn.Parameter], Tensor]) -> None:
        """Give every parameter its numbers, once and for all.

        Args:
            filled: Gives what stands in the place of a parameter, of which it gets the name in the files.
        """
        _put(self._places, filled)

    @contextlib.contextmanager
    def while_used(self, device: torch.device) -> Iterator[None]:
        """Let the model run while the block runs. Each layer has its numbers only while it runs."""
        layers = list(decoder_layers(self._model))
        of_layers = {id(module): layer for layer in layers for module in layer.modules()}
        inside: dict[int, list[_Place]] = {id(layer): [] for layer in layers}
        outside: list[_Place] = []
        for place in self._places:
            layer = of_layers.get(id(place.module))
            (outside if layer is None else inside[id(layer)]).append(place)

        def filled(name: str, parameter: torch.nn.Parameter) -> Tensor:
            return self.read(name).to(device, parameter.dtype)

        with contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(around_forward(layer, partial(_filled, inside[id(layer)], filled)))
            with _filled(outside, filled):
                yield

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Parameters on the CPU stand for those without numbers while the block runs. They take no memory."""
        with _filled(self._places, lambda _, p: torch.zeros((), dtype=p.dtype).expand(p.shape)):
            yield


def find_stored(model: PreTrainedModel, folder: Path) -> StoredWeights | str:
    """Where the parameters of a model lie in its files, or why only transformers can read them, in words.

    Args:
        model: On the ``meta`` device, as transformers made it.
        folder: Its folder.

    Raises:
        ConfigError: A safetensors file is truncated or damaged, or what is loaded is not certain.
    """
    stored = {tensor.name: tensor for tensor in loaded_tensors(folder)}
    for file in sorted({tensor.file for tensor in stored.values()}):
        _require_readable(file)
    wanted = dict(model.named_parameters()) | _kept_buffers(model)
    if any(tensor.dtype not in _FLOATS for tensor in stored.values()):
        return "not all of its weights are floating-point numbers"
    # transformers keeps the former in float32 in both kinds of half precision, the latter in float16 alone.
    widened = model._keep_in_fp32_modules_strict or (
        model.dtype == torch.float16 and model._keep_in_fp32_modules
    )
    if model.dtype in HALF and widened:
        return "some of its weights stay in float32"
    if get_model_conversion_mapping(model, add_legacy=False):
        return "transformers rearranges such a model's weights while it reads them"
    if {name: tensor.shape for name, tensor in stored.items()} != {
        name: tuple(tensor.shape) for name, tensor in wanted.items()
    }:
        return "its files do not hold each of its weights once, under the model's name for it"
    return StoredWeights(model, {name: tensor.file for name, tensor in stored.items()})


def _require_readable(file: Path) -> None:
    # Which dtypes there are only the library knows.
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ConfigError(
            f"the safetensors file is damaged ({first_line(error)})",
            where=str(file),
            why="every log-prob would come from its weights",
            fix="copy or download the model again",
        ) from error


def _kept_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that a model's files hold."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _put(
    places: list[_Place], filled: Callable[[str, torch.nn.Parameter], Tensor]
) -> list[tuple[_Place, torch.nn.Parameter]]:
    """Put other parameters into places. Gives back those that were there."""
    made: dict[int, torch.nn.Parameter] = {}
    before = []
    for place in places:
        old = getattr(place.module, place.attribute)
        if id(old) not in made:
            made[id(old)] = torch.nn.Parameter(filled(place.name, old), requires_grad=old.requires_grad)
        setattr(place.module, place.attribute, made[id(old)])
        before.append((place, old))
    return before


@contextlib.contextmanager
def _filled(places: list[_Place], filled: Callable[[str, torch.nn.Parameter], Tensor]) -> Iterator[None]:
    before = _put(places, filled)
    try:
        yield
    finally:
        for place, old in before:
            setattr(place.module, place.attribute, old)
