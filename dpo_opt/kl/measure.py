"""KL divergence measured where it is defined: on completions that the policy itself samples.

The policy writes, then both models score what it wrote through the same forward, one after the other in
memory. A table that is there is not measured again.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_opt.analysis.kl import estimate_kl, kl_of_run
from dpo_opt.analysis.kl_table import write_kl_table
from dpo_opt.analysis.load import scan_kl_samples
from dpo_opt.kl.policies import Policy, find_policies
from dpo_opt.kl.prompts import choose_prompts
from dpo_opt.merge import merge
from dpo_opt.precompute.tokens.load_tokenizer import load_tokenizer
from dpo_opt.precompute.tokens.template_date import ChosenDate
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.kl_samples import RECORD_KEY, KLRecord, KLSample, read_kl_record, write_kl_samples
from dpo_opt.schemas.models import checkpoint_dtype, context_length, find_model
from dpo_opt.schemas.outputs import require_own_output
from dpo_opt.schemas.pairs import Completion, IdArray, Sampler, TokenSequence, content_hash
from dpo_opt.schemas.progress import Progress, Silent
from dpo_opt.schemas.run_layout import KL
from dpo_opt.schemas.storage import publish, sha256_file
from dpo_opt.schemas.weights import weights_digest
from dpo_opt.scorers import make_engine, runs_vllm

if TYPE_CHECKING:
    from dpo_opt.commands.kl import KLConfig
    from dpo_opt.optimize.transformers_scorer import HfScorer

_STAGES = 3


class _Job(NamedTuple):
    """What one policy's table is measured with."""

    policy: Policy
    base: Path
    """Folder of the policy, or of the model that its adapter is for."""
    reference: Path
    prompts: list[IdArray]
    date: ChosenDate
    record: KLRecord

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its completion."""
        return max(len(p) for p in self.prompts) + self.record.max_new_tokens


def measure_kl(config: "KLConfig", *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Measure each policy whose table is not there yet, and write the tables.

    Returns:
        Of each policy: ``model``, ``reference``, ``step``, ``output``, ``measured`` (False where the table
        was there), the date of its prompts, and the fields of ``KLEstimate``.

    Raises:
        ConfigError: A model is missing, a prompt leaves no room for a completion, or a table was measured
            with other settings. Nothing was measured.
        DataError: The prompts cannot be read, or the samples are not the policy's.
    """
    progress = progress or Silent()
    if config.output is not None:
        require_own_output(config.output, option="--output", command="kl", mark=RECORD_KEY)
    jobs = [_planned(policy, config) for policy in find_policies(config)]
    _require_equal_records(jobs)
    left = {job.policy for job in jobs if not job.policy.output.is_file()}
    progress.start("measuring KL", total=_STAGES * len(left), unit="stages")
    found = []
    for job in jobs:
        measured = job.policy in left
        if measured:
            _measure(job, config, progress)
            if job.policy.run is not None:
                write_kl_table(job.policy.run)
        output = job.policy.output
        found.append(
            {
                "model": job.policy.model,
                "reference": job.policy.reference,
                "step": job.policy.step,
                "output": str(output),
                "measured": measured,
                **job.date.as_record(),
                **estimate_kl(scan_kl_samples(output), where=str(output)).as_record(),
            }
        )
    for run in dict.fromkeys(job.policy.run for job in jobs if job.policy.run is not None):
        # Where a command was killed after its last measurement, this table lacks it.
        write_kl_table(run)
    progress.finish()
    return found


def _planned(policy: Policy, config: "KLConfig") -> _Job:
    """Everything that is known before a model is loaded.

    Raises:
        ConfigError: A model is missing, or the longest prompt leaves no room.
        DataError: The prompts cannot be read.
    """
    reference = find_model(policy.reference)
    adapter = policy.adapter
    base = find_model(policy.base)
    date, prompts = choose_prompts(config, model=base, run=policy.run)
    weights = weights_digest(base) if adapter is None else sha256_file(adapter / "adapter_model.safetensors")
    record = KLRecord(
        policy=weights,
        reference=weights_digest(reference),
        prompts=content_hash(*prompts),
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        engine="vllm" if runs_vllm(config.backend) else "transformers",
        dtype=checkpoint_dtype(base) if config.dtype == "auto" else config.dtype,
        step=policy.step,
    )
    job = _Job(policy, base, reference, prompts, date, record)
    context = context_length(base)
    if context is not None and job.longest > context:
        raise ConfigError(
            f"the longest prompt and --max-new-tokens {config.max_new_tokens} take {job.longest} tokens, "
            f"the model's context has {context}",
            fix="pass a smaller --max-new-tokens, or shorter prompts",
        )
    return job


def _require_equal_records(jobs: Sequence[_Job]) -> None:
    """Keep the tables that are there, unless one was measured with something else.

    Raises:
        ConfigError: Some were; all are named. They may hold columns that a user added.
    """
    others = {
        job.policy.output: difference
        for job in jobs
        if job.policy.output.is_file()
        and (difference := _difference(read_kl_record(job.policy.output), job.record)) is not None
    }
    others |= _others_beside(jobs)
    if not others:
        return
    first, difference = next(iter(others.items()))
    more = f", and {len(others) - 1} more" if len(others) > 1 else ""
    raise ConfigError(
        f"there is another measurement ({difference}{more})",
        where=str(first),
        why="a sweep's policies compare where all were measured alike, and samples that are there are kept",
        fix=f"rm {' '.join(map(quoted, others))}, then run the same command again; or pass the settings that "
        f"{'it has' if len(others) == 1 else 'they have'}",
    )


def _others_beside(jobs: Sequence[_Job]) -> dict[Path, str]:
    """Tables of other policies of the same runs, such as of checkpoints that are gone, with how they differ.

    Raises:
        DataError: One is damaged, or another program's.
    """
    found = {}
    for run, job in {job.policy.run: job for job in jobs}.items():
        # A file that the user named stands beside no others.
        if run is None or job.policy.output.parent != run / KL:
            continue
        own = {other.policy.output for other in jobs}
        for kl in kl_of_run(run):
            if (table := run / KL / kl.file) in own or (there := read_kl_record(table)) is None:
                continue
            # A final model may be saved in another dtype than the checkpoints.
            of_policy = {"policy": there.policy, "step": there.step, "dtype": there.dtype}
            asked = job.record.model_copy(update=of_policy)
            if (difference := _difference(there, asked)) is not None:
                found[table] = difference
    return found


def _difference(there: KLRecord | None, asked: KLRecord) -> str | None:
    """How the table that is there was measured otherwise, in words; None if it was not."""
    if there == asked:
        return None
    if there is None:
        return "it does not say how: an earlier version wrote it, or another program"
    return "; ".join(
        f"{name} {getattr(there, name)}, not {value}"
        for name, value in asked.model_dump().items()
        if getattr(there, name) != value
    )


def _measure(job: _Job, config: "KLConfig", progress: Progress) -> None:
    from dpo_opt.optimize.forward.next_tokens import compare_next_tokens
    from dpo_opt.optimize.transformers_scorer import HfScorer

    record = job.record
    with _whole(job) as folder:
        policy = HfScorer(folder, dtype=record.dtype, max_length=job.longest)
        completions = _sampled(policy, folder, job, config)
        progress.advance(1, "sampled")
        flat = [(p, n, c) for p, cs in zip(job.prompts, completions, strict=True) for n, c in enumerate(cs)]
        sequences = [TokenSequence(p, c.completion_ids) for p, _, c in flat]
        own = policy.states(sequences)
        tokenizer = load_tokenizer(folder)
    del policy
    progress.advance(1, "scored under the policy")
    reference = HfScorer(job.reference, dtype=record.dtype, max_length=job.longest)
    compared = compare_next_tokens(own, reference.states(sequences), [s.completion_ids for s in sequences])
    progress.advance(1, "scored under the reference")
    samples = [
        KLSample(
            prompt_id=content_hash(prompt),
            sample=number,
            finished=completion.finished,
            prompt_ids=prompt,
            completion_ids=completion.completion_ids,
            policy_token_logps=tokens.policy_logps,
            ref_token_logps=tokens.ref_logps,
            policy_token_entropies=tokens.policy_entropies,
            token_kl=tokens.kl,
            prompt=str(tokenizer.decode(prompt)),
            completion=str(tokenizer.decode(completion.completion_ids, skip_special_tokens=True)),
        )
        for (prompt, number, completion), tokens in zip(flat, compared, strict=True)
    ]
    with publish(job.policy.output) as private:
        write_kl_samples(private, samples, record=record)
        # Samples that are not the policy's are an error, and leave no table.
        estimate_kl(scan_kl_samples(private), where=str(job.policy.output))


def _sampled(
    policy: "HfScorer", folder: Path, job: _Job, config: "KLConfig"
) -> Sequence[Sequence[Completion]]:
    """Completions of each prompt at temperature 1, over the whole vocabulary."""
    if not runs_vllm(config.backend):
        return _sample(policy, job)
    # In a process of its own: to run a model that it has no class for, vLLM changes that of transformers,
    # which then works in the engine alone. And no engine is left in memory.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as apart:
        return apart.submit(_sample_with_vllm, folder, job).result()


def _sample_with_vllm(folder: Path, job: _Job) -> list[list[Completion]]:
    engine = make_engine(folder, backend="vllm", dtype=job.record.dtype, max_length=job.longest)
    return _sample(engine, job)


def _sample(sampler: Sampler, job: _Job) -> list[list[Completion]]:
    return sampler.sample(
        job.prompts,
        num_samples=job.record.num_samples,
        max_new_tokens=job.record.max_new_tokens,
        temperature=job.record.temperature,
        seed=job.record.seed,
    )


@contextlib.contextmanager
def _whole(job: _Job) -> Iterator[Path]:
    """Folder of the policy as one model; of an adapter while the block runs, merged into its base."""
    adapter = job.policy.adapter
    if adapter is None:
        yield job.base
        return
    from dpo_opt.commands.merge import MergeConfig

    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder, "merged")
        merge(MergeConfig(model=str(job.base), adapter=adapter, output=merged))
        yield merged
