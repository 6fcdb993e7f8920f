"""A model's folder: where it is, whether it is safe to load, and what its configuration says.

A path or a Hub name says nothing about content; digests do: those here, and that of the weights (weights.py).
They need no deep-learning library, so the stage that plans a job knows exactly which model it is about.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_opt.schemas.errors import ConfigError, first_line, quoted
from dpo_opt.schemas.hub import COMMIT, fetch
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.weights import OTHER_FORMAT, WEIGHTS, loaded_tensors, own_head

ADAPTER_CONFIG = "adapter_config.json"
"""In peft's layout, the file that makes a folder an adapter."""
VOLATILE_CONFIG_KEYS = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys of config.json that may change when a model is saved again, without changing one log-prob.

``architectures`` chooses the implementation, and is compared by itself (``stated_architecture``).
"""

# Names under which transformers' configurations state the longest sequence. The first that is there counts:
# later ones stand beside it as leftovers (n_ctx of GPT-2 checkpoints).
_CONTEXT_KEYS: tuple[str, ...] = (
    "max_position_embeddings",
    "n_positions",  # GPT-2, GPT-J, CodeGen, BigCode
    "max_seq_len",  # MPT, DBRX
    "seq_length",  # ChatGLM, BLOOM
    "model_max_length",  # Kimi Linear
    "max_sequence_length",
    "max_seq_length",
    "max_target_positions",  # decoders of speech models
    "context_length",  # RWKV
    "n_ctx",
)

# Hub names that this process has asked for: a branch may move between two looks at it.
_fetched: dict[tuple[str, bool], Path] = {}


def find_model(model: str, *, weights: bool = True) -> Path:
    """Folder of a model's files: a local path, or ``ORGANISATION/NAME`` on the Hub, fetched.

    ``ORGANISATION/NAME@REVISION`` is one commit, branch or tag. In one process a name is one commit, whatever
    happens on the Hub meanwhile.

    Args:
        model: As it was given.
        weights: False: the configuration and the tokenizer are enough, and no weights are fetched.

    Raises:
        ConfigError: There is no such folder, the Hub cannot provide it, or it is not safe to load.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        known = _fetched.get((model, weights))
        folder = known if known is not None and known.is_dir() else _fetch(model, weights=weights)
        _fetched[model, weights] = folder
    _refuse_unsafe(folder)
    if weights:
        _require_weights(folder)
    return folder


def pinned_name(model: str, folder: Path) -> str:
    """What names these very files later and elsewhere: a Hub name with its commit, any other as it is.

    Args:
        model: As ``find_model`` got it.
        folder: What it found.
    """
    if Path(model).expanduser().is_dir() or not COMMIT.fullmatch(folder.name):
        return model
    return f"{model.partition('@')[0]}@{folder.name}"


def _fetch(model: str, *, weights: bool) -> Path:
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_local:
        raise ConfigError(
            f"there is no model folder {model!r}",
            why="a model is loaded from a folder with config.json and *.safetensors",
            fix="pass an existing folder, or a Hub name such as organisation/model@commit",
        )
    patterns = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
    name, _, revision = model.partition("@")
    return fetch(
        name,
        kind="model",
        revision=revision or None,
        patterns=patterns,
        extra="train",
        unwanted=[OTHER_FORMAT],
    )


def _refuse_unsafe(folder: Path) -> None:
    config_path = folder / "config.json"
    if not config_path.is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{quoted(folder)} is an adapter, not a model",
            why="it is a small change to another model, which it needs",
            fix=f"dpo-opt merge --model BASE --adapter {quoted(folder)} --output MERGED, then pass MERGED",
        )
    if not config_path.is_file():
        raise ConfigError(
            f"{quoted(folder)} has no config.json",
            why="it is not a model folder in the Hugging Face layout",
            fix="pass a folder that save_pretrained wrote",
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{quoted(folder)} holds a model and an adapter (config.json and {ADAPTER_CONFIG})",
            why="transformers would add the adapter to the model's weights, which may hold it already, and "
            "save only the adapter after training; vLLM would leave it out",
            fix=f"cp -rL {quoted(folder)} MODEL && rm MODEL/adapter_*, then pass MODEL if its weights are "
            f"merged; if not, dpo-opt merge --model MODEL --adapter {quoted(folder)} --output MERGED, "
            "then pass MERGED",
        )
    if "auto_map" in read_config(folder):
        raise ConfigError(
            f"{quoted(folder)} asks to run its own Python code (auto_map in config.json)",
            why="loading it would execute code from the model folder",
            fix="use a model that transformers supports without remote code",
        )


def _require_weights(folder: Path) -> None:
    gone = next((path for path in folder.glob("*.safetensors") if not path.exists()), None)
    if gone is not None:
        raise ConfigError(
            "it is a link to a file that is not there",
            where=str(gone),
            why="the model's weights are in it",
            fix="download or copy the model again",
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{quoted(folder)} holds no *.safetensors weights",
            why="other weight formats are pickles, which can run code when loaded",
            fix="convert the model with save_pretrained(..., safe_serialization=True)",
        )
    if "transformers_weights" in read_config(folder):
        raise ConfigError(
            f"{quoted(folder)} names the file of its weights (transformers_weights in config.json)",
            why="transformers would load that file, vLLM the others",
            fix=f"cp -rL {quoted(folder)} MODEL, remove the key and call the file {WEIGHTS}, then pass MODEL",
        )
    # Whoever reads the weights afterwards reads the same: no index lies, and no file is damaged.
    loaded_tensors(folder)
    _require_one_head(folder)


def _require_one_head(folder: Path) -> None:
    """Refuse a head of its own where the configuration says that the embedding is the head."""
    config = read_config(folder)
    stated = text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    names = None if stated is False else own_head(folder)
    if names is None:
        return
    if stated is None:
        from dpo_opt.schemas.model_config import load_model_config

        if not load_model_config(folder).get_text_config().tie_word_embeddings:
            return
    change = 'sed -i \'s/"tie_word_embeddings": *true/"tie_word_embeddings": false/\' MODEL/config.json'
    if stated is None:
        change = "sed -i '0,/{/s//{\"tie_word_embeddings\": false,/' MODEL/config.json"
    raise ConfigError(
        f"{quoted(names[0])} and {quoted(names[1])} hold different weights, and config.json ties them",
        where=str(folder),
        why="transformers would take both, vLLM the second for both: two models with other log-probs",
        fix=f"cp -rL {quoted(folder)} MODEL && {change}, then pass MODEL, which has the head that is there",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        ConfigError: The file is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json_of(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"not readable as JSON ({first_line(error)})", where=str(path)) from error
    if not isinstance(config, dict):
        raise ConfigError("not a JSON object", where=str(path))
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about text: all of it, unless other modalities stand beside it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def checkpoint_dtype(folder: Path) -> str:
    """The dtype the checkpoint declares, ``float32`` where it declares none."""
    config = read_config(folder)
    stated = (part.get(key) for part in (config, text_config(config)) for key in ("dtype", "torch_dtype"))
    return str(next((dtype for dtype in stated if dtype), "float32"))


def context_length(folder: Path) -> int | None:
    """Most tokens a sequence may have, where the config states it; see ``stated_context``."""
    return stated_context(read_config(folder))


def stated_context(config: Mapping[str, Any]) -> int | None:
    """Most tokens a sequence may have by a config.json, None where it states nothing.

    Beyond it, learned positions end in a crash, and rotary ones in angles that the model never saw. Scaled
    rotary embeddings count: ``linear`` and ``dynamic`` stretch the stated positions by their factor, ``yarn``
    stretches those that it began with. Beside ``longrope``, ``llama3`` and anything of Gemma 3 the stated
    positions are the stretched ones.
    """
    text = text_config(config)
    scalings = _rope_scalings(text)
    keys = _CONTEXT_KEYS
    if scalings or "rope_theta" in text:
        # Command-R states what it was trained for under this name, and less under the other.
        keys = ("model_max_length", *keys)
    stated = next(
        (int(part[key]) for part in (text, config) for key in keys if _is_count(part.get(key))), None
    )
    if stated is None or "gemma3" in str(text.get("model_type", config.get("model_type"))):
        return stated
    return max([stated, *(_stretched(stated, scaling, text) for scaling in scalings)])


def _is_count(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def _rope_scalings(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of scaled rotary embeddings: one, or one for each type of layer."""
    found = [text.get("rope_scaling"), text.get("rope_parameters")]
    flat: list[Mapping[str, Any]] = [value for value in found if isinstance(value, dict)]
    return flat + [part for value in flat for part in value.values() if isinstance(part, dict)]


def _stretched(stated: int, scaling: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    kind = scaling.get("rope_type") or scaling.get("type")
    factor = scaling.get("factor")
    if not isinstance(factor, int | float):
        return stated
    if kind in ("linear", "dynamic"):
        return int(stated * factor)
    if kind == "yarn":
        key = "original_max_position_embeddings"
        return int(factor * (scaling.get(key) or text.get(key) or stated))
    return stated


def config_digest(folder: Path) -> str:
    """SHA-256 of what config.json says about the computation; names and versions left out."""
    return digest_of_config(read_config(folder))


def digest_of_config(config: Mapping[str, Any]) -> str:
    """As ``config_digest``, of what a config.json holds."""
    said = {k: v for k, v in config.items() if k not in VOLATILE_CONFIG_KEYS}
    return _sha256(json.dumps(said, sort_keys=True, separators=(",", ":")))


def stated_architecture(folder: Path) -> str | None:
    """The class that config.json names for the model: engines choose their implementation by it.

    None where it names none, and the model's type decides.
    """
    stated = read_config(folder).get("architectures")
    return ",".join(map(str, stated)) or None if isinstance(stated, list) else None


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the behaviour of transformers' fast tokenizer, independent of how its files are written."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from the last call that padded or truncated; no part of how text becomes ids here.
    backend.pop("padding", None)
    backend.pop("truncation", None)
    special: list[object] = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    if tokenizer.split_special_tokens:
        special.append({"split_special_tokens": True})
    return _sha256(json.dumps([backend, special], sort_keys=True, separators=(",", ":")))


def template_digest(templates: Mapping[str, str]) -> str:
    """SHA-256 of a tokenizer's chat templates by name, ``none`` where it has none.

    Of one that is called ``default`` it is that of its text; of others that of all as compact JSON.
    """
    if not templates:
        return "none"
    if templates.keys() == {"default"}:
        return _sha256(templates["default"])
    return _sha256(json.dumps(dict(templates), sort_keys=True, separators=(",", ":")))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
