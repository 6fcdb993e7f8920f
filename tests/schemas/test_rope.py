"""Rotary embeddings that would follow a batch's longest sequence, against transformers' own formulas."""

from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, Phi3Config, PhimoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpo_opt.schemas.rope import FIXED, describe_rope, pin_rope

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SHORT, LONG = [1.0, 1.2, 1.5, 1.8, 2.0, 2.2, 2.4, 2.6], [1.0, 2.0, 6.0, 12.0, 13.0, 14.0, 15.0, 16.0]


def longrope(kind: type = Phi3Config, **more: Any) -> Any:
    return kind(
        **SIZES,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_scaling={
            "type": "longrope",
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 64,
            **more,
        },
        pad_token_id=0,
    )


def dynamic() -> LlamaConfig:
    return LlamaConfig(
        **SIZES, max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    )


def frequencies(config: Any, seq_len: int) -> torch.Tensor:
    """As transformers computes them for a batch whose longest sequence has so many tokens."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        theta = config.rope_parameters["rope_theta"]
        return 1.0 / theta ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)[0].double()


@pytest.mark.parametrize("max_length", [63, 64, 65, 512])
@pytest.mark.parametrize("make", [longrope, dynamic])
def test_every_batch_gets_what_the_longest_allowed_sequence_would(make: Any, max_length: int) -> None:
    wanted = frequencies(make(), max_length)
    pinned = pin_rope(make(), max_length)
    for batch in (5, 64, 65, 512):
        torch.testing.assert_close(frequencies(pinned, batch), wanted, rtol=1e-6, atol=0)
    if max_length > 64:
        assert not torch.allclose(frequencies(make(), 5), wanted)


def test_the_older_name_of_the_kind_does_not_stay_behind() -> None:
    config = LlamaConfig(**SIZES, max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 4.0})
    found = pin_rope(config, 128)
    assert "type" not in found.rope_parameters
    found.standardize_rope_params()
    found.validate_rope()


def test_the_boundary_is_the_original_context() -> None:
    assert [describe_rope(longrope(), n) for n in (63, 64, 65)] == ["longrope:short"] * 2 + ["longrope:long"]
    assert [describe_rope(dynamic(), n) for n in (10, 64, 65)] == ["dynamic:64", "dynamic:64", "dynamic:65"]


def test_the_attention_factor_of_phimoe_is_pinned_as_well() -> None:
    config = pin_rope(longrope(PhimoeConfig, short_mscale=1.2, long_mscale=1.5), 512)
    assert config.rope_parameters["short_mscale"] == config.rope_parameters["long_mscale"] == 1.5
    assert config.rope_parameters["short_factor"] == LONG


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    ],
)
def test_embeddings_of_the_position_alone_are_left_as_they_are(scaling: dict[str, Any] | None) -> None:
    config = LlamaConfig(**SIZES, max_position_embeddings=256, rope_scaling=scaling)
    before = config.to_dict()
    assert describe_rope(config, 10_000) == FIXED
    assert pin_rope(config, 10_000).to_dict() == before


def test_each_kind_of_layer_has_its_own_and_wrappers_are_looked_into() -> None:
    scaling = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
    }
    text = Gemma3TextConfig(**SIZES, head_dim=16, max_position_embeddings=64, rope_parameters=scaling)
    wrapper = Gemma3Config(text_config=text)
    assert describe_rope(wrapper, 128) == "dynamic:128"
    found = pin_rope(wrapper, 128).text_config
    assert found.rope_parameters["sliding_attention"] == scaling["sliding_attention"]
    assert found.rope_parameters["full_attention"]["rope_type"] == "default"
    assert found.rope_parameters["full_attention"]["rope_theta"] > 1e6
    # vLLM's table of positions must hold the longest sequence and the token that it samples after it.
    assert found.max_position_embeddings == 129
