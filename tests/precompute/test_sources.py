import contextlib
import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import s3_client, serve_s3, using_store

from dpo_opt.precompute.config import CheckConfig, DataConfig
from dpo_opt.precompute.read.datasets import read_pairs
from dpo_opt.precompute.read.sources import Source, find_sources, merged_splits, refuse_inside
from dpo_opt.schemas.errors import ConfigError, DataError, DpoOptError
from dpo_opt.schemas.locations import location
from dpo_opt.schemas.pairs import PreferencePair


def row(name: str) -> dict[str, object]:
    return {"prompt": f"Question {name}?", "chosen": f" yes {name}", "rejected": f" no {name}"}


def lines(*names: str) -> bytes:
    return b"".join(json.dumps(row(name)).encode() + b"\n" for name in names)


def write(path: Path, *names: str) -> Path:
    """A file of rows, in the form that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        path.write_text(
            "\n".join(["prompt,chosen,rejected", *(",".join(map(str, row(name).values())) for name in names)])
        )
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row(name) for name in names]), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps([row(name) for name in names], indent=1))
    else:
        path.write_bytes(gzip.compress(lines(*names)) if path.suffix == ".gz" else lines(*names))
    return path


def names_of(*sources: object, **settings: Any) -> list[str]:
    return [str(p.chosen).split()[1] for p in pairs_of(*sources, **settings)]


def pairs_of(
    *sources: object, start: int = 0, stop: int | None = None, **settings: Any
) -> list[PreferencePair]:
    config = DataConfig(data=[str(source) for source in sources], **settings)
    return list(read_pairs(config, start=start, stop=stop))


def refusal(*sources: object, **settings: Any) -> DpoOptError:
    with pytest.raises(DpoOptError) as caught:
        pairs_of(*sources, **settings)
    return caught.value


# Folders and globs ----------------------------------------------------------------------------------------


NO_DATA = ("README.md", "LICENSE", "dataset_info.json", "b/notes.txt", ".hidden.jsonl", "_part.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data of every form in nested folders, beside what publishers put there too."""
    base = tmp_path / "set"
    # Written in another order than that of their names.
    write(base / "b" / "2.jsonl.gz", "b2")
    write(base / "z.json", "z1", "z2")
    write(base / "b" / "1.parquet", "b1", "b1'", "b1''")
    write(base / "a.jsonl", "a")
    write(base / "d.csv", "d1", "d2")
    for other in NO_DATA:
        (base / other).write_text("{no data")
    write(base / ".cache" / "old.jsonl", "hidden")
    write(base / "_temporary" / "half.jsonl", "private")
    return base


IN_ORDER = ["a", "b1", "b1'", "b1''", "b2", "d1", "d2", "z1", "z2"]


def test_a_folder_is_its_data_files_by_name_at_every_depth(folder: Path) -> None:
    pairs = pairs_of(folder)
    assert names_of(folder) == IN_ORDER
    assert [p.row for p in pairs] == list(range(9))
    assert [p.where for p in pairs] == [
        f"{folder}/a.jsonl:1",
        f"{folder}/b/1.parquet:row group 0, row 0",
        f"{folder}/b/1.parquet:row group 0, row 1",
        f"{folder}/b/1.parquet:row group 1, row 0",
        f"{folder}/b/2.jsonl.gz:1",
        f"{folder}/d.csv:row 1",
        f"{folder}/d.csv:row 2",
        f"{folder}/z.json:element 1",
        f"{folder}/z.json:element 2",
    ]


def test_a_hidden_folder_may_be_named_itself(folder: Path) -> None:
    assert names_of(folder / ".cache") == ["hidden"]
    moved = folder.rename(folder.with_name(".set"))
    assert names_of(moved) == IN_ORDER


def test_a_file_that_might_be_data_is_refused_rather_than_left_out(folder: Path) -> None:
    (folder / "b" / "more.xlsx").write_text("chosen,rejected\n")
    error = refusal(folder)
    assert isinstance(error, DataError)
    assert error.what == "the file's name does not say what it holds"
    assert error.where == f"{folder}/b/more.xlsx"
    assert f"{folder}/*.jsonl" in str(error.fix)
    # Named one by one, the others can be read.
    assert names_of(folder / "b" / "*.parquet") == ["b1", "b1'", "b1''"]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing here yet")
    error = refusal(tmp_path)
    assert error.what.startswith("the folder holds no file that ends in .jsonl")
    assert error.where == str(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a"]),
        ("b/*", ["b1", "b1'", "b1''", "b2"]),
        ("**/*.jsonl.gz", ["b2"]),
        ("[az].js*", ["a", "z1", "z2"]),
        ("b/?.parquet", ["b1", "b1'", "b1''"]),
        ("**/[!n]*.jsonl", ["a"]),
        # As in a shell with dots: a pattern that begins so means them.
        ("_*.jsonl", ["part"]),
        (".h*", ["secret"]),
        ("_part.jsonl", ["part"]),
        ("_temporary/*", ["private"]),
        ("_*/*.jsonl", ["private"]),
        (".cache/*.jsonl", ["hidden"]),
    ],
)
def test_a_glob_is_what_it_matches_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: list[str]
) -> None:
    (folder / "b" / "notes.txt").unlink()
    for hidden, says in (
        (".hidden.jsonl", "secret"),
        ("_part.jsonl", "part"),
        ("_temporary/half.jsonl", "private"),
    ):
        write(folder / hidden, says)
    assert names_of(folder / pattern) == names
    monkeypatch.chdir(folder)
    assert names_of(pattern) == names


def test_a_glob_without_a_match_is_refused(folder: Path) -> None:
    error = refusal(folder / "*.zst")
    assert (error.what, error.where) == ("nothing matches", f"{folder}/*.zst")


def test_a_glob_that_matches_hidden_names_alone_says_how_to_read_them(folder: Path) -> None:
    for pattern in ("*rt.jsonl", "*/half.jsonl"):
        error = refusal(folder / pattern)
        assert error.what == "nothing matches"
        assert "must begin so" in str(error.fix)


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "1.jsonl", "one")
    assert names_of(write(tmp_path / "[1].jsonl", "bracket")) == ["bracket"]


def test_what_a_folder_lists_does_not_depend_on_when_files_were_made(tmp_path: Path) -> None:
    files = ["10.jsonl", "9.jsonl", "b.jsonl", "A.jsonl", "a/x.jsonl"]
    for i, order in enumerate(itertools.permutations(files, len(files))):
        if i % 17 == 0:
            base = tmp_path / str(i)
            for name in order:
                write(base / name, name)
            assert names_of(base) == sorted(files)


# Several sources ------------------------------------------------------------------------------------------


def test_rows_are_numbered_over_all_sources_in_the_order_given(folder: Path, tmp_path: Path) -> None:
    first, last = write(tmp_path / "y.jsonl", "y1", "y2"), write(tmp_path / "x.json", "x")
    assert names_of(first, folder, last) == ["y1", "y2", *IN_ORDER, "x"]
    assert [p.row for p in pairs_of(first, folder, last)] == list(range(12))
    assert names_of(last, first, last) == ["x", "y1", "y2", "x"]


def test_start_and_stop_are_slices_of_every_kind_of_source(folder: Path, tmp_path: Path) -> None:
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(
        json.dumps({"prompt": "p", "completions": ["r a", "r b", "r c"], "ranks": [1, 2, 3]}) + "\n"
    )
    for sources, share in (
        ([folder], []),
        ([folder / "z.json"], []),
        ([folder / "b" / "1.parquet", ranked, folder / "a.jsonl"], []),
        ([folder, ranked, folder / "z.json"], [0.7, 1.0, 0.5]),
    ):
        everything = pairs_of(*sources, data_share=share)
        rows = [p.row for p in pairs_of(*sources)]
        assert rows == list(range(len(rows)))
        if not share:
            assert everything == pairs_of(*sources)
        for start, stop in itertools.combinations_with_replacement(range(len(rows) + 2), 2):
            expected = [p for p in everything if start <= p.row < stop]
            assert pairs_of(*sources, data_share=share, start=start, stop=stop) == expected


def test_each_source_may_have_a_form_of_its_own_but_not_each_row(tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", "one")
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes chat"}]
    chat.write_text(json.dumps({"chosen": turns, "rejected": [turns[0], {**turns[1], "content": "no"}]}))
    assert len(pairs_of(text, chat)) == 2
    both = tmp_path / "both"
    both.mkdir()
    for file in (text, chat):
        shutil.copy(file, both)
    error = refusal(both)
    assert error.where == f"{both}/text.jsonl:1"
    assert f"{both}/chat.jsonl:1 holds messages" in error.what


def test_columns_are_renamed_in_every_source(tmp_path: Path) -> None:
    renamed = [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in map(row, "abc")]
    lines_file, table = tmp_path / "data.jsonl", tmp_path / "data.parquet"
    lines_file.write_text("".join(json.dumps(r) + "\n" for r in renamed))
    pq.write_table(pa.Table.from_pylist(renamed), table)
    column = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert names_of(lines_file, table, column=column) == list("abcabc")
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    pair = pairs_of(write(tmp_path / "plain.jsonl", "a"), column=swapped)[0]
    assert (pair.chosen, pair.rejected) == (" no a", " yes a")


# Shares ---------------------------------------------------------------------------------------------------


def test_a_share_takes_about_that_many_rows(tmp_path: Path) -> None:
    names = [str(i) for i in range(4000)]
    path = write(tmp_path / "data.jsonl", *names)
    for share in (0.05, 0.5, 0.9):
        count = len(pairs_of(path, data_share=[share]))
        # Five standard deviations of a binomial.
        assert abs(count - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
    assert names_of(path, data_share=[1.0]) == names


def test_a_smaller_share_is_part_of_a_larger_one(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *map(str, range(300)))
    taken = [set(names_of(path, data_share=[share])) for share in (0.1, 0.4, 0.8)]
    assert taken[0] < taken[1] < taken[2]


def test_a_share_is_chosen_by_content_alone(tmp_path: Path) -> None:
    names = [str(i) for i in range(200)]
    half = names_of(write(tmp_path / "data.jsonl", *names), data_share=[0.5])
    assert half == [name for name in names if name in half]
    backwards = write(tmp_path / "backwards.parquet", *reversed(names))
    assert names_of(backwards, data_share=[0.5]) == half[::-1]
    # Rows that come later, other sources and other files change nothing.
    longer = write(tmp_path / "longer" / "0.jsonl", *names)
    write(tmp_path / "longer" / "1.jsonl", *(f"more {i}" for i in range(200)))
    assert names_of(longer.parent, data_share=[0.5])[: len(half)] == half
    assert names_of(backwards, longer, data_share=[1.0, 0.5])[200:] == half
    # Copies of a row are taken together, or none of them.
    twice = write(tmp_path / "twice.json", *names, *names)
    assert names_of(twice, data_share=[0.5]) == half + half


def test_as_many_shares_as_sources_or_none(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", "a")
    error = refusal(path, path, data_share=[0.5])
    assert isinstance(error, ConfigError)
    assert error.what == "2 --data, but 1 --data-share"
    for share in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match="data_share"):
            DataConfig(data=[str(path)], data_share=[share])


def test_one_source_may_be_given_without_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", "a")
    assert DataConfig.model_validate({"data": path}) == DataConfig(data=[str(path)])
    (source,) = find_sources(DataConfig.model_validate({"data": str(path)}))
    assert (source.name, source.files, source.share) == (str(path), [str(path)], 1.0)


# Object stores --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server on this machine whose bucket ``data`` holds rows."""
    with serve_s3("data", "empty") as url:
        client = s3_client(url)
        local = tmp_path_factory.mktemp("bucket")
        for key, names in STORED.items():
            client.put_object(Bucket="data", Key=key, Body=write(local / key, *names).read_bytes())
        client.put_object(Bucket="data", Key="set/README.md", Body=b"# about")
        yield url


STORED = {
    "set/b.jsonl.gz": ["b1", "b2"],
    "set/a.jsonl": ["a1", "a2"],
    "set/c/d.parquet": ["d1", "d2", "d3"],
    "other/e.json": ["e"],
}


@pytest.fixture
def s3(bucket: str) -> Iterator[None]:
    with using_store(bucket):
        yield


@pytest.mark.filterwarnings("ignore:.*s3fs.*")
@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("s3://data/set/a.jsonl", ["a1", "a2"]),
        ("s3://data/set/b.jsonl.gz", ["b1", "b2"]),
        ("s3://data/set/c/d.parquet", ["d1", "d2", "d3"]),
        ("s3://data/other/e.json", ["e"]),
        ("s3://data/set", ["a1", "a2", "b1", "b2", "d1", "d2", "d3"]),
        ("s3://data/set/", ["a1", "a2", "b1", "b2", "d1", "d2", "d3"]),
        ("s3://data", ["e", "a1", "a2", "b1", "b2", "d1", "d2", "d3"]),
        ("s3://data/set/*.jsonl*", ["a1", "a2", "b1", "b2"]),
        ("s3://data/*/*.json", ["e"]),
    ],
)
def test_a_store_is_read_like_a_folder(url: str, names: list[str]) -> None:
    assert names_of(url) == names
    assert all(p.where.startswith("s3://data/") for p in pairs_of(url))
    for start in range(len(names)):
        assert names_of(url, start=start, stop=start + 1) == [names[start]]


@pytest.mark.filterwarnings("ignore:.*s3fs.*")
@pytest.mark.usefixtures("s3")
def test_stores_and_files_are_one_sequence(tmp_path: Path) -> None:
    local = write(tmp_path / "x.jsonl", "x")
    assert names_of("s3://data/other", local, "s3://data/set/a.jsonl") == ["e", "x", "a1", "a2"]
    pairs = pairs_of("s3://data/other", local, "s3://data/set/a.jsonl")
    assert [p.where for p in pairs] == [
        "s3://data/other/e.json:element 1",
        f"{local}:1",
        "s3://data/set/a.jsonl:1",
        "s3://data/set/a.jsonl:2",
    ]


@pytest.mark.filterwarnings("ignore:.*s3fs.*")
@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    "url",
    [
        "s3://nowhere/a.jsonl",
        "s3://nowhere",
        "s3://data/set/x.jsonl",
        "s3://data/nothing/",
        "s3://data/set/*.zst",
        "s3://empty",
    ],
)
def test_what_a_store_does_not_have_is_refused_by_its_url(url: str) -> None:
    error = refusal(url)
    assert isinstance(error, DataError)
    assert error.where == url
    assert "Traceback" not in str(error)


@pytest.mark.filterwarnings("ignore:.*s3fs.*")
def test_a_store_that_does_not_answer_is_refused_by_its_url() -> None:
    pytest.importorskip("s3fs")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as nobody:
        closed = nobody.server_address[1]
    with using_store(f"http://127.0.0.1:{closed}"):
        for url in ("s3://data/set/a.jsonl", "s3://data/set", "s3://data/set/*.jsonl"):
            error = refusal(url)
            assert isinstance(error, DataError)
            assert error.where == url
            assert error.what.startswith("cannot be listed (")
            assert error.fix == "check the URL and the credentials in the environment"


def test_a_protocol_that_nothing_reads_is_refused() -> None:
    error = refusal("nonsense://data/a.jsonl")
    assert isinstance(error, ConfigError)
    assert error.where == "nonsense://data/a.jsonl"


SPLITS: dict[str, tuple[list[str], dict[str, str]]] = {
    "files of a folder": (
        ["test.jsonl", "train.jsonl"],
        {"test": "{base}/test.jsonl", "train": "{base}/train.jsonl"},
    ),
    "parts of each": (
        [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test_prefs-00000-of-00001.parquet",
        ],
        {
            "test": "{base}/data/test_prefs-00000-of-00001.parquet",
            "train": "{base}/data/train-0000*.parquet",
        },
    ),
    "folders": (
        ["training/a.jsonl.gz", "training/b.jsonl.gz", "dev/a.jsonl.gz", "more.jsonl.gz"],
        {"train": "{base}/training/*.jsonl.gz", "validation": "{base}/dev/a.jsonl.gz"},
    ),
    "one split": (["train-1.jsonl", "train-2.jsonl"], {}),
    "one split, numbered in other ways": (
        ["train/a.jsonl", "train/b-00001-of-00002-a09b74b3ef9c3b56.jsonl", "train_part_3.jsonl"],
        {},
    ),
    "two parts of one split": (
        [
            "data/train_prefs-0-of-2.jsonl",
            "data/train_prefs-1-of-2.jsonl",
            "data/train_sft-a09b74b3ef9c.jsonl",
        ],
        {
            "train_prefs": "{base}/data/train_prefs-*.jsonl",
            "train_sft": "{base}/data/train_sft-a09b74b3ef9c.jsonl",
        },
    ),
    "one split, and files without its name": (
        ["pairs_tr.jsonl", "pairs_val.jsonl"],
        {"pairs_tr": "{base}/pairs_tr.jsonl", "pairs_val": "{base}/pairs_val.jsonl"},
    ),
    "two configurations": (
        ["first/train-0.csv", "second/train-0.csv"],
        {"first/train": "{base}/first/train-0.csv", "second/train": "{base}/second/train-0.csv"},
    ),
    "one file": (["test-train.jsonl"], {}),
    "words that only hold the name of one": (["contest.jsonl", "trainers.jsonl", "latest.jsonl"], {}),
    "no split": (["a.jsonl", "b.jsonl"], {}),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_that_are_read_as_one_are_named_with_how_to_take_each(tmp_path: Path, name: str) -> None:
    files, splits = SPLITS[name]
    # The folder's own name says nothing of its files.
    base = tmp_path / "test" / "train"
    for file in files:
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        (base / file).write_text("")
    for given in (base, f"{base}/**/*.*"):
        (source,) = find_sources(DataConfig(data=[str(given)]))
        found = merged_splits(source)
        assert found == {split: own.format(base=base) for split, own in splits.items()}
        for split, own in found.items():
            (alone,) = find_sources(DataConfig(data=[own]))
            assert merged_splits(alone) == {}, split
            assert set(alone.files) < set(source.files)


CARD = """---
configs:
- config_name: default
  data_files:
  - split: fit
    path: parts/a*
  - split: judge
    path: [parts/b.jsonl, parts/c.jsonl]
---
# Pairs
"""


def test_splits_are_those_that_the_card_of_a_dataset_names(tmp_path: Path) -> None:
    parts = [tmp_path / "parts" / f"{name}.jsonl" for name in ("a0", "a1", "b", "c")]
    parts[0].parent.mkdir()
    for part in parts:
        part.write_text("")
    card = tmp_path / "README.md"
    for given in (tmp_path, tmp_path / "parts", tmp_path / "parts" / "*.jsonl"):
        (source,) = find_sources(DataConfig(data=[str(given)]))
        card.write_text(CARD)
        found = merged_splits(source)
        assert found.keys() == {"fit", "judge"}
        assert found["fit"] == f"{tmp_path}/parts/a*"
        (alone,) = find_sources(DataConfig(data=[found["fit"]]))
        assert alone.files == [str(part) for part in parts[:2]]
        assert merged_splits(alone) == {}
        several = CARD.replace("- config_name: default", "- config_name: small\n- config_name: large")
        card.write_text(several)
        assert merged_splits(source).keys() == {"large/fit", "large/judge"}
    for text in ("", "# Pairs", "---\nconfigs: [1]\n---\n", "---\n: [\n---\n", CARD.replace("path", "files")):
        card.write_text(text)
        assert merged_splits(source) == {}
    card.write_bytes(b"---\n\xff\n---\n")
    assert merged_splits(source) == {}


def test_splits_of_a_hub_dataset_and_of_a_store_are_named_as_they_are_found_there() -> None:
    commit = "a" * 40
    cached = f"/cache/datasets--made--pairs/snapshots/{commit}/data"
    source = Source(f"made/pairs@{commit}", [f"{cached}/test-0.parquet", f"{cached}/train-0.parquet"], 1.0)
    assert merged_splits(source) == {
        "test": f"made/pairs@{commit}/data/test-0.parquet",
        "train": f"made/pairs@{commit}/data/train-0.parquet",
    }
    store = Source("s3://bucket/pairs", ["s3://bucket/pairs/dev.jsonl", "s3://bucket/pairs/train.jsonl"], 1.0)
    assert merged_splits(store) == {
        "train": "s3://bucket/pairs/train.jsonl",
        "validation": "s3://bucket/pairs/dev.jsonl",
    }


@pytest.mark.parametrize(
    ("data", "folder", "refused"),
    [
        ("pairs", "pairs/shards", True),
        ("pairs", "pairs", True),
        ("pairs", "link/shards", True),
        ("link", "pairs/deep/shards", True),
        ("pairs", "pairs2", False),
        ("pairs/a.jsonl", "pairs/shards", False),
        ("pairs/*.jsonl", "pairs/shards", False),
        ("s3://bucket/pairs", "pairs/shards", False),
        ("s3://bucket/pairs/", "s3://bucket/pairs/shards", True),
        ("s3://bucket/pairs", "s3://bucket/pairs2", False),
        ("pairs", "s3://bucket/pairs/shards", False),
    ],
)
def test_a_folder_inside_the_data_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, folder: str, refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.jsonl").write_text("")
    (tmp_path / "link").symlink_to("pairs")
    config = DataConfig(data=[data])
    with pytest.raises(ConfigError) if refused else contextlib.nullcontext() as caught:
        refuse_inside(config, location(folder), option="--shards")
    if caught is not None:
        assert caught.value.what == f"--shards {folder} stands inside --data {data}"


# The Hub --------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PUBLISHED = {
    "README.md": b"# about\n",
    "data/train-0.jsonl": lines("t0", "t1"),
    "data/train-1.jsonl": lines("t2"),
    "data/test.jsonl": lines("e0"),
}
TREE = [
    {"type": "file", "path": name, "size": len(data), "oid": f"{i:040x}"}
    for i, (name, data) in enumerate(PUBLISHED.items())
]


class Hub(BaseHTTPRequestHandler):
    """The few answers of the Hub that finding and fetching a dataset takes."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        """What is known of some paths."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self._send(json.dumps([entry for entry in TREE if entry["path"] in asked]).encode(), with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        api, files = "/api/datasets/made/pairs", f"/datasets/made/pairs/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
            siblings = [{"rfilename": name} for name in PUBLISHED]
            about = {"id": "made/pairs", "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
            self._send(json.dumps(about | {"downloads": 0, "likes": 0}).encode(), with_body=with_body)
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self._send(json.dumps(TREE).encode(), with_body=with_body)
        elif path.startswith(files) and path.removeprefix(files) in PUBLISHED:
            self._send(PUBLISHED[path.removeprefix(files)], with_body=with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, body: bytes, *, with_body: bool) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.send_response(206 if wanted else 200)
        etag = hash(body)
        if wanted:
            body = body[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag:x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    pytest.importorskip("huggingface_hub")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


READER = """
import json, sys
from dpo_opt.precompute.config import CheckConfig, DataConfig
from dpo_opt.precompute.read.datasets import read_pairs
from dpo_opt.precompute.read.sources import find_sources, merged_splits
from dpo_opt.schemas.errors import DpoOptError

kind, *names = sys.argv[1:]
make = {"reads_once": CheckConfig, "reads_again": DataConfig}[kind]

def read(name):
    try:
        config = make(data=[name])
        pairs = [(p.where, str(p.chosen).split()[1]) for p in read_pairs(config)]
        (source,) = find_sources(config)
        return [pairs, merged_splits(source)]
    except DpoOptError as error:
        return [type(error).__name__, error.what, error.fix]

print(json.dumps([read(name) for name in names]))
"""


def read_in_a_process(endpoint: str, home: Path, *names: str, kind: str = "reads_again") -> list[list[Any]]:
    """What a process of its own reads: the endpoint is read once, on import."""
    unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, kind, *names], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


WHOLE = f"made/pairs@{COMMIT}"
OWN_NAMES = {"test": f"{WHOLE}/data/test.jsonl", "train": f"{WHOLE}/data/train-*.jsonl"}


@pytest.mark.parametrize("kind", ["reads_again", "reads_once"])
def test_a_hub_dataset_is_read_at_a_commit_and_nothing_else(hub: str, tmp_path: Path, kind: str) -> None:
    unpinned, branch, *pinned, missing, no_match, bad_pattern = read_in_a_process(
        hub,
        tmp_path / "home",
        "made/pairs",
        "hf://datasets/made/pairs@main/data/train-*.jsonl",
        WHOLE,
        f"hf://datasets/{WHOLE}/data/train-*.jsonl",
        f"hf://datasets/{WHOLE}/data/test.jsonl",
        f"{WHOLE}/*/t*.jsonl",
        "made/nothing",
        f"hf://datasets/{WHOLE}/data/*.parquet",
        f"hf://datasets/{WHOLE}/**.jsonl",
        kind=kind,
    )
    assert unpinned == ["ConfigError", "'made/pairs' is not pinned to a commit", f"--data {WHOLE}"]
    assert branch[0] == "ConfigError"
    assert branch[2] == f"--data '{WHOLE}/data/train-*.jsonl'"
    whole, train, test, both = pinned
    assert [name for _, name in whole[0]] == [name for _, name in both[0]] == ["e0", "t0", "t1", "t2"]
    assert [name for _, name in train[0]] == ["t0", "t1", "t2"]
    assert [name for _, name in test[0]] == ["e0"]
    assert whole[1] == both[1] == OWN_NAMES
    base = f"{tmp_path}/home/hub/datasets--made--pairs/snapshots/{COMMIT}"
    if kind == "reads_once":
        # Nothing was written beside what says how the files are called.
        assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix == ".jsonl"]
        base = f"hf://datasets/{WHOLE}"
    assert [where for where, _ in train[0]] == [
        f"{base}/data/train-0.jsonl:1",
        f"{base}/data/train-0.jsonl:2",
        f"{base}/data/train-1.jsonl:1",
    ]
    assert missing[0] == "ConfigError"
    assert missing[1].startswith("'made/nothing' is neither here nor to be had from the Hub (")
    assert no_match[:2] == ["DataError", "nothing matches"]
    assert bad_pattern[0] == "DataError"
    assert bad_pattern[1].startswith("not a pattern (")


def test_a_dataset_that_was_fetched_is_read_without_the_hub(hub: str, tmp_path: Path) -> None:
    first = read_in_a_process(hub, tmp_path / "home", WHOLE)
    for kind in ("reads_again", "reads_once"):
        assert read_in_a_process("http://127.0.0.1:9", tmp_path / "home", WHOLE, kind=kind) == first


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_rows_of_a_dataset_are_numbered_as_datasets_streams_them(tmp_path: Path, suffix: str) -> None:
    datasets = pytest.importorskip("datasets")
    # Neither by number nor as they were written.
    for i, name in enumerate(("train-2", "train-10", "more/train-1", "train-0", "test-0")):
        write(tmp_path / "data" / f"{name}{suffix}", f"{i}a", f"{i}b", f"{i}c")
    own = str(tmp_path / "data" / f"**/train-*{suffix}")
    streamed = datasets.load_dataset(str(tmp_path), streaming=True)["train"]
    assert [str(row["chosen"]).split()[1] for row in streamed] == names_of(own)
    assert [pair.row for pair in pairs_of(own)] == list(range(12))


def test_without_the_hub_and_a_copy_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import _snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # Its base, which is no OSError, is what comes where nothing answers.
    refused = HfHubHTTPError.__mro__[1]("connection refused")

    def nobody(*_: object, **__: object) -> None:
        raise refused

    for name in ("repo_info", "list_repo_tree"):
        monkeypatch.setattr(hub.HfApi, name, nobody)
    monkeypatch.setattr(_snapshot_download.constants, "HF_HUB_CACHE", str(tmp_path))
    for config in (DataConfig, CheckConfig):
        for given in ("made/pairs", WHOLE):
            with pytest.raises(ConfigError, match=r"is neither here nor to be had from the Hub \(.*conn"):
                list(read_pairs(config(data=[given])))
