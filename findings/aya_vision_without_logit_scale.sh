#!/usr/bin/env bash
# transformers 5.19.0: a Cohere 2 text model multiplies its logits by logit_scale. Inside of AyaVision (and
# Cohere2Vision) the same text model, with the same configuration and weights, does not: the wrapper projects the
# hidden states itself and leaves the factor out. Greedy text is the same; every probability is another, as at
# another temperature. One would expect a text to have one likelihood in both classes.
#
# Random weights, logit_scale 0.25; seen with torch 2.13.0 on a CPU:
#   AyaVisionForConditionalGeneration / Cohere2ForCausalLM: logits 4.00 times as large
#   Cohere2VisionForConditionalGeneration / Cohere2ForCausalLM: logits 4.00 times as large
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import (
    AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, Cohere2ForCausalLM, Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration, SiglipVisionConfig,
)

text = Cohere2Config(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
vision = SiglipVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
)
ids = torch.randint(3, 90, (1, 16), generator=torch.Generator().manual_seed(0))
for kind, config in (
    (AyaVisionForConditionalGeneration, AyaVisionConfig),
    (Cohere2VisionForConditionalGeneration, Cohere2VisionConfig),
):
    torch.manual_seed(0)
    wrapper = kind(config(text_config=text, vision_config=vision, image_token_id=99)).eval()
    alone = Cohere2ForCausalLM(text).eval()
    alone.model.load_state_dict(wrapper.model.language_model.state_dict())
    alone.lm_head.load_state_dict(wrapper.lm_head.state_dict())
    with torch.no_grad():
        ratio = wrapper(input_ids=ids).logits.norm() / alone(input_ids=ids).logits.norm()
    print(f"{kind.__name__} / Cohere2ForCausalLM: logits {float(ratio):.2f} times as large")
    assert abs(float(ratio) - 4) < 1e-3, "the behaviour has changed"
PY
