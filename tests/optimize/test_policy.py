"""Log-probs and gradients against each architecture's own full-logit forward, one sequence at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CPU, HEADS, PACKED, PADDED, SIZES, contrast, groups, load, save_random
from model_edits import change_config, change_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_opt.optimize.forward import attention
from dpo_opt.optimize.forward.architecture import head_of
from dpo_opt.optimize.forward.layout import choose_layout
from dpo_opt.optimize.forward.packing import Segment, pack
from dpo_opt.optimize.forward.policy import Policy, compute_dtype
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.pairs import TokenSequence

FullLogps = Callable[[PreTrainedModel, TokenSequence], Tensor]


def assert_exact(folder: Path, full_logps: FullLogps) -> Policy:
    """The policy's log-probs and gradients are those of separate forwards through full logits."""
    policy = load(folder)
    # Other kernels leave out what some models want, such as soft-capping.
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = [full_logps(stock, sequence) for group in groups() for sequence in group]
    contrast(expected).backward()
    found = policy.sequence_logps(groups())
    contrast(found).backward()

    assert torch.cat(expected).std() > 0.2
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=1e-4)
    own = dict(policy.model.named_parameters())
    exact_grads = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in exact_grads.values())
    assert largest > 1
    assert {n for n, p in own.items() if p.grad is not None} == set(exact_grads)
    for name, exact in exact_grads.items():
        torch.testing.assert_close(
            own[name].grad, exact, rtol=0, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
    return policy


@pytest.mark.parametrize("name", PACKED)
def test_packing_and_sharing_change_neither_log_probs_nor_gradients(
    tmp_path: Path, full_logps: FullLogps, name: str
) -> None:
    save_random(*PACKED[name], tmp_path)
    policy = assert_exact(tmp_path, full_logps)
    assert policy.packs
    with torch.no_grad():
        batch = pack(groups())
        right = policy.batch_logps(batch)
        # The same rows, the other sequences cut off from their prefix: were this equal, nothing was tested.
        segments = tuple(Segment(s.start, s.stop, s.start, s.start) for s in batch.model_kwargs["segments"])
        batch.model_kwargs["segments"] = segments
        assert (policy.batch_logps(batch) - right).abs().max() > 0.05


@pytest.mark.parametrize("name", PADDED)
def test_models_whose_prefix_cannot_be_shared_use_padded_rows_and_are_exact(
    tmp_path: Path, full_logps: FullLogps, name: str
) -> None:
    save_random(*PADDED[name], tmp_path)
    policy = assert_exact(tmp_path, full_logps)
    assert not policy.packs


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    save_random("BertConfig", sizes, tmp_path)
    with pytest.raises(ConfigError, match="it is not causal") as caught:
        load(tmp_path)
    assert "supported architecture" in str(caught.value)


def test_the_chosen_completion_does_not_reach_the_rejected_one(policy: Policy) -> None:
    prompt, chosen, rejected = (np.array(ids, dtype=np.int32) for ids in ([0, 7, 8], [9, 10, 11], [12, 13]))
    other = np.array([14, 15, 16], dtype=np.int32)
    with torch.no_grad():
        first, second = (
            policy.sequence_logps([(TokenSequence(prompt, c), TokenSequence(prompt, rejected))])
            for c in (chosen, other)
        )
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


def test_batch_composition_does_not_matter(policy: Policy) -> None:
    with torch.no_grad():
        together = policy.sequence_logps(groups())
        alone = [logps for group in groups() for logps in policy.sequence_logps([group])]
    for mine, exact in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-5)


def test_bins_of_padded_models_count_the_padding(policy: Policy) -> None:
    padded = Policy(policy.model, CPU, torch.float32, packs=False)
    long_and_short = [groups()[1], *[groups()[2]] * 6]
    # 2 x 41 rows, then 2 x 6 each: 82 + 72 without padding, 14 x 41 with it.
    assert len(policy.bins(long_and_short, 160)) == 1
    assert padded.bins(long_and_short, 160) == [[0], [1, 2, 3, 4, 5, 6]]


def test_dropout_is_off(tmp_path: Path, full_logps: FullLogps) -> None:
    save_random("LlamaConfig", {**HEADS, "attention_dropout": 0.5}, tmp_path)
    assert_exact(tmp_path, full_logps)


def test_bf16_computes_on_fp32_masters(tiny_model: Path) -> None:
    exact = load(tiny_model).sequence_logps(groups())
    policy = load(tiny_model, dtype=torch.bfloat16)
    found = policy.sequence_logps(groups())
    contrast(found).backward()
    assert policy.packs
    for parameter in policy.model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    difference = (torch.cat(found) - torch.cat(exact)).abs()
    assert 1e-4 < difference.max() < 0.2


def test_a_frozen_bf16_model_packs_and_takes_no_gradient(tiny_model: Path) -> None:
    policy = load(tiny_model, dtype=torch.bfloat16, trainable=False, param_dtype=torch.bfloat16)
    assert policy.packs
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    found = policy.sequence_logps(groups())
    assert not found[0].requires_grad
    exact = torch.cat(load(tiny_model).sequence_logps(groups()))
    assert 1e-4 < (torch.cat(found) - exact).abs().max() < 0.5


def test_the_head_is_the_models_own_parameter(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "tie_word_embeddings": True}, tmp_path)
    model = load(tmp_path).model
    assert head_of(model).weight is model.get_input_embeddings().weight


def test_dtype_auto_is_fp32_on_a_cpu_and_bf16_on_a_gpu() -> None:
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16


def test_an_unknown_architecture_is_refused(model: Path) -> None:
    change_config(model, model_type="no-such-model")
    with pytest.raises(ConfigError, match="transformers cannot make this model"):
        load(model)


def test_a_checkpoint_without_all_weights_is_refused(model: Path) -> None:
    change_weights(model, lambda found: found.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ConfigError, match=r"lacks 1 of the model's weights, such as model\.layers\.1\.mlp\.up"
    ):
        load(model)


def test_a_checkpoint_with_weights_that_have_no_place_is_refused(model: Path) -> None:
    bias = {"model.layers.1.self_attn.q_proj.bias": torch.ones(4 * 32)}
    change_weights(model, lambda found: found.update(bias))
    with pytest.raises(
        ConfigError, match=r"holds 1 weights .* such as model\.layers\.1\.self_attn\.q_proj\.bias"
    ):
        load(model)


def test_layers_that_the_configuration_does_not_count_are_refused(model: Path) -> None:
    change_config(model, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"weights that the model has no place for"):
        load(model)


def test_what_older_programs_leave_in_a_checkpoint_is_no_weight(model: Path) -> None:
    left = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    change_weights(model, lambda found: found.update(left))
    assert load(model).packs


def test_a_weight_of_another_shape_is_named_with_both(model: Path) -> None:
    change_config(model, num_key_value_heads=4)
    with pytest.raises(ConfigError, match=r"k_proj\.weight has shape \(64, 64\), .* gives it \(128, 64\)"):
        load(model)


@pytest.mark.parametrize(
    "values",
    [
        {"max_position_embeddings": None},
        {"max_position_embeddings": "512"},
        {"rms_norm_eps": "1e-5"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"hidden_act": None},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"pad_token_id": 9999},
        {"dtype": "torch.no-such-dtype"},
        {"quantization_config": "x"},
    ],
    ids=str,
)
def test_a_value_that_no_model_can_have_is_no_traceback(model: Path, values: dict[str, Any]) -> None:
    change_config(model, **values)
    with pytest.raises(ConfigError) as caught:
        load(model)
    assert str(model) in str(caught.value)
    assert caught.value.fix


def test_a_context_shorter_than_what_loading_tries_is_no_fault(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 8, "bos_token_id": 1, "eos_token_id": 2}
    save_random("GPT2Config", {"vocab_size": 101, **sizes}, tmp_path)
    assert load(tmp_path).packs


def test_a_vocabulary_of_special_tokens_alone_is_no_fault(tmp_path: Path) -> None:
    save_random("LlamaConfig", {**HEADS, "vocab_size": 3}, tmp_path)
    assert load(tmp_path).packs


def test_weights_that_are_no_numbers_are_named(model: Path) -> None:
    change_weights(model, lambda found: found["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan))
    with pytest.raises(
        ConfigError, match=r"weights that are NaN or infinite: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load(model)


def test_activations_beyond_a_dtypes_range_name_the_dtype(model: Path) -> None:
    factors = {"up_proj": 3000.0, "gate_proj": 300.0, "down_proj": 1 / 3000}

    def enlarge(found: dict[str, Tensor]) -> None:
        for name, weight in found.items():
            weight *= factors.get(name.split(".")[-2], 1)

    change_weights(model, enlarge)
    assert load(model).packs
    with pytest.raises(ConfigError, match="logits are not finite in float16") as caught:
        load(model, dtype=torch.float16, trainable=False, param_dtype=None)
    assert caught.value.fix == "pass --dtype bfloat16 or --dtype float32"


def test_quantized_weights_are_not_trained(model: Path) -> None:
    change_config(model, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match="quantized"):
        load(model)


def test_fp32_products_have_all_digits_whatever_the_process_allows(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    exact = torch.nn.functional.linear

    def spy(*args: Any) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return exact(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        policy.sequence_logps(groups())
        choose_layout(policy.model, CPU, torch.float32, folder=Path("unused"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}


def test_a_kernel_that_is_wrong_in_half_precision_alone_is_noticed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the fused kernel of a GPU would be, which no forward in fp32 asks."""
    exact = attention.segment_attention

    def leaking(module: Any, query: Tensor, key: Tensor, *args: Any, **settings: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            # Of another row of the pack a little.
            key = key + 0.3 * key.roll(7, dims=2)
        return exact(module, query, key, *args, **settings)

    mapping = attention.AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, attention.SEGMENT_ATTENTION, leaking)
    assert load(tiny_model).packs
    with pytest.raises(ConfigError, match="computed in bfloat16 on cpu, log-probs differ"):
        load(tiny_model, dtype=torch.bfloat16)


def test_a_layer_that_does_not_ask_our_attention_is_not_packed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However right its numbers are on a few tokens."""
    exact = attention._note_call
    monkeypatch.setattr(attention, "_note_call", lambda m: None if m.layer_idx == 1 else exact(m))
    assert not load(tiny_model).packs


def test_a_probe_leaves_half_precision_weights_as_they_were(tiny_model: Path) -> None:
    policy = load(tiny_model, dtype=torch.bfloat16, trainable=False, param_dtype=torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    for (name, mine), (_, theirs) in zip(
        policy.model.state_dict().items(), stock.state_dict().items(), strict=True
    ):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name
    rotary: Any = policy.model.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
