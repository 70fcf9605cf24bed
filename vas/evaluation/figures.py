"""Every figure of the report, as PNG bytes by file name."""

from __future__ import annotations

from typing import Any

from vas.evaluation.figure_style import file_name
from vas.evaluation.figures_methods import reward_vs_compute, reward_vs_kl, trade_off
from vas.evaluation.figures_value import calibration, come_true, explained_variance, learning_curve
from vas.evaluation.grouping import objectives_of
from vas.evaluation.results import Result
from vas.evaluation.trust import Trust

__all__ = [
    "calibration",
    "come_true",
    "draw_all",
    "explained_variance",
    "file_name",
    "learning_curve",
    "reward_vs_compute",
    "reward_vs_kl",
    "trade_off",
]


def draw_all(
    results: list[Result],
    held_out_metrics: dict[str, Any],
    history: list[dict[str, Any]],
    trust: list[Trust],
) -> dict[str, bytes]:
    """File name → PNG, in reading order; a figure without data to draw is left out.

    results: every method, setting and objective. held_out_metrics: as `Held.report` gives it.
    history: a dict an epoch, with `losses` (one an optimizer step) and `held_out` metrics. trust: an entry an
    objective, or none.
    """
    objectives = objectives_of(results)
    figures: dict[str, bytes] = {}
    for objective in objectives:
        figures[file_name("reward_vs_kl", objective)] = reward_vs_kl(results, objective)
        figures[file_name("reward_vs_compute", objective)] = reward_vs_compute(results, objective)
    if len(objectives) >= 2:
        figures["trade_off.png"] = trade_off(results, objectives[0], objectives[1])
    if held_out_metrics:
        figures["calibration.png"] = calibration(held_out_metrics)
        figures["explained_variance.png"] = explained_variance(held_out_metrics)
    if trust:
        figures["trust.png"] = come_true(trust)
    if any(epoch["losses"] for epoch in history):
        figures["learning_curve.png"] = learning_curve(history)
    return figures
