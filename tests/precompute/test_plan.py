import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes import NUMERICS, preference_rows, write_jsonl
from model_edits import lose_a_merge

from dpo_opt.precompute.check.audit import audit
from dpo_opt.precompute.config import CheckConfig, PrecomputeConfig
from dpo_opt.precompute.shards.make_plan import Planned, make_plan
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.shards.write_plan import adopt_plan
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.schemas.config_keys import MODEL_CONFIG
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError, FingerprintError
from dpo_opt.schemas.manifest import COMMAND, PLAN, TOKENIZER, Plan
from dpo_opt.schemas.pairs import Numerics

Plans = Callable[..., Plan]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", preference_rows(10))


@pytest.fixture
def plan_of(tiny_model: Path, data: Path, tmp_path: Path) -> Plans:
    """Plans, and with ``adopt`` also follows the plan in a folder."""

    def plan(*, adopt: Path | None = None, numerics: Numerics = NUMERICS, **settings: Any) -> Plan:
        values = {"model": str(tiny_model), "data": data, "shards": tmp_path / "shards", "pairs_per_shard": 4}
        config = PrecomputeConfig.model_validate(values | settings)
        reference = resolve_reference(config)
        tokenizer = make_tokenizer(config, reference)
        made = make_plan(config, reference=reference, tokenizer=tokenizer, numerics=numerics)
        if adopt is not None:
            adopt_plan(config.model_copy(update={"shards": adopt}), made, tokenizer.tokenizer.save_pretrained)
        return made.plan

    return plan


def test_shards_cover_the_rows_exactly(plan_of: Plans) -> None:
    for size, expected in ((4, [(0, 4), (4, 8), (8, 10)]), (5, [(0, 5), (5, 10)]), (99, [(0, 10)])):
        plan = plan_of(pairs_per_shard=size)
        assert [(s.start, s.stop) for s in plan.shards] == expected
        assert [s.shard for s in plan.shards] == list(range(len(expected)))
        assert plan.rows == 10


def test_digests_are_the_documented_formula(plan_of: Plans) -> None:
    def digest(rows: list[dict[str, object]]) -> str:
        message = b""
        for row in rows:
            text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
            message += hashlib.sha256(text).digest()
        return hashlib.sha256(message).hexdigest()

    rows = preference_rows(10)
    plan = plan_of()
    assert plan.dataset_digest == digest(rows)
    assert [s.rows_digest for s in plan.shards] == [digest(rows[0:4]), digest(rows[4:8]), digest(rows[8:])]


def test_the_same_input_gives_the_same_bytes_from_any_folder(
    plan_of: Plans, data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(data, moved / "renamed.jsonl")
    shutil.copytree(tiny_model, moved / "model")
    plan_of(adopt=tmp_path / "a")
    plan_of(adopt=tmp_path / "b", data=moved / "renamed.jsonl", model=str(moved / "model"))
    first, second = ((tmp_path / name / PLAN).read_bytes() for name in ("a", "b"))
    assert first == second
    assert str(tmp_path).encode() not in first
    assert read_plan(tmp_path / "a") == plan_of()


def test_other_data_gives_another_digest(plan_of: Plans, tmp_path: Path) -> None:
    rows = preference_rows(10)
    changed = [*rows[:9], {**rows[9], "source": "other"}]
    files = [
        write_jsonl(tmp_path / f"{i}.jsonl", r)
        for i, r in enumerate([rows, changed, rows[::-1], rows[:9], [*rows, rows[0]]])
    ]
    assert len({plan_of(data=f).dataset_digest for f in files}) == len(files)


def test_the_fingerprint_says_what_the_settings_and_the_engine_are(plan_of: Plans) -> None:
    numerics = Numerics(engine="e", engine_version="v", strategy="s", dtype="bfloat16")
    fingerprint = plan_of(max_length=77, truncation="keep_end", numerics=numerics).fingerprint
    assert (fingerprint.max_length, fingerprint.truncation) == (77, "keep_end")
    assert fingerprint.model_dump(include=set(numerics._fields)) == numerics._asdict()
    # Without a setting, the model's context of 256 is shorter than the default of 1024.
    assert plan_of().fingerprint.max_length == 256


def test_a_length_beyond_the_context_is_refused(plan_of: Plans) -> None:
    assert plan_of(max_length=256).fingerprint.max_length == 256
    with pytest.raises(ConfigError, match="--max-length 257 is beyond the model's context of 256"):
        plan_of(max_length=257)


def test_a_context_under_another_name_is_kept_to_as_well(
    plan_of: Plans, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    del config["max_position_embeddings"]
    for stated in ({"n_positions": 128}, {"text_config": config | {"max_position_embeddings": 128}}):
        (model / "config.json").write_text(json.dumps(config | stated))
        with pytest.raises(ConfigError, match="--max-length 129 is beyond the model's context of 128"):
            plan_of(model=str(model), max_length=129)
        assert plan_of(model=str(model)).fingerprint.max_length == 128


def test_a_config_without_a_vocabulary_size_is_refused(
    plan_of: Plans, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    del config["vocab_size"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="vocab_size"):
        plan_of(model=str(model))


def test_planning_writes_nothing(plan_of: Plans, tmp_path: Path) -> None:
    plan_of()
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(("truncation", "reason"), [("keep_start", "prompt_fills"), ("drop", "longer_than")])
def test_data_of_which_nothing_is_left_is_refused_with_a_length_that_keeps_some(
    plan_of: Plans, truncation: str, reason: str
) -> None:
    settings: dict[str, Any] = {"truncation": truncation}
    with pytest.raises(
        DataError, match=rf"none of 10 pairs can be used \(10 {reason}_max_length\)"
    ) as caught:
        plan_of(max_length=2, **settings)
    length = re.match(r"pass --max-length (\d+),", caught.value.fix or "")
    assert length
    plan_of(max_length=int(length[1]), **settings)


LONG = "a long text of many words " * 40


@pytest.mark.parametrize(
    ("row", "truncation", "reason", "fix"),
    [
        ({"chosen": " yes", "rejected": " yes"}, "keep_start", "identical_completions", "--column rejected="),
        ({"prompt": ""}, "keep_start", "empty_prompt", "--column prompt="),
        ({"prompt": LONG}, "keep_start", "prompt_fills_max_length", "pass --truncation keep_end"),
        ({"prompt": LONG}, "drop", "longer_than_max_length", "pass --truncation keep_end"),
        ({"chosen": LONG}, "keep_end", "completion_fills_max_length", "shorten the texts"),
    ],
)
def test_the_fix_for_data_of_which_nothing_is_left_is_of_the_reason_that_most_pairs_have(
    plan_of: Plans,
    data: Path,
    tiny_model: Path,
    tmp_path: Path,
    row: dict[str, str],
    truncation: str,
    reason: str,
    fix: str,
) -> None:
    """Where the model's context allows no longer pairs, and its tokenizer writes no BOS."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    backend = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**backend, "post_processor": None}))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    write_jsonl(data, [{"prompt": "Is it?", "chosen": " yes", "rejected": " no"} | row] * 3)
    with pytest.raises(DataError, match=rf"3 {reason}\)") as caught:
        plan_of(model=str(model), truncation=truncation, max_length=None)
    assert fix in str(caught.value.fix)
    found = audit(
        CheckConfig.model_validate({"data": [str(data)], "model": str(model), "truncation": truncation})
    )
    (error,) = [p for p in found.problems if p.severity == "error"]
    of_length = "max_length" in reason
    assert error.kind == ("nothing_fits" if of_length else f"all_{reason}")
    assert ("--max-length" in error.fix) == of_length
    assert of_length or error.fix == caught.value.fix


def test_a_late_malformed_row_is_found(plan_of: Plans, data: Path) -> None:
    with data.open("a") as file:
        file.write('{"prompt": "a", "chosen": null, "rejected": "b"}\n')
    with pytest.raises(DataError) as caught:
        plan_of()
    assert caught.value.where == f"{data}:11"


def test_a_folder_is_planned_once(plan_of: Plans, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    plan_of(adopt=folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    plan_of(adopt=folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert {p.name for p in folder.iterdir()} == {PLAN, TOKENIZER, COMMAND, MODEL_CONFIG}


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 100},
    "truncation": {"truncation": "drop"},
    "engine": {"numerics": NUMERICS._replace(engine="other")},
    "engine_version": {"numerics": NUMERICS._replace(engine_version="2")},
    "strategy": {"numerics": NUMERICS._replace(strategy="other")},
    "dtype": {"numerics": NUMERICS._replace(dtype="bfloat16")},
}


@pytest.mark.parametrize("field", OTHER_SETTINGS)
def test_a_folder_refuses_another_setting_by_name(plan_of: Plans, tmp_path: Path, field: str) -> None:
    plan_of(adopt=tmp_path / "shards")
    with pytest.raises(FingerprintError) as caught:
        plan_of(adopt=tmp_path / "shards", **OTHER_SETTINGS[field])
    named = [line.split()[0] for line in caught.value.what.splitlines()[2:-1]]
    assert named == [field]


def change_weights(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5}))


def change_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_weights, "weights"),
        (change_config, "config.rms_norm_eps"),
        (change_template, "chat_template"),
        (lose_a_merge, "tokenizer"),
    ],
)
def test_a_folder_refuses_another_model_by_what_differs(
    plan_of: Plans, tiny_model: Path, tmp_path: Path, change: Callable[[Path], None], field: str
) -> None:
    plan_of(adopt=tmp_path / "shards")
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    plan_of(adopt=tmp_path / "shards", model=str(model))
    change(model)
    with pytest.raises(FingerprintError) as caught:
        plan_of(adopt=tmp_path / "shards", model=str(model))
    assert [line.split()[0] for line in caught.value.what.splitlines()[2:-1]] == [field]
    assert caught.value.exit_code == 4


def test_a_folder_refuses_other_data_and_other_shards(plan_of: Plans, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    plan_of(adopt=folder)
    for size in (3, 6, 10):
        with pytest.raises(FingerprintError, match=f"hold 4 rows, --pairs-per-shard now gives {size}"):
            plan_of(adopt=folder, pairs_per_shard=size)
    write_jsonl(data, preference_rows(11))
    with pytest.raises(FingerprintError, match="grown from 10 to 11 rows"):
        plan_of(adopt=folder)


def test_shards_without_a_plan_are_not_taken_for_this_runs(plan_of: Plans, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    plan_of(adopt=folder)
    (folder / "commits").mkdir()
    (folder / "commits" / "00000-abc.json").write_text("{}")
    (folder / PLAN).unlink()
    with pytest.raises(DataError, match=r"holds commits/ and tokenizer/, but no plan\.json"):
        plan_of(adopt=folder)
    assert not (folder / PLAN).exists()


def test_a_tokenizer_without_a_plan_is_not_taken_for_this_runs(
    plan_of: Plans, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    other = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    lose_a_merge(other)
    plan_of(adopt=folder, model=str(other))
    (folder / PLAN).unlink()
    with pytest.raises(DataError, match=r"holds tokenizer/, but no plan\.json"):
        plan_of(adopt=folder)


def test_runs_that_start_together_agree_on_one_plan(plan_of: Plans, tiny_model: Path, tmp_path: Path) -> None:
    planned = Planned(plan_of(), None, {}, None, [])
    tokenizers = [load_tokenizer(tiny_model).save_pretrained for _ in range(8)]
    for attempt in range(5):
        folder = tmp_path / f"shards-{attempt}"
        config = PrecomputeConfig(model=str(tiny_model), data=["unread.jsonl"], shards=folder)
        with ThreadPoolExecutor(len(tokenizers)) as pool:
            list(pool.map(lambda t, config=config: adopt_plan(config, planned, t), tokenizers))
        assert read_plan(folder) == planned.plan
        assert {p.name for p in folder.iterdir()} == {PLAN, TOKENIZER, COMMAND}


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_a_folder_without_a_readable_plan_says_so(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / PLAN).write_bytes(content)
    with pytest.raises(DpoOptError) as caught:
        read_plan(tmp_path)
    assert caught.value.exit_code == 3
    assert caught.value.where == str(tmp_path if content is None else tmp_path / PLAN)


def test_weights_that_are_all_0_are_refused_before_anything_is_scored(plan_of: Plans, tmp_path: Path) -> None:
    rows = [row | {"weight": 0} for row in preference_rows(4)]
    data = write_jsonl(tmp_path / "weightless.jsonl", rows)
    with pytest.raises(DataError, match="the weights of all pairs are 0") as refused:
        plan_of(data=[str(data)])
    assert "--ignore-column weight" in str(refused.value.fix)
    assert plan_of(data=[str(data)], ignore_column=["weight"]).rows == 4
    write_jsonl(data, [*rows, preference_rows(5)[4]])
    assert plan_of(data=[str(data)]).rows == 5
    labelled = [{"prompt": f"{i}", "completion": "a", "label": i > 1, "weight": 0} for i in range(4)]
    write_jsonl(data, labelled)
    with pytest.raises(DataError, match="the weights of all rows are 0"):
        plan_of(data=[str(data)])
