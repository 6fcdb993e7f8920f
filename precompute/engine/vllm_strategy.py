"""How log-probs are asked of vLLM and what an answer is worth: pure functions, no vllm needed to read them.

Strategy ``token_ids`` (vLLM >= 0.32 on a GPU): ``prompt_logprob_token_ids`` with ``prompt_logprob_start``.
The LM head runs on completion rows alone, and one float per token comes back.

Strategy ``prompt_logprobs`` (everywhere else): every prompt token's own log-prob is asked for
(``prompt_logprobs=0, flat_logprobs=True``) and the completion's part is kept.

Both may read the prompt's work from the prefix cache (``skip_reading_prefix_cache=False``), which vLLM does
not do by itself for such requests: rows that come from the cache have no log-probs. An answer is good as long
as the row that predicts the first completion token was computed. Where it was not, ``token_ids`` gives None;
the other strategy's values are memory that nobody has written, and only ``num_cached_tokens`` tells. Such a
sequence is asked for again without the cache.

Chosen by version and build, never by what an object happens to have: a runner may accept what it does not
honour.
"""

from typing import Any, NamedTuple

import numpy as np

from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pairs import LogpArray, TokenSequence

_FIRST_WITH_TOKEN_IDS = (0, 32)
_RECURRENT = ("mamba", "ssm", "linear_attn", "linear_attention", "recurrent", "rwkv", "conv")


class Strategy(NamedTuple):
    """One way to score."""

    token_ids: bool
    """Ask for the completion's ids only."""
    reuse: bool
    """Read the prompt's work from the prefix cache."""

    @property
    def name(self) -> str:
        """As the fingerprint records it."""
        return ("token_ids" if self.token_ids else "prompt_logprobs") + ("+reuse" if self.reuse else "")


def choose_strategy(version: str, *, cpu_build: bool, model_config: dict[str, Any]) -> Strategy:
    """The best way that this vLLM is known to do right.

    Args:
        version: Of the installed vLLM.
        cpu_build: CPU builds run the older runner at any version.
        model_config: The model's config.json; the cache of a recurrent layer is not reused.
    """
    modern = _version(version) >= _FIRST_WITH_TOKEN_IDS and not cpu_build
    # Between the two, the newer runner may be on, which answers with fewer rows when some are cached.
    reads_cache_right = cpu_build or modern
    return Strategy(token_ids=modern, reuse=reads_cache_right and not _is_recurrent(model_config))


def request_settings(strategy: Strategy, sequence: TokenSequence, *, reuse: bool) -> dict[str, Any]:
    """Arguments of ``SamplingParams``; given at once, because changing them later leaves others behind."""
    # One token must be sampled for a request to run; it is thrown away.
    settings: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "detokenize": False}
    settings["skip_reading_prefix_cache"] = not reuse
    if strategy.token_ids:
        settings["prompt_logprob_token_ids"] = sequence.completion_ids.astype(np.int32)[:, None]
        settings["prompt_logprob_start"] = len(sequence.prompt_ids) - 1
    else:
        settings |= {"prompt_logprobs": 0, "flat_logprobs": True}
    return settings


def read_answer(strategy: Strategy, sequence: TokenSequence, output: Any) -> LogpArray | None:
    """The completion's log-probs, (C,) float32; None where too much came from the cache.

    Raises:
        DpoOptError: The answer belongs to other ids, or lacks some.
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
        raise _wrong_answer(f"{len(flat.token_ids)} log-probs", sequence)
    if (output.num_cached_tokens or 0) > start:
        return None
    # What comes before is the prompt's, and unwritten memory where it was cached.
    if not np.array_equal(np.asarray(flat.token_ids[start:], dtype=np.int32), sequence.completion_ids):
        raise _wrong_answer("log-probs of other ids", sequence)
    return np.asarray(flat.logprobs, dtype=np.float32)[start:]


def _wrong_answer(found: str, sequence: TokenSequence) -> DpoOptError:
    return DpoOptError(
        f"vLLM answered with {found}, for {len(sequence.prompt_ids)} + {len(sequence.completion_ids)} tokens",
        why="the values would belong to other tokens",
        fix="pass --backend hf, and report the vLLM version with `dpo-opt env`",
    )


def _version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _is_recurrent(config: dict[str, Any]) -> bool:
    text = config.get("text_config", config)
    words = " ".join(map(str, [*text, *(text.get("layer_types") or []), text.get("model_type", "")]))
    return any(word in words.lower() for word in _RECURRENT)
