"""What keeps a run without findings from being called healthy."""

from collections.abc import Iterator

from dpo_opt.analysis import generalization, rewards
from dpo_opt.analysis.diagnosis.evidence import Evidence
from dpo_opt.analysis.outcomes import shares_over_prompts

_CHANCE = 0.5


def doubts(evidence: Evidence) -> Iterator[str]:
    """Sentences about a run, each of which a run that learned something has not; none where no pair is known.

    A finding needs more: most of these numbers have wide intervals where few prompts were held out.
    """
    if len(evidence.unseen):
        _, (right,) = shares_over_prompts(evidence.unseen, rewards.accuracy())
        if not right.low > _CHANCE:
            yield (
                f"the policy moved {right.value:.1%} [{right.low:.1%}, {right.high:.1%}] of these pairs the "
                "right way, and chance alone moves 50%"
            )
    splits = evidence.final.splits if evidence.final else {}
    known = generalization.overfitting(splits, evidence.run.evals)
    if known is not None and known.training_accuracy is not None:
        held_out = splits["held-out"].reward_accuracy
        yield (
            f"it moved {known.training_accuracy:.1%} of its training pairs the right way, and "
            f"{held_out.value:.1%} [{held_out.low:.1%}, {held_out.high:.1%}] of the held-out ones"
        )
    if known is not None and known.lowest is not None:
        step, least = known.lowest
        yield f"the held-out loss was lowest at step {step:,} ({least:.3g}), and rose by a tenth or more"
