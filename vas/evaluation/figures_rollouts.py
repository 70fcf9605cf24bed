"""The figure of a round's rollouts: how rewards and lengths are spread."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vas.evaluation import figure_style as style


@style.styled
def draw(summary: dict[str, Any]) -> Figure:
    """A histogram of each reward and one of the lengths, from what `summarize` gives."""
    panels = [(f"{style.short(name, 24)}: reward", "reward", each) for name, each in summary["rewards"].items()]
    cut, ended = (summary["finish_reasons"].get(reason, 0) for reason in ("length", "stop"))
    share = f"{100 * cut / max(cut + ended, 1):.0f} % cut at the limit"
    panels.append((f"Length, {share}", "tokens sampled", summary["lengths"]))
    rows = -(-len(panels) // 2)
    figure = style.new_figure(3.1 * rows + 0.3)
    places = figure.subplots(rows, 2, squeeze=False).ravel()
    for number, (axes, (title, label, spread)) in enumerate(zip(places, panels, strict=False)):
        colour = style.OBJECTIVE_COLOURS[number % len(style.OBJECTIVE_COLOURS)]
        _histogram(axes, title, label, spread, style.MUTED if label != "reward" else colour)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    return figure


def _histogram(axes: Axes, title: str, label: str, spread: dict[str, Any], colour: str) -> None:
    axes.set_xlabel(label)
    axes.set_ylabel("share of rollouts")
    if not spread:
        style.entitle(axes, title, "There is none: every rollout failed.")
        return
    counts, edges = np.array(spread["histogram"]["counts"]), np.array(spread["histogram"]["edges"])
    style.entitle(axes, title, f"mean {spread['mean']:.3g}, standard deviation {spread['std']:.3g}")
    axes.bar(edges[:-1], counts / counts.sum(), np.diff(edges), align="edge", color=colour, alpha=0.8)
    axes.axvline(spread["mean"], **style.REFERENCE)
