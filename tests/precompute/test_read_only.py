"""Whoever only reads a finished folder needs no leave to write there, nor who finds nothing to score."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.status import status
from dpo_opt.schemas.manifest import INDEX, MANIFEST, PLAN, load_manifest
from dpo_opt.verify import verify


@pytest.fixture
def config(model: Path, tmp_path: Path) -> PrecomputeConfig:
    """Of a folder that was scored with a model that has another place now."""
    data = [str(write_jsonl(tmp_path / "data.jsonl", preference_rows(5)))]
    settings = PrecomputeConfig(
        model=str(shutil.copytree(model, tmp_path / "before")), data=data, shards=tmp_path / "shards"
    )
    precompute(settings, scorer=ScriptedScorer())
    return settings.model_copy(update={"model": str(model)})


def make_read_only(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """As a mount that takes nothing. Modes would not stop a test of root."""

    def refuse(method: str) -> Callable[..., object]:
        real = getattr(Path, method)

        def call(path: Path, *args: object, **kwargs: object) -> object:
            writes = method != "open" or set(str(args[:1] or kwargs.get("mode", "r"))) & set("wxa+")
            if writes and path.is_relative_to(folder) and not (method == "mkdir" and path.exists()):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return real(path, *args, **kwargs)

        return call

    for method in ("open", "unlink", "mkdir", "touch", "replace", "rename", "write_text", "write_bytes"):
        patch.setattr(Path, method, refuse(method))


@pytest.mark.parametrize("left_out", [[], [PLAN], [PLAN, "precompute.yaml", "weights.json"]])
def test_a_finished_folder_is_read_where_nothing_can_be_written(
    config: PrecomputeConfig, left_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in left_out:
        (config.shards / name).unlink()
    (config.shards / f"{PLAN}.claim").write_text("of a killed run")
    manifest = load_manifest(config.shards)
    scorer = ScriptedScorer()
    with monkeypatch.context() as patch:
        make_read_only(Path(config.shards), patch)
        assert status(config.shards).finalized
        assert precompute(config, scorer=scorer) == manifest
        assert finalize(config.shards) == manifest
        assert verify(config.shards, model=None, num_pairs=1, dtype="auto").ok
    assert scorer.calls == []
    # Where it can be written, the settings of the latest run are kept again.
    precompute(config, scorer=scorer)
    assert str(config.model) in (Path(config.shards) / "precompute.yaml").read_text()
    assert (config.shards / PLAN).is_file()


def test_a_folder_that_is_not_finished_must_be_writable_before_anything_is_scored(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config.shards / MANIFEST).unlink()
    (config.shards / INDEX).unlink()
    scorer = ScriptedScorer()
    with monkeypatch.context() as patch:
        make_read_only(Path(config.shards), patch)
        with pytest.raises(OSError, match="Read-only file system"):
            precompute(config, scorer=scorer)
    assert scorer.calls == []
