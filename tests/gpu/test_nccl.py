"""The step of tests/optimize/test_distributed.py on two GPUs. Not run yet: it wants a machine with two."""

from pathlib import Path

import pytest
import torch
import torchrun_steps
from processes import torchrun
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.gpu


def test_two_gpus_make_the_step_of_one_cpu(tiny_model: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are fewer than two CUDA devices")
    models, alone, several = (tmp_path / name for name in ("models", "alone", "several"))
    config = AutoConfig.from_pretrained(tiny_model)
    for name in ("untied", "tied"):
        config.tie_word_embeddings = name == "tied"
        AutoModelForCausalLM.from_config(config).float().save_pretrained(models / name)
    alone.mkdir()
    several.mkdir()
    torchrun_steps.take_steps(models, alone, torchrun_steps.ALONE, None)
    torchrun(2, torchrun_steps.__file__, models, several, alone, gpus=True)
    for name in ("untied-9", "tied-9", "untied-3", "untied-1", "frozen", "untied-second"):
        expected, found = (load_file(folder / f"{name}.safetensors") for folder in (alone, several))
        assert found.keys() == expected.keys()
        for entry, tensor in expected.items():
            error = (found[entry].double() - tensor.double()).abs().max()
            assert error <= 1e-4 * tensor.double().abs().max(), (name, entry)
    held, loaded = load_file(alone / "tied-held.safetensors"), load_file(several / "tied-loaded.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in held.items())
