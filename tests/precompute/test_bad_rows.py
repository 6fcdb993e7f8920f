import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ScriptedScorer, column_of, preference_rows, write_jsonl

from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.read import datasets, files
from dpo_opt.precompute.run import precompute, work
from dpo_opt.precompute.shards import planned_rows
from dpo_opt.precompute.shards.finalize import finalize
from dpo_opt.precompute.shards.read_plan import read_plan
from dpo_opt.schemas.errors import DataError, FingerprintError
from dpo_opt.schemas.manifest import COMMITS, MANIFEST, Manifest, load_manifest
from dpo_opt.schemas.shard_folder import ShardFolder
from dpo_opt.schemas.sidecars import COLUMNS

Configs = Callable[..., PrecomputeConfig]

ROWS = preference_rows(14)
# Row to what stands there instead, and the kind of its defect.
BAD: dict[int, tuple[bytes, str]] = {
    0: (b"{", "json"),
    4: (b'{"prompt": "a", "chosen": "b"}', "missing_key"),
    5: (b'{"prompt": "a", "chosen": "", "rejected": "c"}', "empty"),
    9: (b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}', "encoding"),
    13: (b'{"chosen": "a b", "rejected": "a c"}', "other_form"),
}
DROPPED = {"prompt": "Same?", "chosen": " same", "rejected": " same"}


@pytest.fixture
def config_of(tiny_model: Path, tmp_path: Path) -> Configs:
    data = tmp_path / "data.jsonl"
    write_lines(data)

    def config(**settings: Any) -> PrecomputeConfig:
        values = {"model": str(tiny_model), "data": data, "shards": tmp_path / "shards", "pairs_per_shard": 4}
        return PrecomputeConfig.model_validate({**values, "on_bad_row": "skip", **settings})

    return config


def write_lines(path: Path) -> None:
    """The rows, bad ones among them, and a blank line that is none."""
    lines = [BAD[i][0] if i in BAD else json.dumps(row).encode() for i, row in enumerate(ROWS)]
    path.write_bytes(b"\n".join([*lines[:2], b"  ", *lines[2:]]) + b"\n")


def run(config: PrecomputeConfig) -> Manifest:
    return precompute(config, scorer=ScriptedScorer())


def content(config: PrecomputeConfig) -> list[dict[str, Any]]:
    """Every pair of a folder as plain values."""
    fields = [
        {name: getattr(pair, name) for name in pair.__dataclass_fields__}
        for pair in ShardFolder.open(config.shards).pairs()
    ]
    return [{n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in pair.items()} for pair in fields]


def left_out(config: PrecomputeConfig, manifest: Manifest) -> list[dict[str, Any]]:
    return [
        row
        for shard in manifest.shards
        for row in pq.read_table(config.shards / shard.dropped_file).to_pylist()
    ]


def test_bad_rows_are_left_out_and_listed_with_their_place(config_of: Configs) -> None:
    config = config_of()
    manifest = run(config)
    assert (manifest.rows, manifest.kept) == (14, 9)
    assert manifest.dropped == {f"bad_row:{kind}": 1 for _, kind in BAD.values()}
    places = [f"{config.data[0]}:{row + 1 + (row > 1)}" for row in BAD]
    assert left_out(config, manifest) == [
        {"row": row, "source": None, "reason": f"bad_row:{kind}", "where": place}
        for (row, (_, kind)), place in zip(BAD.items(), places, strict=True)
    ]


def test_the_other_rows_keep_their_numbers_and_are_what_they_would_be_anyway(
    config_of: Configs, tmp_path: Path
) -> None:
    run(config_of())
    replaced = [DROPPED if i in BAD else row for i, row in enumerate(ROWS)]
    other = config_of(
        data=write_jsonl(tmp_path / "replaced.jsonl", replaced), shards=tmp_path / "other", on_bad_row="error"
    )
    assert run(other).dropped == {"identical_completions": len(BAD)}
    assert content(config_of()) == content(other)
    assert [p["row"] for p in content(other)] == [i for i in range(14) if i not in BAD]


def test_bad_rows_and_dropped_pairs_are_listed_in_order(config_of: Configs, tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in (ROWS[0], DROPPED, ROWS[2], ROWS[3], DROPPED)]
    data = tmp_path / "mixed.jsonl"
    data.write_text("\n".join([*rows[:1], "{", *rows[1:], "["]) + "\n")
    config = config_of(data=data, pairs_per_shard=100)
    manifest = run(config)
    assert [(r["row"], r["reason"]) for r in left_out(config, manifest)] == [
        (1, "bad_row:json"),
        (2, "identical_completions"),
        (5, "identical_completions"),
        (6, "bad_row:json"),
    ]


def test_conversations_that_the_template_cannot_render_are_bad_rows(
    config_of: Configs, tmp_path: Path
) -> None:
    def talk(**others: Any) -> dict[str, Any]:
        turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes"))]
        return {
            "prompt": turns[:1],
            "chosen": turns[1:],
            "rejected": [{**turns[1], "content": "No"}],
            **others,
        }

    # What the call that renders is given is not a row's to change: its ids would be others.
    spoilt = [{"tokenize": True}, {"add_generation_prompt": True}, {"chat_template": "x"}, {"tools": []}]
    spoilt += [{"messages": []}, {"self": 1}, {"conversations": 1}, {"strftime_now": "1"}]
    rows = [
        talk(),
        *(talk(chat_template_kwargs=settings) for settings in spoilt),
        talk(source="web"),
    ]
    config = config_of(data=write_jsonl(tmp_path / "chat.jsonl", rows), pairs_per_shard=2)
    manifest = run(config)
    assert manifest.dropped == {"bad_row:tools": 8}
    assert [p["row"] for p in content(config)] == [0, 9]
    with pytest.raises(DataError, match='"chat_template_kwargs" sets tokenize') as caught:
        run(config_of(data=tmp_path / "chat.jsonl", on_bad_row="error", shards=tmp_path / "strict"))
    assert caught.value.where == f"{tmp_path / 'chat.jsonl'}:2"


@pytest.mark.parametrize("row", BAD)
def test_without_skipping_nothing_is_written(config_of: Configs, tmp_path: Path, row: int) -> None:
    lines = [json.dumps(r).encode() for r in ROWS]
    lines[row] = BAD[row][0]
    data = tmp_path / "one.jsonl"
    data.write_bytes(b"\n".join(lines))
    config = config_of(data=data, on_bad_row="error")
    scorer = ScriptedScorer()
    with pytest.raises(DataError) as caught:
        precompute(config, scorer=scorer)
    assert caught.value.kind == BAD[row][1]
    assert caught.value.where == f"{data}:{row + 1}"
    assert scorer.calls == []
    assert not config.shards.exists()


def test_a_file_that_is_cut_off_stops_everything_all_the_same(config_of: Configs, tmp_path: Path) -> None:
    data = tmp_path / "cut.jsonl.gz"
    data.write_bytes(b"\x1f\x8b no gzip")
    config = config_of(data=[config_of().data[0], str(data)])
    with pytest.raises(DataError, match="cannot be read"):
        run(config)
    assert not config.shards.exists()


def test_data_of_bad_rows_alone_is_refused(config_of: Configs, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text("{\n" * 5)
    with pytest.raises(DataError, match="none of 5 rows can be used"):
        run(config_of(data=data))
    assert not config_of().shards.exists()


def test_another_bad_row_in_the_same_place_is_other_data(config_of: Configs) -> None:
    config = config_of()
    run(config)
    assert run(config).kept == 9
    data = Path(config.data[0])
    data.write_bytes(data.read_bytes().replace(BAD[5][0], b"[]"))
    with pytest.raises(FingerprintError, match="its data has 14 rows"):
        run(config)


MIXED = [json.dumps(ROWS[0]).encode(), BAD[13][0], b"{", *(json.dumps(row).encode() for row in ROWS[1:4])]


def test_bad_rows_are_the_same_from_another_path_and_in_the_words_of_another_python(
    config_of: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message may name a file, and the standard library words it."""
    (tmp_path / "there").mkdir()
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(MIXED))
    (tmp_path / "there" / "other.jsonl").write_bytes(b"\r\n".join(MIXED))
    monkeypatch.chdir(tmp_path)
    manifest = run(config_of(data="mixed.jsonl", pairs_per_shard=2))
    monkeypatch.setattr(json.JSONDecodeError, "__str__", lambda self: "in other words")
    monkeypatch.chdir(tmp_path / "there")
    for data in ("../mixed.jsonl", "other.jsonl", tmp_path / "mixed.jsonl"):
        scorer = ScriptedScorer()
        assert precompute(config_of(data=data, pairs_per_shard=2), scorer=scorer) == manifest
        assert scorer.calls == []
        folder = tmp_path / "shards"
        # A worker of several compares only the rows that it reads.
        for path in (folder / MANIFEST, *(folder / COMMITS).glob("00000-*")):
            path.unlink()
        worker = config_of(data=data, pairs_per_shard=2, worker_index=0, num_workers=2)
        assert work(worker, scorer=scorer) == 1
        manifest = finalize(folder)


def test_the_digest_of_a_bad_row_is_the_documented_formula(config_of: Configs, tmp_path: Path) -> None:
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(MIXED[:3]))
    run(config_of(data=tmp_path / "mixed.jsonl"))
    good = json.dumps(ROWS[0], sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    rows = [good, b"other_form\n" + MIXED[1], b"json\n" + MIXED[2]]
    expected = hashlib.sha256(b"".join(hashlib.sha256(row).digest() for row in rows)).hexdigest()
    assert read_plan(tmp_path / "shards").dataset_digest == expected


@pytest.mark.parametrize("stop", [1, 99])
def test_a_folder_whose_bad_rows_were_known_by_their_messages_goes_on_and_grows(
    config_of: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    data = tmp_path / "mixed.jsonl"
    data.write_bytes(b"\n".join([*MIXED, b""]))

    def told(call: int) -> None:
        if call == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as before, contextlib.suppress(KeyboardInterrupt):
        before.setattr(planned_rows, "row_digest", datasets.message_digest)
        precompute(config_of(data=data, pairs_per_shard=2), scorer=ScriptedScorer(before_call=told))
    planned = read_plan(tmp_path / "shards")
    scorer = ScriptedScorer()
    assert run(config_of(data=data, pairs_per_shard=2)).dataset_digest == planned.dataset_digest
    data.write_bytes(b"\n".join([*MIXED, *(json.dumps(row).encode() for row in ROWS[6:8])]))
    grown = precompute(config_of(data=data, pairs_per_shard=2, append=True), scorer=scorer)
    assert (grown.rows, len(scorer.scored)) == (8, 4)
    assert run(config_of(data=data, pairs_per_shard=2)) == grown


def test_a_bad_row_of_a_table_is_known_by_what_can_be_read_of_it(config_of: Configs, tmp_path: Path) -> None:
    cases = [("Once?", b"\xff"), ("Once?", b"\xff"), ("Twice?", b"\xff"), ("Once?", b"good")]
    digests = []
    for i, (prompt, source) in enumerate(cases):
        rows = [{name: str(row[name]) for name in ("prompt", "chosen", "rejected")} for row in ROWS[:4]]
        rows[1] |= {"prompt": prompt, "chosen": ""}
        sources = pa.Array.from_buffers(
            pa.string(), 4, pa.array([b"a", b"b", source, b"c"], pa.binary()).buffers()
        )
        path = tmp_path / f"{i}.parquet"
        pq.write_table(pa.Table.from_pylist(rows).append_column("source", sources), path)
        run(config_of(data=path, shards=tmp_path / str(i)))
        digests.append(read_plan(tmp_path / str(i)).dataset_digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_ranked_rows_that_are_bad_take_one_number(config_of: Configs, tmp_path: Path) -> None:
    good = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}
    rows = [good, {**good, "ranks": [1, 1, 1]}, {**good, "prompt": "q"}]
    config = config_of(data=write_jsonl(tmp_path / "ranked.jsonl", rows), pairs_per_shard=2)
    manifest = run(config)
    assert (manifest.rows, manifest.kept, manifest.dropped) == (7, 6, {"bad_row:tie": 1})
    assert [r["row"] for r in left_out(config, manifest)] == [3]
    assert [p["row"] for p in content(config)] == [0, 1, 2, 4, 5, 6]


# Weights and margins ---------------------------------------------------------------------------------------


def test_weights_and_margins_stand_beside_the_shards(config_of: Configs, tmp_path: Path) -> None:
    weights = {1: 0.5, 3: 0.0, 6: 2}
    rows = [
        row
        | ({"weight": weights[i]} if i in weights else {})
        | ({"score_chosen": 5, "score_rejected": i} if i % 2 else {})
        for i, row in enumerate(ROWS)
    ]
    rows[3] |= {"chosen": rows[3]["rejected"]}  # dropped, and no number of another row changes
    data = write_jsonl(tmp_path / "weighted.jsonl", rows)
    with data.open("a") as file:
        file.write("{\n")
    config = config_of(data=data)
    run(config)
    columns = read_plan(config.shards).columns
    assert columns is not None
    assert columns == load_manifest(config.shards).columns
    weight, margin = (pq.read_table(config.shards / columns[n]) for n in ("weight", "margin"))
    assert dict(zip(weight["row"].to_pylist(), weight["weight"].to_pylist(), strict=True)) == weights
    margins = {i: 5.0 - i for i in range(1, 14, 2)}
    assert dict(zip(margin["row"].to_pylist(), margin["margin"].to_pylist(), strict=True)) == margins
    kept = np.array([p["row"] for p in content(config)])
    found = column_of(config.shards, "weight", rows=kept, default=1.0)
    assert found.tolist() == [weights.get(row, 1.0) for row in kept.tolist()]


def test_data_without_weights_has_no_columns(config_of: Configs) -> None:
    run(config_of())
    assert not (config_of().shards / COLUMNS).exists()


def test_several_processes_plan_what_one_does(
    config_of: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 90)
    plans = []
    for processes in (1, 2):
        config = config_of(shards=tmp_path / str(processes), processes=processes)
        run(config)
        plans.append((config.shards / "plan.json").read_bytes())
    assert plans[0] == plans[1]
