"""Rows that are pairs, but not for this model: found before anything is scored, and left out on request."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import NUMERICS, ScriptedScorer, preference_rows, write_jsonl

from dpo_opt.dry_run import plan_precompute
from dpo_opt.precompute.config import PrecomputeConfig
from dpo_opt.precompute.read import parallel
from dpo_opt.precompute.run import precompute
from dpo_opt.precompute.shards import make_plan as planning
from dpo_opt.precompute.shards.make_plan import Planned, make_plan
from dpo_opt.precompute.shards.reference import make_tokenizer, resolve_reference
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.texts import PairTexts
from dpo_opt.precompute.tokens.tokenize import PairTokenizer
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

# As many templates: it refuses a conversation by its roles, and this one by a word as well.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) or m['content'] == 'never' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }} "
    "{% for c in m['tool_calls'] or [] %}{% if loop.index0 %}{{ raise_exception('one call') }}{% endif %}"
    "{{ c['function']['name'] }} {{ c['function']['arguments'] | tojson }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BEYOND = "<|beyond|>"
CALL = {"type": "function", "function": {"name": "look", "arguments": {"place": "here"}}}


def chat(i: object, *turns: str) -> dict[str, Any]:
    roles = turns or ("user",)
    return {
        "prompt": [{"role": role, "content": f"Question {i}?"} for role in roles],
        "chosen": [{"role": "assistant", "content": f"The answer is {i}."}],
        "rejected": [{"role": "assistant", "content": f"No {i}."}],
    }


def calling(i: int, *calls: dict[str, Any]) -> dict[str, Any]:
    return chat(i) | {"chosen": [{"role": "assistant", "content": f"Look {i}.", "tool_calls": list(calls)}]}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """It has a template that refuses, and a token that the model does not know."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([BEYOND])
    tokenizer.save_pretrained(folder)
    return folder


Configs = Callable[..., PrecomputeConfig]


@pytest.fixture
def config_of(tiny_model: Path, model: Path, tmp_path: Path) -> Configs:
    """Settings for some rows; the other model knows every id, and its template is the same."""
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    (other / "chat_template.jinja").write_text(TEMPLATE)

    def config(rows: Sequence[dict[str, Any]], *, every_id: bool = True, **settings: Any) -> PrecomputeConfig:
        data = write_jsonl(tmp_path / "data.jsonl", rows)
        values = {"model": str(other if every_id else model), "data": data, "pairs_per_shard": 4}
        return PrecomputeConfig.model_validate(values | {"shards": tmp_path / "shards"} | settings)

    return config


def plan_of(config: PrecomputeConfig, *, tokenize_all: bool = False) -> Planned:
    reference = resolve_reference(config)
    return make_plan(
        config,
        reference=reference,
        tokenizer=make_tokenizer(config, reference),
        numerics=NUMERICS,
        tokenize_all=tokenize_all,
    )


# The rows, whether the model knows every id of its tokenizer, and the line that is refused.
REFUSED: dict[str, tuple[list[dict[str, Any]], bool, int]] = {
    "template": ([*map(chat, range(10)), chat(10, "user", "user"), chat(11)], True, 11),
    "first row": ([chat(0, "user", "user"), *map(chat, range(1, 12))], True, 1),
    "settings": ([*map(chat, range(11)), chat(11) | {"chat_template_kwargs": {"tools": []}}], True, 12),
    "second call": ([*[calling(i, CALL) for i in range(10)], calling(10, CALL, CALL), chat(11)], True, 11),
    "id": ([*preference_rows(11), preference_rows(12)[11] | {"chosen": f" a {BEYOND}"}], False, 12),
    "id in a message": ([*map(chat, range(11)), *map(chat, [BEYOND])], False, 12),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_tokenizing_refuses_is_found_while_planning_and_skipped_on_request(
    config_of: Configs, name: str
) -> None:
    rows, every_id, line = REFUSED[name]
    scorer = ScriptedScorer()
    with pytest.raises(DataError) as caught:
        precompute(config_of(rows, every_id=every_id), scorer=scorer)
    assert str(caught.value.where).endswith(f":{line}")
    assert scorer.calls == []
    assert not config_of(rows).shards.exists()
    if name != "settings":  # which the row should not have, whatever the model
        assert str(caught.value.fix).startswith("pass --on-bad-row skip")
    manifest = precompute(config_of(rows, every_id=every_id, on_bad_row="skip"), scorer=scorer)
    assert (manifest.rows, manifest.kept) == (12, 11)


def test_a_word_that_the_template_refuses_is_found_by_a_dry_run_and_costs_no_finished_shard(
    config_of: Configs,
) -> None:
    rows = [*map(chat, range(11)), chat(11)]
    rows[11]["prompt"][0]["content"] = "never"
    config = config_of(rows)
    with pytest.raises(DataError, match="roles must alternate"):
        plan_precompute(config, NUMERICS)
    planned = plan_precompute(config_of(rows, on_bad_row="skip"), NUMERICS)
    assert (planned["bad_rows"], len(planned["bad_rows_skipped"])) == (1, 1)
    assert not config.shards.exists()
    scorer = ScriptedScorer()
    with pytest.raises(DataError) as caught:
        precompute(config, scorer=scorer)
    assert str(caught.value.fix).startswith("pass --on-bad-row skip")
    assert len(scorer.calls) == 2
    manifest = precompute(config_of(rows, on_bad_row="skip"), scorer=scorer)
    assert (manifest.kept, len(scorer.calls)) == (11, 3)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_plan_does_not_depend_on_which_rows_are_tokenized(config_of: Configs, processes: int) -> None:
    rows = [*preference_rows(300), *preference_rows(300)]
    config = config_of(rows, processes=processes)
    assert plan_of(config) == plan_of(config, tokenize_all=True)
    other = config_of(REFUSED["template"][0], on_bad_row="skip")
    assert plan_of(other).plan == plan_of(other, tokenize_all=True).plan


@pytest.mark.parametrize("processes", [1, 2])
def test_one_row_of_each_shape_is_rendered_in_each_plan_anew(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """However many blocks are read, and in which processes."""
    monkeypatch.setattr("dpo_opt.precompute.read.files._BLOCK_BYTES", 2000)
    rows = [row for i in range(300) for row in (chat(i), calling(i, CALL))]
    rows.append(chat(300, "user", "user"))
    config = config_of(rows, processes=processes)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            plan_of(config)
        assert str(caught.value.where).endswith(":601")
    rendered: list[str] = []

    def texts(_: PairTokenizer, pair: PreferencePair) -> PairTexts:
        rendered.append(pair.where.rpartition(":")[2])
        return PairTexts("a", "ab", "ac")

    sent: list[object] = []

    def map_in_order(*args: Any, **settings: Any) -> Iterator[list[Any]]:
        for block in parallel.map_in_order(*args, **settings):
            sent.extend(found.example for found in block if found.example is not None)
            yield block

    monkeypatch.setattr(PairTokenizer, "texts", texts)
    monkeypatch.setattr(planning, "map_in_order", map_in_order)
    plan_of(config)
    assert rendered == ["1", "1", "2", "601"]  # the first is the pair that must be usable
    assert 3 <= len(sent) <= (3 if processes == 1 else 3 * (1 + processes))


def test_rows_that_are_all_refused_are_not_said_to_be_skipped(config_of: Configs) -> None:
    """To leave them out would leave nothing, which the same run would then say."""
    rows = [chat(i) for i in range(7)]
    for row in rows:
        row["prompt"][0]["content"] = "never"
    with pytest.raises(DataError, match="roles must alternate") as caught:
        precompute(config_of(rows), scorer=ScriptedScorer())
    assert caught.value.fix == "correct the rows as `dpo-opt check DATA --model M` says"
    assert str(caught.value.where).endswith(":1")
    with pytest.raises(DataError) as caught:
        precompute(config_of([*rows, chat(7)]), scorer=ScriptedScorer())
    assert str(caught.value.fix).startswith("pass --on-bad-row skip")
    planned = plan_precompute(config_of([*rows, chat(7)], on_bad_row="skip"), NUMERICS)
    assert (planned["bad_rows"], len(planned["bad_rows_skipped"])) == (7, 5)
