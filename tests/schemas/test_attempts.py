"""The names of an attempt's files."""

import pytest

from dpo_opt.schemas.attempts import AttemptName, commit_names


@pytest.mark.parametrize("shard", [0, 7, 99_999, 100_000, 12_345_678])
def test_a_name_that_was_built_is_parsed_to_the_same_attempt(shard: int) -> None:
    attempt = AttemptName.new(shard)
    files = (attempt.commit_file, attempt.data_file, *attempt.dropped_files)
    assert len(set(files)) == 4
    assert {AttemptName.parse(file.rpartition("/")[2]) for file in files} == {attempt}
    assert attempt.is_generated
    assert attempt != AttemptName.new(shard)


def test_the_files_lie_where_the_format_says() -> None:
    attempt = AttemptName(7, "3f9a01bc")
    assert attempt.commit_file == "commits/00007-3f9a01bc.json"
    assert attempt.data_file == "data/00007-3f9a01bc.parquet"
    assert attempt.dropped_files == ("dropped/00007-3f9a01bc.parquet", "data/00007-3f9a01bc.dropped.parquet")


@pytest.mark.parametrize(
    "file",
    [
        "7-3f9a01bc.json",
        "00007-.json",
        "00007-3F9A01BC.json",
        "00007-notes.json",
        "00007-3f9a01bc.json\n",
        "00007-3f9a01bc.txt",
        "٠٠٠٠٧-3f9a01bc.json",
        ".00007-3f9a01bc.json.1234abcd.tmp",
        "data/00007-3f9a01bc.parquet",
        "",
    ],
)
def test_a_name_of_another_form_is_no_attempt(file: str) -> None:
    assert AttemptName.parse(file) is None


def test_an_id_of_another_length_is_somebody_s_own() -> None:
    attempt = AttemptName.parse("00007-000000000.json")
    assert attempt == AttemptName(7, "000000000")
    assert not attempt.is_generated


def test_commits_are_listed_by_shard_and_id() -> None:
    names = ["00001-bb.json", "00000-cc.json", "notes.json", "00000-aa.json", "00000-aa.parquet"]
    assert list(commit_names(names)) == ["00000-aa.json", "00000-cc.json", "00001-bb.json"]
