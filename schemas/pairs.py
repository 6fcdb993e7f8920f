"""What travels between the stages in memory: pairs, the sequences to score, and who scores or samples them.

Shapes in this package: L = tokens of one sequence, P = prompt tokens, C = completion tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dpo_opt.schemas.rope import FIXED

IdArray = npt.NDArray[np.int32]
LogpArray = npt.NDArray[np.float32]
MaskArray = npt.NDArray[np.bool_]
HIGHEST_LOGP = 1e-3
"""Rounding of ``log_softmax`` in half precision may lift a log-prob above 0, and by no more than this."""

Message = dict[str, object]
Text = str | list[Message]


class PreferencePair(NamedTuple):
    """One source row, still text: plain strings, or lists of chat messages."""

    row: int
    prompt: Text
    chosen: Text
    rejected: Text
    source: str | None
    where: str
    """File and line (or row group and row), for messages."""
    weight: float | None = None
    """How much the pair counts in the loss; None where the data does not say."""
    margin: float | None = None
    """How much better chosen is than rejected, as the data says."""
    tools: list[object] | None = None
    """JSON schemas of the functions the model could call, for the chat template."""
    chat_template_kwargs: dict[str, object] | None = None
    """Settings of the chat template for this pair."""
    id: str | None = None
    """What the data calls its row."""
    rated: float | None = None
    """How much better the data rates chosen than rejected; None where it rates neither, or one alone."""
    label: bool | None = None
    """Of an unpaired row, whether its completion is desirable; it stands as ``chosen`` and as ``rejected``.

    None: a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPair:
    """One pair as token ids: exactly what is scored and what is trained on."""

    row: int
    source: str | None
    prompt_ids: IdArray
    chosen_ids: IdArray
    rejected_ids: IdArray
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    id: str | None = None
    """What the data calls its row; several pairs of one row have one."""
    chosen_mask: MaskArray | None = None
    """(C,) which tokens of the completion count, in every sum, loss and length; None: all do.

    The others are context: what users and tools say inside a completion, and the headers of turns."""
    rejected_mask: MaskArray | None = None
    label: bool | None = None
    """Of an unpaired row, whether its completion is desirable; None: a pair.

    The completion is the side that the label names, chosen where it is true and rejected where it is false.
    The other side is another row's completion, by which KTO estimates a KL divergence."""

    @property
    def truncated(self) -> bool:
        """Whether a completion lost tokens to ``max_length``; of an unpaired row its own, not the other."""
        if self.label is None:
            return self.chosen_truncated or self.rejected_truncated
        return self.chosen_truncated if self.label else self.rejected_truncated

    @property
    def pair_id(self) -> str:
        return content_hash(self.prompt_ids, self.chosen_ids, self.rejected_ids)

    @property
    def prompt_id(self) -> str:
        return content_hash(self.prompt_ids)

    @property
    def chosen_counted(self) -> int:
        """Tokens of the completion that count; at least one."""
        return counted_tokens(self.chosen_ids, self.chosen_mask)

    @property
    def rejected_counted(self) -> int:
        """Tokens of the completion that count; at least one."""
        return counted_tokens(self.rejected_ids, self.rejected_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPair(TokenizedPair):
    """A pair with the reference's log-prob of every completion token, in nats: one row of a shard."""

    ref_chosen_token_logps: LogpArray
    ref_rejected_token_logps: LogpArray

    @property
    def ref_chosen_logps(self) -> float:
        """Sum over the completion's tokens that count, accumulated in float64."""
        return float(counted(self.ref_chosen_token_logps, self.chosen_mask).sum(dtype=np.float64))

    @property
    def ref_rejected_logps(self) -> float:
        """Sum over the completion's tokens that count, accumulated in float64."""
        return float(counted(self.ref_rejected_token_logps, self.rejected_mask).sum(dtype=np.float64))

    def cut(self, *, chosen: int, rejected: int) -> "ScoredPair":
        """The pair with only the first so many tokens of each completion, and what goes with them."""
        return replace(
            self,
            chosen_ids=self.chosen_ids[:chosen],
            rejected_ids=self.rejected_ids[:rejected],
            chosen_mask=None if self.chosen_mask is None else self.chosen_mask[:chosen],
            rejected_mask=None if self.rejected_mask is None else self.rejected_mask[:rejected],
            ref_chosen_token_logps=self.ref_chosen_token_logps[:chosen],
            ref_rejected_token_logps=self.ref_rejected_token_logps[:rejected],
        )


def counted(values: LogpArray, mask: MaskArray | None) -> LogpArray:
    """What a completion's tokens have, of those that count."""
    return values if mask is None else values[mask]


def counted_tokens(ids: IdArray, mask: MaskArray | None) -> int:
    """How many tokens of a completion count."""
    return len(ids) if mask is None else int(mask.sum())


def content_hash(*parts: IdArray) -> str:
    """32 hex digits that name token ids by content (FORMAT.md, "Identifiers").

    Each part is preceded by its length, so moving a token across the prompt boundary changes the hash.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(part, dtype="<i4").tobytes())
    return digest.hexdigest()[:32]


class TokenSequence(NamedTuple):
    """A prompt and one completion of it: what a scorer is asked about."""

    prompt_ids: IdArray  # (P,), P >= 1
    completion_ids: IdArray  # (C,), C >= 1
    mask: MaskArray | None = None
    """(C,) which of the completion's log-probs are wanted, at least one; None: all."""

    @property
    def key(self) -> tuple[bytes, bytes]:
        """Equal for equal ids; memoisation of all log-probs uses it so that a completion is scored once."""
        return self.prompt_ids.tobytes(), self.completion_ids.tobytes()


class Numerics(NamedTuple):
    """How log-probs are computed, as the fingerprint records it."""

    engine: str
    """``vllm`` or ``transformers``."""
    engine_version: str
    strategy: str
    """Which of the engine's ways of returning log-probs is used."""
    dtype: str
    """Compute dtype, spelled as torch spells it: ``float32``, ``bfloat16``, ``float16``."""
    engine_options: str = "{}"
    """Arguments passed through to the engine, as compact JSON with sorted keys."""
    rope: str = FIXED
    """What the longest sequence makes of the rotary embedding (``schemas.rope``)."""


class Scorer(Protocol):
    """A frozen model that says how likely completions are."""

    @property
    def numerics(self) -> Numerics: ...

    def token_logps(self, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
        """Log-probs, in nats, of every completion token: one float32 (C,) array per sequence, in order.

        Sequences of one prompt should be adjacent: scorers reuse the work done for a prompt.

        Raises:
            DpoOptError: A value is not finite, is above 0, or does not belong to the ids asked for.
            EngineStopped: The engine broke; the next call starts it anew.
        """
        ...


def sampling_seed(seed: int, prompt_ids: IdArray) -> int:
    """Seed of a prompt's first completion; the n-th one has this seed plus n.

    It is made of the prompt's ids, so a prompt's completions are the same whatever is sampled beside it.

    Args:
        seed: Seed of the run.
        prompt_ids: (P,).

    Returns:
        A number below 2**62, so that seeds fit into 63 bits.
    """
    digest = hashlib.sha256(f"{seed} {content_hash(prompt_ids)}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


class Completion(NamedTuple):
    """One sampled completion."""

    completion_ids: IdArray  # (C,), C >= 1; ends with EOS where the model ended it
    finished: bool
    """False where ``max_new_tokens`` cut it off."""


class Sampler(Protocol):
    """A model that writes completions."""

    def sample(
        self,
        prompts: Sequence[IdArray],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Completion]]:
        """``num_samples`` completions of every prompt, in order: whole vocabulary, no top-k, no top-p.

        Each completion has a random stream of its own (``sampling_seed``). So equal prompts get equal
        completions, and what else is sampled changes them by rounding at most.

        Args:
            prompts: (P,) each.
            num_samples: Completions per prompt.
            max_new_tokens: Longest completion.
            temperature: 0 takes the most likely token each time.
            seed: Seed of the run.
        """
        ...
