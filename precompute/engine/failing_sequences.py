"""Finds the sequences that break the engine by halving, and leaves them out, so that one row stops no job.

A failed call may be the fault of one of its sequences, or of the engine and its settings. To tell them apart,
a small sequence is scored after every failure; it is one that was scored before, if there is one:

* If the small one fails too, the engine is at fault, and its error stops the run.
* If it is scored, the failed group is halved until the sequences that fail alone are found and left out.

If many sequences fail, single rows are not the cause. So the run stops after ``MOST_LEFT_OUT`` sequences in
one call of ``score_or_leave_out``, after ``MOST_FAILURES`` failed calls, or when a folder has lost too large
a share of its pairs over all its shards (``Losses``). An error that this project raises itself (a
``DpoOptError`` other than ``EngineStopped``) is never a row's fault and is passed on.

Log-probs that are not finite are treated alike: the sequence is scored alone. If they are not finite again,
and the small sequence's are, the sequence is left out. Otherwise the values are returned, and the caller
refuses them. If the model's weights are not finite, the run stops.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_opt.schemas.counts import are, counted
from dpo_opt.schemas.errors import ConfigError, DpoOptError, EngineStopped, Preempted, first_line
from dpo_opt.schemas.pairs import LogpArray, Scorer, TokenizedPair, TokenSequence
from dpo_opt.schemas.safe_text import printable
from dpo_opt.schemas.weights import nonfinite_tensor

ENGINE_ERROR = "engine_error"
"""Reason under which dropped rows are counted."""
MOST_LEFT_OUT = 8
"""Most sequences left out per call; in a shard of 1024 pairs this is below one in a hundred pairs."""
MOST_FAILURES = 64
"""Most failed calls: after each one an engine may have to start again."""
LARGEST_SHARE = 1 / 200
"""Largest share of a folder's pairs to leave out. ``MOST_LEFT_OUT`` pairs are always allowed, in a small
folder one in four."""
_MESSAGE_LENGTH = 200
_LOOK_AT_THE_ENGINE = "look at the engine's settings and memory, then run the same command again"


class Answers(NamedTuple):
    """A scorer's results for some sequences, in order."""

    values: list[LogpArray | None]
    """(C,) float32 each; None for a sequence that was left out."""
    left_out: dict[int, str]
    """From the position of a sequence that was left out to the engine's error."""


class Losses:
    """Counts the pairs of a folder that were left out because of engine errors, as far as one worker knows.

    Args:
        rows: Source rows of the folder's plan.
        seen: Pairs that any worker scored before.
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
            pairs: The pairs that were scored.
            left_out: From each row that was left out to the engine's error.

        Raises:
            EngineStopped: Too large a share of the pairs is lost by now.
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
            f"the engine failed on {self.lost} of {counted(self._seen, 'row')}, the last time with: "
            f"{list(left_out.values())[-1]}",
            why="so many failures are not the fault of single rows, and training would miss these rows; the "
            "shard is not kept",
            fix=f"all of them are longer than what it scored: pass --max-length {self._longest_scored} and "
            "another --shards folder"
            if only_long
            else _LOOK_AT_THE_ENGINE,
        )


def score_or_leave_out(
    sequences: Sequence[TokenSequence], scorer: Scorer, *, model: Path | None = None
) -> Answers:
    """Score sequences, and leave out the few that break the engine.

    Args:
        sequences: The sequences to score.
        scorer: The engine.
        model: The model's folder, to check whether its weights cause log-probs that are not finite.

    Raises:
        ConfigError: The model's weights are not finite.
        EngineStopped: The engine fails on every sequence, or fails too often.
        DpoOptError: The scorer refused something, or an answer is missing.
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
        """Score a group; if it fails as a whole, score its halves.

        Args:
            group: Positions of the sequences.
            holds_a_bad_one: The group is the bad half of a failed group, so it is not tried as a whole again.

        Returns:
            Whether the group was scored as a whole.
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
        """Leave out sequences whose log-probs are not finite, if that is the sequence's own fault."""
        wrong = [i for i, values in self.values.items() if not np.isfinite(values).all()]
        if wrong and self._model is not None:
            _require_finite_weights(self._model)
        if len(wrong) > MOST_LEFT_OUT - len(self.left_out):
            return
        for i in wrong:
            found = self.values.pop(i)
            # Alone it may also break the engine; ``score`` has then left it out.
            if not self.score([i]):
                continue
            alone = self.values[i]
            (small,) = _ask(self._scorer, [self._small()])
            if np.isfinite(alone).all() or not np.isfinite(small).all():
                # The values depend on the batch, or no sequence's are finite: not the row's fault.
                self.values[i] = found
                continue
            count = int((~np.isfinite(alone)).sum())
            dtype = self._scorer.numerics.dtype
            values = counted(len(alone), "log-prob")
            self._leave_out(i, f"{count} of {values} {are(count)} not finite in {dtype}")
            del self.values[i]

    def _require_a_working_engine(self, error: EngineStopped) -> None:
        """Score a small sequence, to see whether the engine works.

        Raises:
            EngineStopped: The small sequence fails as well, or there were too many failures.
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
        """The shortest sequence that was scored; before the first one, a sequence of two tokens."""
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
                why=f"more than {MOST_LEFT_OUT} are not the fault of single rows; the shard was not kept",
                fix=_LOOK_AT_THE_ENGINE,
            ) from (self._failures[0] if self._failures else None)


def _ask(scorer: Scorer, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
    try:
        answers = scorer.token_logps(sequences)
    except DpoOptError:
        raise
    # Engines raise what PyTorch, CUDA or the model's code raise, which has no common class.
    except Exception as error:
        raise EngineStopped(
            f"the scorer stopped ({first_line(error, lines=1, length=_MESSAGE_LENGTH, named=True)})",
            why="finished shards are kept",
            fix=_LOOK_AT_THE_ENGINE,
        ) from error
    if len(answers) != len(sequences):
        given, asked = counted(len(answers), "answer"), counted(len(sequences), "sequence")
        raise DpoOptError(f"the scorer gave {given} for {asked}")
    return answers


def _require_finite_weights(folder: Path) -> None:
    tensor = _nonfinite_tensor(folder)
    if tensor is not None:
        raise ConfigError(
            f"weights that are NaN or infinite: {tensor}",
            where=str(folder),
            why="the log-probs that depend on these weights would be NaN too",
            fix="copy or download the model again, or go back to an earlier checkpoint",
        )


# Cached, because it reads all weights.
_nonfinite_tensor = functools.cache(nonfinite_tensor)


def _length(sequence: TokenSequence) -> int:
    return len(sequence.prompt_ids) + len(sequence.completion_ids)


def _message(error: EngineStopped) -> str:
    return printable(" ".join(error.what.split()))[:_MESSAGE_LENGTH]
