"""Who may import whom, read from the syntax trees: nothing is run, so lazy imports are seen too."""

import sys
from collections.abc import Iterable
from pathlib import Path

from import_statements import Import, imports_of

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("feedback", "precompute", "optimize", "analysis")
FOLDERS = {"dpo_opt": "dpo_opt", "schemas": "dpo_opt.schemas", **{s: f"dpo_opt.{s}" for s in STAGES}}

ANYWHERE = {"numpy", "pydantic", "pyarrow", "fsspec", "upath"}
ALLOWED: dict[str, set[str]] = {
    "schemas": set(),
    "feedback": set(),
    "precompute": {"yaml"},
    "optimize": {"torch", "transformers", "safetensors", "yaml"},
    "analysis": {"polars", "matplotlib", "jinja2", "markupsafe", "yaml"},
    "dpo_opt": {"click", "rich", "yaml"},
}
"""Beyond ``ANYWHERE``, at the top of any file of a folder or inside its functions."""

LAZY: dict[str, set[str]] = {
    "schemas/config_keys.py": {"transformers"},
    "schemas/hub.py": {"huggingface_hub"},
    "schemas/plain_data.py": {"yaml"},
    "schemas/model_config.py": {"transformers", "huggingface_hub", "safetensors"},
    "optimize/adapters/lora.py": {"peft"},
    "optimize/update/optimizer.py": {"torchao"},
    "optimize/reporting/trackers.py": {"wandb", "trackio", "mlflow"},
    "precompute/engine/checkpoint_keys.py": {"transformers"},
    "precompute/check/near_duplicates.py": {"rensa"},
    "precompute/workers/ray_cluster.py": {"ray"},
    "precompute/tokens/templates.py": {"transformers", "jinja2"},
    "precompute/shards/scored_tokenizer.py": {"tokenizers"},
    "precompute/tokens/load_tokenizer.py": {"transformers", "tokenizers"},
    "precompute/tokens/tokenize.py": {"transformers"},
    "precompute/tokens/template_date.py": {"transformers"},
    "precompute/tokens/texts.py": {"transformers"},
    "precompute/tokens/special_tokens.py": {"transformers"},
    "precompute/tokens/ends.py": {"transformers"},
    "precompute/engine/engine_arguments.py": {"vllm"},
    "precompute/engine/vllm_model.py": {"vllm", "torch"},
    "feedback/judging/endpoint.py": {"openai"},
    "analysis/token_texts.py": {"tokenizers"},
    "dpo_opt": {"torch"},
    "dpo_opt/demo_model.py": {"torch", "transformers", "gguf"},
    "dpo_opt/preview.py": {"transformers"},
    "dpo_opt/sample.py": {"transformers"},
    "dpo_opt/trl.py": {"datasets", "filelock"},
    "dpo_opt/demo.py": {"torch", "transformers", "safetensors", "vaderSentiment"},
}
"""Inside functions only, so that importing the module does not load them."""

IMPORTED_LATE: dict[str, set[str]] = {
    "optimize/update/rounding_kernel.py": {"triton"},
    "precompute/tokens/known_roles.py": {"jinja2"},
}
"""At the top of files that are themselves imported inside functions only."""


IMPORTS = [
    found
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    for found in imports_of(
        path.read_text(encoding="utf-8"), file=path.relative_to(ROOT).as_posix(), folder=folder
    )
]


def stage_of(module: str) -> str:
    """The folder that a ``dpo_opt`` module lies in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "dpo_opt"


def test_the_imports_are_seen() -> None:
    seen = {(i.file, i.top, i.lazy) for i in IMPORTS}
    assert ("precompute/engine/vllm_model.py", "vllm", True) in seen
    assert ("optimize/loop.py", "torch", False) in seen
    assert ("precompute/tokens/load_tokenizer.py", "transformers", True) in seen
    assert ("schemas/hub.py", "huggingface_hub", True) in seen
    assert {i.folder for i in IMPORTS} == set(FOLDERS)
    edges = {(i.folder, stage_of(i.module)) for i in IMPORTS if i.top == "dpo_opt"}
    assert {("dpo_opt", stage) for stage in STAGES} <= edges
    assert {(stage, "schemas") for stage in STAGES} <= edges


def test_stages_import_schemas_and_never_each_other() -> None:
    allowed = {
        ("schemas", "schemas"),
        *((stage, to) for stage in STAGES for to in (stage, "schemas")),
        *(("dpo_opt", to) for to in FOLDERS),
    }
    wrong = [i for i in IMPORTS if i.top == "dpo_opt" and (i.folder, stage_of(i.module)) not in allowed]
    assert wrong == []


def test_no_module_is_imported_by_its_folders_bare_name() -> None:
    # From the repository's root that would work, and load a second copy.
    assert [i for i in IMPORTS if i.top in FOLDERS and i.top != "dpo_opt"] == []


def misplaced(imports: Iterable[Import]) -> list[Import]:
    """Imports of third-party packages where they do not belong."""
    wrong = []
    for found in imports:
        if found.top in sys.stdlib_module_names or found.top == "dpo_opt":
            continue
        allowed = ANYWHERE | ALLOWED[found.folder] | IMPORTED_LATE.get(found.file, set())
        if found.lazy:
            allowed |= LAZY.get(found.file, set()) | LAZY.get(found.folder, set())
        if found.top not in allowed:
            wrong.append(found)
    return wrong


def test_third_party_packages_stay_where_they_belong() -> None:
    assert misplaced(IMPORTS) == []
    late = {"dpo_opt." + file.removesuffix(".py").replace("/", ".") for file in IMPORTED_LATE}
    importers = [i for i in IMPORTS if any(f"{i.module}.".startswith(f"{module}.") for module in late)]
    assert importers
    assert all(i.lazy for i in importers)


def test_a_package_in_the_wrong_place_is_noticed() -> None:
    text = """
import os, numpy as np
import torch.nn
from dpo_opt.schemas import pairs
if TYPE_CHECKING:
    import vllm

def late():
    with open("a"):
        from huggingface_hub import snapshot_download
"""
    found = list(imports_of(text, file="schemas/hub.py", folder="schemas"))
    assert [(i.line, i.module, i.lazy) for i in found] == [
        (2, "os", False),
        (2, "numpy", False),
        (3, "torch.nn", False),
        (4, "dpo_opt.schemas.pairs", False),
        (6, "vllm", True),
        (10, "huggingface_hub.snapshot_download", True),
    ]
    assert [i.top for i in misplaced(found)] == ["torch", "vllm"]
    elsewhere = list(imports_of(text, file="schemas/pairs.py", folder="schemas"))
    assert [i.top for i in misplaced(elsewhere)] == ["torch", "vllm", "huggingface_hub"]
