"""Names that strangers gave: of folders, files, tensors, settings. A message shows them, and nothing more.

Each refusal is met with a name that would steer a terminal, begin a line of its own and end a shell's word.
"""

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from fakes import ScriptedScorer, preference_rows, write_jsonl
from model_edits import change_config, change_weights
from safetensors.torch import save_file

from dpo_opt.analysis import scan_pair_logps
from dpo_opt.analysis.check_page import write_check_page
from dpo_opt.analysis.kl import estimate_kl
from dpo_opt.analysis.load import join_reference
from dpo_opt.analysis.page import report
from dpo_opt.analysis.reference_margins import reference_view
from dpo_opt.cli import main
from dpo_opt.commands.merge import MergeConfig
from dpo_opt.console import watched
from dpo_opt.merge import merge
from dpo_opt.optimize.adapters.adapter_folder import WEIGHTS, read_adapter
from dpo_opt.optimize.checkpoint.checkpoints import newest_checkpoint
from dpo_opt.optimize.run_folder import RunFolder
from dpo_opt.precompute import PrecomputeConfig, precompute
from dpo_opt.precompute.shards.repair import Repair
from dpo_opt.schemas.errors import DpoOptError, quoted
from dpo_opt.schemas.fingerprint import short_value
from dpo_opt.schemas.kl_samples import LATER_COLUMNS
from dpo_opt.schemas.locations import location
from dpo_opt.schemas.manifest import load_manifest, write_manifest
from dpo_opt.schemas.models import ADAPTER_CONFIG, find_model
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.shards import read_row_groups
from dpo_opt.schemas.weights import refuse_left_over, weights_digest

STRANGE = "a b\x1b[31m\n  fix: echo $HOME #'\u202e"
FOLDERS = ("dpo_opt", "schemas", "precompute", "optimize", "analysis")


def message(call: Callable[[], object]) -> str:
    """What a call is refused with, after looking at it."""
    with pytest.raises(DpoOptError) as caught:
        call()
    said = str(caught.value)
    lines = said.split("\n")
    assert all(line.isprintable() for line in lines), said
    # No line but those of the message itself.
    labels = [line.split(":")[0].strip() for line in lines[1:]]
    assert labels == [label for label in ("why", "fix") if getattr(caught.value, label)], said
    return said


def words(command: str) -> list[str]:
    """A command as a shell reads it."""
    script = f"set -f; for word in {command}; do printf '%s\\0' \"$word\"; done"
    found = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout
    return found.split("\0")


@pytest.fixture
def strange(model: Path) -> Path:
    """A copy of the model in a folder of a strange name."""
    return model.rename(model.with_name(STRANGE))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def an_adapter(folder: Path) -> None:
    no_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def both(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def a_setting_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{\x1b")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def a_link(folder: Path) -> None:
    (folder / f"{STRANGE}.safetensors").symlink_to("nowhere")


def two_files(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / f"{STRANGE}.safetensors")


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def another_index(folder: Path) -> None:
    index(folder, {"a": "part.safetensors"})
    two = (folder / "part.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(two)


FOLDERS_OF_MODELS: dict[str, Callable[[Path], object]] = {
    "no config": no_config,
    "an adapter": an_adapter,
    "a model and an adapter": both,
    "own code": lambda folder: change_config(folder, auto_map={STRANGE: STRANGE}),
    "own name of the weights": lambda folder: change_config(folder, transformers_weights=STRANGE),
    "no JSON": a_setting_that_is_no_json,
    "no weights": no_weights,
    "a link to nothing": a_link,
    "two files": two_files,
    "an index of other files": another_index,
    "a missing file": lambda folder: index(folder, {"a": STRANGE}),
    "no index": lambda folder: index(folder, STRANGE),
}


@pytest.mark.parametrize("name", FOLDERS_OF_MODELS)
def test_a_models_folder_of_a_strange_name_is_refused_in_lines_of_our_own(name: str, strange: Path) -> None:
    FOLDERS_OF_MODELS[name](strange)
    said = message(lambda: find_model(str(strange)))
    for rest in re.findall(r"(?:cp -rL|--adapter|fix: remove) (.*)", said):
        assert rest.startswith(quoted(strange).removesuffix("'"))


def test_tensors_of_strange_names(strange: Path) -> None:
    change_weights(strange, lambda found: found.update({STRANGE: found["model.norm.weight"].clone()}))
    index(strange, {STRANGE: "part.safetensors"})
    shutil.copy(strange / "part.safetensors", strange / f"{STRANGE}.safetensors")
    both_files = {STRANGE: "part.safetensors", "b": f"{STRANGE}.safetensors"}
    for weight_map, what in (
        ({STRANGE: "part.safetensors", "b\x1b": "part.safetensors"}, "is not in part.safetensors, where"),
        (both_files, "is in"),
    ):
        (strange / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert what in message(lambda: weights_digest(strange))
    assert quoted(STRANGE) in message(lambda: refuse_left_over([STRANGE], folder=strange))


def test_other_folders_of_strange_names(tmp_path: Path) -> None:
    folder = tmp_path / STRANGE
    folder.mkdir()
    assert quoted(folder) in message(lambda: read_adapter(folder))
    (folder / "config.resolved.yaml").write_text("")
    assert words(message(lambda: RunFolder.require_unused(folder)).partition("--config ")[2])[0] == str(
        folder / "config.resolved.yaml"
    )
    message(lambda: report([folder], folder))
    audit: Any = None
    message(lambda: write_check_page(audit, folder))
    assert quoted(folder) in message(lambda: reference_view(folder))
    message(lambda: scan_pair_logps(folder))
    message(lambda: find_model(f"./{STRANGE}/none"))
    message(lambda: location(f"s3:/{STRANGE}"))


def test_adapters_of_strange_content(tmp_path: Path) -> None:
    import torch

    for config in (
        {"r": 1, "lora_alpha": 1, "peft_type": "LORA", STRANGE: STRANGE},
        {"r": STRANGE, "lora_alpha": 1},
        {"r": 1, "lora_alpha": 1, "peft_type": "LORA"},
    ):
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
        save_file({STRANGE: torch.zeros(2)}, tmp_path / WEIGHTS)
        assert str(tmp_path) in message(lambda: read_adapter(tmp_path))
    (tmp_path / WEIGHTS).write_bytes(b"\x1b[31m" * 20)
    assert WEIGHTS in message(lambda: read_adapter(tmp_path))


def test_checkpoints_of_strange_content(tmp_path: Path) -> None:
    run = tmp_path / STRANGE
    said: list[str] = []
    for name, files in (
        ("step-1", [{"file": STRANGE, "bytes": 1, "sha256": "0" * 64}]),
        ("step-2", [{"file": f"../{STRANGE}", "bytes": 1, "sha256": "0" * 64}]),
        ("step-3", [{STRANGE: 1}]),
    ):
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "COMPLETE.json").write_text(json.dumps({"step": 1, "files": files}))
        last = message(lambda: newest_checkpoint(run, said.append))
        assert words(last.partition("rm -r ")[2]) == [str(run), ""]
    assert len(said) == 1 + 2 + 3
    assert all(line.isprintable() for line in said), said


def test_tables_of_strange_content(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.int64())], metadata={"dpo_opt.schema_version": STRANGE})
    (tmp_path / STRANGE).mkdir()
    path = tmp_path / STRANGE / "a.parquet"
    pq.write_table(schema.empty_table(), path)
    message(lambda: list(read_row_groups(path)))
    message(lambda: scan_pair_logps(path))
    path.write_bytes(b"\x1b[31m" * 20)
    assert quoted(path.parent.parent) in message(lambda: list(read_row_groups(path)))
    message(lambda: scan_pair_logps(path))
    logps = pl.LazyFrame({"row": [1], "pair_id": [STRANGE]})
    message(lambda: join_reference(logps, logps.with_columns(pair_id=pl.lit("other"))))
    sample = {"prompt_id": STRANGE, "sample": 0, "policy_token_logps": [1.0], "ref_token_logps": [1.0, 2.0]}
    later = dict.fromkeys(LATER_COLUMNS)
    message(lambda: estimate_kl(pl.LazyFrame([sample | later])))


def test_a_shard_folder_with_a_file_of_a_strange_name(model: Path, tmp_path: Path) -> None:
    shards = tmp_path / STRANGE
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(2))
    precompute(PrecomputeConfig(model=str(model), data=data, shards=shards), scorer=ScriptedScorer())

    def read() -> None:
        with ShardFolder.open(shards).tokenizer():
            raise AssertionError

    for name in (STRANGE, "\x1b[2J"):
        (shards / "tokenizer" / name).touch()
        said = message(read)
        (shards / "tokenizer" / name).unlink()
    assert quoted(name) in said
    assert quoted(shards) in said


def test_what_is_repaired_or_removed_is_shown_as_a_shell_would_be_given_it(
    model: Path, tmp_path: Path
) -> None:
    shards = tmp_path / STRANGE
    data = write_jsonl(tmp_path / "data.jsonl", preference_rows(4))
    precompute(
        PrecomputeConfig(model=str(model), data=data, shards=shards, pairs_per_shard=2),
        scorer=ScriptedScorer(),
    )
    manifest = load_manifest(shards)
    # A record of a forged manifest, whose attempt is a name as well; the other shard's data is damaged.
    own = manifest.shards[0].model_copy(update={"attempt": STRANGE})
    write_manifest(shards, manifest.model_copy(update={"shards": [own, manifest.shards[1]]}))
    lost = shards / manifest.shards[1].file
    lost.unlink()
    (shards / "tokenizer" / "tokenizer.json").write_text("{")
    record = shards / "commits" / "00001-0badc0de.json"
    record.touch()
    private = ".b\x1b[31m.00000000.tmp"
    (shards / private).touch()
    os.utime(shards / private, (0, 0))

    def shown(*words: str) -> str:
        found = CliRunner().invoke(main, [*words, "--shards", str(shards), "--dry-run"])
        assert found.exit_code == 0, found.output
        assert all(line.isprintable() for line in found.stdout.split("\n"))
        return found.stdout

    said = shown("repair")
    labels = [line.split()[0] for line in said.splitlines()]
    assert labels == ["would_rebuild" if name == "rebuilt" else name for name in Repair.model_fields]
    for damaged in (lost, record, shards / "tokenizer"):
        assert f"{quoted(damaged)}: " in said
    # A commit counts only with its own shard's files, so what a record calls its attempt names no file.
    assert STRANGE not in said.replace(quoted(shards), "")
    assert quoted(private) in shown("gc", "--older-than", "1")


def test_a_merged_model_in_a_folder_of_a_strange_name(tmp_path: Path) -> None:
    used = tmp_path / STRANGE / "file"
    used.parent.mkdir()
    used.touch()
    config = MergeConfig(model="unused", adapter=tmp_path, output=used.parent)
    assert quoted(used.parent) in message(lambda: merge(config))


def test_values_of_strange_text_stay_on_their_line() -> None:
    assert short_value(STRANGE).isprintable()
    assert short_value({"factor": 2.0}) == "{'factor': 2.0}"


def test_progress_shows_names_and_is_not_steered_by_them(capsys: pytest.CaptureFixture[str]) -> None:
    progress = watched()
    progress.start("merging", total=1, unit="files")
    progress.advance(1, STRANGE)
    progress.finish()
    progress.say(STRANGE)
    assert "\x1b" not in capsys.readouterr().err


_TAKES_A_NAME = re.compile(
    r"(--(shards|model|config|output|output-dir|adapter|data|prompts|reference) |\b(cp|rm|mv)( -\w+)* )$"
)


def test_every_command_of_a_message_quotes_the_names_in_it() -> None:
    """Read from the syntax trees: what stands in a text after such an option or command."""
    root, found, bare = Path(__file__).resolve().parents[1], 0, []
    for path in (path for folder in FOLDERS for path in sorted((root / folder).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            for text, value in zip(node.values, node.values[1:], strict=False):
                if isinstance(text, ast.Constant) and _TAKES_A_NAME.search(str(text.value)):
                    found += 1
                    if not ast.unparse(value).startswith("{quoted("):
                        bare.append(f"{path.name}:{node.lineno}: {ast.unparse(value)}")
    assert found > 20
    assert bare == []
