"""Every causal language model that transformers has: exact in packed rows, exact in padded rows, or
refused.
"""

from importlib.metadata import version
from pathlib import Path

import all_architectures
import pytest
import torch
from architecture_results import CPU, LONGEST, documented, result_of, save_tiny, series, windows

from dpo_opt.optimize.forward.load_policy import load_policy
from dpo_opt.schemas.errors import ConfigError

TYPES = [name for name in all_architectures.model_types() if name not in all_architectures.BROKEN]
DOCUMENTED = documented(series(version("transformers")))


def test_there_are_many_and_few_cannot_be_built() -> None:
    assert len(TYPES) > 200
    assert len(all_architectures.BROKEN) < 12


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.filterwarnings("ignore")
def test_it_is_exact_or_refused_by_name(tmp_path: Path, model_type: str) -> None:
    layout, difference = result_of(model_type, tmp_path)
    # Log-probs of random models are large, and so is what the order of additions does to them.
    assert difference < 1e-3
    if DOCUMENTED:
        assert layout == DOCUMENTED[model_type], "docs/architectures.md says otherwise"


@pytest.mark.parametrize("model_type", [n for n in TYPES if windows(all_architectures.tiny_config(n))])
@pytest.mark.filterwarnings("ignore")
def test_a_window_longer_than_what_loading_tries_is_kept_to(tmp_path: Path, model_type: str) -> None:
    layout, difference = result_of(model_type, tmp_path, window=25)
    assert difference < 1e-3
    if DOCUMENTED:
        # With a window of its own a model is loaded in float32 alone.
        assert layout == DOCUMENTED[model_type].removesuffix(", float32 only")


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_attention_to_the_best_keys_alone_is_refused_beyond_them(tmp_path: Path, model_type: str) -> None:
    save_tiny(model_type, tmp_path)
    with pytest.raises(
        ConfigError, match=f"attends only to its {LONGEST} best keys, but sequences of 65"
    ) as caught:
        load_policy(tmp_path, dtype=torch.float32, device=CPU, trainable=True, max_length=LONGEST + 1)
    assert caught.value.fix is not None
    assert f"--max-length {LONGEST}" in caught.value.fix
