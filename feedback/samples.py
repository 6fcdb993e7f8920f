"""The table of completions (``dpo-opt sample``): one row each, in parts that are whole or not there.

A folder ``SAMPLES`` holds ``settings.json`` and ``data/00000.parquet``, ``data/00001.parquet``, ...
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.feedback.work_folder import SETTINGS, read_settings_of
from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import ConfigError, DataError, first_line, quoted
from dpo_opt.schemas.pairs import IdArray
from dpo_opt.schemas.storage import publish

DATA = "data"
SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("finished", pa.bool_(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("row", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion."""

    prompt_id: str
    """Hash of ``prompt_ids`` (``schemas.pairs.content_hash``)."""
    sample: int
    """Number among those of its prompt."""
    seed: int
    """Of its random stream."""
    prompt: str
    """What the model was shown, as text: of messages, what the chat template made of them."""
    completion: str
    """Its text, without special tokens."""
    finished: bool
    """False where the token limit cut it off."""
    prompt_ids: IdArray | list[int]
    completion_ids: IdArray | list[int]
    row: str
    """JSON of what the data says: ``prompt``, and ``tools``, ``chat_template_kwargs`` where it has them."""


def finished_parts(folder: Path) -> set[int]:
    """Numbers of the parts that are there."""
    return {int(path.stem) for path in (folder / DATA).glob("*.parquet") if path.stem.isdecimal()}


def count_cut(folder: Path, numbers: Sequence[int]) -> int:
    """How many completions of some parts the token limit cut off.

    Raises:
        DataError: A part cannot be read.
    """
    cut = 0
    for path in (folder / DATA / f"{number:05}.parquet" for number in numbers):
        with _readable(path), arrow_file(path) as source:
            (finished,) = pq.read_table(source, columns=["finished"]).columns
            cut += finished.to_pylist().count(False)
    return cut


def write_part(folder: Path, number: int, samples: Sequence[Sample], settings: Mapping[str, Any]) -> None:
    """Publish a part. The settings stand in its metadata too, as ``dpo_opt.settings``."""
    metadata = {"dpo_opt.schema_version": "1", "dpo_opt.settings": json.dumps(settings)}
    columns = {name: [getattr(s, name) for s in samples] for name in SAMPLES_SCHEMA.names}
    table = pa.Table.from_pydict(columns, schema=SAMPLES_SCHEMA.with_metadata(metadata))
    with publish(folder / DATA / f"{number:05}.parquet") as private, arrow_file(private, "wb") as sink:
        pq.write_table(table, sink, compression="zstd")


def read_samples(folder: Path) -> Iterator[Sample]:
    """All completions of a finished folder, those of a prompt next to each other.

    Raises:
        ConfigError: It is no folder of completions.
        DataError: A part is missing, or cannot be read.
    """
    parts = read_settings_of(folder).get("parts")
    if not isinstance(parts, int) or parts < 1:
        raise ConfigError(
            f"its {SETTINGS} does not say how many parts of completions it has",
            where=str(folder),
            why="it is another command's folder, and nothing in it can be judged",
            fix="pass a folder that `dpo-opt sample` wrote",
        )
    expected = set(range(parts))
    missing = sorted(expected - finished_parts(folder))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(expected)} parts are missing",
            where=str(folder),
            why="the prompts of those parts would be left out in silence",
            fix="run the `dpo-opt sample` command of the folder again, which continues",
        )
    for number in sorted(expected):
        path = folder / DATA / f"{number:05}.parquet"
        with _readable(path), arrow_file(path) as source:
            rows = pq.read_table(source, schema=SAMPLES_SCHEMA).to_pylist()
        names = [field.name for field in fields(Sample)]
        for row in rows:
            yield Sample(**{name: row[name] for name in names})


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"the part cannot be read ({first_line(error)})",
            where=str(path),
            why="its completions would be left out in silence",
            fix=f"rm {quoted(path)}, and run the `dpo-opt sample` command of the folder again",
        ) from error
