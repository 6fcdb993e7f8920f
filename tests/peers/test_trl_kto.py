"""The losses of single completions are those of TRL 1.16's KTOTrainer, and so are metrics and defaults.

TRL's method runs on a stand-in for the trainer, with a model that answers with given log-probs. Where the two
differ on purpose: z0 is the mean over a step here, and over a micro-batch of every process there; completions
are rotated within a shard here, and within a micro-batch there. `kl` is measured here whatever the loss, and
there it is 0 where the loss has none.
"""

import inspect
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_opt.optimize import TrainConfig, preference_loss
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import UNPAIRED, options_of
from dpo_opt.optimize.metrics_window import MetricsWindow, metric_names
from dpo_opt.optimize.pair_results import PairResults
from dpo_opt.precompute.tokens.mismatched import with_mismatched
from dpo_opt.schemas.pairs import TokenizedPair

pytestmark = pytest.mark.usefixtures("peers")

BETA = 0.3
WEIGHTS = {"desirable_weight": 1.33, "undesirable_weight": 0.8}
LABELS = {
    "both": [True, False, False, True, True, False, True],
    "desirable alone": [True] * 5,
    "undesirable alone": [False] * 5,
}


class Alone:
    """An accelerator of one process."""

    device = torch.device("cpu")

    @staticmethod
    def gather_for_metrics(values: Tensor) -> Tensor:
        return values


def rows_of(labels: list[bool], *, up: float, seed: int = 3) -> dict[str, Tensor]:
    """Token log-probs of completions and of mismatched ones, which the policy raised by ``up``."""
    torch.manual_seed(seed)
    count = len(labels)
    places, lengths = torch.arange(8), torch.randint(1, 8, (2, count, 1))
    masks = ((places >= 1) & (places <= lengths)).long()
    logps = -torch.rand(2, count, 7) * 3 * masks[..., 1:]
    reference = logps.sum(-1) + torch.randn(2, count) * 2 - torch.tensor([[0.0], [up]])
    return {"masks": masks, "logps": logps, "reference": reference, "label": torch.tensor(labels)}


def theirs(name: str, given: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """The loss of TRL's KTOTrainer, and its metrics."""
    from trl import KTOTrainer

    trainer = SimpleNamespace(
        accelerator=Alone(),
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=name == "kto",
        loss_type=name,
        beta=BETA,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        **WEIGHTS,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    own, mismatched = (
        SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=torch.zeros_like(logps))
        for logps in given["logps"]
    )
    ids = torch.zeros_like(given["masks"][0])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": given["masks"][0],
        "KL_input_ids": ids + 1,
        "KL_attention_mask": torch.ones_like(ids),
        "KL_completion_mask": given["masks"][1],
        "ref_logps": given["reference"][0],
        "ref_KL_logps": given["reference"][1],
        "label": given["label"],
    }

    def model(*, input_ids: Tensor, **_: Any) -> Any:
        return mismatched if bool(input_ids.any()) else own

    loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    return float(loss), metrics


def ours(name: str, given: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    label = given["label"]
    (own, other), (ref_own, ref_other) = given["logps"].double().sum(-1), given["reference"].double()
    sides = (own, other), (other, own), (ref_own, ref_other), (ref_other, ref_own)
    chosen, rejected, ref_chosen, ref_rejected = (torch.where(label, *side) for side in sides)
    lengths = torch.ones(len(label), dtype=torch.int64)
    inputs = LossInputs(chosen, rejected, ref_chosen, ref_rejected, lengths, lengths, beta=BETA, labels=label)
    found = preference_loss(name, inputs, **WEIGHTS)
    window = MetricsWindow(torch.device("cpu"), unpaired=True, beta=BETA)
    pairs: Any = [SimpleNamespace(label=value) for value in label.tolist()]
    window.add(
        pairs, PairResults(found.losses, chosen, rejected, found.chosen_rewards, found.rejected_rewards)
    )
    return found.losses.mean().item(), window.means()


@pytest.mark.parametrize("up", [4.0, -4.0], ids=["z0 above 0", "z0 at 0"])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", sorted(UNPAIRED))
def test_loss_and_metrics_are_those_of_trls_trainer(name: str, kind: str, up: float) -> None:
    given = rows_of(LABELS[kind], up=up)
    (loss, metrics), (expected, theirs_) = ours(name, given), theirs(name, given)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (metrics["kl"] > 1) == (up > 0)
    assert metrics.keys() == {"loss", *theirs_} & set(metric_names(unpaired=True))
    if name != "kto":
        assert theirs_["kl"] == 0
        theirs_["kl"] = metrics["kl"]
    for metric in metrics.keys() - {"loss"}:
        assert metrics[metric] == pytest.approx(theirs_[metric], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", sorted(UNPAIRED))
def test_the_rows_loss_is_not_theirs_where_a_label_is_turned(name: str) -> None:
    given = rows_of(LABELS["both"], up=4.0)
    expected, _ = theirs(name, given)
    given["label"][0] = False
    assert abs(ours(name, given)[0] - expected) > 1e-3


def test_names_and_defaults_are_trls() -> None:
    from trl import KTOConfig

    fields = KTOConfig.__dataclass_fields__
    for loss in UNPAIRED:
        for name, default in options_of(loss).items():
            assert fields[name].default == default
    assert fields["beta"].default == TrainConfig.model_fields["beta"].default
    assert fields["loss_type"].default == "kto"


def test_mismatched_completions_are_those_of_a_micro_batch_of_theirs_as_large_as_the_shard() -> None:
    """Its rotation is written out: the function stands inside the method that prepares a dataset."""
    from trl import KTOTrainer

    source = "".join(inspect.getsource(KTOTrainer._prepare_dataset).split())
    rotated = 'examples["KL_completion_ids"]=[examples["completion_ids"][-1]]+examples["completion_ids"][:-1]'
    assert rotated in source
    completions = [np.arange(4, 5 + i, dtype=np.int32) for i in range(6)]
    rows = [
        TokenizedPair(
            row=i,
            source=None,
            prompt_ids=np.array([1, 2, 3 + i], dtype=np.int32),
            chosen_ids=ids,
            rejected_ids=ids,
            label=i % 2 == 0,
        )
        for i, ids in enumerate(completions)
    ]
    found = with_mismatched(rows, max_length=99)
    assert not found.left_out
    given = [row.rejected_ids if row.label else row.chosen_ids for row in found.rows]
    expected = [completions[-1], *completions[:-1]]
    assert all(np.array_equal(a, b) for a, b in zip(given, expected, strict=True))
