"""Draws the figures of one run, each as SVG under its name."""

import math

import polars as pl
from matplotlib.figure import Figure

from dpo_opt.analysis.calibration import Calibration
from dpo_opt.analysis.figures import curves, distributions, quadrants, reliability
from dpo_opt.analysis.figures.drawing import svg
from dpo_opt.analysis.final_state import FinalState
from dpo_opt.analysis.quadrants import margin_grid
from dpo_opt.analysis.run_files import Run
from dpo_opt.analysis.trajectories import Trajectories


def run_figures(
    run: Run,
    reference: float | None,
    found: Trajectories | None,
    final: FinalState | None,
    calibrated: Calibration | None,
) -> dict[str, str]:
    """The figures for which there are numbers; their names are those that the template asks for."""
    points = found.points if found is not None and len(found.points) else None
    figures = _logged(run, reference, points)
    if points is not None:
        figures["logratios"] = svg(curves.logratio_curves(points), label="Mean log-ratios against steps")
        figures["movements"] = svg(quadrants.movement_areas(points), label="Quadrants against steps")
    if final:
        drawn: dict[str, tuple[Figure, str]] = {
            "histogram": (
                distributions.margin_histogram(final.judging),
                "Log-prob margins before and after training",
            ),
            "margins": (
                distributions.reward_margin_histogram(final.judging, beta=run.beta),
                "Final reward margins",
            ),
            "lengths": (
                distributions.margin_by_length(final.judging, beta=run.beta),
                "Margin against length difference",
            ),
            "map": (
                quadrants.margin_map(margin_grid(final.judging)),
                "Reference margin against trained margin",
            ),
        }
        figures |= {name: svg(figure, label=label) for name, (figure, label) in drawn.items()}
    if calibrated:
        figures["reliability"] = svg(
            reliability.reliability_diagram(calibrated), label="Accuracy against stated probability"
        )
    return figures


def _logged(run: Run, reference: float | None, points: pl.DataFrame | None) -> dict[str, str]:
    figures = {}
    if "loss" in run.train.columns:
        # Where other losses begin depends on their options and lengths.
        alone = run.config.get("loss_type") == "sigmoid" and run.config.get("loss_weights") is None
        untrained = math.log(2) if alone else None
        loss = curves.loss_curve(run.train, run.evals, untrained=untrained)
        figures["loss"] = svg(loss, label="Loss against steps")
    if "rewards/margins" in run.train.columns:
        reward = curves.reward_curves(run.train, run.evals, points, beta=run.beta)
        margin = curves.margin_curve(run.train, run.evals, points, beta=run.beta)
        figures["rewards"] = svg(reward, label="Implicit rewards against steps")
        figures["margin"] = svg(margin, label="Margin against steps")
    if "rewards/accuracies" in run.train.columns:
        accuracy = curves.accuracy_curve(run.train, run.evals, reference=reference)
        figures["accuracy"] = svg(accuracy, label="Accuracy against steps")
    if "grad_norm" in run.train.columns and run.train["grad_norm"].is_finite().any():
        update = curves.update_curves(run.train)
        figures["update"] = svg(update, label="Gradient norm and learning rate against steps")
    return figures
