"""Each loss against its paper's equation, its gradient, its edges, and where it begins."""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from loss_cases import AT_START, NEEDED, of_one_pair
from torch import Tensor

from dpo_opt.optimize import preference_loss
from dpo_opt.optimize.losses.pair_inputs import LossInputs
from dpo_opt.optimize.losses.preference_loss import (
    DIVERGENCES,
    LOSSES,
    NEED_MARGINS,
    NEED_RUNNING,
    REFERENCE_FREE,
    UNPAIRED,
    WHOLE_STEP,
    options_of,
    takes_divergence,
)
from dpo_opt.optimize.losses.running import Running

Values = npt.NDArray[np.float64]

PAIRS = 6
BETA = 0.3
DESIRABLE = np.arange(PAIRS) % 3 != 0
"""Labels, for losses of unpaired rows: rejected of these, chosen of others is another row's."""
RUNNING = Running(steps=3, completions=24, reward=0.4, margin=-0.9, spread=1.5)


class Numbers(NamedTuple):
    """Of pairs, in the papers' letters: w is chosen, l is rejected."""

    pi_w: Values
    pi_l: Values
    ref_w: Values
    ref_l: Values
    len_w: Values
    len_l: Values
    gap: Values
    """The data's margin."""

    @property
    def ratio_w(self) -> Values:
        return np.exp(self.pi_w) / np.exp(self.ref_w)

    @property
    def ratio_l(self) -> Values:
        return np.exp(self.pi_l) / np.exp(self.ref_l)

    @property
    def h(self) -> Values:
        """DPO's difference of log-ratios, before beta."""
        return np.log(self.ratio_w / self.ratio_l)

    @property
    def p_w(self) -> Values:
        """ORPO's P: the geometric mean of the tokens' probabilities."""
        return np.exp(self.pi_w) ** (1 / self.len_w)

    @property
    def p_l(self) -> Values:
        return np.exp(self.pi_l) ** (1 / self.len_l)


@pytest.fixture
def numbers() -> Numbers:
    rng = np.random.default_rng(5)
    ref = -rng.exponential(6, (2, PAIRS)) - 1
    # Each of both sides above and below the reference.
    moved = rng.normal(0, 3, (2, PAIRS))
    pi = np.minimum(ref + moved, -0.2)
    lengths = rng.integers(1, 12, (2, PAIRS)).astype(float)
    return Numbers(*pi, *ref, *lengths, gap=rng.normal(0, 2, PAIRS))


def tensors(numbers: Numbers, beta: float = BETA) -> LossInputs:
    given = [torch.from_numpy(values) for values in numbers]
    lengths = given[4].long(), given[5].long()
    labels = torch.from_numpy(DESIRABLE)
    return LossInputs(*given[:4], *lengths, beta=beta, data_margins=given[6], running=RUNNING, labels=labels)


def s(x: Values) -> Values:
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def bernoulli_kl(p: Values, q: Values) -> Values:
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def swapped(n: Numbers) -> Numbers:
    return Numbers(n.pi_l, n.pi_w, n.ref_l, n.ref_w, n.len_l, n.len_w, -n.gap)


def dpo(n: Numbers, b: float) -> Values:
    return -np.log(s(b * n.h))


def slope(n: Numbers) -> Values:
    """Of DPO's log-ratios, each per token."""
    return np.log(n.ratio_w) / n.len_w - np.log(n.ratio_l) / n.len_l


def discopop(n: Numbers, b: float, tau: float) -> Values:
    mix = s(b * n.h / tau)
    return (1 - mix) * dpo(n, b) + mix * np.exp(-b * n.h)


def odds(p: Values) -> Values:
    return p / (1 - p)


def dpop(n: Numbers, b: float, scale: float) -> Values:
    return -np.log(s(b * (n.h - scale * np.maximum(0, np.log(1 / n.ratio_w)))))


def kto_pair(n: Numbers, b: float, at: Numbers) -> Values:
    """With the points of reference z taken ``at`` other numbers: they have no gradient."""
    z_w, z_l = (max(0.0, np.log(ratio).mean()) for ratio in (at.ratio_w, at.ratio_l))
    return ((1 - s(b * (np.log(n.ratio_w) - z_l))) + (1 - s(b * (z_w - np.log(n.ratio_l))))) / 2


def kto(n: Numbers, b: float, at: Numbers) -> Values:
    """lambda_y - v(x, y), with z0 taken ``at`` other numbers: it has no gradient."""
    r = np.where(DESIRABLE, np.log(n.ratio_w), np.log(n.ratio_l))
    z0 = max(0.0, np.where(DESIRABLE, np.log(at.ratio_l), np.log(at.ratio_w)).mean())
    return np.where(DESIRABLE, 1.4 - 1.4 * s(b * (r - z0)), 0.7 - 0.7 * s(b * (z0 - r)))


def beta_dpo(n: Numbers, b: float, at: Numbers) -> Values:
    """With beta taken ``at`` other numbers. M0 is of log-ratios, the running margin of rewards."""
    return -np.log(s(b * (1 + 0.5 * (at.h.mean() - RUNNING.margin / b)) * n.h))


def by_rank(above: Values, below: Values, share: float) -> Values:
    """Of each quantile the smoothed loss, at the place where it is found above."""
    found = np.empty(PAIRS)
    x = np.sort(above) - np.sort(below)
    found[np.argsort(above)] = -(1 - share) * np.log(s(x)) - share * np.log(s(-x))
    return found


HELD = {"kto": kto, "kto_pair": kto_pair, "beta_dpo": beta_dpo}
"""A part of them is made of the policy's log-probs, and has no gradient."""
EQUATIONS: dict[str, tuple[dict[str, float], Callable[[Numbers, float], Values]]] = {
    "sigmoid": ({"label_smoothing": 0.2}, lambda n, b: 0.8 * dpo(n, b) + 0.2 * dpo(swapped(n), b)),
    "robust": ({"label_smoothing": 0.2}, lambda n, b: (0.8 * dpo(n, b) - 0.2 * dpo(swapped(n), b)) / 0.6),
    "hinge": ({}, lambda n, b: np.maximum(0, 1 - b * n.h)),
    "exo_pair": (
        {"label_smoothing": 0.01},
        # The policy's preference is softmax over both of beta x log-ratio.
        lambda n, b: bernoulli_kl(n.ratio_w**b / (n.ratio_w**b + n.ratio_l**b), np.full(PAIRS, 0.99)),
    ),
    "discopop": ({"discopop_tau": 0.7}, lambda n, b: discopop(n, b, 0.7)),
    "sigmoid_norm": ({}, lambda n, b: -np.log(s(b * slope(n)))),
    "ipo": ({}, lambda n, b: (slope(n) - 1 / (2 * b)) ** 2),
    "ipo_sum": ({}, lambda n, b: (n.h - 1 / (2 * b)) ** 2),
    # With eta = 1 / beta and P = 1 and 0: (log-ratio - eta (P - 1/2))^2.
    "sppo_hard": ({}, lambda n, b: (np.log(n.ratio_w) - 0.5 / b) ** 2 + (np.log(n.ratio_l) + 0.5 / b) ** 2),
    "cal_dpo": (
        {},
        lambda n, b: (
            -np.log(s(n.h)) + (np.log(n.ratio_w) - 1 / (2 * b)) ** 2 + (np.log(n.ratio_l) + 1 / (2 * b)) ** 2
        ),
    ),
    "nca_pair": (
        {},
        lambda n, b: (
            -np.log(s(b * np.log(n.ratio_w)))
            - np.log(s(-b * np.log(n.ratio_w))) / 2
            - np.log(s(-b * np.log(n.ratio_l))) / 2
        ),
    ),
    "apo_zero": ({}, lambda n, b: -s(b * np.log(n.ratio_w)) + s(b * np.log(n.ratio_l)) + 1),
    "apo_down": ({}, lambda n, b: s(b * np.log(n.ratio_w)) - s(b * n.h) + 1),
    "rdpo": ({"rdpo_alpha": 0.05}, lambda n, b: -np.log(s(b * n.h + (0.05 * n.len_w - 0.05 * n.len_l)))),
    "dpop": ({"dpop_lambda": 5.0}, lambda n, b: dpop(n, b, 5.0)),
    "odpo": ({"margin_scale": 0.5}, lambda n, b: -np.log(s(b * n.h - 0.5 * n.gap))),
    "rpo": ({"margin_scale": 0.5}, lambda n, b: bernoulli_kl(s(0.5 * n.gap), s(b * n.h))),
    "bco_pair": (
        {},
        lambda n, b: (
            -np.log(s(b * np.log(n.ratio_w) - RUNNING.reward))
            - np.log(s(-(b * np.log(n.ratio_l) - RUNNING.reward)))
        ),
    ),
    "kto": ({"desirable_weight": 1.4, "undesirable_weight": 0.7}, lambda n, b: kto(n, b, n)),
    "apo_zero_unpaired": (
        {"desirable_weight": 1.4, "undesirable_weight": 0.7},
        lambda n, b: np.where(
            DESIRABLE, 1.4 * (1 - s(b * np.log(n.ratio_w))), 0.7 * s(b * np.log(n.ratio_l))
        ),
    ),
    "kto_pair": ({}, lambda n, b: kto_pair(n, b, n)),
    "aot": (
        {"label_smoothing": 0.1},
        lambda n, b: by_rank(b * (n.pi_w - n.pi_l), b * (n.ref_w - n.ref_l), 0.1),
    ),
    "aot_unpaired": (
        {"label_smoothing": 0.1},
        lambda n, b: by_rank(b * np.log(n.ratio_w), b * np.log(n.ratio_l), 0.1),
    ),
    "beta_dpo": ({"beta_dpo_alpha": 0.5}, lambda n, b: beta_dpo(n, b, n)),
    "simpo": (
        {"simpo_gamma": 0.4},
        lambda n, b: -np.log(s(b / n.len_w * n.pi_w - b / n.len_l * n.pi_l - 0.4)),
    ),
    "cpo": (
        {"cpo_alpha": 0.7, "label_smoothing": 0.1},
        lambda n, b: (
            -0.9 * np.log(s(b * (n.pi_w - n.pi_l)))
            - 0.1 * np.log(s(b * (n.pi_l - n.pi_w)))
            - 0.7 * n.pi_w / n.len_w
        ),
    ),
    "orpo": ({}, lambda n, b: -np.log(n.p_w) - b * np.log(s(np.log(odds(n.p_w) / odds(n.p_l))))),
    "sft": ({}, lambda n, b: -np.log(n.p_w)),
    "unlikelihood": ({"unlikelihood_alpha": 0.6}, lambda n, b: -n.pi_w + 0.6 * n.pi_l),
}


def test_every_loss_has_its_equation_here() -> None:
    assert set(EQUATIONS) == set(LOSSES) == set(AT_START)


@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_of_the_papers_equation(name: str, numbers: Numbers) -> None:
    options, equation = EQUATIONS[name]
    found = preference_loss(name, tensors(numbers), **options)
    np.testing.assert_allclose(found.losses.numpy(), equation(numbers, BETA), rtol=1e-10, atol=1e-12)


SCORES: dict[str, Callable[[Values], Values]] = {
    "reverse_kl": lambda t: np.log(t),
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: np.log(2 * t / (t + 1)),
    # The paper's alpha is 1 - a: (1 - t^-alpha) / alpha.
    "alpha_divergence": lambda t: (1 - t**-0.7) / 0.7,
}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_are_the_derivatives_of_their_f(kind: str) -> None:
    ratios = np.exp(np.linspace(-6, 6, 25))
    coefficient = {"f_alpha_divergence_coef": 0.3} if kind == "alpha_divergence" else {}
    found = DIVERGENCES[kind](torch.from_numpy(np.log(ratios)), **coefficient)
    np.testing.assert_allclose(found.numpy(), SCORES[kind](ratios), rtol=1e-10, atol=1e-12)


def test_the_alpha_divergence_joins_both_kls() -> None:
    logratios = torch.linspace(-4, 4, 17, dtype=torch.float64)
    alpha = DIVERGENCES["alpha_divergence"]
    for coefficient, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl"), (1 + 2e-6, "reverse_kl")):
        expected = DIVERGENCES[kind](logratios)
        torch.testing.assert_close(
            alpha(logratios, f_alpha_divergence_coef=coefficient), expected, atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("name", [name for name in LOSSES if takes_divergence(name)])
def test_a_divergence_takes_the_place_of_the_log_ratio(name: str, numbers: Numbers) -> None:
    """The loss of log-ratios x is, with another divergence, the one of log-ratios f'(x)."""
    kind = "js_divergence"
    found = preference_loss(name, tensors(numbers), f_divergence_type=kind, **EQUATIONS[name][0])
    score_w, score_l = SCORES[kind](numbers.ratio_w), SCORES[kind](numbers.ratio_l)
    moved = numbers._replace(pi_w=numbers.ref_w + score_w, pi_l=numbers.ref_l + score_l)
    expected = EQUATIONS[name][1](moved, BETA)
    np.testing.assert_allclose(found.losses.numpy(), expected, rtol=1e-9, atol=1e-12)


def kinds_of(name: str) -> list[str]:
    return list(DIVERGENCES) if takes_divergence(name) else ["reverse_kl"]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in LOSSES for kind in kinds_of(name)])
def test_gradients_are_those_of_the_values(name: str, kind: str, numbers: Numbers) -> None:
    given = tensors(numbers)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        pairs = given._replace(chosen_logps=chosen, rejected_logps=rejected)
        return preference_loss(name, pairs, f_divergence_type=kind, **EQUATIONS[name][0]).losses

    sides = [given.chosen_logps.requires_grad_(), given.rejected_logps.requires_grad_()]
    if name not in HELD:
        assert torch.autograd.gradcheck(losses, sides)
        return
    found = torch.autograd.grad(losses(*sides).sum(), sides)
    step = 1e-6
    for side, gradient in zip(("pi_w", "pi_l"), found, strict=True):
        # Of one loss each: what is held is of all.
        up, down = (
            HELD[name](numbers._replace(**{side: getattr(numbers, side) + by}), BETA, numbers)
            for by in (step, -step)
        )
        np.testing.assert_allclose(gradient.numpy(), (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


EXTREMES = (-1e4, -100.0, 0.0, 100.0, 1e4)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_overflows(name: str) -> None:
    """Log-ratios of +-1e4 on either side, a single token, certain completions, and both sides equal."""
    sides = torch.tensor(list(itertools.product(EXTREMES, EXTREMES)), dtype=torch.float64)
    reference = torch.full_like(sides[:, 0], -1e4)
    chosen, rejected = (torch.clamp(reference + side, max=0).requires_grad_() for side in sides.unbind(1))
    ones = torch.ones(len(sides), dtype=torch.int64)
    margins = torch.where(sides[:, 0] < 0, -1e4, 1e4).double()
    pairs = LossInputs(
        chosen,
        rejected,
        reference,
        reference,
        ones,
        ones,
        beta=1.0,
        data_margins=margins,
        labels=torch.arange(len(sides)) % 2 == 0,
    )
    for kind in kinds_of(name):
        losses = preference_loss(name, pairs, f_divergence_type=kind, **NEEDED.get(name, {})).losses
        assert torch.isfinite(losses).all()
        for gradient in torch.autograd.grad(losses.sum(), [chosen, rejected], materialize_grads=True):
            assert torch.isfinite(gradient).all()


def test_clamps_hold_where_they_are_said_to() -> None:
    """exp(80) is the greatest exponential; beyond it nothing is left to learn."""
    x = torch.tensor([-79.0, -81.0, -1e4], dtype=torch.float64, requires_grad=True)
    for kind, most, factor in (("forward_kl", 80, 1), ("alpha_divergence", 80, 2)):
        coefficient = {"f_alpha_divergence_coef": 0.5} if factor == 2 else {}
        found = DIVERGENCES[kind](factor * x, **coefficient)
        clamped = -factor * math.expm1(most)
        assert found.tolist()[1:] == pytest.approx([clamped, clamped])
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert gradient[0] > 1e30
        assert gradient[1:].tolist() == [0.0, 0.0]
    # With its default temperature discopop needs no clamp: the weight vanishes faster than the exponential
    # grows.
    plain = of_one_pair("discopop", -1e4, 0.0, beta=1.0)
    assert plain.loss == pytest.approx(1e4)
    assert plain.chosen_gradient == pytest.approx(-1.0)
    warm = of_one_pair("discopop", -1e4, 0.0, beta=1.0, discopop_tau=2.0)
    assert warm.loss == pytest.approx(math.exp(80))
    # A completion that is certain, or by rounding more than that, has in ORPO the odds of exp(-1e-6).
    certain, rounded = (
        of_one_pair("orpo", logp, -5.0, reference=0.0, beta=1.0, lengths=(1, 1)) for logp in (0.0, 1e-7)
    )
    assert certain.loss == pytest.approx(1e-6 * math.exp(-5) / (1 - math.exp(-5)), rel=1e-4)
    assert rounded.loss == pytest.approx(certain.loss - 1e-7, abs=1e-12)


def test_discopop_has_a_valley_on_the_wrong_side_of_the_reference() -> None:
    """At its default temperature, around a margin of -0.12; from 0.08 on descent raises the margin."""
    margins = (-0.15, -0.1, 0.0, 0.05, 0.1, 1.0)
    gradients = [of_one_pair("discopop", 10 * margin, 0.0).chosen_gradient for margin in margins]
    assert [gradient < 0 for gradient in gradients] == [True, False, False, False, True, True]


@pytest.mark.parametrize("name", LOSSES)
def test_where_policy_is_the_reference_a_loss_has_its_constant_and_its_push(name: str) -> None:
    """Of a completion of four tokens chosen over one of two, -3 nats each, beta 0.1, a margin of 1."""
    found = of_one_pair(name, 0.0, 0.0, **NEEDED.get(name, {}))
    expected = AT_START[name]
    assert found.loss == pytest.approx(expected.loss, abs=1e-12)
    # Descent goes against the gradient.
    push = {1.0: "down", -1.0: "up", 0.0: "-"}
    pushes = (
        push[math.copysign(1, g) if g else 0.0] for g in (found.chosen_gradient, found.rejected_gradient)
    )
    assert tuple(pushes) == (expected.chosen, expected.rejected)


@pytest.mark.parametrize("name", [name for name in LOSSES if takes_divergence(name)])
def test_every_divergence_begins_as_the_reverse_kl_does(name: str) -> None:
    needed = NEEDED.get(name, {})
    plain = of_one_pair(name, 0.0, 0.0, **needed)
    for kind in DIVERGENCES:
        found = of_one_pair(name, 0.0, 0.0, f_divergence_type=kind, **needed)
        assert found.loss == pytest.approx(plain.loss, abs=1e-12)
        # f'' at 1 is 1, and 1/2 for Jensen-Shannon.
        factor = 0.5 if kind == "js_divergence" else 1.0
        assert found.chosen_gradient == pytest.approx(factor * plain.chosen_gradient)
        assert found.rejected_gradient == pytest.approx(factor * plain.rejected_gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_and_the_margins_are_read_where_they_are_said_to_be(
    name: str, numbers: Numbers
) -> None:
    options = EQUATIONS[name][0]
    pairs = tensors(numbers)
    plain = preference_loss(name, pairs, **options).losses
    other = pairs._replace(ref_chosen_logps=pairs.ref_chosen_logps + 1)
    assert torch.equal(plain, preference_loss(name, other, **options).losses) == (name in REFERENCE_FREE)
    begun = preference_loss(name, pairs._replace(running=Running()), **options).losses
    assert torch.equal(plain, begun) == (name not in NEED_RUNNING)
    without = pairs._replace(data_margins=None)
    if name in NEED_MARGINS:
        with pytest.raises(ValueError, match="data_margins"):
            preference_loss(name, without, **options)
    else:
        assert torch.equal(plain, preference_loss(name, without, **options).losses)


@pytest.mark.parametrize("above", [True, False])
def test_kto_is_measured_from_mismatched_completions_and_never_from_below_0(
    above: bool, numbers: Numbers
) -> None:
    given = tensors(numbers)
    assert given.labels is not None
    by = 2.0 if above else -40.0
    others = given._replace(
        chosen_logps=torch.where(given.labels, given.chosen_logps, given.ref_chosen_logps + by),
        rejected_logps=torch.where(given.labels, given.ref_rejected_logps + by, given.rejected_logps),
    )
    moved = numbers._replace(pi_w=others.chosen_logps.numpy(), pi_l=others.rejected_logps.numpy())
    plain = kto(moved, BETA, moved._replace(pi_w=moved.ref_w, pi_l=moved.ref_l))  # z0 is 0
    found = preference_loss("kto", others, desirable_weight=1.4, undesirable_weight=0.7).losses.numpy()
    assert np.allclose(found, plain) == (not above)
    np.testing.assert_allclose(found, kto(moved, BETA, moved), rtol=1e-10)


@pytest.mark.parametrize("name", sorted(UNPAIRED))
def test_single_completions_without_labels_are_an_error(name: str, numbers: Numbers) -> None:
    with pytest.raises(ValueError, match=f"{name} needs the label"):
        preference_loss(name, tensors(numbers)._replace(labels=None))


def test_apo_zero_of_single_completions_is_that_of_pairs_term_by_term(numbers: Numbers) -> None:
    """A pair's loss is the sum of those of its two completions, and no mismatched one is read."""
    given = tensors(numbers)
    of_pairs = preference_loss("apo_zero", given).losses.numpy()
    as_rows = [
        preference_loss("apo_zero_unpaired", given._replace(labels=torch.full((PAIRS,), label))).losses
        for label in (True, False)
    ]
    np.testing.assert_allclose(sum(side.numpy() for side in as_rows), of_pairs, rtol=1e-12)


def test_dpop_pulls_a_fallen_chosen_completion_up_harder_than_dpo() -> None:
    fallen, dpo_there = (of_one_pair(name, -1.0, 0.0) for name in ("dpop", "sigmoid"))
    assert fallen.chosen_gradient < 40 * dpo_there.chosen_gradient < 0
    above = of_one_pair("dpop", 1.0, 0.0)
    assert above == of_one_pair("sigmoid", 1.0, 0.0)


def test_rdpo_learns_less_from_pairs_whose_chosen_is_longer() -> None:
    """Here it has two tokens more, and two less where the sides are changed."""
    plain = of_one_pair("rdpo", 0.0, 0.0, rdpo_alpha=0.0)
    longer = of_one_pair("rdpo", 0.0, 0.0, rdpo_alpha=0.1)
    shorter = of_one_pair("rdpo", 0.0, 0.0, rdpo_alpha=0.1, lengths=(2, 4))
    assert abs(longer.chosen_gradient) < abs(plain.chosen_gradient) < abs(shorter.chosen_gradient)


@pytest.mark.parametrize("name", ["odpo", "rpo"])
def test_a_greater_margin_of_the_data_asks_for_a_greater_one_of_the_policy(name: str) -> None:
    small, great = (of_one_pair(name, 0.0, 0.0, margin=margin) for margin in (0.5, 3.0))
    assert great.chosen_gradient < small.chosen_gradient < 0


def test_rpo_is_least_where_both_margins_are_the_same() -> None:
    losses = [of_one_pair("rpo", 10 * gap, 0.0, margin=0.8).loss for gap in (0.7, 0.8, 0.9)]
    assert losses[1] == pytest.approx(0, abs=1e-12)
    assert min(losses[0], losses[2]) > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_single_pairs_does_not_see_the_others(name: str, numbers: Numbers) -> None:
    given, options = tensors(numbers), EQUATIONS[name][0]
    together = preference_loss(name, given, **options).losses
    first = given._replace(**{f: v[:1] for f, v in given._asdict().items() if isinstance(v, Tensor)})
    alone = preference_loss(name, first, **options).losses
    # bco_pair looks at the steps before, not at the other pairs.
    assert torch.equal(together[:1], alone) == (name not in WHOLE_STEP - {"bco_pair"})


def test_ranks_need_no_order_of_the_pairs(numbers: Numbers) -> None:
    given = tensors(numbers)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = given._replace(**{f: v[order] for f, v in given._asdict().items() if isinstance(v, Tensor)})
    for name in ("aot", "aot_unpaired"):
        found, again = (preference_loss(name, pairs).losses for pairs in (given, moved))
        torch.testing.assert_close(again, found[order], rtol=1e-13, atol=0)


def test_running_rewards_are_those_of_all_steps_so_far() -> None:
    rng = np.random.default_rng(2)
    steps = [rng.normal(1, 2, (2, count)) for count in (4, 7, 1)]
    running, margin, spread = Running(), 0.0, 0.0
    for number, rewards in enumerate(steps, start=1):
        running = running.after(*torch.from_numpy(rewards))
        seen = np.concatenate([r.ravel() for r in steps[:number]])
        apart = rewards[0] - rewards[1]
        margin = 0.9 * margin + 0.1 * apart.mean()
        spread = 0.9 * spread + 0.1 * (apart.std(ddof=1) if len(apart) > 1 else 0.0)
        assert (running.steps, running.completions) == (number, len(seen))
        assert (running.reward, running.margin, running.spread) == pytest.approx(
            (seen.mean(), margin, spread), rel=1e-13
        )
    # A checkpoint holds it as JSON, exactly.
    assert Running.model_validate_json(running.model_dump_json()) == running


def test_beta_dpo_leaves_out_unusual_pairs_and_counts_the_others() -> None:
    count, taken = 40, []
    margins = np.linspace(-1, 1, count)
    margins[0], margins[7] = 30.0, -25.0
    chosen = torch.from_numpy(margins).requires_grad_()
    zeros = torch.zeros(count, dtype=torch.float64)
    ones = torch.ones(count, dtype=torch.int64)
    pairs = LossInputs(chosen, zeros, zeros, zeros, ones, ones, beta=1.0, running=Running(spread=0.7))
    for seed in range(30):
        draws = torch.from_numpy(np.random.default_rng(seed).random(count))
        losses = preference_loss("beta_dpo", pairs._replace(draws=draws)).losses
        (gradient,) = torch.autograd.grad(losses.mean(), chosen)
        left_in = losses.detach() != 0
        assert left_in.sum() == 32
        assert torch.equal(left_in, gradient != 0)
        kept = margins[left_in.numpy()]
        expected = np.log1p(np.exp(-max(1e-3, 1 + 0.6 * kept.mean()) * kept)).mean()
        assert losses.mean().item() == pytest.approx(expected, rel=1e-12)
        taken.append(left_in)
    often = torch.stack(taken).double().mean(dim=0)
    assert often[0] == often[7] == 0
    # Of the others those at the edges are left out more often.
    assert often[15:25].mean() > often[[1, 2, 3, 36, 37, 38]].mean() + 0.2
    none = preference_loss("beta_dpo", pairs._replace(draws=torch.zeros(count))).losses
    assert torch.isfinite(none).all()


def test_several_losses_are_added_with_their_weights(numbers: Numbers) -> None:
    pairs = tensors(numbers)
    alone = {
        "sigmoid": preference_loss("sigmoid", pairs, label_smoothing=0.1).losses,
        "ipo": preference_loss("ipo", pairs).losses,
        "sft": preference_loss("sft", pairs).losses,
    }
    both = preference_loss(list(alone), pairs, loss_weights=[0.8, 0.2, 1.5], label_smoothing=0.1)
    torch.testing.assert_close(
        both.losses, 0.8 * alone["sigmoid"] + 0.2 * alone["ipo"] + 1.5 * alone["sft"], rtol=1e-13, atol=0
    )
    assert torch.equal(both.chosen_rewards, preference_loss("sft", pairs).chosen_rewards)
    plain = preference_loss(["ipo", "sft"], pairs).losses
    torch.testing.assert_close(plain, alone["ipo"] + alone["sft"], rtol=1e-13, atol=0)
    # A divergence is that of the losses that have one.
    kind: dict[str, Any] = {"f_divergence_type": "forward_kl"}
    torch.testing.assert_close(
        preference_loss(["ipo", "sft"], pairs, **kind).losses,
        preference_loss("ipo", pairs, **kind).losses + alone["sft"],
        rtol=1e-13,
        atol=0,
    )


def test_an_option_that_no_loss_has_is_an_error(numbers: Numbers) -> None:
    with pytest.raises(TypeError, match="sft, ipo: no option simpo_gamma"):
        preference_loss(["sft", "ipo"], tensors(numbers), simpo_gamma=1.0)
    with pytest.raises(TypeError, match="rdpo_alpha"):
        preference_loss("rdpo", tensors(numbers))
    with pytest.raises(ValueError, match="zip"):
        preference_loss(["sft", "ipo"], tensors(numbers), loss_weights=[1.0])


def test_what_a_loss_needs_is_what_has_no_default() -> None:
    empty = inspect.Parameter.empty
    lacking = {name: {o for o, d in options_of(name).items() if d is empty} for name in LOSSES}
    assert {name: set(needed) for name, needed in NEEDED.items()} == {n: o for n, o in lacking.items() if o}
