"""Several processes each read their own part of a model: the same policy, bit by bit, with fewer bytes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrun_loading
from architecture_results import save_tiny
from processes import torchrun
from transformers import AutoConfig, AutoModelForCausalLM

# Model, settings, bytes of a stored weight, and the fault that is planted.
Case = tuple[str, dict[str, Any], int, str]
HALF = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
QUICK: dict[str, Case] = {
    "tied": ("tied", {}, 4, ""),
    "half": ("half", HALF, 2, ""),
    "adapter": ("tied", {"use_peft": True, "dtype": "bfloat16"}, 4, ""),
    "whole": ("tied", {}, 4, "whole"),
    "rows": ("tied", {}, 4, "rows"),
}
SLOW: dict[str, Case] = {
    "untied": ("untied", {}, 4, ""),
    "half as float32": ("half", {"dtype": "bfloat16"}, 2, ""),
    "recomputed": ("untied", {"dtype": "bfloat16", "activation_checkpointing": "full"}, 4, ""),
    "adapter on float32": ("untied", {"use_peft": True}, 4, ""),
    "twice": ("tied", {}, 4, "untied"),
    # Buffers that the files hold, embeddings that are scaled, weights in more than two dimensions.
    "gemma4_text": ("gemma4_text", HALF, 4, ""),
    "gpt_oss": ("gpt_oss", {}, 4, ""),
    "phi3": ("phi3", {}, 4, ""),
    # Its experts are merged while they are read.
    "qwen3_moe": ("qwen3_moe", {}, 4, ""),
}
Loaded = dict[str, dict[str, Any]]


def save_models(root: Path, tiny_model: Path) -> None:
    """In several files with an index, with numbers of rows that two processes cannot divide evenly."""
    odd = {"vocab_size": 301, "intermediate_size": 129}
    for name, tied, dtype in (
        ("untied", False, torch.float32),
        ("tied", True, torch.float32),
        ("half", True, torch.bfloat16),
    ):
        config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=tied, **odd)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config).to(dtype)
        model.save_pretrained(root / name, max_shard_size="100KB")
        assert (root / name / "model.safetensors.index.json").is_file()


def load_on(processes: int, root: Path, cases: dict[str, Case]) -> list[Loaded]:
    """What each process found."""
    listed = [
        (name, str(root / model), settings, fault) for name, (model, settings, _, fault) in cases.items()
    ]
    (root / "cases.json").write_text(json.dumps(listed), encoding="utf-8")
    torchrun(processes, torchrun_loading.__file__, root / "cases.json")
    return [json.loads((root / f"loaded-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Loaded]:
    root = tmp_path_factory.mktemp("loaded")
    save_models(root, tiny_model)
    return load_on(2, root, QUICK)


def require_same(loaded: Sequence[Loaded], name: str, case: Case) -> None:
    """All numbers are those of whole models, and each process read its part of them, no byte more."""
    _, settings, stored, _ = case
    for found in (process[name] for process in loaded):
        assert (found["differs"], found["same cost"], found["said"]) == ([], True, []), name
        assert found["read"] == stored * found["own of the files"], name
        # The embedding, which is the largest, has an odd number of rows.
        assert found["largest"] < 0.51 * found["largest whole"], name
    assert (
        sum(process[name]["own of the files"] for process in loaded)
        == loaded[0][name]["weights of the files"]
    )
    assert settings.get("use_peft") is None or loaded[0][name]["own"] > loaded[0][name]["own of the files"]


@pytest.mark.parametrize("name", [name for name, case in QUICK.items() if not case[3]])
def test_each_process_reads_its_part_alone_and_the_policy_is_the_same(
    loaded: list[Loaded], name: str
) -> None:
    require_same(loaded, name, QUICK[name])


def test_processes_that_read_whole_tensors_are_noticed(loaded: list[Loaded]) -> None:
    assert all(process["whole"]["differs"] == [] for process in loaded)
    with pytest.raises(AssertionError):
        require_same(loaded, "whole", QUICK["whole"])


def test_a_process_that_read_another_ones_part_is_refused(loaded: list[Loaded]) -> None:
    for process in loaded:
        assert "log-probs differ from the same model in fp32" in process["rows"]["refused"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_on_three_processes_so_is_every_kind_of_model(tiny_model: Path, tmp_path: Path) -> None:
    save_models(tmp_path, tiny_model)
    for name in ("gemma4_text", "gpt_oss", "phi3", "qwen3_moe"):
        save_tiny(name, tmp_path / name)
    found = load_on(3, tmp_path, SLOW)
    for name, case in SLOW.items():
        if name in ("twice", "qwen3_moe"):
            continue
        require_same(found, name, case)
    with pytest.raises(AssertionError):
        require_same(found, "twice", SLOW["twice"])
    # As before, each process reads all of it; the first one says why.
    for process in found:
        assert (process["qwen3_moe"]["differs"], process["qwen3_moe"]["read"]) == ([], 0)
        (line,) = process["qwen3_moe"]["said"]
        assert line.endswith("transformers rearranges such a model's weights while it reads them")


@pytest.mark.slow
def test_main_memory_holds_a_part_of_the_model_where_it_held_all_of_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    """400 MB of weights, on two processes: the first also has embedding, head and a layer at a time."""
    save_models(tmp_path, tiny_model)
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 27, "vocab_size": 4000}
    config = AutoConfig.from_pretrained(tiny_model, num_attention_heads=8, num_key_value_heads=8, **size)
    model = AutoModelForCausalLM.from_config(config)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weights > 4e8
    model.save_pretrained(tmp_path / "large", max_shard_size="100MB")
    del model

    def peaks(fault: str) -> list[float]:
        # What is loaded first imports what is needed.
        cases: dict[str, Case] = {"small": ("tied", {}, 4, ""), "large": ("large", {}, 4, fault)}
        return [process["large"]["peak"] / weights for process in load_on(2, tmp_path, cases)]

    # Half of the weights stay with each process.
    by_part, as_before = peaks(""), peaks("as before")
    assert min(by_part) > 0.4
    assert max(by_part) < 0.75
    assert min(as_before) > 0.95
