"""The model card: the README.md that is saved with a trained model."""

import json
from pathlib import Path

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.parity import Parity
from dpo_opt.schemas.manifest import Manifest
from dpo_opt.schemas.rope import FIXED


def model_card(
    config: TrainConfig, manifest: Manifest, parity: Parity | None, *, steps: int, text_alone: bool
) -> str:
    """The card as Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        config: The run's configuration.
        manifest: Manifest of the shards that it was trained on.
        parity: Parity of the starting policy with the cached reference; None with ``reference_differs``.
        steps: Updates made.
        text_alone: Whether the model also takes images or sound, so that only its text model was trained.
    """
    reference = (
        "another model than the starting policy (`--reference-differs`)"
        if parity is None
        else f"the starting policy (parity {parity.mean:+.1e} mean, {parity.sd:.1e} sd nats per token)"
    )
    base = Path(config.model).name
    library = f"peft\nbase_model: {json.dumps(base)}" if config.use_peft else "transformers"
    rope = manifest.fingerprint.rope
    rows = "".join(
        [
            f"| rotary embedding | {rope} (fixed for the whole run) |\n" if rope != FIXED else "",
            "| trained | only the text model, on text: the image and audio parts are the base's |\n"
            if text_alone
            else "",
        ]
    )
    what = "A LoRA adapter trained by direct" if config.use_peft else "Direct"
    return f"""---
library_name: {library}
tags: [dpo, preference-optimization, dpo-opt]
---

# {config.output_dir.name}

{what} Preference Optimization (Rafailov et al. 2023) of `{base}` with dpo-opt.

| | |
|---|---|
| pairs | {manifest.kept} of {manifest.rows} source rows |
| dataset digest | `{manifest.dataset_digest}` |
| reference | {reference} |
| reference weights | `{manifest.fingerprint.weights}` |
| loss | {config.described_loss} |
| optimizer | {config.optim}, peak learning rate {config.learning_rate}, {config.batch_size} pairs per step |
| steps | {steps} |
| seed | {config.seed} |
{rows}"""
