"""Compares cached log-probs with the policy's own in the first step's forward, before the first update.

Until then the policy is the reference, and that forward is needed anyway. What it cannot see is computed
apart: shards that none of its pairs come from, and single sequences in a forward of their own.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dpo_opt.optimize.adapters.lora import FOUR_BIT_OFFSET
from dpo_opt.optimize.begin import Run, RunState, open_folder
from dpo_opt.optimize.forward.prompt_groups import PromptGroup
from dpo_opt.optimize.gradients import repeated_where_memory_ran_out
from dpo_opt.optimize.measure_parity import OwnLogps, compare, one_at_a_time, together
from dpo_opt.optimize.micro_batches import SeeLogps
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.optimize.parity import Parity, require_parity
from dpo_opt.optimize.parity_sample import evenly, head_to_judge, pairs_beside
from dpo_opt.optimize.processes.distributed import sum_over_ranks
from dpo_opt.optimize.run_folder import Written
from dpo_opt.optimize.stop_signals import StopRequested
from dpo_opt.schemas.errors import DpoOptError
from dpo_opt.schemas.pairs import LogpArray, ScoredPair

_ALONE_PAIRS = (2, 8)
"""Fewest and most pairs of which each sequence is also computed alone, which takes longest."""
_ALONE_TOKENS = 256
"""Scored tokens that these pairs should have."""
_NOTHING = Written(0, {})


class FirstStep:
    """The comparison before a run's first update. Every process must call the same methods.

    Args:
        run: Whose policy is not trained yet.
        pairs: The pairs of the first step.

    Raises:
        DataError: A shard that is needed is damaged.
    """

    def __init__(self, run: Run, pairs: list[ScoredPair]) -> None:
        self.pairs = pairs
        self._run = run
        beside = pairs_beside(run.prepared.folder, pairs)
        self._beside, self._compared = len(beside), [*beside, *pairs]
        self._beside_sides = together(run.policy, beside)
        tokens = np.mean([pair.chosen_counted + pair.rejected_counted for pair in self._compared])
        least, most = _ALONE_PAIRS
        count = min(len(self._compared), most, max(least, round(_ALONE_TOKENS / float(tokens))))
        self._alone = one_at_a_time(run.policy, self._compared, evenly(len(self._compared), count))
        self._seen: dict[int, Tensor] = {}

    def results(self, state: RunState, forward: Callable[[SeeLogps], PairResults | None]) -> PairResults:
        """Results and gradients of the step. The run's folder is begun if the cache is the policy's own.

        Args:
            state: Gets the parity.
            forward: Computes the step, forward and backward; gives None if memory ran out.

        Raises:
            FingerprintError: The cached log-probs are not the policy's own. Nothing was written.
            DpoOptError: See ``forward``; also if memory ran out twice. The folder holds what its advice
                needs; so it does when a signal came.
        """

        def attempt() -> PairResults | None:
            # A second one may divide the pairs among the processes in another way.
            self._seen.clear()
            return forward(self._see)

        try:
            results = repeated_where_memory_ran_out(self._run, state, attempt(), attempt)
        except (DpoOptError, StopRequested):
            open_folder(self._run, None, _NOTHING)
            raise
        state.parity = self._judged()
        open_folder(self._run, state.parity, _NOTHING)
        return results

    def _see(self, groups: Sequence[PromptGroup], sequences: Sequence[Tensor]) -> None:
        firsts = itertools.accumulate((len(group.sequences) for group in groups), initial=0)
        for first, group in zip(firsts, groups, strict=False):
            for pair, sides in zip(group.pairs, group.sides, strict=True):
                for side, place in enumerate(sides):
                    if place is not None:
                        self._seen[2 * (self._beside + pair) + side] = sequences[first + place]

    def _judged(self) -> Parity:
        config, policy, folder = self._run.config, self._run.policy, self._run.prepared.folder
        own = OwnLogps(self._compared, [*self._beside_sides, *self._step_sides()], self._alone)
        dtype = folder.manifest.fingerprint.dtype
        parity = compare(policy, own, cached_dtype=dtype)
        if config.use_peft and config.load_in_4bit:
            figures = f"mean {parity.mean:+.1e}, sd {parity.sd:.1e} nats per token"
            self._run.progress.say(f"{FOUR_BIT_OFFSET} ({figures})")
            return parity
        head = head_to_judge(self._compared, self._beside)
        for found in (compare(policy, own, cached_dtype=dtype, first=head), parity):
            require_parity(found, shards=str(config.shards), model=config.model)
        return parity

    def _step_sides(self) -> list[LogpArray]:
        """Of each of the step's pairs chosen and rejected, from the process that computed them."""
        lengths = [count for pair in self.pairs for count in (pair.chosen_counted, pair.rejected_counted)]
        device = self._run.policy.device
        parts = [
            self._seen.get(number, torch.zeros(length, device=device))
            for number, length in enumerate(lengths, start=2 * self._beside)
        ]
        whole = sum_over_ranks(torch.cat(parts), self._run.world).cpu().numpy()
        return np.split(whole, np.cumsum(lengths)[:-1])


def first_step(run: Run, state: RunState, batches: Iterator[list[ScoredPair]]) -> FirstStep | None:
    """What a new run compares before its first update; None if it compares nothing, or goes on.

    Raises:
        DataError: A shard that is needed is damaged.
    """
    if state.at.step:
        return None
    if run.config.reference_differs:
        open_folder(run, None, _NOTHING)
        return None
    began = time.perf_counter()
    first = FirstStep(run, next(batches))
    state.throughput.leave_out(time.perf_counter() - began)
    return first
