"""Results and gradients of a step. One whose memory runs out is repeated, in micro-batches half as large."""

import math
from collections.abc import Callable, Sequence

import torch

from dpo_opt.optimize.begin import Run, RunState
from dpo_opt.optimize.less_memory import halve_micro_batches, ran_out_again
from dpo_opt.optimize.micro_batches import SeeLogps
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.optimize.processes.distributed import process_without
from dpo_opt.optimize.run_folder import resume_command
from dpo_opt.optimize.step import forward_pairs
from dpo_opt.schemas.pairs import ScoredPair


def try_step(
    run: Run, state: RunState, pairs: Sequence[ScoredPair], see: SeeLogps | None = None
) -> PairResults | None:
    """Results and gradients of a step; None if memory ran out on this process.

    The others learn of it without an exchange of their own: its gradients are then NaN, so that the norm of
    all processes' gradients is, which each looks at before the update. See ``repeated_where_memory_ran_out``.
    """
    stream = run.prepared.stream
    try:
        return forward_pairs(
            run.policy,
            pairs,
            run.config,
            batching=state.batching,
            weights=stream.weights(pairs),
            margins=stream.margins(pairs),
            running=state.running,
            backward=True,
            stop=run.stop,
            see=see,
        )
    except torch.OutOfMemoryError:
        pass
    # Not in the handler: there the error still holds the tensors of the step.
    for parameter in run.parameters:
        if parameter.grad is not None:
            parameter.grad.fill_(math.nan)
    return None


def repeated_where_memory_ran_out(
    run: Run, state: RunState, results: PairResults | None, again: Callable[[], PairResults | None]
) -> PairResults:
    """The results of a step, and its gradients; of a second try, if memory ran out on any process.

    Every process must call this. The second try and all later steps have half the micro-batch budget.

    Args:
        run: The run. Gradients of the first try are dropped.
        state: Gets the smaller budget.
        results: Of ``try_step``.
        again: The second try.

    Raises:
        DpoOptError: Memory ran out again; on every process.
    """
    lost = process_without(results, run.world)
    if lost is not None:
        step = f"step {state.at.step + 1}"
        halve_micro_batches(run, state, process=lost, what=step)
        results = again()
        lost = process_without(results, run.world)
        if lost is not None:
            raise ran_out_again(
                run,
                state,
                process=lost,
                what=step,
                why="a pair's completions run forward and backward together, so no micro-batch is smaller",
                fix=f"{resume_command(run.files.path)} --activation-checkpointing full",
            )
    assert results is not None
    return results
