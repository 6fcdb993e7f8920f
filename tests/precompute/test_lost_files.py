"""A finished folder that lost a file is not called finished, and the command that is named heals it."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.cli import main
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.repair import repair
from dpo_opt.precompute.shards.status import status
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.manifest import (
    INDEX,
    MANIFEST,
    TOKENIZER,
    load_manifest,
    repair_command,
    write_manifest,
)
from dpo_opt.verify import verify


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("lost")
    write_jsonl(base / "data.jsonl", preference_rows(8))
    precompute(config_of(base / "shards", base, tiny_model), scorer=ScriptedScorer())
    return base


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "shards", tmp_path / "my shards"))


def config_of(shards: Path, made: Path, model: Path) -> PrecomputeConfig:
    data = str(made / "data.jsonl")
    return PrecomputeConfig(model=str(model), data=[data], shards=shards, pairs_per_shard=3)


def dropped_file(shards: Path) -> Path:
    return shards / load_manifest(shards).shards[1].dropped_file


LOSSES: dict[str, Callable[[Path], object]] = {
    "the index": lambda shards: (shards / INDEX).unlink(),
    "an empty index": lambda shards: (shards / INDEX).write_bytes(b""),
    "dropped rows": lambda shards: dropped_file(shards).unlink(),
    "empty dropped rows": lambda shards: dropped_file(shards).write_bytes(b""),
    "the tokenizer": lambda shards: shutil.rmtree(shards / TOKENIZER),
    "a file of the tokenizer": lambda shards: (shards / TOKENIZER / "tokenizer_config.json").unlink(),
    "a shard": lambda shards: (shards / load_manifest(shards).shards[0].file).unlink(),
}


def command(line: str) -> Result:
    program, *words = shlex.split(line)
    assert program == "dpo-opt"
    return CliRunner().invoke(main, words, catch_exceptions=False)


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES.keys())
def test_a_lost_file_is_noticed_by_whoever_calls_the_folder_finished(
    lose: Callable[[Path], object], made: Path, finished: Path, tiny_model: Path
) -> None:
    config = config_of(finished, made, tiny_model)
    assert (status(finished).lost, status(finished).next, status(finished).finalized) == ([], None, True)
    lose(finished)
    heals = repair_command(finished)
    for run in (
        lambda: precompute(config, scorer=ScriptedScorer()),
        lambda: work(config, scorer=ScriptedScorer()),
        lambda: finalize(finished),
    ):
        with pytest.raises(DataError) as caught:
            run()
        assert caught.value.fix == heals
    found = status(finished)
    assert (found.finalized, found.next) == (False, heals)
    assert found.lost
    said = command(f"dpo-opt status --shards '{finished}'")
    assert said.exit_code == 0
    assert heals in said.output
    assert command(heals).exit_code == 0
    if (rest := repair(finished).next) is not None:
        # A shard is scored again, by the command that the repair names.
        assert rest.startswith("dpo-opt precompute")
        precompute(config, scorer=ScriptedScorer())
    assert (status(finished).finalized, status(finished).lost) == (True, [])
    assert verify(finished, model=None, num_pairs=1, dtype="auto").ok


def test_many_lost_files_are_counted_and_some_are_shown(finished: Path) -> None:
    manifest = load_manifest(finished)
    for commit in manifest.shards:
        (finished / commit.file).unlink()
        (finished / commit.dropped_file).unlink()
    with pytest.raises(DataError, match=r"5 other files are lost or cut as well"):
        finalize(finished)
    said = command(f"dpo-opt status --shards '{finished}'").output
    assert "and 1 more" in said
    assert said.count("the file is missing") == 5


def test_a_manifest_that_names_no_files_of_the_tokenizer_still_needs_some(finished: Path) -> None:
    """Versions before the names wrote such manifests."""
    write_manifest(finished, load_manifest(finished).model_copy(update={"tokenizer_files": None}))
    assert '"tokenizer_files": null' in (finished / MANIFEST).read_text()
    assert status(finished).finalized
    shutil.rmtree(finished / TOKENIZER)
    assert status(finished).lost
    assert not status(finished).finalized
