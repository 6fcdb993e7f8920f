"""How log-probs are requested from vLLM, and when an answer can be trusted. Pure functions that need no vLLM.

Strategy ``token_ids`` (vLLM >= 0.32 on a GPU): ``prompt_logprob_token_ids`` with ``prompt_logprob_start``.
The LM head runs only on completion rows, and vLLM returns one float per token.

Strategy ``prompt_logprobs`` (everywhere else): vLLM returns the log-prob of every token of the sequence
(``prompt_logprobs=0, flat_logprobs=True``), and the completion's part is kept.

Both may read the prompt's work from the prefix cache (``skip_reading_prefix_cache=False``). vLLM does not do
so by default for such requests, because rows that come from the cache have no log-probs. An answer is good if
the row that predicts the first completion token was computed. If it was not, ``token_ids`` gives None. The
other strategy then returns uninitialized memory, and only ``num_cached_tokens`` shows it. Such a sequence is
scored again without the cache.

The strategy is chosen by version and build, never by the attributes that an object happens to have, because a
runner may accept an argument and ignore it.
"""

from typing import Any, NamedTuple

import numpy as np

from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pairs import LogpArray, TokenSequence

_FIRST_WITH_TOKEN_IDS = (0, 32)
_RECURRENT = ("mamba", "ssm", "linear_attn", "linear_attention", "recurrent", "rwkv", "conv")


class Strategy(NamedTuple):
    """One way to score."""

    token_ids: bool
    """Request the log-probs of only the completion's tokens."""
    reuse: bool
    """Read the prompt's work from the prefix cache."""

    @property
    def name(self) -> str:
        """Name of the strategy in the fingerprint."""
        return ("token_ids" if self.token_ids else "prompt_logprobs") + ("+reuse" if self.reuse else "")


def choose_strategy(version: str, *, cpu_build: bool, model_config: dict[str, Any]) -> Strategy:
    """The fastest strategy that is known to be right in this vLLM.

    Args:
        version: Version of the installed vLLM.
        cpu_build: Whether it is a CPU build, which has the older runner in every version.
        model_config: The model's config.json; the cache of a recurrent layer is not reused.
    """
    modern = _version(version) >= _FIRST_WITH_TOKEN_IDS and not cpu_build
    # GPU builds before 0.32 may use the newer runner, which returns fewer rows when some are cached.
    reads_cache_right = cpu_build or modern
    return Strategy(token_ids=modern, reuse=reads_cache_right and not _is_recurrent(model_config))


def request_settings(strategy: Strategy, sequence: TokenSequence, *, reuse: bool) -> dict[str, Any]:
    """Arguments of ``SamplingParams``, which derives others from them when it is made."""
    # A request must sample one token to run; the token is not used.
    settings: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "detokenize": False}
    settings["skip_reading_prefix_cache"] = not reuse
    if strategy.token_ids:
        settings["prompt_logprob_token_ids"] = sequence.completion_ids.astype(np.int32)[:, None]
        settings["prompt_logprob_start"] = len(sequence.prompt_ids) - 1
    else:
        settings |= {"prompt_logprobs": 0, "flat_logprobs": True}
    return settings


def read_answer(strategy: Strategy, sequence: TokenSequence, output: Any) -> LogpArray | None:
    """The completion's log-probs, (C,) float32; None if too many rows came from the cache.

    Raises:
        DpoOptError: The answer belongs to other token ids, or lacks some.
    """
    if strategy.token_ids:
        scores = output.prompt_token_id_logprobs
        if scores is None:
            return None
        values = np.asarray(scores, dtype=np.float32)
        if values.shape != (len(sequence.completion_ids), 1):
            raise _wrong_answer(f"scores of shape {values.shape}", sequence)
        return values[:, 0]
    # The flat form has no entry for the first token, so entry k belongs to token k + 1.
    flat = output.prompt_logprobs
    start = len(sequence.prompt_ids) - 1
    if len(flat.token_ids) != start + len(sequence.completion_ids):
        raise _wrong_answer(counted(len(flat.token_ids), "log-prob"), sequence)
    if (output.num_cached_tokens or 0) > start:
        return None
    # Entries before ``start`` are the prompt's; those from the cache are uninitialized memory.
    if not np.array_equal(np.asarray(flat.token_ids[start:], dtype=np.int32), sequence.completion_ids):
        raise _wrong_answer("log-probs of other ids", sequence)
    return np.asarray(flat.logprobs, dtype=np.float32)[start:]


def _wrong_answer(found: str, sequence: TokenSequence) -> DpoOptError:
    return DpoOptError(
        f"vLLM answered with {found}; the prompt has {counted(len(sequence.prompt_ids), 'token')}, the "
        f"completion {len(sequence.completion_ids)}",
        why="the values would belong to other tokens",
        fix="pass --backend hf, and report the vLLM version with `dpo-opt env`",
    )


def _version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _is_recurrent(config: dict[str, Any]) -> bool:
    text = config.get("text_config", config)
    words = " ".join(map(str, [*text, *(text.get("layer_types") or []), text.get("model_type", "")]))
    return any(word in words.lower() for word in _RECURRENT)
