"""Sequences that break the engine, found by halving, so that one row does not stop a job for ever.

A call that fails may be the fault of one of its sequences, or of the engine and its settings. To tell them
apart, a small sequence is asked after every failure, one that was answered before where there is one:

* the small one fails too: it is the engine, and its error stops the run;
* it is answered: the failed group is halved until single sequences that fail alone are found and left out.

Many that fail are no accident of single rows: past ``MOST_LEFT_OUT`` in one call of ``score_or_leave_out``,
or ``MOST_FAILURES`` failed calls, the run stops; and so it does where a folder loses too large a share of its
pairs over all its shards (``Losses``). What the project refuses itself (``DpoOptError`` other than
``EngineStopped``) is never a row's fault, and passes through.

Values that are not finite are treated alike, unless the model's weights are not finite either, which stops
the run: such a sequence is asked for alone. If it gives them again, and the small one does not, it is left
out; otherwise the values are handed on, for the caller to refuse.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_opt.schemas.errors import ConfigError, DpoOptError, EngineStopped, Preempted
from dpo_opt.schemas.pairs import LogpArray, Scorer, TokenizedPair, TokenSequence
from dpo_opt.schemas.safe_text import printable
from dpo_opt.schemas.weights import nonfinite_tensor

ENGINE_ERROR = "engine_error"
"""Reason under which dropped rows are counted."""
MOST_LEFT_OUT = 8
"""Sequences; in a shard of 1024 pairs this is below one in a hundred pairs."""
MOST_FAILURES = 64
"""Failed calls: each may take the start of an engine."""
LARGEST_SHARE = 1 / 200
"""Of a folder's pairs; the first ``MOST_LEFT_OUT`` may be more, in a small folder one in four."""
_MESSAGE_LENGTH = 200
_LOOK_AT_THE_ENGINE = "look at the engine's settings and memory, then run the same command again"


class Answers(NamedTuple):
    """What a scorer gave for some sequences, in order."""

    values: list[LogpArray | None]
    """(C,) float32 each; None for those that were left out."""
    left_out: dict[int, str]
    """Position to what the engine said."""


class Losses:
    """Pairs that a folder lost to the engine, as far as one worker knows.

    Args:
        rows: Of the folder's plan.
        seen: Pairs that were scored before, by whomever.
        lost: How many of them were left out.
    """

    def __init__(self, *, rows: int, seen: int = 0, lost: int = 0) -> None:
        self.lost = lost
        self._seen = seen
        self._free = max(1, min(MOST_LEFT_OUT, rows // 4))
        self._longest_scored = 0
        self._shortest_lost: int | None = None

    def add(self, pairs: Sequence[TokenizedPair], left_out: Mapping[int, str]) -> None:
        """Count a shard's pairs, before it is kept.

        Args:
            pairs: What was asked for.
            left_out: By row, what the engine said of those that it failed on.

        Raises:
            EngineStopped: Too large a share is lost by now.
        """
        self._seen += len(pairs)
        self.lost += len(left_out)
        for pair in pairs:
            length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
            if pair.row in left_out:
                self._shortest_lost = min(length, self._shortest_lost or length)
            else:
                self._longest_scored = max(length, self._longest_scored)
        if not left_out or self.lost <= max(self._free, LARGEST_SHARE * self._seen):
            return
        only_long = self._longest_scored and (self._shortest_lost or 0) > self._longest_scored
        raise EngineStopped(
            f"the engine failed on {self.lost} of {self._seen} pairs, the last time with: "
            f"{list(left_out.values())[-1]}",
            why="so many are no accident of single rows, and training would miss them; the shard is not kept",
            fix=f"all of them are longer than what it scored: pass --max-length {self._longest_scored} and "
            "another --shards folder"
            if only_long
            else _LOOK_AT_THE_ENGINE,
        )


def score_or_leave_out(
    sequences: Sequence[TokenSequence], scorer: Scorer, *, model: Path | None = None
) -> Answers:
    """Score sequences; the few that break the engine are left out.

    Args:
        sequences: What to score.
        scorer: The engine.
        model: Its model's folder, to see whether the weights are to blame for values that are not finite.

    Raises:
        ConfigError: The model's weights are not finite.
        EngineStopped: The engine fails whatever it is asked, or fails too often.
        DpoOptError: What the scorer refuses, or an answer is missing.
    """
    search = _Search(sequences, scorer, model)
    if sequences:
        search.score(range(len(sequences)))
        search.look_again_at_what_is_not_finite()
    return Answers([search.values.get(i) for i in range(len(sequences))], search.left_out)


class _Search:
    def __init__(self, sequences: Sequence[TokenSequence], scorer: Scorer, model: Path | None) -> None:
        self.values: dict[int, LogpArray] = {}
        self.left_out: dict[int, str] = {}
        self._sequences = sequences
        self._scorer = scorer
        self._model = model
        self._failures: list[EngineStopped] = []

    def score(self, group: Sequence[int], *, holds_a_bad_one: bool = False) -> bool:
        """Score a group, in parts where it fails as a whole.

        Args:
            group: Positions.
            holds_a_bad_one: It has failed as part of a larger group whose other part is good, so the whole
                need not fail once more.

        Returns:
            Whether it was answered as a whole.
        """
        if len(group) == 1 or not holds_a_bad_one:
            try:
                answers = _ask(self._scorer, [self._sequences[i] for i in group])
            except EngineStopped as error:
                self._require_a_working_engine(error)
                if len(group) == 1:
                    self._leave_out(group[0], _message(error))
                    return False
            else:
                self.values.update(zip(group, answers, strict=True))
                return True
        half = len(group) // 2
        good = self.score(group[:half])
        self.score(group[half:], holds_a_bad_one=good)
        return False

    def look_again_at_what_is_not_finite(self) -> None:
        """Leave out what is not finite alone either, while others are."""
        wrong = [i for i, values in self.values.items() if not np.isfinite(values).all()]
        if wrong and self._model is not None:
            _require_finite_weights(self._model)
        if len(wrong) > MOST_LEFT_OUT - len(self.left_out):
            return
        for i in wrong:
            found = self.values.pop(i)
            # Alone it may also break the engine, and is then left out for that.
            if not self.score([i]):
                continue
            alone = self.values[i]
            (small,) = _ask(self._scorer, [self._small()])
            if np.isfinite(alone).all() or not np.isfinite(small).all():
                # Which values it gives depends on its company, or nothing is finite: no fault of the row.
                self.values[i] = found
                continue
            count = int((~np.isfinite(alone)).sum())
            dtype = self._scorer.numerics.dtype
            self._leave_out(i, f"{count} of {len(alone)} log-probs are not finite in {dtype}")
            del self.values[i]

    def _require_a_working_engine(self, error: EngineStopped) -> None:
        """Ask for something small.

        Raises:
            EngineStopped: It fails as well, or there were too many failures.
        """
        self._failures.append(error)
        if len(self._failures) > MOST_FAILURES:
            raise self._failures[0]
        try:
            _ask(self._scorer, [self._small()])
        except Preempted:
            raise
        except DpoOptError as again:
            raise error from again

    def _small(self) -> TokenSequence:
        """The shortest that was answered; before the first answer, one of two tokens."""
        good = [self._sequences[i] for i, values in self.values.items() if np.isfinite(values).all()]
        if good:
            return min(good, key=_length)
        shortest = min(self._sequences, key=_length)
        return TokenSequence(shortest.prompt_ids[:1], shortest.completion_ids[:1])

    def _leave_out(self, position: int, message: str) -> None:
        self.left_out[position] = message
        if len(self.left_out) > MOST_LEFT_OUT:
            raise EngineStopped(
                f"{len(self.left_out)} sequences of one shard fail alone, the first with: "
                f"{next(iter(self.left_out.values()))}",
                why=f"more than {MOST_LEFT_OUT} are no accident of single rows; the shard was not kept",
                fix=_LOOK_AT_THE_ENGINE,
            ) from (self._failures[0] if self._failures else None)


def _ask(scorer: Scorer, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
    try:
        answers = scorer.token_logps(sequences)
    except DpoOptError:
        raise
    except Exception as error:
        raise EngineStopped(
            f"the scorer stopped ({type(error).__name__}: {_first_line(error)})",
            why="finished shards are kept",
            fix=_LOOK_AT_THE_ENGINE,
        ) from error
    if len(answers) != len(sequences):
        raise DpoOptError(f"the scorer gave {len(answers)} answers for {len(sequences)} sequences")
    return answers


def _require_finite_weights(folder: Path) -> None:
    tensor = _nonfinite_tensor(folder)
    if tensor is not None:
        raise ConfigError(
            f"weights that are no numbers: {tensor}",
            where=str(folder),
            why="the log-probs of whatever they touch are no numbers either",
            fix="copy or download the model again, or go back to a checkpoint from before they broke",
        )


# Once a process: it reads all weights.
_nonfinite_tensor = functools.cache(nonfinite_tensor)


def _length(sequence: TokenSequence) -> int:
    return len(sequence.prompt_ids) + len(sequence.completion_ids)


def _message(error: EngineStopped) -> str:
    return printable(" ".join(error.what.split()))[:_MESSAGE_LENGTH]


def _first_line(error: Exception) -> str:
    return printable((str(error).strip() or "no message").splitlines()[0])[:_MESSAGE_LENGTH]
