"""Every field of the fingerprint, changed alone and by its real cause: who refuses, and who does not mind.

For each field there is a folder that was scored under another cause (another weight, another template,
another engine); the four commands then use it with the model and settings that all other folders have.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from command_line import invoke
from fakes import NUMERICS, preference_rows, write_jsonl
from model_edits import change_config, change_weights, touched
from safetensors.torch import load_file, save_file

from dpo_opt.cli import main
from dpo_opt.optimize import TrainConfig
from dpo_opt.optimize.prepare import prepare
from dpo_opt.optimize.score_folder import score_shards
from dpo_opt.optimize.transformers_scorer import HfScorer
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute, work
from dpo_opt.schemas.errors import DataError, FingerprintError
from dpo_opt.schemas.fingerprint import ALL_FIELDS, MODEL_FIELDS, TOKENIZER_FIELDS, Fingerprint
from dpo_opt.schemas.manifest import COMMITS, INDEX, MANIFEST, load_manifest
from dpo_opt.schemas.pairs import LogpArray, Numerics, TokenSequence
from dpo_opt.verify import verify

ROWS = preference_rows(6)


@functools.cache
def loaded(model: Path) -> HfScorer:
    return HfScorer(model, dtype="float32")


class Renamed:
    """The model's own log-probs, under another engine's name."""

    def __init__(self, model: Path, numerics: Numerics) -> None:
        self.numerics = numerics
        self._scorer = loaded(model)

    def token_logps(self, sequences: list[TokenSequence]) -> list[LogpArray]:
        return self._scorer.token_logps(sequences)


@dataclasses.dataclass
class Cause:
    """What a folder is scored under."""

    model: Path
    folder: Path
    numerics: Numerics = NUMERICS
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self, **changes: Any) -> PrecomputeConfig:
        data = write_jsonl(self.folder / "data.jsonl", changes.pop("rows", ROWS))
        shards = self.folder / "shards"
        settings = {"pairs_per_shard": 4, **self.settings, **changes}
        return PrecomputeConfig(model=str(self.model), data=data, shards=shards, **settings)


Change = Callable[[Cause, pytest.MonkeyPatch], None]


def own_model(cause: Cause) -> Path:
    """A copy of the model that may be changed."""
    cause.model = Path(shutil.copytree(cause.model, cause.folder / "model"))
    return cause.model


def another_weight(cause: Cause, _: pytest.MonkeyPatch) -> None:
    change_weights(
        own_model(cause), lambda found: found["model.layers.1.mlp.up_proj.weight"][5, 7].add_(1e-3)
    )


def another_config(cause: Cause, _: pytest.MonkeyPatch) -> None:
    change_config(own_model(cause), rms_norm_eps=2e-6)


def another_architecture(cause: Cause, _: pytest.MonkeyPatch) -> None:
    change_config(own_model(cause), architectures=["GraniteForCausalLM"])


def another_merge(cause: Cause, _: pytest.MonkeyPatch) -> None:
    """Of two letters that the data does not have, so that all ids stay what they are."""
    path = own_model(cause) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["ZZ"] = len(vocabulary)
    tokenizer["model"]["merges"].append(["Z", "Z"])
    path.write_text(json.dumps(tokenizer))


def another_template(cause: Cause, _: pytest.MonkeyPatch) -> None:
    """Of no consequence for these rows, which are text; a worker cannot know the next ones."""
    path = own_model(cause) / "chat_template.jinja"
    path.write_text(path.read_text() + "{# another #}")


def another(name: str, value: object) -> Change:
    def change(cause: Cause, _: pytest.MonkeyPatch) -> None:
        if name in Numerics._fields:
            cause.numerics = cause.numerics._replace(**{name: value})
        else:
            cause.settings[name] = value

    return change


def another_version(constant: str, value: object) -> Change:
    """As another release of this program writes it."""

    def change(_: Cause, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(f"dpo_opt.precompute.shards.reference.{constant}", value)

    return change


def a_clock_in_the_template(_: Cause, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another release found one, in a template where this one sees none."""
    monkeypatch.setattr("dpo_opt.precompute.tokens.tokenize.asks_for_the_date", lambda tokenizer: True)


CAUSES: dict[str, Change] = {
    "schema_version": another_version("SCHEMA_VERSION", 0),
    "weights": another_weight,
    "model_config_digest": another_config,
    "tokenizer": another_merge,
    "chat_template": another_template,
    "text_to_ids": another_version("TEXT_TO_IDS", "0"),
    "max_length": another("max_length", 200),
    "truncation": another("truncation", "keep_end"),
    "engine": another("engine", "another"),
    "engine_version": another("engine_version", "2"),
    "strategy": another("strategy", "another"),
    "dtype": another("dtype", "bfloat16"),
    "engine_options": another("engine_options", '{"tensor_parallel_size":2}'),
    "rope": another("rope", "longrope:long"),
    "train_on": another("train_on", "last"),
    "template_date": a_clock_in_the_template,
    "architecture": another_architecture,
}

WITH_OTHERS = {"rows"}
"""Never changed alone: unpaired rows are another version of the format too (test_unpaired_rows.py)."""

# A configuration is told by its keys.
TOLD_AS = {"model_config_digest": "config.rms_norm_eps"}

# Who compares what (FORMAT.md, "Fingerprint").
COMPARED: dict[str, tuple[str, ...]] = {
    "precompute": tuple(Fingerprint.model_fields),
    "train": ("schema_version", "weights", "model_config_digest", "tokenizer", "rope", "architecture"),
    "train --reference-differs": ("schema_version", "tokenizer"),
    "verify": ("schema_version", "weights", "model_config_digest", "tokenizer", "rope", "architecture"),
    "score": ("schema_version", "tokenizer"),
}


def test_every_field_has_a_row() -> None:
    assert set(CAUSES) | WITH_OTHERS == set(Fingerprint.model_fields)
    assert set(COMPARED["precompute"]) == set(ALL_FIELDS)
    assert set(COMPARED["train"]) == set(COMPARED["verify"]) == set(MODEL_FIELDS)
    assert set(COMPARED["score"]) == set(TOKENIZER_FIELDS)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cause]:
    """One finished folder for each field, scored under another cause."""
    made = {}
    for field, change in CAUSES.items():
        cause = Cause(tiny_model, tmp_path_factory.mktemp(field))
        with pytest.MonkeyPatch.context() as monkeypatch:
            change(cause, monkeypatch)
            precompute(cause.config(), scorer=Renamed(cause.model, cause.numerics))
        made[field] = cause
    return made


def run(command: str, shards: Path, model: Path, folder: Path) -> object:
    """A command with the model and the settings that all folders but one have."""
    if command == "precompute":
        config = Cause(model, shards.parent).config()
        return work(config, scorer=Renamed(model, NUMERICS))
    if command.startswith("train"):
        differs = command.endswith("differs")
        return prepare(
            TrainConfig(shards=shards, model=str(model), output_dir=folder / "run", reference_differs=differs)
        )
    if command == "verify":
        verdict = verify(shards, model=str(model), num_pairs=4, dtype="float32")
        assert verdict.ok, verdict
        return verdict
    return score_shards(shards, model=str(model), output=folder / "scores.parquet", dtype="float32")


@pytest.mark.parametrize("command", COMPARED)
@pytest.mark.parametrize("field", CAUSES)
def test_a_field_is_refused_by_who_compares_it_and_by_nobody_else(
    field: str, command: str, folders: dict[str, Cause], tiny_model: Path, tmp_path: Path
) -> None:
    shards = folders[field].folder / "shards"
    if field not in COMPARED[command]:
        assert run(command, shards, tiny_model, tmp_path)
        return
    with pytest.raises(FingerprintError) as caught:
        run(command, shards, tiny_model, tmp_path)
    error = caught.value
    assert error.exit_code == 4
    assert error.where == str(shards)
    assert error.fix
    header, *table = [line.split() for line in error.what.splitlines()[1:]]
    assert header == ["field", "cached", "this", "run"]
    *differing, same = table
    assert [line[0] for line in differing] == [TOLD_AS.get(field, field)]
    assert {name.rstrip(",") for name in same[1:]} == set(COMPARED[command]) - {field}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", CAUSES)
def test_a_worker_that_finds_a_plan_compares_every_field(
    field: str, folders: dict[str, Cause], tiny_model: Path
) -> None:
    """It does not make the plan anew, which is another way through the code."""
    config = Cause(tiny_model, folders[field].folder).config(worker_index=0, num_workers=2)
    with pytest.raises(FingerprintError) as caught:
        work(config, scorer=Renamed(tiny_model, NUMERICS))
    assert caught.value.what.splitlines()[2].split()[0] == TOLD_AS.get(field, field)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("verify", []),
        ("train", ["--output-dir", "{out}/run"]),
        ("train", ["--output-dir", "{out}/run", "--dry-run"]),
        ("score", ["--output", "{out}/scores.parquet"]),
        ("precompute", ["--data", "{data}", "--backend", "hf", "--pairs-per-shard", "4"]),
    ],
)
def test_the_exit_code_of_the_program_is_4(
    command: str, options: list[str], folders: dict[str, Cause], tiny_model: Path, tmp_path: Path
) -> None:
    folder = folders["tokenizer"].folder
    given = [option.format(out=tmp_path, data=folder / "data.jsonl") for option in options]
    result = invoke(command, "--shards", folder / "shards", "--model", tiny_model, *given)
    assert result.exit_code == 4, result.output
    assert any(line.split()[:1] == ["tokenizer"] for line in result.stderr.splitlines())
    assert list(tmp_path.iterdir()) == []


# The same model in other clothes --------------------------------------------------------------------------


def resharded(model: Path) -> None:
    """Two files and an index of them."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, model / file, metadata={"format": "pt"})
    path.unlink()
    weight_map = {name: file for file, inside in files.items() for name in inside}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def renamed(model: Path) -> None:
    change_config(
        model,
        _name_or_path="elsewhere/model",
        transformers_version="4.0.0",
        use_cache=False,
        architectures=None,
    )


def written_again(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    shutil.rmtree(model)
    saved.save_pretrained(model)
    tokenizer.save_pretrained(model)


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cause = Cause(tiny_model, tmp_path_factory.mktemp("plain"))
    precompute(cause.config(), scorer=Renamed(tiny_model, NUMERICS))
    return cause.folder / "shards"


@pytest.mark.parametrize("dress", [resharded, touched, renamed, written_again])
def test_the_same_model_is_accepted_by_every_command(
    dress: Callable[[Path], None], plain: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    dress(model)
    (tmp_path / "out").mkdir()
    for command in COMPARED:
        found = run(command, plain, model, tmp_path / "out")
        assert (found == 0) == (command == "precompute"), "all shards are there"


def test_an_adapter_that_the_reference_lacks_is_merged_and_scored_by_what_the_message_says(
    plain: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The base is the model that was scored: to pass it again, or to score it again, would change nothing."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    model.save_pretrained(adapter)
    own = {"use_peft": True, "adapter": adapter, "model": str(tiny_model)}
    with pytest.raises(FingerprintError, match="weights") as caught:
        prepare(TrainConfig(shards=plain, output_dir=tmp_path / "run", **own))
    merge_command, score_command, *_ = str(caught.value.fix).split(", then ")
    for command, places in (
        (merge_command, {"MERGED": merged}),
        (
            f"{score_command} --backend hf",
            {"MERGED": merged, "DATA": plain.parent / "data.jsonl", "SCORED": tmp_path / "scored"},
        ),
    ):
        words = [str(places.get(word, word)) for word in command.removeprefix("dpo-opt ").split()]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    assert prepare(TrainConfig(shards=tmp_path / "scored", output_dir=tmp_path / "run", **own))


def test_a_weight_that_changes_in_its_place_is_noticed(tiny_model: Path, tmp_path: Path) -> None:
    """What is remembered of the weights' digest holds for the files that were read."""
    cause = Cause(Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path)
    precompute(cause.config(), scorer=Renamed(cause.model, NUMERICS))
    assert work(cause.config(), scorer=Renamed(cause.model, NUMERICS)) == 0
    path = cause.model / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(FingerprintError, match="weights"):
        work(cause.config(), scorer=Renamed(cause.model, NUMERICS))


# Other data -----------------------------------------------------------------------------------------------

OTHER_DATA: dict[str, list[dict[str, object]]] = {
    "a text": [*ROWS[:-1], {**ROWS[-1], "chosen": " Another answer."}],
    "a source": [{**ROWS[0], "source": "elsewhere"}, *ROWS[1:]],
    "the order": ROWS[::-1],
    "a row less": ROWS[:-1],
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_is_refused_by_the_next_precompute(name: str, plain: Path, tiny_model: Path) -> None:
    try:
        config = Cause(tiny_model, plain.parent).config(rows=OTHER_DATA[name])
        with pytest.raises(FingerprintError) as caught:
            work(config, scorer=Renamed(tiny_model, NUMERICS))
    finally:
        write_jsonl(plain.parent / "data.jsonl", ROWS)
    assert caught.value.exit_code == 4
    assert load_manifest(plain).dataset_digest[:16] in caught.value.what
    assert caught.value.fix


def test_a_worker_that_finds_a_plan_refuses_the_rows_that_it_reads(
    plain: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """It does not read the others, so it compares rows shard by shard: exit code 3, nothing committed."""
    shards = Path(shutil.copytree(plain, tmp_path / "shards"))
    for path in (shards / MANIFEST, shards / INDEX, *(shards / COMMITS).glob("00001-*")):
        path.unlink()
    cause = Cause(tiny_model, tmp_path)
    config = cause.config(rows=OTHER_DATA["a text"], worker_index=0, num_workers=2)
    with pytest.raises(DataError) as caught:
        work(config, scorer=Renamed(tiny_model, NUMERICS))
    assert caught.value.exit_code == 3
    assert "rows 4 to 6" in caught.value.what
    assert str(tmp_path / "data.jsonl") in str(caught.value.where)
    assert list((shards / COMMITS).glob("00001-*")) == []
    # The rows that were planned are scored.
    assert work(cause.config(worker_index=0, num_workers=2), scorer=Renamed(tiny_model, NUMERICS)) == 1
