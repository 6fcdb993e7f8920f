"""Our losses are those of TRL 1.16's trainers, computed by their own code on the same log-probs.

TRL's methods run on a stand-in for the trainer, and a model that answers with given log-probs.

Where the two differ on purpose:

* `sigmoid` with label smoothing is cDPO here; TRL's `sigmoid` ignores the setting.
* `sft`, and the cross-entropy of `cpo`, is a mean over each completion's tokens, then over pairs. TRL's is
  over the tokens of the micro-batch, so it depends on which pairs share one. With one pair it is ours.
* `orpo` has the cross-entropy of the completion; TRL's trainer adds the prompt's.
* `simpo` is the paper's; TRL adds `cpo_alpha` times cross-entropy, by default 1.
* TRL overflows in `forward_kl` below a log-ratio of -88, in `discopop` below a margin of -88.
* A divergence with `sft` alone is refused here, and ignored by TRL.
* `bco_pair` is shifted by the mean reward of training so far. TRL has no shift, as here before the first
  step.
* `aot` and `aot_unpaired` sort all pairs of a step; TRL sorts those of the micro-batch.
* `ld_alpha` is refused beside `sft`, whose cross-entropy TRL leaves as it is.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from loss_cases import NEEDED
from torch import Tensor

from dpo_opt.optimize import TrainConfig, preference_loss
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import DIVERGENCES, LOSSES, options_of, takes_divergence
from dpo_opt.optimize.losses.running import Running
from dpo_opt.optimize.losses.usable import require_usable_losses
from dpo_opt.optimize.measured import Measured, measure
from dpo_opt.schemas.errors import ConfigError

pytestmark = pytest.mark.usefixtures("peers")

OURS_ONLY = {
    "ipo_sum", "cal_dpo", "rdpo", "dpop", "odpo", "rpo", "kto", "apo_zero_unpaired", "kto_pair", "beta_dpo",
    "simpo", "cpo", "orpo", "unlikelihood",
}  # fmt: skip
"""Not in DPOTrainer; kto, apo_zero_unpaired, simpo, cpo and orpo are in trainers of their own."""
SHARED = [name for name in LOSSES if name not in OURS_ONLY]
BETA = 0.3


class Batch(NamedTuple):
    """Token log-probs of a few pairs, as TRL's trainer has them: chosen ones first, padded."""

    token_logps: Tensor  # (2 x pairs, tokens - 1)
    completion_mask: Tensor  # (2 x pairs, tokens)
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.completion_mask.sum(dim=1)

    @property
    def log_squares(self) -> Tensor:
        """(2 x pairs, tokens - 1) made up: logs of numbers below 1."""
        return -torch.arange(1.0, 1 + self.token_logps.numel()).reshape(self.token_logps.shape).sqrt()

    def measured(self, ld_alpha: float | None = None) -> Measured:
        scored = self.completion_mask[:, 1:].bool()
        pairs = len(scored) // 2
        return measure(
            self.token_logps[scored],
            self.lengths.tolist(),
            [(number, pairs + number) for number in range(pairs)],
            ld_alpha=ld_alpha,
            log_squares=self.log_squares[scored],
        )

    def ours(self, ld_alpha: float | None = None) -> LossInputs:
        measured = self.measured(ld_alpha)
        return LossInputs(
            measured.chosen_weighed,
            measured.rejected_weighed,
            self.ref_chosen_logps.double(),
            self.ref_rejected_logps.double(),
            *self.lengths.chunk(2),
            beta=BETA,
        )


def batch(pairs: int, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    lengths = torch.randint(1, 8, (2 * pairs, 1))
    # One prompt token, completions of 1 to 7.
    places = torch.arange(8)
    mask = ((places >= 1) & (places <= lengths)).long()
    token_logps = -torch.rand(2 * pairs, 7) * 3 * mask[:, 1:]
    references = token_logps.sum(dim=1) + torch.randn(2 * pairs) * 2
    return Batch(token_logps, mask, *references.chunk(2))


class Alone:
    """An accelerator of one process."""

    device = torch.device("cpu")

    @staticmethod
    def gather(values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather


def theirs(given: Batch, loss_type: list[str], **settings: Any) -> tuple[float, dict[str, float]]:
    """The loss of TRL's DPOTrainer, and its metrics."""
    from collections import defaultdict

    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir="unused", loss_type=loss_type, beta=BETA, use_cpu=True, bf16=False, **settings
    )
    trainer = SimpleNamespace(
        accelerator=Alone(),
        model=SimpleNamespace(training=False),
        args=args,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_types=args.loss_type,
        loss_weights=args.loss_weights or [1.0] * len(args.loss_type),
        ld_alpha=args.ld_alpha,
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        f_divergence_type=args.f_divergence_type,
        f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        use_weighting=args.use_weighting,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    nothing = torch.zeros_like(given.token_logps)
    answer = SimpleNamespace(
        log_probs=given.token_logps,
        log_sum_sq_probs=given.log_squares,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )
    inputs = {
        "input_ids": torch.zeros_like(given.completion_mask),
        "completion_mask": given.completion_mask,
        "ref_chosen_logps": given.ref_chosen_logps,
        "ref_rejected_logps": given.ref_rejected_logps,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: answer, inputs, False)
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    return float(loss), metrics


def require_equal(given: Batch, loss_type: list[str], **settings: Any) -> None:
    found = preference_loss(loss_type, given.ours(), **settings).losses.mean().item()
    expected, _ = theirs(given, loss_type, **settings)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_every_loss_of_theirs_is_ours_or_named() -> None:
    from typing import get_args

    from trl import DPOConfig

    help_text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {part.strip("`' ,.") for part in help_text.split() if part.startswith("`'")}
    assert named == set(SHARED)
    kinds = get_args(TrainConfig.model_fields["f_divergence_type"].annotation)[0]
    assert set(get_args(kinds)) == set(DIVERGENCES)


@pytest.mark.parametrize("name", SHARED)
def test_losses_are_trls(name: str) -> None:
    given = batch(1 if name == "sft" else 5)
    require_equal(given, [name], **NEEDED.get(name, {}))
    if name in {"robust", "exo_pair", "aot", "aot_unpaired"}:
        require_equal(given, [name], label_smoothing=0.2)
    if name == "discopop":
        require_equal(given, [name], discopop_tau=0.4)


@pytest.mark.parametrize("kind", [kind for kind in DIVERGENCES if kind != "reverse_kl"])
@pytest.mark.parametrize("name", [name for name in SHARED if takes_divergence(name)])
def test_losses_with_a_divergence_are_trls(name: str, kind: str) -> None:
    options = NEEDED.get(name, {}) | {"f_divergence_type": kind}
    require_equal(batch(5), [name], **options)
    if kind == "alpha_divergence":
        for coefficient in (0.0, 0.3, 1.0, 1.7):
            require_equal(batch(5), [name], **options, f_alpha_divergence_coef=coefficient)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot", "bco_pair"])
def test_ld_dpo_is_trls(name: str, alpha: float) -> None:
    given = batch(6)
    found = preference_loss(name, given.ours(alpha))
    expected, metrics = theirs(given, [name], ld_alpha=alpha)
    assert found.losses.mean().item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(found.chosen_rewards.mean().item(), rel=1e-5)


@pytest.mark.parametrize("names", [["sigmoid"], ["hinge", "ipo"], ["bco_pair", "nca_pair"]])
def test_wpo_is_trls(names: list[str]) -> None:
    given = batch(5)
    agreement = given.measured().agreement
    assert agreement is not None
    found = (preference_loss(names, given.ours()).losses * agreement).mean().item()
    expected, _ = theirs(given, names, use_weighting=True)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_several_losses_and_metrics_are_trls() -> None:
    """MPO's three, and RPO's two."""
    require_equal(batch(1), ["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    require_equal(batch(1), ["sigmoid", "sft"])
    require_equal(batch(1), ["hinge", "sft"], loss_weights=[1.0, 0.1], f_divergence_type="js_divergence")
    given = batch(5)
    found = preference_loss(["simpo", "sft"], given.ours())
    _, metrics = theirs(given, ["sigmoid"])
    assert metrics["rewards/chosen"] == pytest.approx(found.chosen_rewards.mean().item(), rel=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(found.rejected_rewards.mean().item(), rel=1e-5)


def test_defaults_are_trls() -> None:
    from trl import DPOConfig
    from trl.experimental.cpo import CPOConfig

    ours = {o: d for name in (*LOSSES, *DIVERGENCES) for o, d in options_of(name).items()}
    for name in ("discopop_tau", "f_alpha_divergence_coef"):
        assert DPOConfig.__dataclass_fields__[name].default == ours[name]
    for name in ("cpo_alpha", "simpo_gamma"):
        assert CPOConfig.__dataclass_fields__[name].default == ours[name]
    for name in ("beta", "label_smoothing"):
        default = TrainConfig.model_fields[name].default
        assert DPOConfig.__dataclass_fields__[name].default == default
        assert CPOConfig.__dataclass_fields__[name].default == default


def test_trls_divergences_go_with_the_same_losses() -> None:
    """Read from its trainer: the check stands in the constructor, which wants a model."""
    import inspect
    import re

    from trl import DPOTrainer

    source = inspect.getsource(DPOTrainer.__init__)
    (listed,) = re.findall(r"f_divergence_loss_types = \{([^}]*)\}", source)
    allowed = set(re.findall(r'"(\w+)"', listed))
    assert allowed - {"sft"} == {name for name in SHARED if takes_divergence(name)}
    # Beside another loss, that is: alone it has no reference, and TRL ignores the divergence.
    for names, refused in ((["sigmoid", "sft"], False), (["sft"], True), (["nca_pair"], True)):
        config = TrainConfig.model_validate(
            {
                "shards": "s",
                "model": "m",
                "output_dir": "o",
                "loss_type": names,
                "f_divergence_type": "forward_kl",
            }
        )
        if refused:
            with pytest.raises(ConfigError):
                require_usable_losses(config)
        else:
            require_usable_losses(config)


# --- What is not so in TRL


def test_trl_ignores_label_smoothing_in_sigmoid() -> None:
    given = batch(5)
    assert theirs(given, ["sigmoid"], label_smoothing=0.2) == theirs(given, ["sigmoid"])
    plain, smoothed = (
        preference_loss("sigmoid", given.ours(), label_smoothing=share).losses.mean().item()
        for share in (0.0, 0.2)
    )
    assert abs(plain - smoothed) > 1e-3


def test_trls_sft_weighs_tokens_and_ours_pairs() -> None:
    given = batch(5)
    expected, _ = theirs(given, ["sft"])
    chosen, lengths = given.ours().chosen_logps, given.ours().chosen_lengths
    assert expected == pytest.approx(float(-chosen.sum() / lengths.sum()), rel=1e-5)
    found = preference_loss("sft", given.ours()).losses
    assert found.mean().item() == pytest.approx(float((-chosen / lengths).mean()))
    assert found.mean().item() != pytest.approx(expected, rel=1e-2)


def test_trl_does_not_shift_rewards_in_bco_pair() -> None:
    given = batch(5)
    shifted = preference_loss("bco_pair", given.ours()._replace(running=Running(reward=0.5))).losses
    expected, _ = theirs(given, ["bco_pair"])
    assert abs(shifted.mean().item() - expected) > 1e-3


def test_trl_overflows_where_ours_is_clamped() -> None:
    given = batch(1)
    far = given._replace(ref_chosen_logps=given.ref_chosen_logps + 1e4)
    for loss_type, settings in (
        ("sigmoid", {"f_divergence_type": "forward_kl"}),
        ("discopop", {}),
    ):
        expected, _ = theirs(far, [loss_type], **settings)
        found = preference_loss(loss_type, far.ours(), **settings).losses
        assert not torch.isfinite(torch.tensor(expected))
        assert torch.isfinite(found).all()


# --- The trainers without a reference


def of_cpo_trainer(given: Batch, loss_type: str, **settings: Any) -> Tensor:
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        accelerator=Alone(), loss_type=loss_type, beta=BETA, alpha=0.0, simpo_gamma=0.5, label_smoothing=0.0
    )
    vars(trainer).update(settings)
    logps = given.token_logps.sum(dim=1)
    if loss_type == "simpo":
        logps = logps / given.lengths
    losses: Tensor = CPOTrainer.cpo_loss(trainer, *logps.chunk(2))[0]
    return losses


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_and_cpo_are_those_of_trls_trainer(label_smoothing: float) -> None:
    given = batch(5)
    smoothing = {"label_smoothing": label_smoothing}
    simpo = preference_loss("simpo", given.ours(), simpo_gamma=0.8, **smoothing).losses
    expected = of_cpo_trainer(given, "simpo", simpo_gamma=0.8, **smoothing)
    torch.testing.assert_close(simpo.float(), expected, rtol=1e-5, atol=1e-5)
    # The trainer adds the cross-entropy afterwards.
    cpo = preference_loss("cpo", given.ours(), cpo_alpha=0.0, **smoothing).losses
    torch.testing.assert_close(
        cpo.float(), of_cpo_trainer(given, "sigmoid", **smoothing), rtol=1e-5, atol=1e-5
    )


def test_orpos_odds_are_those_of_trls_trainer() -> None:
    from trl.experimental.orpo import ORPOTrainer

    given = batch(5)
    trainer = SimpleNamespace(accelerator=Alone(), beta=BETA)
    mean_logps = given.token_logps.sum(dim=1) / given.lengths
    expected = ORPOTrainer.odds_ratio_loss(trainer, *mean_logps.chunk(2))[0]
    pairs = given.ours()
    found = preference_loss("orpo", pairs).losses - preference_loss("sft", pairs).losses
    # Its method gives what the trainer subtracts.
    torch.testing.assert_close(found.float(), -expected, rtol=1e-5, atol=1e-5)
