"""A model without numbers: its layers are filled while they run; and which files can be read by part."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from all_architectures import model_types
from architecture_results import save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_opt.optimize.forward.architecture import auto_class, decoder_layers, model_without_weights
from dpo_opt.optimize.forward.load_policy import lay_out_policy, load_policy
from dpo_opt.optimize.forward.stored_weights import StoredWeights, find_stored
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.model_config import load_model_config

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


def unread(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, StoredWeights]:
    model = model_without_weights(folder, dtype=dtype)
    weights = find_stored(model, folder)
    assert isinstance(weights, StoredWeights), weights
    weights.fill_buffers(CPU)
    return model, weights


def test_a_layer_has_its_weights_only_while_it_runs(tiny_model: Path) -> None:
    model, weights = unread(tiny_model)
    layers = list(decoder_layers(model))
    filled: list[list[bool]] = []

    def look(*_: object) -> None:
        filled.append([not any(p.is_meta for p in layer.parameters()) for layer in layers])

    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), weights.while_used(CPU):
        for layer in layers:
            layer.register_forward_pre_hook(look)
        found = model(input_ids=ids).logits
        look()
    assert filled == [[True, False], [False, True], [False, False]]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(found, AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=ids).logits)


def test_a_layer_that_breaks_off_gives_its_weights_back(tiny_model: Path) -> None:
    model, weights = unread(tiny_model)

    def break_off(*_: object) -> None:
        raise torch.OutOfMemoryError("planted")

    hook = next(decoder_layers(model)).register_forward_pre_hook(break_off)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError), weights.while_used(CPU):
        model(input_ids=torch.arange(3, 12)[None])
    assert all(parameter.is_meta for parameter in model.parameters())
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_and_what_was_compared_are_those_of_the_whole_model(
    tiny_model: Path, dtype: torch.dtype
) -> None:
    whole = load_policy(tiny_model, dtype=dtype, device=CPU, trainable=True, param_dtype=dtype)
    found = lay_out_policy(
        tiny_model,
        dtype=dtype,
        device=CPU,
        trainable=True,
        max_length=None,
        param_dtype=dtype,
        once=lambda work: work(),
    )
    assert not isinstance(found, str)
    probe, expected = found.policy.probe, whole.probe
    assert probe is not None
    assert expected is not None
    assert torch.equal(probe.expected, expected.expected)
    assert (found.policy.packs, *probe[3:]) == (whole.packs, *expected[3:])
    named = [(name, p.shape, p.dtype, p.requires_grad) for name, p in found.policy.model.named_parameters()]
    assert named == [(name, p.shape, p.dtype, p.requires_grad) for name, p in whole.model.named_parameters()]


def test_rows_are_read_alone(tiny_model: Path) -> None:
    _, weights = unread(tiny_model)
    for name, tensor in load_file(tiny_model / WEIGHTS).items():
        assert torch.equal(weights.read(name), tensor)
        assert torch.equal(weights.read(name, slice(3, 7)), tensor[3:7])


def with_one_more(tensors: dict[str, Tensor]) -> None:
    tensors["model.again.weight"] = tensors["lm_head.weight"].clone()


def without_one(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def of_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(3)


def in_whole_numbers(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)


@pytest.mark.parametrize("change", [with_one_more, without_one, of_another_shape, in_whole_numbers])
def test_what_is_not_plain_is_left_to_transformers(
    model: Path, change: Callable[[dict[str, Tensor]], None]
) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    found = find_stored(model_without_weights(model), model)
    assert found == (
        "not all of its weights are floating-point numbers"
        if change is in_whole_numbers
        else "its files do not hold each of its weights once, under the model's name for it"
    )


def test_a_damaged_file_is_refused(model: Path) -> None:
    whole = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(whole[:-5])
    with pytest.raises(ConfigError, match="truncated or damaged"):
        find_stored(model_without_weights(model), model)


@pytest.mark.parametrize("key", ["dtype", "data_offsets"])
def test_a_file_that_only_its_library_finds_damaged_is_refused_by_name(model: Path, key: str) -> None:
    raw = (model / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    norms = [entry for name, entry in header.items() if name.endswith("layernorm.weight")]
    # Of another size than its bytes have; the bytes of another tensor.
    norms[0][key] = "F64" if key == "dtype" else norms[1][key]
    text = json.dumps(header).encode()
    (model / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    with pytest.raises(ConfigError, match="the safetensors file is truncated or damaged") as caught:
        find_stored(model_without_weights(model), model)
    assert caught.value.where == str(model / WEIGHTS)
    assert caught.value.fix is not None


COMMON = ["gemma3_text", "gemma4_text", "phi3", "gpt2", "qwen3", "olmo2", "granite", "gpt_oss", "mamba2"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", COMMON)
@pytest.mark.filterwarnings("ignore")
def test_names_dtypes_and_buffers_are_those_that_transformers_loads(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    assert model_type in model_types()
    save_tiny(model_type, tmp_path)
    model, weights = unread(tmp_path, dtype)
    weights.fill(lambda name, parameter: weights.read(name).to(parameter.dtype))
    config = load_model_config(tmp_path)
    whole = auto_class(config).from_pretrained(tmp_path, config=config, dtype=dtype)
    for found, expected in (
        (model.named_parameters(), whole.named_parameters()),
        (model.named_buffers(), whole.named_buffers()),
    ):
        for (name, tensor), (other, same) in zip(found, expected, strict=True):
            assert (name, tensor.dtype) == (other, same.dtype)
            assert torch.equal(tensor, same), name
