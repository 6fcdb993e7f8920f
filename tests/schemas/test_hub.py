"""What a repository on the Hub may do to the machine that fetches it."""

from pathlib import Path
from typing import Any

import pytest

from dpo_opt.schemas.errors import ConfigError
from dpo_opt.schemas.hub import fetch

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
