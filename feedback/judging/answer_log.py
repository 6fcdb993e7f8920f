"""Every answer of a judge, kept from the moment it is there, so that nothing is asked twice.

While a run is at work, answers are lines of ``answers.jsonl``: a killed process leaves all of them but the
one that it was writing. At the end they become ``answers.parquet``.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_opt.schemas.arrow_file import arrow_file
from dpo_opt.schemas.errors import ConfigError, DataError, first_line
from dpo_opt.schemas.full_disk import room_on_disk
from dpo_opt.schemas.plain_data import json_of
from dpo_opt.schemas.storage import publish

ANSWERS = "answers.parquet"
_LINES = "answers.jsonl"


def has_answers(folder: Path) -> bool:
    """Whether any answer was kept in a folder."""
    lines = folder / _LINES
    return (folder / ANSWERS).exists() or (lines.exists() and lines.stat().st_size > 0)


class AnswerLog:
    """The answers of a folder, by key. Use it as a context: one process at a time may have it.

    Args:
        folder: Folder of the judge's results.
        schema: Of an answer; its first column is ``key``.

    Raises:
        ConfigError: Another process is at work in the folder.
        DataError: Answers that were kept cannot be read.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder = folder
        self._schema = schema

    def __enter__(self) -> Self:
        self._lines = (self._folder / _LINES).open("ab+")
        if not self._locked():
            self._lines.close()
            raise ConfigError(
                "another process is at work in the folder",
                where=str(self._folder),
                why="both would ask the same things",
                fix="wait for it, or pass another --output",
            )
        self.answers: dict[str, dict[str, Any]] = {
            a["key"]: a for a in [*self._table(), *self._whole_lines()]
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What a full disk did not take is tried again here, and fails as it did.
        with contextlib.suppress(OSError):
            self._lines.flush()
            if os.fstat(self._lines.fileno()).st_size == 0:
                (self._folder / _LINES).unlink()
        with contextlib.suppress(OSError):
            self._lines.close()

    def keep(self, answer: Mapping[str, Any]) -> None:
        """Keep an answer, before anything is made of it.

        Raises:
            DpoOptError: The disk is full; the answers before are kept.
        """
        with room_on_disk(self._folder):
            self._lines.write(json.dumps(answer).encode() + b"\n")
            self._lines.flush()
        self.answers[answer["key"]] = dict(answer)

    def finish(self) -> None:
        """Put all answers into the table."""
        rows = list(self.answers.values())
        table = pa.Table.from_pylist(rows, schema=self._schema)
        with publish(self._folder / ANSWERS) as private, arrow_file(private, "wb") as sink:
            pq.write_table(table, sink, compression="zstd")
        self._lines.truncate(0)

    def _locked(self) -> bool:
        """Whether this process alone has the file of lines now, which a process removes when it ends."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._lines.fileno()), (self._folder / _LINES).stat())
        return False

    def _table(self) -> Iterator[dict[str, Any]]:
        path = self._folder / ANSWERS
        if not path.exists():
            return
        try:
            with arrow_file(path) as source:
                yield from pq.read_table(source, schema=self._schema).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"the answers cannot be read ({first_line(error)})",
                where=str(path),
                why="what was asked already would be asked again",
                fix="restore the file, or pass another --output",
            ) from error

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        self._lines.seek(0)
        text = self._lines.read()
        whole = text.rfind(b"\n") + 1
        for number, line in enumerate(text[:whole].splitlines(), 1):
            try:
                answer = json_of(line.decode())
            except ValueError:
                answer = None
            if not isinstance(answer, dict) or set(answer) != set(self._schema.names):
                raise DataError(
                    "the line is no answer",
                    where=f"{self._folder / _LINES}:{number}",
                    why="somebody else wrote into the file",
                    fix="remove the line; what it answered is asked again",
                )
            yield answer
        # The rest is half a line, which a killed process left.
        self._lines.truncate(whole)
