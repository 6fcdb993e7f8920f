"""The means that a line of metrics holds, under TRL's names, gathered step by step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_opt.optimize.forward.packing import to_device
from dpo_opt.optimize.metrics_lines import Metrics
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.schemas.pairs import ScoredPair

_OF_PAIRS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected",
)  # fmt: skip
_OF_UNPAIRED = (
    "loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip


def metric_names(*, unpaired: bool) -> tuple[str, ...]:
    """Metrics of pairs, or of rows with one completion each."""
    return _OF_UNPAIRED if unpaired else _OF_PAIRS


class MetricsWindow:
    """Sums over the pairs since the last line of metrics. They stay on the device until they are read."""

    def __init__(self, device: torch.device, *, unpaired: bool, beta: float) -> None:
        """Begin with no pair.

        Args:
            device: Where the sums stay.
            unpaired: The rows have one completion and a label each. As in TRL's KTOTrainer ``rewards/chosen``
                is the mean over desirable ones, and ``rewards/margins`` the difference of both means.
            beta: By which rewards are more than log-ratios.
        """
        self._unpaired, self._beta = unpaired, beta
        self._sums = torch.zeros(10, dtype=torch.float64, device=device)

    def add(self, pairs: Sequence[ScoredPair], results: PairResults, grad_norm: Tensor | None = None) -> None:
        """Count a step's pairs, and its gradient norm."""
        columns = self._unpaired_columns(pairs, results) if self._unpaired else _pair_columns(results)
        self._sums[:-2] += columns.sum(dim=1)
        if grad_norm is not None:
            self._sums[-2] += grad_norm.double()
            self._sums[-1] += 1

    def _unpaired_columns(self, pairs: Sequence[ScoredPair], results: PairResults) -> Tensor:
        """(8, rows): loss, kl, both rewards, both log-probs, desirable, and 1."""
        chosen, rejected = results.chosen_rewards, results.rejected_rewards
        label = to_device(torch.tensor([bool(pair.label) for pair in pairs]), chosen.device)
        kl = torch.relu(torch.where(label, rejected, chosen).mean() / self._beta)
        desirable, other = label.double(), (~label).double()
        return torch.stack(
            [
                results.losses,
                kl.expand(len(pairs)),
                chosen * desirable,
                rejected * other,
                results.chosen_logps * desirable,
                results.rejected_logps * other,
                desirable,
                torch.ones_like(desirable),
            ]
        )

    def means(self, *, prefix: str = "") -> Metrics:
        """Means over the pairs; ``grad_norm`` is the mean over the steps. One of no row is left out."""
        *sums, pairs, grad_norms, steps = self._sums.tolist()
        found = _unpaired_means(sums, pairs) if self._unpaired else [total / pairs for total in sums]
        names = metric_names(unpaired=self._unpaired)
        means: Metrics = {
            prefix + name: mean for name, mean in zip(names, found, strict=True) if mean is not None
        }
        if steps:
            means["grad_norm"] = grad_norms / steps
        return means

    @property
    def pairs(self) -> int:
        """Number of pairs counted."""
        return int(self._sums[-3])

    @property
    def state(self) -> list[float]:
        """The sums, exactly."""
        return list(self._sums.tolist())

    @state.setter
    def state(self, sums: list[float]) -> None:
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))


def _pair_columns(results: PairResults) -> Tensor:
    """(8, pairs): ``_OF_PAIRS``, and 1."""
    margins = results.chosen_rewards - results.rejected_rewards
    return torch.stack(
        [
            results.losses,
            results.chosen_rewards,
            results.rejected_rewards,
            margins,
            (margins > 0).double(),
            results.chosen_logps,
            results.rejected_logps,
            torch.ones_like(margins),
        ]
    )


def _unpaired_means(sums: Sequence[float], rows: float) -> list[float | None]:
    """Those of ``_OF_UNPAIRED``; None for one of no row."""
    loss, kl, chosen, rejected, chosen_logps, rejected_logps, desirable = sums
    undesirable = rows - desirable
    chosen_mean, chosen_logp = (chosen / desirable, chosen_logps / desirable) if desirable else (None, None)
    rejected_mean, rejected_logp = (
        (rejected / undesirable, rejected_logps / undesirable) if undesirable else (None, None)
    )
    margin = None if chosen_mean is None or rejected_mean is None else chosen_mean - rejected_mean
    return [loss / rows, kl / rows, chosen_mean, rejected_mean, margin, chosen_logp, rejected_logp]
