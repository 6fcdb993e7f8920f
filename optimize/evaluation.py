"""What a policy is evaluated on, and how it does there."""

import contextlib
import math
from typing import NamedTuple

import torch

from dpo_opt.optimize.checkpoint.checkpoints import Best
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.optimize.forward.policy import Policy
from dpo_opt.optimize.losses.preference_loss import is_unpaired
from dpo_opt.optimize.losses.running import Running
from dpo_opt.optimize.losses.usable import reads_margins, require_matching_rows
from dpo_opt.optimize.metrics_lines import Metrics
from dpo_opt.optimize.metrics_window import MetricsWindow, metric_names
from dpo_opt.optimize.processes.distributed import process_without
from dpo_opt.optimize.run_folder import HeldLogps, RunFolder, hold_logps
from dpo_opt.optimize.step import Batching, forward_pairs
from dpo_opt.optimize.stop_signals import StopSignals
from dpo_opt.optimize.stream import PairStream, share_that_holds_out
from dpo_opt.schemas.config_keys import differing_keys, kept_model_config
from dpo_opt.schemas.errors import ConfigError, quoted
from dpo_opt.schemas.fingerprint import MODEL_FIELDS, refuse_differences
from dpo_opt.schemas.shard_folder import ShardFolder


class MemoryRanOut(Exception):
    """An evaluation broke off on all processes, because memory ran out on this one of them."""

    def __init__(self, process: int) -> None:
        super().__init__(process)
        self.process = process


class Evaluation(NamedTuple):
    """One set of pairs that are never trained on."""

    name: str | None
    """Of its folder of shards; None for the prompts held out of the training folder."""
    stream: PairStream
    index_sha256: str | None
    """Hash of its folder's index; None for the held-out prompts, which are the run's own for good."""
    unpaired: bool
    """Its rows have one completion and a label each."""

    @property
    def prefix(self) -> str:
        """Of its metrics."""
        return f"eval_{self.name}_" if self.name else "eval_"

    @property
    def metrics(self) -> list[str]:
        """Names of this evaluation's metrics, with its prefix."""
        return [self.prefix + name for name in metric_names(unpaired=self.unpaired)]


def evaluations(config: TrainConfig, folder: ShardFolder, stream: PairStream) -> list[Evaluation]:
    """The held-out prompts, then every folder of ``eval_shards``.

    Raises:
        ConfigError: Two folders have the same name, ``eval_split`` holds out no prompt, there is nothing to
            evaluate on, no evaluation has the metric of ``metric_for_best_model``, or a folder has rows that
            the losses are not of, or lacks the margins that a loss reads.
        DataError: A folder is incomplete or damaged.
        FingerprintError: A folder was scored with another reference or tokenizer.
    """
    if config.eval_split and not len(stream.eval_positions):
        share = share_that_holds_out(folder.index(["prompt_id"])["prompt_id"])
        noun = folder.manifest.fingerprint.noun
        raise ConfigError(
            f"--eval-split {config.eval_split} holds out none of the prompts",
            where=str(folder.path),
            why="the run would silently never be evaluated on them"
            if share is not None
            else f"all {noun}s share one prompt, or nearly so, and those of a prompt are held out together",
            fix=f"pass a larger share, such as --eval-split {share}, or leave --eval-split out"
            if share is not None
            else f"leave --eval-split out, and pass {noun}s of other prompts as --eval-shards",
        )
    unpaired = is_unpaired(config.loss_type)
    found = [Evaluation(None, stream, None, unpaired)] if len(stream.eval_positions) else []
    for path in config.eval_shards:
        if path.name in {evaluation.name for evaluation in found}:
            raise ConfigError(
                f"two folders of --eval-shards are called {path.name!r}",
                why="their metrics could not be told apart",
                fix="rename one of them",
            )
        other = ShardFolder.open(path)
        cached, current = other.manifest.fingerprint, folder.manifest.fingerprint
        require_matching_rows(config, rows=cached.rows, where=str(path))
        refuse_differences(
            cached=cached,
            current=current,
            fields=MODEL_FIELDS,
            config_keys=differing_keys(
                path,
                cached_digest=cached.model_config_digest,
                current=kept_model_config(folder.path, digest=current.model_config_digest),
            ),
            where=str(path),
            fix=f"score it with the reference of {quoted(folder.path)}",
        )
        pairs = PairStream(other, eval_split=1.0, margins=reads_margins(config))
        found.append(Evaluation(path.name, pairs, other.manifest.index_sha256, unpaired))
    wanted = config.metric_for_best_model
    names = [name for evaluation in found for name in evaluation.metrics]
    if wanted is not None and wanted not in names:
        raise ConfigError(
            f"--metric-for-best-model {wanted!r} is not a metric of any evaluation",
            fix=f"pass one of: {', '.join(map(quoted, names))}"
            if names
            else "pass --eval-split or --eval-shards",
        )
    if config.eval_steps is not None and not found:
        raise ConfigError(
            f"--eval-steps {config.eval_steps} has nothing to evaluate on",
            why="the run would silently never be evaluated",
            fix="add --eval-split 0.05 or --eval-shards, or leave --eval-steps out",
        )
    return found


@torch.no_grad()
def evaluate(
    evaluation: Evaluation,
    policy: Policy,
    config: TrainConfig,
    run: RunFolder,
    *,
    batching: Batching,
    running: Running,
    step: int,
    epoch: float,
    stop: StopSignals,
) -> Metrics:
    """Metrics over all of an evaluation's pairs. Writes their log-probs to the run's folder.

    Raises:
        MemoryRanOut: It did so on one of the processes; on all of them. Nothing is left behind.
        StopRequested: A signal came; the unfinished evaluation leaves nothing behind.
    """
    window = MetricsWindow(policy.device, unpaired=evaluation.unpaired, beta=config.beta)
    found: list[HeldLogps] = []
    batches = evaluation.stream.batches(evaluation.stream.eval_positions, config.batch_size)
    with contextlib.closing(batches):
        for pairs in batches:
            stop.check(batching.world)
            results = None
            with contextlib.suppress(torch.OutOfMemoryError):
                results = forward_pairs(
                    policy,
                    pairs,
                    config,
                    batching=batching,
                    weights=None,
                    margins=evaluation.stream.margins(pairs),
                    running=running,
                    backward=False,
                    stop=stop,
                )
            lost = process_without(results, batching.world)
            if lost is not None:
                raise MemoryRanOut(lost)
            assert results is not None
            window.add(pairs, results)
            found.append(
                hold_logps(
                    pairs,
                    chosen_logps=results.chosen_logps,
                    rejected_logps=results.rejected_logps,
                    step=step,
                    epoch=epoch,
                    phase="eval",
                )
            )
    for batch in found:
        run.add_pair_logps(batch, evaluation=evaluation.name)
    return window.means(prefix=evaluation.prefix)


def new_best(metric: str, value: float, evaluations: list[Evaluation], *, step: int) -> Best:
    """Record an evaluation as the best so far, with the pairs that its value belongs to."""
    pairs = next(evaluation.index_sha256 for evaluation in evaluations if metric in evaluation.metrics)
    return Best(metric=metric, value=value, step=step, pairs=pairs)


def is_comparable(best: Best, metric: str | None, evaluations: list[Evaluation]) -> bool:
    """Whether the next evaluations can be compared with ``best``: same metric, same pairs."""
    return metric is not None and best == new_best(metric, best.value, evaluations, step=best.step)


def is_better(value: float, metric: str, than: float | None) -> bool:
    """Whether a value beats the best before it. Lower is better for a loss, else higher is better."""
    if than is None:
        return not math.isnan(value)
    return value < than if metric.endswith("loss") else value > than
