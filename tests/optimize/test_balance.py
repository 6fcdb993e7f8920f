"""What a forward costs, counted by hand for a Llama and finite for every architecture."""

import pytest
import torch
import transformers
from all_architectures import BROKEN, MORE_THAN_TEXT, auto_class, model_types, tiny_config

from dpo_opt.optimize.forward.architecture import decoder_of
from dpo_opt.optimize.forward.balance import ForwardCost, forward_cost
from dpo_opt.optimize.forward.policy import Policy


def cost(model: transformers.PreTrainedModel) -> ForwardCost:
    return forward_cost(Policy(model, torch.device("meta"), torch.float32, packs=True))


def without_weights(model_type: str) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return auto_class(model_type).from_config(tiny_config(model_type))


def test_a_llama_costs_its_matrices_and_its_heads() -> None:
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    # Query and output are 64 x 128, key and value 64 x 64, gate, up and down 64 x 96.
    layer = 2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 96
    expected = ForwardCost(2.0 * 4 * layer, 4.0 * 4 * 4 * 32, 2.0 * 101 * 64)
    for tied in (False, True):
        config.tie_word_embeddings = tied
        with torch.device("meta"):
            assert cost(transformers.LlamaForCausalLM(config)) == expected


def test_rows_of_embeddings_are_no_products() -> None:
    config = transformers.GPT2Config(vocab_size=101, n_embd=64, n_layer=2, n_head=4, n_positions=4096)
    with torch.device("meta"):
        found = cost(transformers.GPT2LMHeadModel(config))
    assert found == ForwardCost(2.0 * 2 * 12 * 64**2, 4.0 * 2 * 64, 2.0 * 101 * 64)


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_text", "gemma4_unified"])
def test_layers_may_have_heads_of_their_own_size(model_type: str) -> None:
    model = without_weights(model_type)
    widths = [layer.self_attn.o_proj.in_features for layer in decoder_of(model).layers]
    assert len(set(widths)) == 2
    assert cost(model).per_key == 4.0 * sum(widths)


def test_a_wrapper_costs_what_its_text_model_costs() -> None:
    wrapper = without_weights("gemma3")
    with torch.device("meta"):
        text = transformers.Gemma3ForCausalLM(wrapper.config.text_config)
    assert cost(wrapper) == cost(text)


@pytest.mark.parametrize("model_type", sorted({*model_types()} - {*BROKEN} - {*MORE_THAN_TEXT}))
def test_every_architecture_has_a_cost(model_type: str) -> None:
    model = without_weights(model_type)
    if model.get_output_embeddings() is None:
        pytest.skip("it has no head that is one matrix, and is refused when it is loaded")
    found = cost(model)
    assert found.per_row > 0
    assert found.per_scored > 0
    assert found.per_key >= 0
