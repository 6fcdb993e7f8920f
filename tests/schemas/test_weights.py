import contextlib
import hashlib
import json
import shutil
import struct
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from model_edits import change_config, change_weights
from refusals import refusal

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.models import config_digest, find_model
from dpo_opt.schemas.weights import nonfinite_tensor, parameter_count, weights_digest


def test_weights_digest_is_the_documented_formula(tiny_model: Path) -> None:
    from safetensors.torch import load_file

    lines = []
    for name, tensor in load_file(tiny_model / "model.safetensors").items():
        content = hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()
        lines.append(f"{name} F32 {'x'.join(map(str, tensor.shape))} {content}")
    assert len(lines) == 21
    assert weights_digest(tiny_model) == hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def test_a_resharded_copy_is_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "m", max_shard_size="50KB")
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3
    assert weights_digest(tmp_path / "m") == weights_digest(tiny_model)
    assert config_digest(tmp_path / "m") == config_digest(tiny_model)
    assert parameter_count(tmp_path / "m") == parameter_count(tiny_model)


def test_one_changed_weight_is_another_model(tiny_model: Path, model: Path) -> None:
    change_weights(model, lambda found: found["model.layers.1.mlp.up_proj.weight"][5, 7].add_(1e-3))
    assert weights_digest(model) != weights_digest(tiny_model)


def test_exchanged_tensors_are_another_model(tiny_model: Path, model: Path) -> None:
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"

    def exchange(found: dict[str, Any]) -> None:
        assert found[a].shape == found[b].shape
        found[a], found[b] = found[b], found[a]

    change_weights(model, exchange)
    assert weights_digest(model) != weights_digest(tiny_model)


def test_parameters_are_counted(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert parameter_count(tiny_model) == sum(p.numel() for p in model.parameters())


def two_versions(model: Path) -> dict[str, dict[str, str]]:
    """Two whole files of weights that differ in one tensor; an index of each, none of them written."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, model / "model-best.safetensors", metadata={"format": "pt"})
    names = ("model-00001-of-00001.safetensors", "model-best.safetensors")
    return {name: dict.fromkeys(tensors, name) for name in names}


def write_index(model: Path, weight_map: object) -> None:
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_the_weights_are_those_that_the_index_names(tiny_model: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    first, best = two_versions(model).items()
    digests, loaded = [], []
    for _, weight_map in (first, best):
        write_index(model, weight_map)
        find_model(str(model))
        digests.append(weights_digest(model))
        assert parameter_count(model) == parameter_count(tiny_model)
        state = AutoModelForCausalLM.from_pretrained(model).state_dict()
        loaded.append(state["lm_head.weight"][3, 4].item())
    assert loaded[0] != loaded[1]
    assert digests[0] == weights_digest(tiny_model) != digests[1]


def test_mistrals_other_format_is_no_part_of_a_model(tiny_model: Path, model: Path) -> None:
    (model / "consolidated.safetensors").write_bytes(b"never read")
    (model / "consolidated.safetensors.index.json").write_text("{")
    assert weights_digest(Path(find_model(str(model)))) == weights_digest(tiny_model)
    assert nonfinite_tensor(model) is None


def test_weights_that_two_programs_would_read_otherwise_are_refused(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    error = refusal(lambda: find_model(str(model)))
    assert error.what.startswith("other.safetensors stands beside model.safetensors")
    assert "rm MODEL/other.safetensors" in str(error.fix)
    (model / "other.safetensors").unlink()
    content = (model / "model.safetensors").read_bytes()
    weight_map, _ = two_versions(model).values()
    write_index(model, weight_map)
    (model / "model.safetensors").write_bytes(content)
    error = refusal(lambda: find_model(str(model)))
    assert error.what.startswith("model.safetensors stands beside model.safetensors.index.json")
    assert str(model / "model.safetensors") in str(error.fix)
    (model / "model.safetensors").unlink()
    find_model(str(model))
    change_config(model, transformers_weights="model-best.safetensors")
    assert "transformers_weights" in refusal(lambda: find_model(str(model))).what


def test_an_index_that_is_not_of_these_files_is_refused(model: Path) -> None:
    first, best = two_versions(model)
    both = {"lm_head.weight": first, "model.norm.weight": best}
    for weight_map, what in (
        ({"lm_head.weight": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"lm_head.weight": first, "more": first}, f"the tensor more is not in {first}"),
        (both, f"the tensor lm_head.weight is in {first} and in {best}"),
        ([], "not readable as an index"),
        ({"lm_head.weight": "../model.safetensors"}, "../model.safetensors is missing"),
    ):
        write_index(model, weight_map)
        assert what in refusal(lambda: weights_digest(model)).what
        # By every reader of weights, whatever it reads of them: also where no head is compared.
        for tied in (True, False):
            change_config(model, tie_word_embeddings=tied)
            assert what in refusal(lambda: find_model(str(model))).what
    (model / "model.safetensors.index.json").write_text("{")
    assert "not readable as an index" in refusal(lambda: find_model(str(model))).what


def test_weights_that_transformers_would_not_find_are_refused_with_what_mends_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process and several would read them otherwise, and so would vLLM."""
    (model / "model.safetensors").rename(model / "weights.safetensors")
    for read in (lambda: find_model(str(model)), lambda: weights_digest(model)):
        error = refusal(read)
        assert error.what.startswith("there is no model.safetensors")
    monkeypatch.chdir(model.parent)
    commands, _, then = str(error.fix).partition(", then ")
    subprocess.run(["bash", "-ec", commands], check=True)
    assert then == "pass MODEL"
    assert weights_digest(find_model("./MODEL"))
    (model / "weights.safetensors").rename(model / "consolidated.safetensors")
    assert refusal(lambda: find_model(str(model))).what.startswith("there is no model.safetensors")


def test_bytes_after_the_last_tensor_are_refused(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    assert "truncated or damaged" in refusal(lambda: weights_digest(model)).what


def test_a_link_to_weights_that_are_gone_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "nowhere")
    error = refusal(lambda: find_model(str(model)))
    assert error.where == str(model / "model.safetensors")
    assert "link to a file that is not there" in error.what


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_weights_are_refused(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    error = refusal(lambda: weights_digest(model))
    assert error.where == str(path)
    assert "truncated or damaged" in error.what


@pytest.mark.parametrize(
    "header",
    [
        [],
        "text",
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**9]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
        },
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
        },
        {"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}},
        {"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 4]}},
    ],
)
def test_a_header_that_makes_no_sense_is_refused(model: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    assert "truncated or damaged" in refusal(lambda: weights_digest(model)).what


def test_no_flipped_byte_of_the_weights_goes_unnoticed(model: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    right = weights_digest(model)
    data = 8 + int.from_bytes(whole[:8], "little")
    # The header's keys and offsets, and bytes of the tensors; its metadata and padding do not matter.
    first = whole.index(b'"lm_head')
    for place in [*range(first, first + 120), *range(data, len(whole), 20_011)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with contextlib.suppress(ConfigError):
            assert weights_digest(model) != right, place
    path.write_bytes(whole)
    assert weights_digest(model) == right


def write_tensors(path: Path, tensors: dict[str, tuple[str, bytes]]) -> None:
    """A safetensors file of flat tensors: dtype and bytes by name."""
    header, end = {}, 0
    for name, (dtype, content) in tensors.items():
        size = {"F64": 8, "F32": 4, "I64": 8}.get(dtype, 2)
        shape = [len(content) // size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        end += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + b"".join(content for _, content in tensors.values())
    )


LARGEST = {
    "F64": struct.pack("<d", -1.7976931348623157e308),
    "F32": struct.pack("<f", -3.4028234e38),
    "F16": struct.pack("<e", -65504.0),
    "BF16": b"\x7f\xff",
}
NOT_FINITE = {
    "F64": [struct.pack("<d", value) for value in (float("nan"), float("inf"), float("-inf"))],
    "F32": [struct.pack("<f", value) for value in (float("nan"), float("inf"), float("-inf"))],
    "F16": [struct.pack("<e", value) for value in (float("nan"), float("inf"), float("-inf"))],
    "BF16": [b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"],
}


@pytest.mark.parametrize("dtype", NOT_FINITE)
def test_a_tensor_with_a_value_that_is_no_number_is_named(dtype: str, tmp_path: Path) -> None:
    good = {"head": (dtype, LARGEST[dtype] * 3), "ids": ("I64", b"\xff" * 8), "empty": (dtype, b"")}
    write_tensors(tmp_path / "model.safetensors", good)
    assert nonfinite_tensor(tmp_path) is None
    for value in NOT_FINITE[dtype]:
        others = {"good": good["head"], "bad": (dtype, LARGEST[dtype] * 5 + value), "worse": (dtype, value)}
        write_tensors(tmp_path / "model.safetensors", others)
        assert nonfinite_tensor(tmp_path) == "bad"


def test_the_last_value_of_a_large_tensor_is_looked_at_in_little_memory(tmp_path: Path) -> None:
    content = bytes(2**26 + 2)
    write_tensors(tmp_path / "model.safetensors", {"large": ("BF16", content + NOT_FINITE["BF16"][0])})
    tracemalloc.start()
    try:
        assert nonfinite_tensor(tmp_path) == "large"
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
