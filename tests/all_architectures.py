"""A tiny configuration with random weights of every causal language model that transformers has."""

import dataclasses
from copy import deepcopy
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 101
ORDINARY = range(3, 72)  # the tokens that mean nothing but themselves to every type, such as no image's place
LAYERS = 4  # in towers too, so that the last hidden states but one or two are there
HEADS = 4
HEAD = 16

# Each size and the settings that get it. Windows, and what sparse attention keeps, hide most of 40 tokens.
SIZES = """
1 n_group topk_group n_groups mamba_n_groups num_nextn_predict_layers num_mem_blocks n_shared_experts
1 num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers num_expert_group
1 attn_layer_offset
2 num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts depth encoder_layers
2 num_encoder_layers max_window_layers attn_layer_period index_topk_blocks index_kpool
4 num_experts n_routed_experts num_local_experts moe_num_experts num_attention_heads n_head n_heads
4 num_heads encoder_attention_heads decoder_attention_heads num_encoder_attention_heads attention_heads
4 num_decoder_attention_heads conf_num_attention_heads linear_num_heads linear_num_key_heads
4 linear_num_value_heads swa_num_attention_heads index_n_heads index_block_size codebook_size
4 num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks layers
8 qk_rope_head_dim qk_nope_head_dim rotary_dim state_size ssm_state_size mamba_d_state mamba_dt_rank
8 time_step_rank linear_key_head_dim linear_value_head_dim linear_head_dim mamba_n_heads mamba_num_heads
8 sliding_window attention_window_size window_size local_attention sliding_window_size attention_chunk_size
8 keep_window_size index_topk
12 v_head_dim
16 head_dim q_lora_rank kv_lora_rank d_kv d_head dim_head kv_channels attention_head_size index_head_dim
16 mamba_d_head mamba_head_dim swa_head_dim chunk_size mamba_chunk_size block_size
28 image_size
32 moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
32 expert_ffn_hidden_size share_expert_dim hidden_size_per_layer_input base_channels
64 hidden_size n_embd d_model embed_dim embedding_dim emb_dim embedding_size input_embedding_size
64 output_embedding_size word_embed_proj_dim projection_dim out_hidden_size output_dim hidden_size_global
64 projection_hidden_size vision_hidden_size text_hidden_size encoder_hidden_size lru_width
64 backbone_hidden_size decoder_hidden_size image_token_embed_dim router_hidden_size patch_embed_hidden_size
64 output_channels adapter_in_dim adapter_out_dim adapter_input_size codebook_dim num_embeddings
64 projector_input_dim projector_output_dim vision_output_dim
96 intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff d_ff d_inner n_inner dim_ff
96 mlp_dim feed_forward_size intermediate_size_mlp dense_intermediate_size alignment_intermediate_size
96 shared_intermediate_size projector_hidden_size projection_intermediate_size
101 vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input
101 encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size
256 max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions
256 context_length position_embedding_size
"""
SIZE = {name: int(size) for size, *names in map(str.split, SIZES.strip().splitlines()) for name in names}
DEPTHS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"}
DEPTHS |= {"num_blocks", "layers"}
# Sizes that are given even where the default is none, which some types cannot be built with.
ALWAYS = {"head_dim", "sliding_window", "moe_intermediate_size", "top_k_experts", "num_experts"}
ALWAYS |= {"num_experts_per_tok", "n_routed_experts", "n_shared_experts"}
KEY_VALUE_HEADS = {
    "num_key_value_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
}
# A BERT is a causal model only as a decoder; some types' own scale of the logits leaves all tokens alike.
VALUES = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | {
    "use_sliding_window": True,
    "is_decoder": True,
    "causal": True,
    "logit_scale": 0.5,
    "output_multiplier": 1.5,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
# What a type or its part is given over the table, by its model_type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 72, "audio_token_offset": 76},
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 100, **{f"IMGIMG{c}Z": i for i, c in enumerate("ABCD", 90)}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "diffusion_gemma_text": {"global_head_dim": 32},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 12,
    },
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 99, "<|visual token 000000|>": 98}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "florence_vision": {
        "embed_dim": (64,) * 4,
        "depths": (1,) * 4,
        "num_heads": (4,) * 4,
        "num_groups": (4,) * 4,
    },
    "gemma3n_text": {"intermediate_size": 96},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "inkling_text": {"logits_mup_width_multiplier": 2.0, "rel_extent": 16},
    "inkling_vision": {"num_hidden_layers": 4, "patch_size": 4},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "molmo2_adapter": {"vision_feature_layer": [3, 1]},
    "molmo2_vision": {"image_size": [28, 28], "num_position_embeddings": 4},
    "muse_spark_audio": {"hidden_sizes": (32, 32, 32, 64)},
    "paddleocr_vl_text": {"rope_parameters": ROPE},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (16, 48),
        "hash_seed": 0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "step3p5": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # whose row transformers sets to zero in what it loads
    "zaya": {"num_experts_per_tok": 1},
}
# Parts without which a type cannot be made, or whose default is not what its published weights have.
PARTS: dict[str, dict[str, Any]] = {
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision"}},
    "fast_vlm": {"vision_config": {"model_type": "siglip_vision_model"}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "granite4_vision": {"text_config": {"model_type": "granite4_vision_text"}},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}},
}
BROKEN: dict[str, str] = {
    "evolla": "a model of proteins, which transformers lists but no Auto class of text builds",
    "gemma3n": "its vision tower is a model of the timm package; gemma3n_text is its text model",
    "musicgen": "a model of sounds, whose decoder cannot be built from the whole model's configuration",
    "musicgen_melody": "as musicgen",
    "perception_lm": "its vision tower is a model of the timm package; its text model is a llama",
    "shieldgemma2": "a classifier of images, whose saved weights transformers does not find again",
}
IMAGE = "it takes an image with every text"
ENCODER = "its decoder reads what an encoder makes of an image or another text"
DRAFT = "it drafts for another model and takes that model's keys and hidden states"
# Types that are built, saved and loaded like any other, but whose forward cannot score a text alone.
MORE_THAN_TEXT: dict[str, str] = {
    "blip": IMAGE,
    "blip-2": IMAGE,
    "diffusion_gemma": "it predicts the blocks of a canvas from noise, not the next token",
    "florence2": ENCODER,
    "gemma4_assistant": DRAFT,
    "gemma4_unified_assistant": DRAFT,
    "idefics": IMAGE,
    "instructblip": IMAGE,
    "instructblipvideo": IMAGE,
    "kosmos-2": IMAGE,
    "pi0": "it predicts a robot's actions from images and the robot's state",
    "pix2struct": ENCODER,
    "pp_formulanet": ENCODER,
    "t5gemma2": ENCODER,
    "udop": ENCODER,
    "vision-encoder-decoder": ENCODER,
}


def model_types() -> list[str]:
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def auto_class(model_type: str) -> Any:
    """The class that builds the type as its published weights hold it: a wrapper with its towers."""
    if model_type == "llama4":  # whose wrapper transformers 5.24 cannot run without an image
        return AutoModelForCausalLM
    wrapper = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if wrapper else AutoModelForCausalLM


def tiny_config(model_type: str) -> PreTrainedConfig:
    return _shrunk(CONFIG_MAPPING[model_type](**deepcopy(PARTS.get(model_type, {}))), {})


def _shrunk(config: PreTrainedConfig, places: dict[str, int]) -> PreTrainedConfig:
    """The configuration and its parts at a tiny size; `places` are the ids given to special tokens so far.

    What the table does not know keeps the type's default, or what the wrapper gave a part instead of it.
    """
    values = _values(config)
    usual = {} if config.model_type in PARTS else _values(type(config)())
    depth = next((values[name] for name in sorted(DEPTHS & values.keys())), 0)
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            part = _shrunk(value, places)
            tiny[name] = part if name in _fields(config) else part.to_dict()
        elif name in KEY_VALUE_HEADS and value != 0:
            tiny[name] = HEADS if value == values.get(KEY_VALUE_HEADS[name]) else HEADS // 2
        elif name == "num_kv_shared_layers":
            tiny[name] = LAYERS if value == depth else min(value, LAYERS // 2)
        elif name in VALUES and (value is not None or name.endswith("_id")):
            tiny[name] = VALUES[name]
        elif name.endswith(("token_id", "token_index", "token_ids")) and value is not None:
            tiny[name] = _place(name, value, places)
        elif name in SIZE and ((value is None and name in ALWAYS) or (type(value) is int and value)):
            tiny[name] = SIZE[name]
        elif isinstance(value, list) and depth and len(value) == depth:
            kinds = [kind for i, kind in enumerate(value) if kind not in value[:i]]
            if 1 < len(kinds) < depth:  # otherwise the type makes its own list for fewer layers
                tiny[name] = _sample(name, kinds)
        elif name not in usual or value != usual[name]:
            tiny[name] = value
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        turned = HEAD * values["rope_parameters"].get("partial_rotary_factor", 1.0)
        turned = int(SIZE["qk_rope_head_dim"] if "qk_rope_head_dim" in values else turned) // 2
        part = turned * 3 // 8
        tiny["rope_parameters"] = {
            **values["rope_parameters"],
            "mrope_section": [part, part, turned - 2 * part],
        }
    return type(config)(**{**tiny, **deepcopy(OVERRIDES.get(config.model_type, {}))})


def _fields(config: PreTrainedConfig) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if field.init]


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """What the configuration holds for its fields and parts, past what varies between layers."""
    held = vars(config)
    parts = {name: part for name, part in held.items() if isinstance(part, PreTrainedConfig)}
    places = {name: config.attribute_map.get(name, name) for name in _fields(config)}
    return parts | {name: held[place] for name, place in places.items() if place in held}


def _place(name: str, value: Any, places: dict[str, int]) -> Any:
    """A token id of its own from the vocabulary's end, the same in a wrapper and its parts."""
    if isinstance(value, list | tuple):
        return [_place(f"{name}{i}", 0, places) for i in range(len(value))]
    return places.setdefault(name.replace("_index", "_id"), VOCABULARY - 1 - len(places))


def _sample(name: str, kinds: list[Any]) -> list[Any]:
    """As many entries as the tiny model has layers, or as there are kinds if these are more.

    Layer types take turns and the other lists change once, so that kinds of layers meet kinds of MLPs.
    """
    if name in ("layer_types", "layers_block_type"):
        return (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    return [kinds[i * len(kinds) // LAYERS] for i in range(LAYERS)]


def randomize(model: PreTrainedModel) -> None:
    """Weights so large that each token gets a log-prob of its own and a wrong mask changes them all."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(std=0.15)
            elif name.endswith("bias"):
                weight.normal_(std=0.05)
            else:  # norms, and decay rates that must stay near where they are to keep the states finite
                weight.add_(torch.randn_like(weight), alpha=0.05)
