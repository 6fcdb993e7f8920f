"""Reads --engine-option, and refuses arguments of vLLM's engine that would make log-probs silently wrong.

Refused by name, with the reason and before anything starts: arguments that this program sets itself, and
arguments that are known to lose or mix up prompt log-probs, or to make vLLM hang.
"""

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.fingerprint import without_memory_options
from dpo_opt.schemas.plain_data import json_of, yaml_of

_SET_HERE = {
    "model": "pass --model",
    "model_weights": "pass --model",
    "hf_config_path": "change config.json in the model folder, which the fingerprint covers",
    "tokenizer": "put it into the model folder",
    "tokenizer_mode": "leave it out: only token ids reach the engine",
    "skip_tokenizer_init": "leave it out: only token ids reach the engine",
    **dict.fromkeys(("revision", "code_revision", "tokenizer_revision"), "pass --model ORG/NAME@REVISION"),
    "hf_token": "set HF_TOKEN in the environment: options are written into the folder",
    "download_dir": "set HF_HOME in the environment",
    "dtype": "pass --dtype",
    "max_model_len": "pass --max-length",
    "enable_prefix_caching": "leave it out: it is on where this vLLM reads it right",
    "load_format": "leave it out: only safetensors are loaded, because other formats can run code",
    **dict.fromkeys(
        ("logprobs_mode", "max_logprobs", "runner", "convert", "seed", "disable_log_stats"),
        "leave it out: log-probs depend on it",
    ),
    **dict.fromkeys(
        ("generation_config", "override_generation_config"),
        "leave it out: samples are the model's own, at temperature 1",
    ),
}
"""From an argument that this program sets to what the user can do instead."""

_RUNS_CODE = (
    "trust_remote_code",
    "worker_cls",
    "worker_extension_cls",
    "scheduler_cls",
    "logits_processors",
    "model_class_overrides",
    "io_processor_plugin",
    "reasoning_parser_plugin",
)


class _Danger(NamedTuple):
    names: str
    """Regular expression that matches a whole name."""
    why: str
    fix: str


# vLLM's issue or pull request, or its own source, where the reason comes from.
_DANGERS = [
    _Danger(
        r".*lora.*",
        # 51594
        "vLLM silently leaves an adapter of the LM head out of prompt log-probs",
        "merge the adapter into the model, and pass the merged folder as --model",
    ),
    _Danger(
        r"speculative_config|spec_(method|model|tokens)",
        # 53488
        "speculative decoding silently overwrites prompt log-probs",
        "leave it out: no text is generated, so it would make nothing faster",
    ),
    _Danger(
        r"kv_sharing_fast_prefill",
        # v1/engine/input_processor.py; its own check misses prompt_logprobs=0
        "it leaves out rows of the prompt, and their log-probs are then wrong",
        "leave it out",
    ),
    _Danger(
        r"data_parallel_.*|enable_elastic_ep|elastic_ep_.*",
        # entrypoints/llm.py
        "an engine in one process hangs with data parallelism; workers share the shards without it",
        "pass --num-workers, with --launcher local for the GPUs of one machine",
    ),
    _Danger(
        r"pipeline_parallel_size|nnodes|node_rank|master_(addr|port)",
        # 38602
        "vLLM hangs on prompt log-probs if an engine spans pipeline stages or machines",
        "pass --engine-option tensor_parallel_size=N with the GPUs of one machine",
    ),
    _Danger(
        r"enable_dbo",
        # config/vllm.py
        "it switches to another model runner, which answers in another form than is expected here",
        "leave it out",
    ),
    _Danger(
        r"kv_transfer_config|kv_offloading_.*",
        # 57269
        "prompt rows from a cache outside the engine have no log-probs",
        "leave it out: the engine's own prefix cache is used",
    ),
    _Danger(
        r"enable_prompt_embeds|enable_trace_replay",
        # v1/worker/gpu_model_runner.py
        "prompt log-probs are not computed with it",
        "leave it out",
    ),
]
# Values that switch one of these off are harmless.
_OFF: tuple[object, ...] = (None, False, 0, {}, [])

_POSITIVE = ("tensor_parallel_size", "max_num_batched_tokens", "max_num_seqs", "block_size")


def read_engine_options(given: Sequence[str]) -> dict[str, Any]:
    """Arguments of the engine, from ``name=value`` with values in JSON or YAML.

    Raises:
        ConfigError: An option has another form, is set by this program, or would make log-probs wrong.
    """
    options: dict[str, Any] = {}
    for option in given:
        name, equals, text = option.partition("=")
        name = name.strip().replace("-", "_")
        if not (equals and re.fullmatch(r"[a-z][a-z0-9_]*", name) and text.strip()):
            raise ConfigError(
                f"--engine-option {option!r} is not of the form name=value",
                why="each option is one argument of vLLM's engine",
                fix="for example --engine-option tensor_parallel_size=2",
            )
        value = _value(text, option)
        _refuse(name, value, option)
        options[name] = value
    return options


def canonical(options: Mapping[str, Any]) -> str:
    """The options that log-probs depend on, in the spelling that the fingerprint records; ``{}`` for none.

    Memory settings (``MEMORY_OPTIONS``) are left out.
    """
    return json.dumps(without_memory_options(options), sort_keys=True, separators=(",", ":"))


def refuse_unknown(options: Mapping[str, Any], *, known: Collection[str]) -> None:
    """Refuse arguments that the installed engine does not have.

    Raises:
        ConfigError: There is no such argument; the fix names the closest one.
    """
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            raise ConfigError(
                f"--engine-option {name}: this vLLM has no such argument",
                why="a misspelt option would have no effect",
                fix=f"did you mean {close[0]}?" if close else "see `vllm serve --help=all` for the arguments",
            )


def _value(text: str, option: str) -> Any:
    try:
        try:
            value = json_of(text)
        except ValueError:
            value = yaml_of(text)
        # JSON has neither dates nor NaN and infinities.
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"--engine-option {option!r}: the value is neither JSON nor a YAML scalar",
            why="the fingerprint records the value as JSON",
            fix="put quotes around text that looks like something else: name='\"2026-01-01\"'",
        ) from error
    return value


def _refuse(name: str, value: Any, option: str) -> None:
    if name in _SET_HERE:
        raise ConfigError(f"--engine-option {option!r}: {name} is set by this program", fix=_SET_HERE[name])
    if name in _RUNS_CODE:
        raise ConfigError(
            f"--engine-option {option!r}: {name} makes the engine run code that the option names",
            why="no model and no setting may bring code along",
            fix="leave it out, or pass --backend hf",
        )
    harmless = value in _OFF or (name.endswith("_size") and value == 1)
    for danger in _DANGERS:
        if re.fullmatch(danger.names, name) and not harmless:
            raise ConfigError(f"--engine-option {option!r} is refused", why=danger.why, fix=danger.fix)
    if name == "distributed_executor_backend" and value not in ("mp", "uni", None):
        raise ConfigError(
            f"--engine-option {option!r} is refused",
            why="vLLM hangs on prompt log-probs if it did not start the executor's processes itself",
            fix="leave it out; --launcher ray runs whole workers on Ray",
        )
    if name == "hf_overrides" and not (isinstance(value, dict) and set(value) <= {"head_dtype"}):
        raise ConfigError(
            f"--engine-option {option!r} is refused",
            why="another configuration is another reference, and training compares only the model folder's",
            fix="change config.json in a copy of the model folder; only head_dtype may be given here",
        )
    if name in _POSITIVE and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        raise ConfigError(f"--engine-option {option!r}: not a whole number above 0")
    if name == "gpu_memory_utilization" and not (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    ):
        raise ConfigError(f"--engine-option {option!r}: not a share of the memory, above 0 and at most 1")
