import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.run import precompute
from dpo_opt.schemas.errors import DataError, FingerprintError
from dpo_opt.schemas.manifest import INDEX, MANIFEST, TOKENIZER, load_manifest, write_manifest
from dpo_opt.schemas.shards import write_table
from dpo_opt.schemas.storage import sha256_file
from dpo_opt.verify import Verdict, verify


def make_shards(folder: Path, model: Path, *, scripted: bool) -> Path:
    from dpo_opt.optimize.score import HfScorer

    data = write_jsonl(folder / "data.jsonl", preference_rows(20))
    config = PrecomputeConfig(model=str(model), data=data, shards=folder / "shards", pairs_per_shard=8)
    precompute(config, scorer=ScriptedScorer() if scripted else HfScorer(model, dtype="float32"))
    return config.shards


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("verify"), tiny_model, scripted=False)


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shards"))


def check(shards: Path, model: Path | None = None, *, num_pairs: int = 64) -> Verdict:
    return verify(shards, model=None if model is None else str(model), num_pairs=num_pairs, dtype="auto")


def flip(path: Path, place: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)


def test_a_whole_folder_is_ok(shards: Path) -> None:
    verdict = check(shards)
    assert verdict.as_dict() == {"integrity": {"ok": True, "problems": []}, "parity": None}
    verdict.require_ok()


def test_every_damaged_file_is_named(shards: Path) -> None:
    files = [shards / INDEX, shards / TOKENIZER / "tokenizer.json"]
    for shard in load_manifest(shards).shards:
        files += [shards / shard.file, shards / shard.dropped_file]
    assert len(files) == 8
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        for damage in (lambda p: flip(p, 100), lambda p: flip(p, -1), Path.unlink):
            damage(path)
            (problem,) = check(shards).problems
            assert str(path if path.parent.name != TOKENIZER else path.parent) in problem
            with pytest.raises(DataError, match="1 problem"):
                check(shards).require_ok()
            path.write_bytes(whole[path])
    assert check(shards).problems == []


def test_all_problems_are_named_at_once(shards: Path) -> None:
    for shard in load_manifest(shards).shards:
        flip(shards / shard.file, 200)
    shutil.rmtree(shards / TOKENIZER)
    verdict = check(shards)
    assert len(verdict.problems) == 4
    assert not verdict.as_dict()["integrity"]["ok"]


def test_an_unfinished_folder_cannot_be_verified(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    with pytest.raises(DataError, match="no manifest"):
        check(shards)


def rewrite(shards: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Replace a shard as a careless program would: with other rows, and with their right hash."""
    manifest = load_manifest(shards)
    first = manifest.shards[0]
    path = shards / first.file
    write_table(path, change(pq.read_table(path)))
    first = first.model_copy(update={"sha256": sha256_file(path), "bytes": path.stat().st_size})
    write_manifest(shards, manifest.model_copy(update={"shards": [first, *manifest.shards[1:]]}))
    return path


def set_column(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(
        table.schema.get_field_index(name), table.field(name), pa.array(values, table.field(name).type)
    )


CHANGES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "log_prob": (
        lambda t: set_column(t, "ref_chosen_token_logps", 2, [-1.0] * len(t["chosen_ids"][2])),
        "row 2 has a ref_chosen_logps that does not follow",
    ),
    "token": (
        lambda t: set_column(t, "chosen_ids", 2, [5] * len(t["chosen_ids"][2])),
        "row 2 has a pair_id that does not follow",
    ),
    "nan": (
        lambda t: set_column(t, "ref_rejected_token_logps", 1, [float("nan")] * len(t["rejected_ids"][1])),
        "row 1 has log-probs that do not fit",
    ),
    "length": (
        lambda t: set_column(t, "ref_rejected_token_logps", 1, [-1.0]),
        "row 1 has log-probs that do not fit",
    ),
    "positive": (
        lambda t: set_column(t, "ref_chosen_token_logps", 0, [1.0] * len(t["chosen_ids"][0])),
        "row 0 has log-probs that do not fit",
    ),
    "empty_prompt": (lambda t: set_column(t, "prompt_ids", 0, []), "row 0 has log-probs that do not fit"),
    "lost_row": (lambda t: t.slice(1), "7 rows, the manifest says 8"),
    "row_twice": (lambda t: set_column(t, "row", 3, 2), "row 2 does not belong here, or twice"),
    "foreign_row": (lambda t: set_column(t, "row", 3, 12), "row 12 does not belong here, or twice"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_that_do_not_hold_together_are_named(shards: Path, name: str) -> None:
    change, message = CHANGES[name]
    path = rewrite(shards, change)
    problems = check(shards).problems
    assert any(problem == f"{path}: {message}" or message in problem for problem in problems), problems
    assert all(str(path) in problem for problem in problems)


def test_a_rewritten_but_equal_shard_is_ok(shards: Path) -> None:
    rewrite(shards, lambda table: table)
    assert check(shards).problems == []


def test_the_model_that_was_scored_passes(shards: Path, tiny_model: Path) -> None:
    verdict = check(shards, tiny_model, num_pairs=7)
    verdict.require_ok()
    parity = verdict.as_dict()["parity"]
    assert set(parity) >= {"pairs", "tokens", "mean", "sd", "p99", "max", "floor_sd", "ok"}
    assert parity["ok"]
    assert parity["pairs"] == 7
    assert parity["max"] < 5e-3
    json.dumps(parity)


def test_another_model_is_refused_by_its_weights(shards: Path, other_model: Path) -> None:
    with pytest.raises(FingerprintError, match="weights") as caught:
        check(shards, other_model)
    assert caught.value.exit_code == 4


def test_numbers_that_are_not_the_models_fail_parity(tiny_model: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path, tiny_model, scripted=True)
    assert check(shards).problems == []
    verdict = check(shards, tiny_model)
    assert not verdict.as_dict()["parity"]["ok"]
    with pytest.raises(FingerprintError, match="the cached log-probs are not those of"):
        verdict.require_ok()


def test_parity_is_not_measured_on_damaged_shards(shards: Path, tiny_model: Path) -> None:
    flip(shards / load_manifest(shards).shards[0].file, 300)
    verdict = check(shards, tiny_model)
    assert verdict.problems
    assert verdict.parity is None
