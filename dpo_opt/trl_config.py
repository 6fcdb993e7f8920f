"""Reads the settings of TRL's DPO and KTO trainers: a YAML of their scripts, or a ``DPOConfig`` as JSON.

What TRL 1.16 calls by another name, or counts otherwise, gets the name and the value that train the same
here.
A setting that TRL leaves at its default trains as that default says, not as ours does.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from dpo_opt.optimize.config import TrackerName
from dpo_opt.read_settings import read_document
from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.locations import AnyPath


class TrlConfig(NamedTuple):
    """What a file of TRL's settings means here."""

    settings: dict[str, Any]
    """Settings of ``TrainConfig``."""
    not_taken: dict[str, str]
    """Setting of TRL to the reason why it has no effect, and what to do instead."""


_SAME = (
    "output_dir", "beta", "loss_type", "loss_weights", "learning_rate", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "logging_steps", "seed", "use_peft", "lora_r",
    "lora_alpha",
    "lora_target_modules", "load_in_4bit", "num_train_epochs", "ld_alpha", "use_weighting",
)  # fmt: skip
# Settings of one loss. TRL's defaults stand in every file that it writes, whatever the loss is.
_OF_ONE_LOSS = {
    **{"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05},
    **{"desirable_weight": 1.0, "undesirable_weight": 1.0},
}
# Losses with which TRL 1.16 reads label_smoothing, of those that are here.
_SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), "adamw-8bit"),
    "rmsprop": "rmsprop",
}
_SCHEDULES = {"constant_with_warmup": "constant"}  # the warm-up has a setting of its own

_ELSEWHERE = {
    **dict.fromkeys(
        ("dataset_name", "dataset_config", "datasets", "dataset_train_split", "dataset_test_split"),
        "score the pairs with dpo-opt precompute --data, and pass --shards",
    ),
    **dict.fromkeys(
        ("max_length", "truncation_mode", "max_prompt_length", "max_completion_length"),
        "pass --max-length and --truncation to dpo-opt precompute, where the ids are made",
    ),
    **dict.fromkeys(("eval_steps", "eval_strategy"), "pass --eval-steps with --eval-split or --eval-shards"),
    "report_to": "--report-to has tensorboard, wandb, trackio and mlflow; metrics.jsonl has all metrics",
    "fp16": "training computes in bfloat16 or float32 (--dtype)",
    "lora_dropout": "adapters have no dropout",
    "save_strategy": "a run saves every 30 minutes and at its end; --save-steps and --save-minutes change it",
    "router_aux_loss_coef": "no auxiliary loss of routers",
}
# Another objective or another reference: without them another run.
_REFUSED = ("sync_ref_model", "label_smoothing_factor", "neftune_noise_alpha")
# Of logging, data loading, launching, the Hub and the Trainer class: nothing that is trained depends on them.
_NO_MATTER = (
    "log", "dataloader_", "ddp_", "hub_", "push_", "trackio_", "include_", "eval_", "fsdp", "deepspeed",
    "accelerator_", "disable_", "train_sampling_", "ref_model_", "per_device_eval_", "do_", "bf16_",
    "fp16_", "tf32", "optim_", "gradient_checkpointing_", "average_tokens_", "remove_unused_",
    "label_names", "length_column_", "skip_memory_", "pad_", "precompute_ref_", "project", "run_name",
    "liger_", "use_liger_", "use_cache", "torch_", "debug", "local_rank", "parallelism_",
    "dataset_num_proc", "restore_", "save_on_", "prediction_", "greater_", "load_best_", "batch_eval_",
    "auto_find_", "data_seed", "use_cpu", "enable_jit_", "model_", "trust_", "activation_off",
    "padding_free", "attn_", "dtype", "torch_dtype", "save_only_", "ignore_data_", "full_determinism",
    "resume_from_",
)  # fmt: skip


def read_trl_config(path: AnyPath) -> TrlConfig:
    """The settings of ``dpo-opt train`` that train what a file of TRL's settings trains.

    Args:
        path: YAML, or JSON where its name ends so.

    Raises:
        ConfigError: The file is not readable, or asks for what there is not here and what is trained depends
            on.
    """
    values = _read(path)
    for name in _REFUSED:
        if values.get(name):
            raise ConfigError(
                f"{name} is {values[name]!r}, which is not here",
                where=str(path),
                why="without it, something else would be trained",
                fix=f"remove {name} from the file, or train with TRL from the shards (docs/trl.md)",
            )
    found: dict[str, Any] = {"num_train_epochs": 3}
    found |= {name: values[name] for name in _SAME if values.get(name) is not None}
    found |= {
        name: values[name]
        for name, default in _OF_ONE_LOSS.items()
        if values.get(name) is not None and values[name] != default
    }
    each = int(values.get("per_device_train_batch_size") or 8)
    found["batch_size"] = each * int(values.get("gradient_accumulation_steps") or 1)
    for take in (_take_steps, _take_memory, _take_names, _take_reports):
        take(values, found)
    known = {*_SAME, *_OF_ONE_LOSS, *_TAKEN, *(["report_to"] if "report_to" in found else [])}
    if values.get("save_strategy") == "steps":
        known.add("save_strategy")
    not_taken = {name: _why(name) for name in values if name not in known and _matters(name, values[name])}
    if values.get("label_smoothing"):
        losses = found.get("loss_type", "sigmoid")
        if set([losses] if isinstance(losses, str) else losses) <= _SMOOTHED:
            found["label_smoothing"] = values["label_smoothing"]
        else:
            not_taken["label_smoothing"] = (
                "TRL 1.16 ignores it with this loss; --label-smoothing is cDPO here"
            )
    return TrlConfig(found, not_taken)


_TAKEN = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "warmup_steps", "warmup_ratio",
    "save_steps", "save_total_limit", "metric_for_best_model", "gradient_checkpointing", "bf16", "optim",
    "lr_scheduler_type", "model_name_or_path", "label_smoothing", "lr_scheduler_kwargs",
)  # fmt: skip


def _take_steps(values: Mapping[str, Any], found: dict[str, Any]) -> None:
    if float(values.get("max_steps") or -1) > 0:
        found["max_steps"] = values["max_steps"]
    # Older versions have a share of all steps under a name of its own.
    warmup = values.get("warmup_steps") or values.get("warmup_ratio")
    if warmup:
        found["warmup_steps"] = warmup
    if values.get("save_strategy", "steps") == "steps":
        found["save_steps"] = values.get("save_steps") or 500
    if values.get("save_total_limit"):
        found["save_total_limit"] = max(2, int(values["save_total_limit"]))


def _take_memory(values: Mapping[str, Any], found: dict[str, Any]) -> None:
    if values.get("gradient_checkpointing", True):
        found["activation_checkpointing"] = "full"
    if values.get("bf16"):
        found["dtype"] = "bfloat16"


def _take_names(values: Mapping[str, Any], found: dict[str, Any]) -> None:
    if values.get("model_name_or_path"):
        found["model"] = values["model_name_or_path"]
    optim, schedule = values.get("optim"), values.get("lr_scheduler_type")
    if optim:
        found["optim"] = _OPTIMIZERS.get(str(optim), optim)
    if schedule:
        found["lr_scheduler_type"] = _SCHEDULES.get(str(schedule), schedule)
    metric = values.get("metric_for_best_model")
    if metric:
        found["metric_for_best_model"] = metric if str(metric).startswith("eval_") else f"eval_{metric}"


def _take_reports(values: Mapping[str, Any], found: dict[str, Any]) -> None:
    asked = values.get("report_to") or []
    names = [asked] if isinstance(asked, str) else list(asked)
    if names and set(names) <= set(get_args(TrackerName)):
        found["report_to"] = names


def _matters(name: str, value: object) -> bool:
    """Whether a user should read that a setting has no effect."""
    if value in (None, False, "no", "none", "", [], {}) or value == ["none"]:
        return False
    return name in _ELSEWHERE or not name.startswith(_NO_MATTER)


def _why(name: str) -> str:
    return _ELSEWHERE.get(name, "there is no such setting here")


def _read(path: AnyPath) -> dict[str, Any]:
    values = read_document(path, form="JSON" if path.name.endswith(".json") else "YAML")
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(
            "not a mapping of settings to values",
            where=str(path),
            fix="write it with TRL: DPOConfig(...).to_json_string(), or pass the YAML of its script",
        )
    return values
