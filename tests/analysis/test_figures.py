import math
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

from dpo_opt.analysis.aligned_runs import by_kl
from dpo_opt.analysis.figures import curves, distributions
from dpo_opt.analysis.figures.drawing import svg
from dpo_opt.analysis.figures.frontier import frontier_figure
from dpo_opt.analysis.figures.quadrants import margin_map
from dpo_opt.analysis.figures.runs import RunCurve, accuracy_of_runs
from dpo_opt.analysis.frontier import FrontierPoint
from dpo_opt.analysis.intervals import Interval
from dpo_opt.analysis.quadrants import MarginGrid


@pytest.fixture
def train():
    steps = np.arange(1, 201)
    return pl.DataFrame(
        {
            "step": steps,
            "loss": 0.69 - 0.001 * steps,
            "rewards/chosen": -0.002 * steps,
            "rewards/rejected": -0.004 * steps,
            "rewards/margins": 0.002 * steps,
            "rewards/accuracies": 0.5 + 0.001 * steps,
        }
    )


@pytest.fixture
def evals(train):
    return train.gather_every(50, 49).rename({c: f"eval_{c}" for c in train.columns if c != "step"})


@pytest.fixture
def pairs():
    random = np.random.default_rng(0)
    n = 500
    reference = random.normal(-100, 10, (n, 2))
    policy = reference + random.normal([-1, -4], 3, (n, 2))
    return pl.DataFrame(
        {
            "row": np.arange(n),
            "chosen_logps": policy[:, 0],
            "rejected_logps": policy[:, 1],
            "ref_chosen_logps": reference[:, 0],
            "ref_rejected_logps": reference[:, 1],
            "chosen_length": random.integers(5, 50, n).astype(np.int32),
            "rejected_length": random.integers(5, 50, n).astype(np.int32),
        }
    )


def axes(figure):
    return figure.axes[0]


def title(figure):
    return axes(figure).get_title("left").replace("\n", " ")


def drawn(figure, label):
    return next(line for line in axes(figure).lines if line.get_label() == label).get_xydata()


def test_lines_are_the_logged_values_in_means_of_equal_intervals(train, evals):
    line = drawn(curves.loss_curve(train, evals, untrained=math.log(2)), "training")
    assert len(line) <= 24
    # Nine logged steps are in the first interval: its middle is step 5.
    assert line[0] == pytest.approx([5, 0.685])
    assert drawn(curves.loss_curve(train, evals, untrained=None), "held-out")[-1] == pytest.approx(
        [200, 0.49]
    )


def test_titles_state_the_held_out_result_where_there_is_one(train, evals):
    none = pl.DataFrame(schema={"step": pl.Int64})
    assert title(curves.accuracy_curve(train, evals, reference=0.6)) == ("Accuracy ends at 70%, held-out")
    ends = title(curves.accuracy_curve(train, none, reference=None))
    assert ends == "Accuracy ends at 70%, in training, as means over intervals of steps"
    few = curves.loss_curve(train.head(3), none, untrained=None)
    assert title(few).endswith(f"in training (first: {train['loss'][0]:.3g})")
    assert "−0.4 (chosen) and −0.8 (rejected)" in title(curves.reward_curves(train, evals))


def test_every_axis_says_what_and_in_which_unit(train, evals, pairs):
    trajectories = pl.DataFrame(
        {"phase": ["train"] * 3, "step": [1.0, 2.0, 3.0], "chosen_logratio": [0.0, -1.0, -2.0]}
    ).with_columns(rejected_logratio=pl.col("chosen_logratio") * 2)
    figures = [
        curves.loss_curve(train, evals, untrained=None),
        curves.reward_curves(train, evals),
        curves.margin_curve(train, evals),
        curves.logratio_curves(trajectories),
        distributions.margin_by_length(pairs.lazy(), beta=0.1),
    ]
    for figure in figures:
        assert "nats" in axes(figure).get_ylabel()
        assert axes(figure).get_xlabel()
    assert title(figures[3]) == "Both went down: chosen −2, rejected −4 nats"
    assert "nats" in axes(distributions.margin_histogram(pairs.lazy())).get_xlabel()


def test_histograms_hold_every_pair(pairs):
    for figure in (
        distributions.margin_histogram(pairs.lazy()),
        distributions.reward_margin_histogram(pairs.lazy(), beta=0.1),
    ):
        for patch in axes(figure).patches:
            assert patch.get_data().values.sum() == 500


def test_histogram_titles_count_pairs(pairs):
    before = (pairs["ref_chosen_logps"] > pairs["ref_rejected_logps"]).mean()
    after = (pairs["chosen_logps"] > pairs["rejected_logps"]).mean()
    assert (
        title(distributions.margin_histogram(pairs.lazy()))
        == f"Ranked correctly: {before:.0%} of pairs before, {after:.0%} after"
    )


def test_length_groups_hold_about_equal_numbers(pairs):
    line = axes(distributions.margin_by_length(pairs.lazy(), beta=0.1)).lines[-1].get_xydata()
    difference = (pairs["chosen_length"] - pairs["rejected_length"]).to_numpy()
    assert len(line) == 12
    assert (np.diff(line[:, 0]) > 0).all()
    assert line[:, 0].min() == pytest.approx(np.sort(difference)[: 500 // 12].mean(), abs=2)


def test_one_pair_and_equal_pairs_can_be_drawn(pairs):
    same = pl.concat([pairs.head(1)] * 5)
    for frame in (pairs.head(1), same):
        for figure in (
            distributions.margin_histogram(frame.lazy()),
            distributions.reward_margin_histogram(frame.lazy(), beta=0.1),
            distributions.margin_by_length(frame.lazy(), beta=0.1),
        ):
            assert str(svg(figure, label="x")).endswith("</svg>")


def test_svg_is_well_formed_and_refers_to_nothing_outside(train, evals):
    text = svg(curves.loss_curve(train, evals, untrained=0.69), label='a "<b>"')
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img"
    for element in root.iter():
        assert element.tag.split("}")[-1] not in ("script", "style", "image", "foreignObject")
        for name, value in element.attrib.items():
            if name.endswith("href"):
                assert value.startswith("#")


def test_svg_is_well_formed_whatever_a_name_has(recwarn):
    curve = RunCurve("esc\x1b[31m\u202ered 一", [1.0, 2.0], [0.5, 0.6])
    root = ElementTree.fromstring(svg(accuracy_of_runs([curve], along="step"), label="a\x1b"))
    assert "esc[31mred 一" in "".join(root.itertext())
    assert not recwarn.list


def test_equal_frames_are_equal_bytes(train, evals):
    texts = {svg(curves.margin_curve(train, evals), label="x") for _ in range(2)}
    assert len(texts) == 1


def test_drawing_leaves_the_callers_style_and_figures_alone(train, evals):
    before = dict(matplotlib.rcParams)
    svg(curves.loss_curve(train, evals, untrained=None), label="x")
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_every_figure_draws_into_given_axes_or_into_its_own_and_keeps_its_docstring(train, evals, pairs):
    train = train.with_columns(grad_norm=pl.lit(1.0), learning_rate=pl.lit(1e-6))
    trajectories = pl.DataFrame(
        {"phase": ["train"], "step": [1.0], "chosen_logratio": [-1.0], "rejected_logratio": [-2.0]}
    )
    given = {
        curves.loss_curve: ((train, evals), {"untrained": None}),
        curves.reward_curves: ((train, evals), {}),
        curves.margin_curve: ((train, evals), {}),
        curves.accuracy_curve: ((train, evals), {"reference": 0.5}),
        curves.logratio_curves: ((trajectories,), {}),
        curves.update_curves: ((train,), {}),
        distributions.margin_histogram: ((pairs,), {}),
        distributions.reward_margin_histogram: ((pairs,), {"beta": 0.1}),
        distributions.margin_by_length: ((pairs,), {"beta": 0.1}),
    }
    every = {f for m in (curves, distributions) for f in vars(m).values() if hasattr(f, "__wrapped__")}
    assert set(given) == every
    for draw, (frames, options) in given.items():
        assert draw.__doc__
        assert draw.__name__ in vars(sys.modules[draw.__module__])
        outer = Figure()
        left, right = outer.subplots(1, 2)
        assert draw(*frames, **options, axes=right) is outer
        assert right.get_title(loc="left")
        assert not left.has_data()
        own = draw(*frames, **options)
        assert own is not outer
        assert axes(own).get_title(loc="left") == right.get_title(loc="left")


def test_runs_lie_on_one_axis_each_in_order():
    curves = [RunCurve("one", [20, 10], [0.7, 0.6]), RunCurve("two", [10, 30], [0.5, 0.9])]
    figure = accuracy_of_runs(curves, along="step")
    assert title(figure) == "Highest: 90%, two at 30"
    assert drawn(figure, "one").tolist() == [[10, 0.6], [20, 0.7]]


def test_accuracy_is_found_at_the_kl_of_the_same_step():
    def view(steps, kls):
        evals = pl.DataFrame({"step": [10, 20], "eval_rewards/accuracies": [0.6, 0.7]})
        values = zip(steps, kls, strict=True)
        kl = [
            SimpleNamespace(step=s, estimate=SimpleNamespace(rb_sequence=Interval(k, k, k)))
            for s, k in values
        ]
        return SimpleNamespace(run=SimpleNamespace(name="a", evals=evals), kl=kl)

    (found,) = by_kl([view([20, 15, 10], [2.0, 1.5, 1.0]), view([15], [1.5])])
    assert (found.at, found.accuracy) == ([2.0, 1.0], [0.7, 0.6])


@pytest.mark.parametrize("name", ["_x", "__", "cost $5$", "a_b"])
def test_a_run_of_any_name_stands_in_the_legends(name):
    runs = [RunCurve(name, [1, 2], [0.5, 0.6]), RunCurve("other", [1, 2], [0.4, 0.5])]
    point = FrontierPoint(
        name, "f", 1, 0.1, "sigmoid", "r", None, 4, 2, 0.0, Interval(1, 0, 2), Interval(1, 0, 2)
    )
    for figure in (accuracy_of_runs(runs, along="step"), frontier_figure([point])):
        shown = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        assert name in [text.strip() for text in shown]
        assert f">{name}<" in svg(figure, label="").replace("> ", ">")


def test_a_frontier_begins_at_the_reference():
    def point(step, kl):
        at = Interval(kl, kl, kl)
        return FrontierPoint("a", "f", step, 0.1, "sigmoid", "r", None, 4, 2, 0.0, at, Interval(1, 0, 2))

    figure = frontier_figure([point(10, 2.0), point(20, 1.0), point(None, 0.0), point(None, 3.0)])
    (bars,) = axes(figure).containers
    assert bars[0].get_xdata().tolist() == [0.0, 2.0, 1.0, 3.0]


def test_of_equal_rewards_a_frontier_names_the_one_that_moved_the_policy_least():
    def point(kl):
        at, reward = Interval(kl, kl, kl), Interval(0.5, 0, 1)
        return FrontierPoint("a", "f", int(kl), 0.1, "sigmoid", "r", None, 4, 2, 0.0, at, reward)

    assert "at a KL of 2 nats" in title(frontier_figure([point(5.0), point(2.0), point(3.0)]))


def test_a_map_has_no_mark_for_what_no_pair_did():
    counts = np.zeros((4, 4))
    counts[0, 0], counts[3, 1] = 5, 2
    figure = margin_map(MarginGrid(edges=np.array([-2.0, -1, 0, 1, 2]), counts=counts))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ranking unchanged", "turned wrong"]


def test_a_single_evaluation_is_not_called_the_first(train):
    evals = pl.DataFrame({"step": [200], "eval_loss": [0.5]})
    assert title(curves.loss_curve(train, evals, untrained=None)) == "Loss ends at 0.5, held-out"
    more = pl.DataFrame({"step": [100, 200], "eval_loss": [0.6, 0.5]})
    assert title(curves.loss_curve(train, more, untrained=None)) == "Loss ends at 0.5, held-out (first: 0.6)"


def test_no_line_of_a_title_is_wider_than_its_figure(train):
    wide = train.with_columns(**{"rewards/chosen": -0.839, "rewards/rejected": -0.781})
    figure = curves.reward_curves(wide, train.clear())
    figure.draw_without_rendering()
    title = axes(figure)._left_title.get_window_extent()
    # Something to spare: the reader's bold font may be wider than matplotlib's.
    assert title.x1 < 0.95 * figure.bbox.width


@pytest.mark.parametrize("steps", [[10, 15], [1, 2], [10, 20]])
def test_two_logged_values_are_a_line_and_not_a_dot(steps):
    few = pl.DataFrame({"step": steps, "loss": [0.7, 0.5]})
    figure = curves.loss_curve(few, pl.DataFrame(schema={"step": pl.Int64}), untrained=None)
    (line,) = figure.axes[0].get_lines()
    assert (list(line.get_xdata()), line.get_marker()) == (steps, "")
    one = curves.loss_curve(few[:1], pl.DataFrame(schema={"step": pl.Int64}), untrained=None)
    (dot,) = one.axes[0].get_lines()
    assert dot.get_marker() == "o"
    assert dot.get_markersize() < 5
