"""Hands every line of ``metrics.jsonl`` to the trackers of a run, under the names that TRL's runs have there.

They run in a thread of their own. Whatever a tracker does, training computes the same and waits for nothing:
one that fails is given up with a line of warning, and one that hangs is left behind at the end.
"""

import contextlib
import json
import queue
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dpo_opt.optimize.metrics_lines import Metrics
from dpo_opt.optimize.reporting.trackers import TRACKERS, About, Tracker
from dpo_opt.schemas.errors import first_line
from dpo_opt.schemas.storage import write_text

_RECORD = "reports.json"
_LAST_SECONDS = 60.0
"""How long the end of a run waits for what is not sent yet."""


class Reports:
    """The trackers of one run. They are opened by its first line, so a refused run is reported nowhere.

    Args:
        names: Of ``TRACKERS``; none in all processes of a run but the first.
        run: The run's folder. ``reports.json`` in it keeps the id under which a resumed run goes on.
        settings: As the run's folder records them.
        say: Shows a line to the user.
    """

    def __init__(
        self, names: Sequence[str], *, run: Path, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._names = list(dict.fromkeys(names))
        self._folder, self._settings, self._say = run, settings, say
        self._lines: queue.SimpleQueue[Metrics | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._finished = False

    def log(self, metrics: Metrics) -> None:
        """Report one line of metrics; it has a ``step``."""
        if not self._names:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="reports", daemon=True)
            self._thread.start()
        self._lines.put(dict(metrics))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close the trackers, after what they still have to send."""
        if self._thread is None:
            return
        self._finished = kind is None
        self._lines.put(None)
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive():
            self._say(
                f"{', '.join(self._names)} did not answer for {_LAST_SECONDS:.0f} s, and is left behind; "
                "metrics.jsonl has every line"
            )

    def _work(self) -> None:
        opened: dict[str, Tracker] = {}
        while (line := self._lines.get()) is not None:
            step, values = int(line["step"]), as_reported(line)
            for name in list(self._names):
                with self._given_up_if_it_fails(name):
                    if name not in opened:
                        opened[name] = TRACKERS[name](self._about(step))
                    opened[name].log(values, step)
        for name in [name for name in self._names if name in opened]:
            with self._given_up_if_it_fails(name):
                opened[name].close(finished=self._finished)

    @contextlib.contextmanager
    def _given_up_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker, its server or its disk may raise
            self._names.remove(name)
            reason = re.sub(r"//[^/@\s]*@", "//", first_line(error, named=True))
            self._say(f"nothing more is reported to {name} ({reason}); metrics.jsonl has every line")

    def _about(self, step: int) -> About:
        return About(self._folder, run_id(self._folder), self._settings, step)


def as_reported(line: Metrics) -> dict[str, float]:
    """A line's metrics under transformers' and TRL's names in trackers: ``train/loss``, ``eval/loss``."""
    group = "train" if "loss" in line else "eval"
    return {f"{group}/{name.removeprefix('eval_')}": value for name, value in line.items() if name != "step"}


def run_id(run: Path) -> str:
    """The 8 hex digits of a run, made and kept at the first call."""
    record = run / _RECORD
    if record.is_file():
        # A damaged record costs a new id in the trackers, not all reports.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kept = json.loads(record.read_text(encoding="utf-8"))["id"]
            if re.fullmatch("[0-9a-f]{8}", kept):
                return str(kept)
    made = secrets.token_hex(4)
    write_text(record, json.dumps({"id": made}) + "\n")
    return made
