"""What makes another reference of a model folder and its tokenizer, and what is only another spelling of it.

Each edit is made alone, to a copy of the model that a folder was scored with. Both who goes on scoring and
who trains compare the copy with the folder.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import NUMERICS, ScriptedScorer, preference_rows, write_jsonl
from model_edits import touched
from safetensors.torch import load_file, save_file

from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.evaluation import evaluations
from dpo_opt.optimize.identity import require_same_model
from dpo_opt.optimize.stream import PairStream
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.schemas.config_keys import MODEL_CONFIG
from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.fingerprint import MODEL_FIELDS
from dpo_opt.schemas.manifest import COMMITS
from dpo_opt.schemas.shard_folder import ShardFolder

Edit = Callable[[Path], None]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def config(**values: Any) -> Edit:
    """An edit of config.json."""
    return in_json("config.json", lambda found: {**found, **values})


def in_json(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Edit:
    def edit(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object], metadata: str = "pt") -> Edit:
    def edit(model: Path) -> None:
        found = load_file(model / WEIGHTS)
        change(found)
        save_file(found, model / WEIGHTS, metadata={"format": metadata})

    return edit


def one_weight(found: dict[str, torch.Tensor]) -> None:
    found["model.layers.1.mlp.up_proj.weight"][5, 7] += 1e-3


def two_exchanged(found: dict[str, torch.Tensor]) -> None:
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    found[a], found[b] = found[b], found[a]


def one_in_bfloat16(found: dict[str, torch.Tensor]) -> None:
    found["lm_head.weight"] = found["lm_head.weight"].bfloat16()


def write_index(model: Path, weight_map: dict[str, str]) -> None:
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def another_file_in_the_index(model: Path) -> None:
    found = load_file(model / WEIGHTS)
    (model / WEIGHTS).rename(model / "model-00001-of-00001.safetensors")
    one_weight(found)
    save_file(found, model / "model-best.safetensors")
    write_index(model, dict.fromkeys(found, "model-best.safetensors"))


def resharded(model: Path) -> None:
    found = load_file(model / WEIGHTS)
    names = sorted(found)
    (model / WEIGHTS).unlink()
    weight_map = {}
    for number in (0, 1):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: found[name] for name in names[number::2]}, model / file)
        weight_map |= dict.fromkeys(names[number::2], file)
    write_index(model, weight_map)


def mistrals_format(model: Path) -> None:
    (model / "consolidated.safetensors").write_bytes(b"loaded by nobody")


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Edit:
    def changed(found: dict[str, Any]) -> dict[str, Any]:
        change(found)
        return found

    return in_json("tokenizer.json", changed)


def tokenizer_config(**values: Any) -> Edit:
    return in_json("tokenizer_config.json", lambda found: {**found, **values})


def added_token(found: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    found["added_tokens"].append({"id": 270, "content": "<call>", "special": True, **flags})


def template(text: str, name: str = "chat_template.jinja") -> Edit:
    def edit(model: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)

    return edit


def rope(**values: Any) -> Edit:
    def change(found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "rope_parameters": {**found["rope_parameters"], **values}}

    return in_json("config.json", change)


# By what the refusal names: the first line of its table.
CHANGED: dict[str, tuple[str, Edit]] = {
    "a weight": ("weights", tensors(one_weight)),
    "two tensors exchanged": ("weights", tensors(two_exchanged)),
    "a weight's dtype": ("weights", tensors(one_in_bfloat16)),
    "a tensor removed": ("weights", tensors(lambda found: found.pop("lm_head.weight"))),
    "the index": ("weights", another_file_in_the_index),
    "the implementation": ("architecture", config(architectures=["GraniteForCausalLM"])),
    "rope's base": ("config.rope_parameters.rope_theta", rope(rope_theta=5e5)),
    "rope's scaling": ("config.rope_parameters.factor", rope(rope_type="linear", factor=2.0)),
    "rope's base in its former place": (
        "config.rope_parameters.rope_theta",
        config(rope_parameters=None, rope_theta=5e5),
    ),
    "epsilon": ("config.rms_norm_eps", config(rms_norm_eps=1e-5)),
    "a window": ("config.sliding_window", config(sliding_window=32)),
    "the context": ("config.max_position_embeddings", config(max_position_embeddings=128)),
    "key heads": ("config.num_key_value_heads", config(num_key_value_heads=4)),
    "the head's width": ("config.head_dim", config(head_dim=16)),
    "the activation": ("config.hidden_act", config(hidden_act="gelu")),
    "a bias": ("config.attention_bias", config(attention_bias=True)),
    "a quantization": ("config.quantization_config.bits", config(quantization_config={"bits": 4})),
    "another kind of model": ("config.model_type", config(model_type="mistral")),
    "the template": ("chat_template", template("{{ messages }}")),
    "a template for tools": (
        "chat_template",
        template("{{ tools }}", "additional_chat_templates/tool_use.jinja"),
    ),
    "an added token": ("tokenizer", tokenizer(added_token)),
    "a merge removed": ("tokenizer", tokenizer(lambda found: found["model"]["merges"].pop())),
    "no BOS": ("tokenizer", tokenizer(lambda found: found.update(post_processor=None))),
    "a space before each text": (
        "tokenizer",
        tokenizer(lambda found: found["pre_tokenizer"].update(add_prefix_space=True)),
    ),
    "lower case": ("tokenizer", tokenizer(lambda found: found.update(normalizer={"type": "Lowercase"}))),
    "another end": ("tokenizer", tokenizer_config(eos_token="<s>")),
}


def linked(model: Path) -> None:
    moved = model.rename(model.with_name("elsewhere"))
    model.symlink_to(moved)


def saved_again(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(model)
    shutil.rmtree(model)
    found.save_pretrained(model, max_shard_size="100KB")
    words.save_pretrained(model)


def as_transformers_4_wrote_it(found: dict[str, Any]) -> dict[str, Any]:
    found = {**found, "rope_theta": found["rope_parameters"]["rope_theta"], "rope_scaling": None}
    found["torch_dtype"] = found.pop("dtype")
    del found["rope_parameters"]
    return found


def defaults_written_out(found: dict[str, Any]) -> dict[str, Any]:
    from transformers import LlamaConfig

    return dict(LlamaConfig.from_dict(found).to_dict())


def defaults_left_out(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k not in ("attention_bias", "mlp_bias", "hidden_act")}


def template_in_the_settings(model: Path) -> None:
    path = model / "chat_template.jinja"
    tokenizer_config(chat_template=path.read_text())(model)
    path.unlink()


SAME: dict[str, Edit] = {
    "a copy": lambda model: None,
    "file times": touched,
    "a link": linked,
    "more shards": resharded,
    "the metadata of weights": tensors(lambda found: None, metadata="np"),
    "a file that nobody loads": mistrals_format,
    "saved again": saved_again,
    "the order of keys": in_json("config.json", lambda found: dict(reversed(found.items()))),
    "defaults written out": in_json("config.json", defaults_written_out),
    "defaults left out": in_json("config.json", defaults_left_out),
    "as transformers 4 wrote it": in_json("config.json", as_transformers_4_wrote_it),
    "the declared dtype": config(dtype="bfloat16", torch_dtype="bfloat16"),
    "names and versions": config(_name_or_path="there", transformers_version="4.1", id2label={"0": "a"}),
    "no architecture": config(architectures=None),
    "a padding token": config(pad_token_id=1),
    "several ends": config(eos_token_id=[1, 2]),
    "dropout": config(attention_dropout=0.1),
    "a kind of problem": config(problem_type="regression"),
    "a training program": config(unsloth_version="2026.1", unsloth_fixed=True),
    "the cache": config(use_cache=False),
    "settings of generation": config(temperature=0.7, do_sample=True, max_length=20),
    "how it was initialised": config(initializer_range=0.02),
    "the tokenizer's spelling": tokenizer(lambda found: None),
    "its padding": tokenizer(
        lambda found: found.update(
            truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        )
    ),
    "its longest text": tokenizer_config(model_max_length=17),
    "its cleaning up": tokenizer_config(clean_up_tokenization_spaces=True, padding_side="left"),
    "the template's place": template_in_the_settings,
}


@pytest.fixture(scope="module")
def scored(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PrecomputeConfig:
    base = tmp_path_factory.mktemp("identity")
    data = write_jsonl(base / "data.jsonl", preference_rows(4))
    settings: dict[str, Any] = {"max_length": 64, "pairs_per_shard": 4, "shards": base / "shards"}
    found = PrecomputeConfig.model_validate({"model": str(tiny_model), "data": data, **settings})
    precompute(found, scorer=ScriptedScorer())
    return found


def refusals(scored: PrecomputeConfig, model: Path, tmp_path: Path) -> dict[str, list[str]]:
    """First words of the table that each command refuses the model with; empty where it accepts it."""
    shards = tmp_path / "shards"
    shutil.copytree(str(scored.shards), shards)
    found: dict[str, list[str]] = {}

    def told(who: str, call: Callable[[], object]) -> None:
        try:
            call()
        except FingerprintError as error:
            found[who] = [line.split()[0] for line in error.what.splitlines()[2:-1]]

    again = scored.model_copy(update={"model": str(model), "shards": shards})
    told("precompute", lambda: precompute(again, scorer=ScriptedScorer()))
    worker = again.model_copy(update={"worker_index": 0, "num_workers": 2})
    told("a worker", lambda: precompute(worker, scorer=ScriptedScorer()))
    folder = ShardFolder.open(shards)
    told("training", lambda: require_same_model(folder, model, fields=MODEL_FIELDS, fix="another"))
    evaluated = tmp_path / "evaluated"
    precompute(again.model_copy(update={"shards": evaluated}), scorer=ScriptedScorer())
    settings = TrainConfig(shards=shards, model=str(model), output_dir="run", eval_shards=[evaluated])
    told("evaluation", lambda: evaluations(settings, folder, PairStream(folder, eval_split=0)))
    return found


@pytest.mark.parametrize("name", CHANGED)
def test_another_model_is_refused_by_what_differs(
    name: str, scored: PrecomputeConfig, model: Path, tmp_path: Path
) -> None:
    what, edit = CHANGED[name]
    edit(model)
    found = refusals(scored, model, tmp_path)
    who = {"precompute", "a worker"} | (set() if what == "chat_template" else {"training", "evaluation"})
    assert found.keys() == who
    assert all(what in rows for rows in found.values()), found
    kinds = {row.partition(".")[0] for rows in found.values() for row in rows}
    assert kinds == {what.partition(".")[0]}


@pytest.mark.parametrize("name", SAME)
def test_another_spelling_of_the_model_is_accepted(
    name: str, scored: PrecomputeConfig, model: Path, tmp_path: Path
) -> None:
    SAME[name](model)
    assert refusals(scored, model, tmp_path) == {}


@pytest.mark.parametrize("option", ["max_num_seqs", "gpu_memory_utilization", "enforce_eager", "block_size"])
def test_memory_settings_of_the_engine_are_the_same_run(
    option: str, scored: PrecomputeConfig, tmp_path: Path
) -> None:
    again = scored.model_copy(update={"shards": Path(shutil.copytree(str(scored.shards), tmp_path / "s"))})
    numerics = NUMERICS._replace(engine_options=json.dumps({option: 1}))
    scorer = ScriptedScorer(numerics=numerics)
    assert precompute(again, scorer=scorer) == ShardFolder.open(scored.shards).manifest
    assert scorer.scored == []


def test_other_shards_of_a_folder_follow_another_spelling_and_its_plan(
    scored: PrecomputeConfig, model: Path, tmp_path: Path
) -> None:
    """What is scored under the other spelling counts as the folder's own."""
    shards = Path(shutil.copytree(str(scored.shards), tmp_path / "shards"))
    plan = (shards / "plan.json").read_bytes()
    for path in [shards / "manifest.json", *(shards / COMMITS).iterdir()]:
        path.unlink()
    in_json("config.json", as_transformers_4_wrote_it)(model)
    scorer = ScriptedScorer()
    precompute(scored.model_copy(update={"model": str(model), "shards": shards}), scorer=scorer)
    assert scorer.scored
    assert (shards / "plan.json").read_bytes() == plan


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_folder_that_does_not_keep_its_references_configuration_compares_digests(
    text: str | None, scored: PrecomputeConfig, model: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(str(scored.shards), tmp_path / "old"))
    (old / MODEL_CONFIG).unlink()
    if text is not None:
        (old / MODEL_CONFIG).write_text(text)
    before = scored.model_copy(update={"shards": old})
    config(_name_or_path="there")(model)
    assert refusals(before, model, tmp_path) == {}
    for name in ("shards", "evaluated"):
        shutil.rmtree(tmp_path / name)
    config(pad_token_id=1)(model)
    found = refusals(before, model, tmp_path)
    assert set(map(tuple, found.values())) == {("model_config_digest",)}
    assert len(found) == 4
