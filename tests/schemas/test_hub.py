"""What is fetched from a repository on the Hub, and what it may do to the machine that fetches it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.hub import fetch
from dpo_opt.schemas.models import find_model
from dpo_opt.schemas.weights import loaded_files

huggingface_hub = pytest.importorskip("huggingface_hub")


def test_a_file_name_that_leads_out_of_the_cache_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, **_: Any) -> str:
        """As for a repository that lists such a file."""
        return str(
            huggingface_hub.hf_hub_download(
                repository, "../../../../OWNED", revision="a" * 40, cache_dir=tmp_path / "cache" / "hub"
            )
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match="neither here nor to be had from the Hub"):
        fetch("made/pairs", kind="dataset", revision="a" * 40, patterns=["*"], extra="hub")
    assert not [path for path in tmp_path.rglob("*") if "OWNED" in path.name]


def test_what_nobody_loads_is_not_fetched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Mistral's repositories are: the weights twice, and programs for neither of us."""
    wanted = {path.name for path in model.iterdir()}
    for name in (
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "consolidated.safetensors.index.json",
        "consolidated.00.pth",
        "modeling.py",
    ):
        (model / name).write_bytes(b"large")
    fetched = tmp_path / "fetched"

    def download(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        """As ``snapshot_download`` chooses among a repository's files."""
        fetched.mkdir()
        for name in huggingface_hub.utils.filter_repo_objects(
            sorted(path.name for path in model.iterdir()),
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        ):
            shutil.copy(model / name, fetched / name)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = find_model(f"made/model-{tmp_path.name}")
    assert {path.name for path in folder.iterdir()} == wanted
    assert loaded_files(folder) == [fetched / "model.safetensors"]
