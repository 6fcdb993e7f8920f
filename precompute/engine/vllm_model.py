"""``VllmModel``: scores and samples with vLLM (``--backend vllm``).

Guards against what vLLM would silently get wrong:
* sequences that lost log-probs to the prefix cache are scored again (``vllm_strategy``);
* the first sequences are scored with and without the cache, and compared;
* every answer is checked for its length and, if it names them, for its token ids.
"""

import contextlib
import functools
import gc
import os
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from dpo_opt.precompute.engine.checkpoint_keys import require_place_for_all_weights
from dpo_opt.precompute.engine.engine_arguments import accepted_arguments, engine_arguments
from dpo_opt.precompute.engine.option_rules import canonical, refuse_unknown
from dpo_opt.precompute.engine.process_death import death_is_noticed
from dpo_opt.precompute.engine.process_watchdog import children_end_with_this_process
from dpo_opt.precompute.engine.vllm_build import is_cpu_build, prepare_environment, vllm_version
from dpo_opt.precompute.engine.vllm_strategy import choose_strategy, read_answer, request_settings
from dpo_opt.schemas.counts import counted
from dpo_opt.schemas.errors import ConfigError, DpoOptError, EngineStopped, first_line
from dpo_opt.schemas.model_config import load_model_config
from dpo_opt.schemas.models import read_config
from dpo_opt.schemas.pairs import Completion, IdArray, LogpArray, Numerics, TokenSequence, sampling_seed
from dpo_opt.schemas.rope import FIXED, describe_rope

# Older versions can be made to run a model folder's code (CVE-2026-27893), or lack features used here.
_OLDEST = (0, 18)
# Requests in the engine at once: enough to fill its steps, few enough that memory does not grow.
_REQUESTS = 512
# Sequences that are scored with and without the cache when a worker starts, and the largest mean difference
# in nats per token. Half precision rounds differently in every batch.
_CHECKED = 16
_REUSE_LIMIT = {"float32": 1e-4, "half": 0.05}


class ReuseCheck(NamedTuple):
    """Differences between scoring with and without the prefix cache, in nats per token."""

    tokens: int
    mean: float
    max: float


class VllmModel:
    """A model in a vLLM engine, as ``Scorer`` and as ``Sampler``. The engine starts at first use.

    Args:
        folder: The model folder.
        dtype: Dtype of weights and computation, such as ``bfloat16``.
        max_length: Longest sequence that will be scored, in tokens.
        engine_options: More arguments of the engine (``option_rules.read_engine_options``).
        reuse: Compute a prompt once for all its completions, if this vLLM does so correctly.

    Raises:
        ConfigError: vLLM is not installed, is too old, or has no such argument.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        max_length: int,
        engine_options: Mapping[str, Any] = MappingProxyType({}),
        reuse: bool = True,
    ) -> None:
        version = vllm_version()
        if version is None:
            raise ConfigError(
                "vLLM is not installed",
                fix="pip install 'dpo-opt[vllm]', or pass --backend hf",
            )
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
            raise ConfigError(
                f"vLLM {version} is too old, 0.{_OLDEST[1]} is the oldest supported",
                why="older versions can be made to run code from a model folder",
                fix="pip install -U 'dpo-opt[vllm]'",
            )
        self._version = version
        self._folder = folder
        self._dtype = dtype
        self._max_length = max_length
        if engine_options:
            refuse_unknown(engine_options, known=accepted_arguments())
        self._engine_options = engine_options
        self._engine: Any = None
        best = choose_strategy(version, cpu_build=is_cpu_build(), model_config=read_config(folder))
        self._strategy = best._replace(reuse=best.reuse and reuse)
        self.reuse_check: ReuseCheck | None = None
        """The measured difference between scoring with and without the cache; None if not measured."""

    @property
    def numerics(self) -> Numerics:
        return Numerics(
            engine="vllm",
            engine_version=self._version,
            strategy=self._strategy.name,
            dtype=self._dtype,
            engine_options=canonical(self._engine_options),
            rope=self._rope,
        )

    @functools.cached_property
    def _rope(self) -> str:
        try:
            config = load_model_config(self._folder)
        except ConfigError:
            return FIXED  # vLLM knows a few models that transformers does not
        return describe_rope(config, self._max_length)

    def token_logps(self, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
        """See ``Scorer``."""
        if self._strategy.reuse and self.reuse_check is None:
            if len(sequences) == 1:
                # A single sequence shows nothing about reuse, so the check waits for the next call.
                return self._score(sequences, reuse=False)
            self._check_reuse(sequences[:_CHECKED])
        found: list[LogpArray] = []
        for i in range(0, len(sequences), _REQUESTS):
            found += self._score(sequences[i : i + _REQUESTS], reuse=self._strategy.reuse)
        return found

    def _score(self, sequences: Sequence[TokenSequence], *, reuse: bool) -> list[LogpArray]:
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": np.concatenate([s.prompt_ids, s.completion_ids]).tolist()} for s in sequences
        ]
        params = [SamplingParams(**request_settings(self._strategy, s, reuse=reuse)) for s in sequences]
        outputs = self._generate(prompts, params)
        answers = [read_answer(self._strategy, s, o) for s, o in zip(sequences, outputs, strict=True)]
        again = [i for i, answer in enumerate(answers) if answer is None]
        if again and not reuse:
            raise DpoOptError(
                f"vLLM gave no log-probs for {len(again)} of {counted(len(sequences), 'sequence')}",
                where=str(self._folder),
                fix="pass --backend hf, and report the vLLM version with `dpo-opt env`",
            )
        if again:
            for i, answer in zip(again, self._score([sequences[i] for i in again], reuse=False), strict=True):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _check_reuse(self, sequences: Sequence[TokenSequence]) -> None:
        """Score the first sequences with and without the prefix cache, before any value is kept.

        Raises:
            DpoOptError: The cache changes the values by more than rounding can.
        """
        if not sequences:
            return
        # Run the cached pass first; a second pass would be served from the first one's cache entries.
        reused, plain = (np.concatenate(self._score(sequences, reuse=way)) for way in (True, False))
        self._started().reset_prefix_cache()
        finite = np.isfinite(plain)
        if not finite.any():
            return  # not the cache's fault: the caller scores them again, and explains them
        difference = np.abs(plain - reused)[finite]
        self.reuse_check = ReuseCheck(len(difference), float(difference.mean()), float(difference.max()))
        limit = _REUSE_LIMIT["float32" if self._dtype == "float32" else "half"]
        if not self.reuse_check.mean <= limit:
            raise DpoOptError(
                f"with the prefix cache, log-probs differ by {self.reuse_check.mean:.2g} nats per token on "
                f"average over {counted(len(difference), 'token')}; {limit:g} is allowed",
                where=str(self._folder),
                why="the cache may change only the speed, not the values",
                fix="pass --backend hf, and report the vLLM version with `dpo-opt env`",
            )

    def sample(
        self,
        prompts: Sequence[IdArray],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Completion]]:
        """See ``Sampler``."""
        from vllm import SamplingParams

        # The n-th completion of a request has the request's seed plus n.
        params = [
            SamplingParams(
                n=num_samples,
                max_tokens=max_new_tokens,
                temperature=temperature,
                detokenize=False,
                seed=sampling_seed(seed, prompt),
            )
            for prompt in prompts
        ]
        requests = [{"prompt_token_ids": p.tolist()} for p in prompts]
        outputs = self._generate(requests, params)
        return [
            [
                Completion(np.asarray(c.token_ids, dtype=np.int32), c.finish_reason == "stop")
                for c in output.outputs
            ]
            for output in outputs
        ]

    def _generate(self, prompts: list[dict[str, list[int]]], params: Any) -> Any:
        engine = self._started()
        try:
            with death_is_noticed(engine):
                return engine.generate(prompts, params, use_tqdm=False)
        except DpoOptError:
            raise
        # The engine runs the model's code and drivers, in processes of its own: it may fail with any class.
        except Exception as error:
            del engine
            self._abandon(error)
            raise EngineStopped(
                f"vLLM stopped ({first_line(error, lines=1, named=True)})",
                where=str(self._folder),
                why="the shard that it was working on is lost; finished shards are kept",
                fix="see the engine's log with VLLM_LOGGING_LEVEL=INFO, or pass --backend hf",
            ) from error

    def _abandon(self, error: Exception) -> None:
        """End an engine that failed: its queued requests would be returned as answers to the next ones."""
        engine, self._engine = self._engine, None
        # What has failed may fail to end, too. The failure itself is what the user must read.
        with contextlib.suppress(Exception):
            engine.llm_engine.engine_core.shutdown()
        # The frames of the traceback hold the engine and all of its memory.
        traceback.clear_frames(error.__traceback__)
        del engine
        gc.collect()

    def _started(self) -> Any:
        if self._engine is None:
            prepare_environment()
            require_place_for_all_weights(self._folder)
            self._engine = _start(
                **engine_arguments(
                    self._folder,
                    dtype=self._dtype,
                    max_length=self._max_length,
                    reuse=self._strategy.reuse,
                    fixes_rope=self._rope != FIXED,
                    options=self._engine_options,
                )
            )
        return self._engine


def _start(**settings: Any) -> Any:
    import torch
    from vllm import LLM

    if is_cpu_build():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        # vLLM's imports warn about vLLM's own use of torch, which a user cannot change.
        warnings.simplefilter("ignore", FutureWarning)
        with children_end_with_this_process() if _has_processes(settings) else contextlib.nullcontext():
            return LLM(**settings)
    except DpoOptError:
        raise
    # What vLLM refuses a model or a machine with has no common class.
    except Exception as error:
        raise DpoOptError(
            f"vLLM cannot run this model ({first_line(error, lines=1, named=True)})",
            where=settings["model"],
            fix="pass --backend hf, or see the engine's log with VLLM_LOGGING_LEVEL=INFO",
        ) from error


def _has_processes(settings: Mapping[str, Any]) -> bool:
    """Whether the engine runs in processes of its own."""
    apart = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0"
    return apart or settings.get("tensor_parallel_size", 1) > 1
