import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import assistant, user

from dpo_opt.precompute.config import DataConfig
from dpo_opt.precompute.read.datasets import BadRow, read_pairs, row_content, scan_pairs
from dpo_opt.precompute.read.rows import to_pairs
from dpo_opt.precompute.read.shape_parts import RATINGS
from dpo_opt.precompute.read.shapes import SHAPES, find_shape, keys_to_read
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import PreferencePair

LONG = "private words " * 20


def pairs_of(row: dict[str, Any]) -> list[PreferencePair]:
    return to_pairs(row, where="data.jsonl:1")[0]


def texts_of(row: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    return [(p.prompt, p.chosen, p.rejected) for p in pairs_of(row)]


def refusal(row: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        pairs_of(row)
    assert caught.value.where == "data.jsonl:1"
    assert caught.value.fix
    assert LONG[:61] not in str(caught.value)
    return caught.value


A, B = [user("Hi"), assistant("Hello!")], [user("Hi"), assistant("Go away.")]
SHP = {"history": "How?", "human_ref_A": "So.", "human_ref_B": "No.", "domain": "askbaking", "seconds": 9}
LABELLED = {"prompt": "How?", "response_a": "So.", "response_b": "No."}
SAFETY = {"prompt": "How?", "response_0": "So.", "response_1": "No.", "safer_response_id": 1}
GRADED = {"prompt": "How?", "response1": "So.", "response2": "No.", "domain": "code"}
ARENA = {"conversation_a": A, "conversation_b": B, "language": "English"}
SO_NO, NO_SO = ("How?", "So.", "No."), ("How?", "No.", "So.")
CHAT_SO_NO = ([user("How?")], [assistant("So.")], [assistant("No.")])
CHAT_NO_SO = ([user("How?")], [assistant("No.")], [assistant("So.")])
WITH_SYSTEM = ([{"role": "system", "content": "Be kind."}, user("How?")], *CHAT_SO_NO[1:])
HELPSTEER2 = {"prompt": "How?", "response_1": "So.", "response_2": "No."}
A_WINS = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
B_WINS = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
BATTLE = {"prompt": '["How?"]', "response_a": '["So."]', "response_b": '["No."]', "model_a": "m"}
OPENAI: dict[str, Any] = {
    "input": {"messages": [user("How?")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [assistant("So.")],
    "non_preferred_output": [assistant("No.")],
}
HUMAN = {"from": "human", "value": "How?"}
RANKING: dict[str, Any] = {
    "conversations": [HUMAN],
    "chosen": {"from": "gpt", "value": "So."},
    "rejected": {"from": "gpt", "value": "No."},
}
ASKED = {"conversations": [HUMAN], "chosen": "So.", "rejected": "No."}
OBJECTS = {"messages": [user("How?")], "chosen": assistant("So."), "rejected": assistant("No.")}
SWIFT: dict[str, Any] = {"messages": [user("How?"), assistant("So.")], "rejected_response": "No."}
SWIFT_MESSAGES: dict[str, Any] = {
    "messages": [user("How?"), assistant("So.")],
    "rejected_messages": [user("How?"), assistant("No.")],
}
ORCA = {"system": "Be kind.", "question": "How?", "chosen": "So.", "rejected": "No."}
IMAGE = {"question": "How?", "chosen": "So.", "rejected": "No.", "image": None, "idx": "7"}
SIDES = ("chosen", "rejected")
ALPACA = {"instruction": "How?", "input": "", "chosen": "So.", "rejected": "No."}


def turn(role: str, *texts: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text} for text in texts]}


def vertex(*scores: float, **others: Any) -> dict[str, Any]:
    completions = [
        {"score": score, "completion": turn("model", text)}
        for score, text in zip(scores, ("So.", "No.", "Never."), strict=False)
    ]
    return {"contents": [turn("user", "Ho", "w?")], "completions": completions, **others}


def nemo(*ranks: int) -> dict[str, Any]:
    completions = [
        {"rank": rank, "completion": [assistant(text)]}
        for rank, text in zip(ranks, ("So.", "No."), strict=True)
    ]
    return {"context": [user("How?")], "completions": completions}


def nectar(*ranks: float) -> dict[str, Any]:
    answers = [
        {"answer": text, "model": "m", "rank": rank} for rank, text in zip(ranks, ("So.", "No."), strict=True)
    ]
    return {"prompt": "How?", "answers": answers, "turns": 1}


# Form, row, and the only pair that the row means.
ONE_PAIR: list[tuple[str, dict[str, Any], tuple[Any, Any, Any]]] = [
    ("SHP", {**SHP, "labels": 1}, CHAT_SO_NO),
    ("SHP", {**SHP, "labels": 0}, CHAT_NO_SO),
    ("labelled responses", {**LABELLED, "preference": "a"}, SO_NO),
    ("labelled responses", {**LABELLED, "preference": " B "}, NO_SO),
    ("labelled responses", {**LABELLED, "winner": "response_b"}, NO_SO),
    ("labelled responses", {**LABELLED, "winner": "model_a"}, SO_NO),
    ("safety-labelled responses", {**SAFETY, "better_response_id": 0}, SO_NO),
    ("safety-labelled responses", {**SAFETY, "better_response_id": 1}, NO_SO),
    *(("graded responses", {**GRADED, "overall_preference": g}, SO_NO) for g in (-3, -2, -1)),
    *(("graded responses", {**GRADED, "overall_preference": g}, NO_SO) for g in (1, 2, 3)),
    (
        "graded responses",
        {"context": A, "response1": "So.", "response2": "No.", "overall_preference": 2},
        (A, [assistant("No.")], [assistant("So.")]),
    ),
    ("conversations", {**ARENA, "winner": "model_a"}, (A[:1], A[1:], B[1:])),
    ("conversations", {**ARENA, "winner": "model_b"}, (A[:1], B[1:], A[1:])),
    (
        "conversations",
        {"conversation_a": [*A, *A], "conversation_b": [*A, *B], "winner": "b"},
        ([*A, user("Hi")], B[1:], A[1:]),
    ),
    ("ranked completions", {"prompt": "How?", "completions": ["No.", "So."], "ranks": [2, 1]}, SO_NO),
    ("ranked completions", {"question": "How?", "responses": ["So.", "No."], "scores": [0.5, -1]}, SO_NO),
    ("ranked completions", nemo(0, 1), CHAT_SO_NO),
    ("ranked completions", nemo(1, 0), CHAT_NO_SO),
    ("ranked completions", nectar(1.0, 7.0), SO_NO),
    ("ranked completions", nectar(2.0, 1.0), NO_SO),
    *(("graded responses", {**HELPSTEER2, "preference_strength": g}, SO_NO) for g in (-3, -2, -1)),
    *(("graded responses", {**HELPSTEER2, "preference_strength": g}, NO_SO) for g in (1, 2, 3)),
    ("arena battles", {**BATTLE, **A_WINS}, CHAT_SO_NO),
    ("arena battles", {**BATTLE, **B_WINS}, CHAT_NO_SO),
    (
        "arena battles",
        {"prompt": ["Hi", "How?"], "response_a": ["Yo", "So."], "response_b": ["Yo", "No."], **A_WINS},
        ([user("Hi"), assistant("Yo"), user("How?")], [assistant("So.")], [assistant("No.")]),
    ),
    ("Vertex AI preferences", vertex(1, 0), CHAT_SO_NO),
    ("Vertex AI preferences", vertex(0, 1), CHAT_NO_SO),
    ("Vertex AI preferences", vertex(1, 0, system_instruction=turn("system", "Be kind.")), WITH_SYSTEM),
    ("OpenAI preferences", OPENAI, CHAT_SO_NO),
    ("ShareGPT ranking", RANKING, CHAT_SO_NO),
    ("ShareGPT ranking", {**RANKING, "system": "", "tools": "", "images": []}, CHAT_SO_NO),
    ("ShareGPT ranking", {**RANKING, "system": "Be kind."}, WITH_SYSTEM),
    (
        "ShareGPT ranking",
        {**RANKING, "system": "?", "conversations": [{"from": "system", "value": "Be kind."}, HUMAN]},
        WITH_SYSTEM,
    ),
    ("ShareGPT ranking", OBJECTS, CHAT_SO_NO),
    *(
        ("conversation and answers", {**ASKED, **sides}, CHAT_SO_NO)
        for sides in (
            {},
            {"conversations": None, "messages": [user("How?")]},
            {"messages": [user("How?")]},
            {"chosen": [assistant("So.")], "rejected": [assistant("No.")]},
            {"chosen": [{"from": "gpt", "value": "So."}], "rejected": [assistant("No.")]},
            {"conversations": [HUMAN, {"from": "gpt", "value": "So."}]},
            {"chosen": CHAT_SO_NO[0] + CHAT_SO_NO[1], "rejected": CHAT_SO_NO[0] + CHAT_SO_NO[2]},
        )
    ),
    ("conversation and answers", {**ASKED, "system": "Be kind."}, WITH_SYSTEM),
    ("conversation and answers", {"messages": A, "chosen": A, "rejected": B}, (A[:1], A[1:], B[1:])),
    ("ms-swift", SWIFT, CHAT_SO_NO),
    ("ms-swift", SWIFT_MESSAGES, CHAT_SO_NO),
    ("system and question", ORCA, WITH_SYSTEM),
    ("system and question", {**ORCA, "system": ""}, CHAT_SO_NO),
    ("question with image", IMAGE, SO_NO),
    ("Alpaca preferences", ALPACA, CHAT_SO_NO),
    (
        "Alpaca preferences",
        {**ALPACA, "instruction": "Ho", "input": "w?"},
        ([user("Ho\nw?")], *CHAT_SO_NO[1:]),
    ),
    ("Alpaca preferences", {**ALPACA, "system": "Be kind."}, WITH_SYSTEM),
    ("Alpaca preferences", {**ALPACA, "history": [["Hi", "Hello!"]]}, ([*A, user("How?")], *CHAT_SO_NO[1:])),
    (
        "Alpaca preferences",
        {**ALPACA, "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
        CHAT_SO_NO,
    ),
    ("Alpaca preferences", {"instruction": "Hi", "chosen": A, "rejected": B}, (A[:1], A[1:], B[1:])),
    (
        "Alpaca preferences",
        {"instruction": "Hi", "system": "Be kind.", "chosen": A, "rejected": B},
        ([{"role": "system", "content": "Be kind."}, *A[:1]], A[1:], B[1:]),
    ),
]


@pytest.mark.parametrize(("name", "row", "pair"), ONE_PAIR)
def test_a_published_row_is_the_pair_that_its_label_means(
    name: str, row: dict[str, Any], pair: tuple[Any, Any, Any]
) -> None:
    shape = find_shape(row)
    assert shape is not None
    assert shape.name == name
    assert texts_of(row) == [pair]


@pytest.mark.parametrize(("name", "row", "pair"), ONE_PAIR)
def test_a_table_of_a_published_form_is_read_like_its_lines(
    tmp_path: Path, name: str, row: dict[str, Any], pair: tuple[Any, Any, Any]
) -> None:
    lines, table = tmp_path / "data.jsonl", tmp_path / "data.parquet"
    lines.write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([{**row, "embedding": [0.5]}]), table)
    for path in (lines, table):
        (found,) = read_pairs(DataConfig(data=[str(path)]))
        assert (found.prompt, found.chosen, found.rejected) == pair


@pytest.mark.parametrize(("name", "row", "pair"), ONE_PAIR)
def test_a_published_row_becomes_tokens_as_the_plain_pair_of_its_texts(
    name: str, row: dict[str, Any], pair: tuple[Any, Any, Any]
) -> None:
    plain = dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))
    (found,), (expected,) = pairs_of({**row, "source": "s"}), pairs_of({**plain, "source": "s"})
    assert row_content(found) == row_content(expected)


def test_every_form_has_a_row_above_and_every_key_of_it_is_loaded_from_tables() -> None:
    assert {shape.name for shape in SHAPES if not shape.unpaired} == {name for name, _, _ in ONE_PAIR}
    for shape in SHAPES:
        assert shape.keys | shape.also <= keys_to_read(shape.keys, shape.objects)
    always = keys_to_read(set(), set())
    assert {"context", "instruction", "weight", "tools", "score_chosen"} <= always
    assert {"images", "system"} <= always  # that nothing of the prompt is left out
    assert always.isdisjoint({"messages", "conversations"})


def test_a_table_of_pairs_is_read_without_the_columns_of_other_forms() -> None:
    # As UltraFeedback and RLAIF-V have them: pairs already, or pairs by --column prompt=question.
    ultra = {"prompt", "chosen", "rejected", "messages", "images"}
    assert keys_to_read(ultra, set()) == keys_to_read(set(), set())
    lists = {"chosen", "rejected", "conversations", "messages"}
    assert keys_to_read(lists, set()) == keys_to_read(set(), set()) | lists
    assert keys_to_read({"chosen", "rejected", "image"}, set()) == keys_to_read(set(), set())


def test_no_row_is_of_two_forms_by_the_keys_of_one() -> None:
    for one, other in itertools.permutations(SHAPES, 2):
        if one.keys == other.keys:
            assert one.objects or other.objects  # and beside texts and lists it is the other
        elif one.keys <= other.keys:
            # The smaller form asks for a prompt, which the larger one does not allow.
            assert (one.name, other.name) == ("ranked completions", "Vertex AI preferences")
            assert "prompt" in other.absent


def test_a_row_with_both_completions_is_never_taken_for_another_form() -> None:
    row = {"prompt": "p", "chosen": " a", "rejected": " b"}
    shp = {key: value for key, value in SHP.items() if key != "history"}
    others = {**shp, "labels": 0, **LABELLED, "winner": "b", "completions": ["x", "y"], "ranks": [1, 2]}
    assert texts_of({**others, **row}) == [("p", " a", " b")]


def test_the_domain_of_shp_is_its_source_unless_a_source_is_given() -> None:
    assert pairs_of({**SHP, "labels": 1})[0].source == "askbaking"
    assert pairs_of({**SHP, "labels": 1, "source": "reddit"})[0].source == "reddit"
    assert pairs_of({**GRADED, "overall_preference": 1})[0].source is None


def test_the_sources_of_nectar_are_one_source() -> None:
    assert (
        pairs_of({**nectar(1.0, 2.0), "source": ["lmsys-chat-1m", "flan"]})[0].source == "lmsys-chat-1m, flan"
    )
    assert pairs_of({**nectar(1.0, 2.0), "source": []})[0].source is None
    assert refusal({**nectar(1.0, 2.0), "source": [1]}).kind == "type"


def test_what_any_row_may_carry_is_kept_by_every_form() -> None:
    carried = {"source": "made", "weight": 2, "margin": 0.5, "chat_template_kwargs": {"thinking": True}}
    for _, row, _ in ONE_PAIR:
        (pair,) = pairs_of({**row, **carried})
        kept = (pair.source, pair.weight, pair.margin, pair.chat_template_kwargs)
        assert kept == ("made", 2.0, 0.5, {"thinking": True})


def test_how_a_row_rates_its_pair_is_kept_by_every_form_of_one_pair() -> None:
    for name, row, _ in ONE_PAIR:
        for key, other in RATINGS.items():
            (pair,) = pairs_of({**row, key: 1, other: 5})
            expected = None if name in ("ranked completions", "Vertex AI preferences") else -4
            assert (pair.rated, pair.margin) == (expected, expected if key == "score_chosen" else None)


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({**SHP, "labels": 0.0}, CHAT_NO_SO),
        ({**SAFETY, "better_response_id": 1.0}, NO_SO),
        ({**GRADED, "overall_preference": -2.0}, SO_NO),
        ({**HELPSTEER2, "preference_strength": 3.0}, NO_SO),
        ({**BATTLE, **{key: float(vote) for key, vote in A_WINS.items()}}, CHAT_SO_NO),
    ],
)
def test_a_label_may_be_the_float_of_a_whole_number(row: dict[str, Any], pair: tuple[Any, Any, Any]) -> None:
    assert texts_of(row) == [pair]


def test_numbers_of_tokens_in_messages_of_the_arena_are_no_part_of_them() -> None:
    a, b = ([{**message, "num_tokens": 3} for message in side] for side in (A, B))
    row = {"conversation_a": a, "conversation_b": b, "winner": "model_a"}
    assert texts_of(row) == [(A[:1], A[1:], B[1:])]
    assert "num_tokens" in refusal({"chosen": a, "rejected": b}).what


OWN = {"system_prompt": "Be kind.", "tools": [{"name": "f"}], "images": ["a.png"], "context": "A page."}


@pytest.mark.parametrize("key", OWN)
def test_a_completion_that_was_given_more_than_the_prompt_is_refused(key: str) -> None:
    row = nemo(0, 1)
    row["completions"][1][key] = OWN[key]
    error = refusal(row)
    assert (error.kind, error.what[:43]) == (
        "prompt_column",
        f'completion 2 of "completions" has the key "{key}'[:43],
    )
    row["completions"][1][key] = None
    assert texts_of(row) == [CHAT_SO_NO]


def test_a_completion_may_say_what_its_row_says() -> None:
    row = {"instruction": "How?", "system": "Be kind.", "completions": []}
    for rank, text in enumerate(("So.", "No.")):
        own = {"rank": rank, "text": text, "response": text, "content": "", "model": "m"}
        row["completions"].append({**own, "prompt": "How?", "system": "Be kind."})
    assert refusal(row).what == '"system" is not empty'  # for which plain text has no place
    assert texts_of(
        {
            **row,
            "instruction": [user("How?")],
            "completions": [
                {**own, "text": [assistant(own["text"])], "response": "", "prompt": None}
                for own in row["completions"]
            ],
        }
    ) == [WITH_SYSTEM]


@pytest.mark.parametrize(
    ("beside", "keys"),
    [({"text": "Else."}, ("completion", "text")), ({"score": 0.5}, ("rank", "score"))],
)
def test_completions_that_contradict_themselves_are_refused(
    beside: dict[str, Any], keys: tuple[str, str]
) -> None:
    row = nemo(0, 1)
    for i, completion in enumerate(row["completions"]):
        completion.update({key: value + i if key == "score" else value for key, value in beside.items()})
    error = refusal(row)
    assert (error.kind, error.what) == ("two_sources", f'"{keys[0]}" and "{keys[1]}" say different things')
    assert str(error.fix).startswith("remove one of them from ")


def test_what_a_turn_of_vertex_says_beside_its_text_is_read_or_refused() -> None:
    def asked(**others: Any) -> dict[str, Any]:
        return {**vertex(1, 0), "contents": [{**turn("user", "How?"), **others}]}

    assert texts_of(asked(thought=None, name=None)) == [CHAT_SO_NO]
    assert pairs_of(asked(name="Bo"))[0].prompt == [{**user("How?"), "name": "Bo"}]
    assert refusal(asked(thought="Hm.")).what.startswith('turn 1 of "contents" has the key "thought"')
    assert texts_of(asked(parts=[{"text": "How?", "inlineData": None}])) == [CHAT_SO_NO]
    assert refusal(asked(parts=[{"text": "How?", "inlineData": {}}])).kind == "shape"
    row = vertex(1, 0)
    for rank, completion in enumerate(row["completions"]):
        completion["rank"] = 2 - rank
    assert refusal(row).what == '"rank" and "score" say different things'


@pytest.mark.parametrize("key", ["prompt", "instruction", "question", "context", "input", "query"])
def test_a_prompt_is_found_under_every_name_that_publishers_use(key: str) -> None:
    row = {key: "How?", "response_a": "So.", "response_b": "No.", "preference": "a"}
    assert texts_of(row) == [SO_NO]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({**SHP, "labels": 2}, '"labels" is 2, not 1'),
        ({**SHP, "labels": True}, '"labels" is true, not 1'),
        ({**SHP, "labels": None}, '"labels" is null, not 1'),
        ({**SHP, "labels": "1"}, '"labels" is "1", not 1'),
        ({**LABELLED, "preference": LONG}, '"preference" is "private words'),
        ({**LABELLED, "preference": 1}, '"preference" is 1, not "a", "b" or "tie"'),
        ({**LABELLED, "winner": ["a"]}, '"winner" is a list'),
        ({**SAFETY, "better_response_id": -1}, '"better_response_id" is -1'),
        ({**SAFETY, "better_response_id": False}, '"better_response_id" is false'),
        ({**GRADED, "overall_preference": 4}, '"overall_preference" is 4'),
        ({**GRADED, "overall_preference": 1.5}, '"overall_preference" is 1.5'),
        ({**GRADED, "overall_preference": float("nan")}, '"overall_preference" is NaN'),
        ({**ARENA, "winner": "model_c"}, '"winner" is "model_c"'),
        ({**HELPSTEER2, "preference_strength": -4}, '"preference_strength" is -4'),
        ({**HELPSTEER2, "preference_strength": "1"}, '"preference_strength" is "1"'),
        ({**BATTLE, **A_WINS, "winner_model_a": 0.5}, '"winner_model_a" is 0.5, not 0 or 1'),
        ({**BATTLE, **A_WINS, "winner_tie": True}, '"winner_tie" is true, not 0 or 1'),
        ({**BATTLE, **A_WINS, "winner_model_b": 1}, '"winner_model_a" is 1, not one vote'),
        ({**BATTLE, **A_WINS, "winner_model_a": 0}, '"winner_model_a" is 0, not one vote'),
    ],
)
def test_a_label_that_names_no_side_is_refused(row: dict[str, Any], what: str) -> None:
    error = refusal(row)
    assert error.kind == "label"
    assert error.what.startswith(what)


@pytest.mark.parametrize(
    "row",
    [
        {**LABELLED, "preference": "tie"},
        {**LABELLED, "winner": "Neither"},
        {**GRADED, "overall_preference": 0},
        *({**ARENA, "winner": winner} for winner in ("tie (bothbad)", "both_bad", "tie (both bad)")),
        {**GRADED, "overall_preference": 0.0},
        {**HELPSTEER2, "preference_strength": 0},
        {**BATTLE, "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
        nemo(1, 1),
        nectar(1.0, 1.0),
        vertex(1, 1),
        {"prompt": "p", "completions": ["a", "b"], "scores": [3, 3.0]},
    ],
)
def test_a_tie_is_refused_as_a_tie(row: dict[str, Any]) -> None:
    error = refusal(row)
    assert (error.kind, error.what) == ("tie", "no completion is preferred over another")
    assert "--on-bad-row skip" in str(error.fix)


def test_four_ranked_completions_are_six_pairs_best_first() -> None:
    ranks = {"poor": 4, "best": 1, "fair": 3, "good": 2}
    row = {"prompt": "p", "completions": list(ranks), "ranks": list(ranks.values())}
    assert texts_of(row) == [
        ("p", "best", "good"),
        ("p", "best", "fair"),
        ("p", "best", "poor"),
        ("p", "good", "fair"),
        ("p", "good", "poor"),
        ("p", "fair", "poor"),
    ]


def test_tied_completions_make_no_pair_with_each_other() -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1, 2, 2, 1]}
    assert texts_of(row) == [("p", "b", "a"), ("p", "b", "d"), ("p", "c", "a"), ("p", "c", "d")]


@pytest.mark.parametrize("values", list(itertools.product([1, 2, 3], repeat=3)))
def test_ranks_and_scores_of_opposite_sign_mean_the_same(values: tuple[int, ...]) -> None:
    base = {"prompt": "p", "completions": ["a", "b", "c"]}
    better = {
        (x, y)
        for x, y in itertools.product("abc", repeat=2)
        if values["abc".index(x)] < values["abc".index(y)]
    }
    if not better:
        assert refusal({**base, "ranks": list(values)}).kind == "tie"
        return
    by_rank = texts_of({**base, "ranks": list(values)})
    assert {(c, r) for _, c, r in by_rank} == better
    assert len(by_rank) == len(better)
    assert texts_of({**base, "scores": [-v for v in values]}) == by_rank


def test_scores_may_stand_inside_each_completion() -> None:
    def completion(text: str, score: float, **others: Any) -> dict[str, Any]:
        return {"response": text, "overall_score": score, "model": "m", **others}

    row = {"instruction": "How?", "source": "sharegpt", "models": ["m", "n"]}
    published = {**row, "completions": [completion("No.", 3.5), completion("So.", 8.0, critique="fine")]}
    assert texts_of(published) == [SO_NO]
    assert pairs_of(published)[0].source == "sharegpt"
    texts = [{"text": "No.", "rank": 2}, {"text": "So.", "rank": 1}]
    assert texts_of({**row, "completions": texts}) == [SO_NO]


def test_ranked_completions_may_be_messages() -> None:
    row = {"prompt": [user("How?")], "completions": [[assistant("So.")], [assistant("No.")]], "ranks": [1, 2]}
    assert texts_of(row) == [CHAT_SO_NO]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"completions": ["a"]}, '"completions" is not a list of at least two completions'),
        ({"completions": "ab"}, '"completions" is not a list of at least two completions'),
        ({"ranks": [1]}, '"ranks" has 1 value for 2 completions'),
        ({"ranks": [1, "2"]}, '"ranks" holds a string where a number is expected'),
        ({"ranks": [1, True]}, '"ranks" holds a boolean where a number is expected'),
        ({"ranks": None}, '"completions" has neither ranks nor scores'),
        ({"ranks": None, "completions": [{"text": "a", "score": 1}, {"text": "b"}]}, '"completions" has nei'),
        ({"completions": [{"reply": "a"}, "b"]}, 'completion 1 of "completions" has none of the keys'),
    ],
)
def test_ranked_completions_that_cannot_be_ranked_are_refused(changes: dict[str, Any], what: str) -> None:
    error = refusal({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], **changes})
    assert error.kind == "shape"
    assert error.what.startswith(what)


def test_a_published_row_without_a_prompt_is_refused() -> None:
    assert refusal({"completions": ["a", "b"], "ranks": [1, 2]}).what == 'there is no "prompt"'
    assert refusal({**LABELLED, "prompt": None, "winner": "a"}).what == '"prompt" is null'


def test_an_empty_completion_of_a_published_row_is_refused() -> None:
    assert refusal({**SHP, "labels": 1, "human_ref_B": ""}).kind == "empty"
    assert refusal({"prompt": "p", "completions": ["a", "", "c"], "ranks": [1, 2, 3]}).kind == "empty"


TOOL = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}


def test_tools_and_calls_of_sharegpt_are_those_of_a_chat_template() -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    row = {
        **RANKING,
        "conversations": [
            HUMAN,
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "sunny"},
        ],
        "chosen": {"from": "function_call", "value": json.dumps([call, call])},
        "tools": json.dumps([TOOL]),
    }
    (pair,) = pairs_of(row)
    said = {"type": "function", "function": call}
    assert pair.prompt == [
        user("How?"),
        {**assistant(""), "tool_calls": [said]},
        {"role": "tool", "content": "sunny"},
    ]
    assert pair.chosen == [{**assistant(""), "tool_calls": [said, said]}]
    assert pair.tools == [{"type": "function", "function": TOOL}]
    assert pairs_of({**row, "tools": pair.tools})[0].tools == pair.tools


def test_tools_of_an_openai_row_are_the_pairs() -> None:
    tool = {"type": "function", "function": TOOL}
    (pair,) = pairs_of({**OPENAI, "input": {**OPENAI["input"], "tools": [tool]}})
    assert pair.tools == [tool]


def test_tools_of_both_sides_of_an_ms_swift_row_are_the_same() -> None:
    row = {**SWIFT_MESSAGES, "tools": [TOOL], "rejected_tools": [TOOL]}
    assert pairs_of(row)[0].tools == [TOOL]
    assert refusal({**row, "rejected_tools": [{**TOOL, "name": "x"}]}).kind == "shape"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({**BATTLE, **A_WINS, "prompt": "How?"}, '"prompt" is no list of turns'),
        ({**BATTLE, **A_WINS, "response_b": '["No.", "a"]'}, '"prompt", "response_a" and "response_b" have'),
        (
            {**BATTLE, **A_WINS, "prompt": "[]", "response_a": "[]", "response_b": "[]"},
            '"prompt", "response_a"',
        ),
        ({**vertex(1, 0), "contents": "How?"}, '"contents" and "completions" are not two lists'),
        (vertex(2, 1, 0), '"completions" has 3 completions where two'),
        ({**vertex(1, 0), "contents": [turn("human", "a")]}, 'turn 1 of "contents" has neither the role'),
        ({**vertex(1, 0), "contents": [{"role": [], "parts": []}]}, 'turn 1 of "contents" has neither'),
        (
            {**vertex(1, 0), "contents": [{"role": "user", "parts": [{"fileData": {}}]}]},
            'turn 1 of "contents" h',
        ),
        (vertex(1, 0, system_instruction="Be kind."), 'the instruction has no "parts"'),
        ({**vertex(1, 0), "completions": ["a", "b"]}, 'completion 1 of "completions" has no "completion"'),
        ({**OPENAI, "input": "How?"}, '"input" is no object with "messages"'),
        ({**OPENAI, "input": {"messages": A[:1], "functions": []}}, '"input" has the key "functions"'),
        ({**RANKING, "conversations": "How?"}, '"conversations" is a string'),
        (
            {**RANKING, "conversations": [{"from": "me", "value": "a"}]},
            '"from" of message 1 of "conversations"',
        ),
        (
            {**RANKING, "chosen": {"from": "function_call", "value": "f()"}},
            'the function call in "chosen" is no',
        ),
        ({**RANKING, "tools": "weather"}, '"tools" is no list of JSON schemas'),
        ({**SWIFT, "rejected_response": None}, '"rejected_response" is null'),
        ({**SWIFT, "messages": [user("How?")]}, '"messages" is no conversation that ends with an answer'),
        ({**SWIFT, "messages": "How?"}, '"messages" is no conversation that ends with an answer'),
        ({**ALPACA, "instruction": [user("How?")]}, '"instruction" is a list'),
        ({**ALPACA, "input": {"a": "b"}}, '"input" is an object'),
        ({**ALPACA, "history": [["Hi"]]}, '"history" is no list of pairs'),
        ({**ALPACA, "history": "Hi"}, '"history" is no list of pairs'),
    ],
)
def test_a_row_that_its_form_does_not_allow_is_refused(row: dict[str, Any], what: str) -> None:
    error = refusal(row)
    assert error.kind == "shape"
    assert error.what.startswith(what)


def test_a_text_prompt_beside_answers_is_what_the_user_said() -> None:
    sides = {"chosen": [assistant("So.")], "rejected": [assistant("No.")]}
    pairs, form = to_pairs({"prompt": "How?", **sides}, where="data.jsonl:1")
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [CHAT_SO_NO]
    assert form.rules == to_pairs({"prompt": [user("How?")], **sides}, where="")[1].rules


@pytest.mark.parametrize("prompt", ["How?", user("How?"), [user("How?")]])
def test_one_message_may_stand_where_a_list_of_them_does(prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": assistant("So."), "rejected": assistant("No.")}
    assert texts_of(row) == [CHAT_SO_NO]
    assert texts_of({**row, "conversations": [HUMAN], "messages": [user("How?")]}) == [CHAT_SO_NO]


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"chosen": A, "rejected": B, "messages": [user("How?")]}, ("chosen", "messages")),
        ({"chosen": A, "rejected": B, "conversations": [HUMAN]}, ("chosen", "conversations")),
        ({**ASKED, "messages": A}, ("conversations", "messages")),
    ],
)
def test_a_conversation_that_the_pair_contradicts_is_refused(
    row: dict[str, Any], keys: tuple[str, str]
) -> None:
    error = refusal(row)
    assert error.kind == "two_sources"
    assert error.what == f'"{keys[0]}" and "{keys[1]}" say different things'
    assert f"--ignore-column {keys[1]}" in str(error.fix)
    assert pairs_of({key: value for key, value in row.items() if key != keys[1]})


def test_an_empty_conversation_beside_a_pair_says_nothing() -> None:
    row = {"chosen": "Hi there", "rejected": "Hi you", "conversations": [], "messages": None}
    assert texts_of(row) == [("Hi", " there", " you")]


@pytest.mark.parametrize("asks", ["user", "tool"])
@pytest.mark.parametrize("system", [{}, {"system": "Be kind."}])
def test_turns_that_answers_share_follow_the_text_that_was_asked(asks: str, system: dict[str, str]) -> None:
    shared = [assistant("How?"), {"role": asks, "content": "Go on."}]
    row = {"prompt": "How?", "chosen": [*shared, assistant("So.")], "rejected": [*shared, assistant("No.")]}
    prompt = [*(WITH_SYSTEM if system else CHAT_SO_NO)[0], *shared]
    assert texts_of({**row, **system}) == [(prompt, [assistant("So.")], [assistant("No.")])]


def test_what_is_left_to_answers_begins_with_an_answer() -> None:
    sides = [[assistant("Hm."), user(text), assistant(text)] for text in ("So.", "No.")]
    row = {"prompt": "How?", "chosen": sides[0], "rejected": sides[1]}
    assert texts_of(row) == [([user("How?")], *sides)]


def test_pairs_of_ranked_rows_are_numbered_through(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    counts = [4, 2, 3]
    rows = [
        {"prompt": f"p{i}", "completions": [f"{i}{k}" for k in range(n)], "ranks": list(range(n))}
        for i, n in enumerate(counts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(data=[str(path)])
    found = list(read_pairs(config))
    assert [p.row for p in found] == list(range(6 + 1 + 3))
    assert [p.where for p in found] == [f"{path}:1"] * 6 + [f"{path}:2"] + [f"{path}:3"] * 3
    for start, stop in itertools.combinations_with_replacement(range(11), 2):
        assert list(read_pairs(config, start=start, stop=stop)) == found[start:stop]


def test_a_bad_ranked_row_has_one_number(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}
    rows = [good, {**good, "ranks": [1, 1, 1]}, good]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(scan_pairs(DataConfig(data=[str(path)])))
    assert [item.row for item in found] == list(range(7))
    assert [item.row for item in found if isinstance(item, BadRow)] == [3]


# UltraFeedback, binarized ---------------------------------------------------------------------------------

ULTRA: dict[str, Any] = {
    "prompt": "Hi",
    "prompt_id": "ab12",
    "chosen": A,
    "rejected": B,
    "messages": A,
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}


def test_ultrafeedback_says_its_prompt_twice_and_is_read_once() -> None:
    pairs, form = to_pairs(ULTRA, where="data.jsonl:1")
    assert form.name == "UltraFeedback (text prompt, message lists)"
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [(A[:1], A[1:], B[1:])]
    assert pairs[0].margin == 2.5


def test_a_prompt_that_is_no_message_of_the_conversation_is_refused() -> None:
    error = refusal({**ULTRA, "prompt": "Hello there"})
    assert error.kind == "prompt_mismatch"
    assert error.what.startswith('"prompt" is no message')
    assert str(error.fix).startswith('remove "prompt"')
    sides = {side: [{"role": "system", "content": "Be kind."}, *ULTRA[side][1:]] for side in SIDES}
    fix = refusal({**ULTRA, **sides}).fix  # without "prompt" nothing would be asked
    assert fix == 'write "prompt" into both sides, as the message of the user that it is'


def test_ultrafeedback_and_message_lists_without_prompt_may_stand_in_one_source(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    bare = {"chosen": A, "rejected": B}
    path.write_text("".join(json.dumps(row) + "\n" for row in (ULTRA, bare)))
    first, second = read_pairs(DataConfig(data=[str(path)]))
    assert first[1:4] == second[1:4]


@pytest.mark.parametrize(
    ("changes", "margin"),
    [
        ({}, 2.5),
        ({"margin": 7}, 7.0),
        ({"margin": None}, None),
        ({"score_chosen": None}, None),
        ({"score_chosen": 1, "score_rejected": 4}, -3.0),
    ],
)
def test_the_margin_is_the_rows_own_or_the_difference_of_its_scores(
    changes: dict[str, Any], margin: float | None
) -> None:
    assert pairs_of({**ULTRA, **changes})[0].margin == margin
    without = {key: value for key, value in ULTRA.items() if key != "score_rejected"}
    assert pairs_of(without)[0].margin is None


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": "a"}]',
        "[{'content': 'a', 'role': 'user'}]",
        ' [ {"from": "gpt", "value": "a"}]',
    ],
)
def test_messages_that_were_written_as_text_are_refused(key: str, text: str) -> None:
    row = {"prompt": "a", "chosen": " b", "rejected": " c"} | {key: text}
    error = refusal(row)
    assert error.what == f'"{key}" holds messages as text'
    assert ("ast.literal_eval" if "'" in text else "json.loads") in str(error.fix)


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ('{"role": "assistant", "content": "a"}', "json.loads"),
        (' {"content": "it\'s", "role": "assistant"}', "json.loads"),
        ("{'role': 'assistant', 'content': 'a'}", "ast.literal_eval"),
        ('{"from": "gpt", "value": "a"}', "json.loads"),
    ],
)
def test_one_message_that_was_written_as_text_is_refused(text: str, reads: str) -> None:
    error = refusal({"prompt": "a", "chosen": text, "rejected": " c"})
    assert (error.kind, error.what) == ("type", '"chosen" holds a message as text')
    assert f"write it as an object, which {reads} makes" in str(error.fix)


ANSWERS = ["[1, 2]", '[{"x": 1}]', "[citation needed]", '{"role": "user"}']
OBJECTS_AS_ANSWERS = [
    '{"value": 3}',
    '{"from": "Rome", "value": 3}',
    '{"content": "a"}',
    '{"role": "assistant", "content": ',
]


@pytest.mark.parametrize("text", ANSWERS + OBJECTS_AS_ANSWERS)
def test_other_texts_in_brackets_are_texts(text: str) -> None:
    assert pairs_of({"prompt": "a", "chosen": text, "rejected": " c"})[0].chosen == text
