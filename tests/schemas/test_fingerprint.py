import json
from typing import Any

import pytest
from pydantic import ValidationError

from dpo_opt.schemas.errors import FingerprintError
from dpo_opt.schemas.fingerprint import (
    ALL_FIELDS,
    MEMORY_OPTIONS,
    MODEL_FIELDS,
    TOKENIZER_FIELDS,
    Fingerprint,
    follows,
    refuse_differences,
)

VALUES: dict[str, Any] = {
    "schema_version": 1,
    "weights": "a" * 64,
    "model_config_digest": "b" * 64,
    "tokenizer": "c" * 64,
    "chat_template": "none",
    "text_to_ids": "1",
    "max_length": 512,
    "truncation": "keep_start",
    "engine": "vllm",
    "engine_version": "0.32.0",
    "strategy": "prompt_logprobs",
    "dtype": "bfloat16",
    "engine_options": "{}",
    "rope": "fixed",
    "template_date": "2026-03-31",
    "architecture": "LlamaForCausalLM",
    "train_on": "all",
    "rows": "unpaired",
}
OTHER: dict[str, Any] = {
    **{name: f"other-{name}" for name in VALUES},
    "schema_version": 2,
    "weights": "d" * 64,
    "max_length": 1024,
}


def refusal(cached: Fingerprint, current: Fingerprint, fields: tuple[str, ...]) -> FingerprintError | None:
    try:
        refuse_differences(
            cached=cached, current=current, fields=fields, where="shards", fix="pass the other model"
        )
    except FingerprintError as error:
        return error
    return None


def test_the_table_of_this_test_knows_every_field() -> None:
    assert set(ALL_FIELDS) == set(VALUES) == set(OTHER)
    assert set(MODEL_FIELDS) < set(ALL_FIELDS)
    assert set(TOKENIZER_FIELDS) < set(MODEL_FIELDS)


@pytest.mark.parametrize("name", ALL_FIELDS)
def test_a_difference_is_named_with_both_values(name: str) -> None:
    cached, current = Fingerprint(**VALUES), Fingerprint(**{**VALUES, name: OTHER[name]})
    error = refusal(cached, current, ALL_FIELDS)
    assert error is not None
    assert error.exit_code == 4
    assert error.fix == "pass the other model"
    (line,) = (line for line in str(error).splitlines() if line.split()[:1] == [name])
    for value in (VALUES[name], OTHER[name]):
        assert str(value)[:16] in line
    (same,) = (line for line in str(error).splitlines() if line.strip().startswith("same:"))
    assert set(same.strip().removeprefix("same: ").split(", ")) == set(ALL_FIELDS) - {name}


@pytest.mark.parametrize("name", ALL_FIELDS)
@pytest.mark.parametrize("fields", [MODEL_FIELDS, TOKENIZER_FIELDS, ALL_FIELDS])
def test_only_the_fields_asked_for_are_compared(fields: tuple[str, ...], name: str) -> None:
    error = refusal(Fingerprint(**VALUES), Fingerprint(**{**VALUES, name: OTHER[name]}), fields)
    assert (error is not None) == (name in fields)


def test_equal_fingerprints_pass() -> None:
    assert refusal(Fingerprint(**VALUES), Fingerprint(**VALUES), ALL_FIELDS) is None


def test_all_differences_are_listed_at_once() -> None:
    error = refusal(Fingerprint(**VALUES), Fingerprint(**OTHER), ALL_FIELDS)
    assert error is not None
    listed = [line.split()[0] for line in str(error).splitlines() if line.startswith("    ")]
    assert listed == ["field", *ALL_FIELDS, "same:"]
    assert "same: nothing else" in str(error)


def test_an_architecture_is_compared_where_both_sides_name_one() -> None:
    one = Fingerprint(**VALUES)
    for other in (one.model_copy(update={"architecture": None}), one):
        assert refusal(one, other, ALL_FIELDS) is None
        assert refusal(other, one, MODEL_FIELDS) is None
        assert follows(one, other)
    assert not follows(one, one.model_copy(update={"architecture": "GraniteForCausalLM"}))


def test_a_configuration_is_told_by_its_keys_where_they_are_known() -> None:
    one = Fingerprint(**VALUES)
    other = one.model_copy(update={"model_config_digest": "d" * 64})

    def told(keys: dict[str, tuple[object, object]] | None) -> list[list[str]]:
        try:
            refuse_differences(
                cached=one, current=other, fields=ALL_FIELDS, where="shards", fix="", config_keys=keys
            )
        except FingerprintError as error:
            return [line.split() for line in error.what.splitlines()[2:-1]]
        return []

    assert told(None) == [["model_config_digest", "b" * 16 + "...", "d" * 16 + "..."]]
    assert told({"rms_norm_eps": (1e-6, 1e-5)}) == [["config.rms_norm_eps", "1e-06", "1e-05"]]
    assert told({}) == []


def with_options(**options: Any) -> Fingerprint:
    return Fingerprint(**{**VALUES, "engine_options": json.dumps(options)})


def test_settings_of_memory_are_the_same_run() -> None:
    for name in MEMORY_OPTIONS:
        for cached, current in (({name: 64}, {name: 32}), ({name: 64}, {}), ({}, {name: 32})):
            one, other = (with_options(quantization="fp8", **more) for more in (cached, current))
            assert refusal(one, other, ALL_FIELDS) is None
            assert follows(one, other)
    one, other = with_options(max_num_seqs=3), with_options(max_num_seqs=3, kv_cache_dtype="fp8")
    assert refusal(one, other, ALL_FIELDS) is not None
    assert not follows(one, other)


def test_a_fingerprint_from_before_dates_were_kept_is_read() -> None:
    old = {name: value for name, value in VALUES.items() if name != "template_date"}
    assert Fingerprint.model_validate_json(json.dumps(old)).template_date is None


def test_a_fingerprint_does_not_change() -> None:
    with pytest.raises(ValidationError):
        Fingerprint(**VALUES).dtype = "float32"  # type: ignore[misc]


def test_a_key_of_a_later_version_stops_only_those_who_would_add_to_it() -> None:
    later = Fingerprint.model_validate({**VALUES, "rotary": "other\x1b[2J"})
    error = refusal(later, Fingerprint(**VALUES), ALL_FIELDS)
    assert error is not None
    assert error.exit_code == 4
    assert "rotary" in error.what
    assert error.fix == "pip install --upgrade dpo-opt"
    assert not follows(later, Fingerprint(**VALUES))
    for fields in (MODEL_FIELDS, TOKENIZER_FIELDS):
        assert refusal(later, Fingerprint(**VALUES), fields) is None
    assert later != Fingerprint(**VALUES)
    assert Fingerprint.model_validate_json(later.model_dump_json()) == later
    # Null says what an absent key does.
    empty = Fingerprint.model_validate({**VALUES, "rotary": None})
    assert refusal(empty, Fingerprint(**VALUES), ALL_FIELDS) is None
    assert follows(empty, Fingerprint(**VALUES))
