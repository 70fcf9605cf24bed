"""Figures of how good the value model is, on held-out rollouts, and how it was learnt."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vas.evaluation import figure_style as style
from vas.evaluation.trust import Trust


@style.styled
def calibration(held_out_metrics: dict[str, Any]) -> Figure:
    """Predicted value against the reward that came, in bins of equal count. In: as `Held.report` gives it."""
    figure = style.new_figure(5.2)
    axes = figure.subplots()
    style.entitle(
        axes,
        "Does a predicted value come true?",
        "On the diagonal, what the value model predicts is what the base model goes on to get.",
    )
    axes.set_xlabel("mean predicted value, reward standard deviations")
    axes.set_ylabel("mean reward, standard deviations")
    ends: list[float] = []
    for j, (name, metrics) in enumerate(held_out_metrics.items()):
        bins = metrics["calibration"]
        value, reward = [b["value"] for b in bins], [b["reward"] for b in bins]
        ends += [*value, *reward]
        axes.plot(
            value,
            reward,
            **_look(j),
            label=f"{style.short(name)}: {_explains(metrics['explained_variance'])}",
        )
    _diagonal(axes, ends)
    _legend(axes, loc="upper left")
    return figure


@style.styled
def come_true(trust: list[Trust]) -> Figure:
    """V of half-finished responses against the mean reward of their completions; a panel an objective."""
    columns = min(len(trust), 2)
    rows = -(-len(trust) // columns)
    figure = style.new_figure(4.4 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for j, (axes, each) in enumerate(zip(panels, trust, strict=False)):
        share = f"explains {100 * each.explained_variance:.0f} %" if np.isfinite(each.explained_variance) else "–"
        most = f" of at most {100 * each.ceiling:.0f} %" if np.isfinite(each.ceiling) else ""
        style.entitle(
            axes, f"{style.short(each.objective, 24)}: does it come true?", f"V {share}{most} of the variance."
        )
        value, reward, error = (np.array([point[key] for point in each.points]) for key in ("value", "reward", "error"))
        look = _look(j)
        axes.errorbar(
            value, reward, error, fmt=look["marker"], color=look["color"], alpha=0.45, markersize=5,
            markeredgecolor="white", elinewidth=1, zorder=2,
        )  # fmt: skip
        axes.plot([b["value"] for b in each.calibration], [b["reward"] for b in each.calibration], **look)
        _diagonal(axes, [*value, *(reward - error), *(reward + error)])
        axes.set_xlabel("V at half the response, standard deviations")
        axes.set_ylabel("mean reward of completions")
    for axes in panels[len(trust) :]:
        axes.set_axis_off()
    return figure


@style.styled
def explained_variance(held_out_metrics: dict[str, Any]) -> Figure:
    """Explained variance in each quarter of the response, per objective."""
    figure = style.new_figure(4.0)
    axes = figure.subplots()
    style.entitle(
        axes,
        "How early does the value model know?",
        "Share of the reward's variance explained: 1 is perfect, 0 is what a constant reaches.",
    )
    axes.set_ylabel("explained variance")
    axes.axhline(0, **style.REFERENCE)
    top = 0.1
    for j, (name, metrics) in enumerate(held_out_metrics.items()):
        quarters = np.array(metrics["by_quarter"], dtype=float)
        axes.plot(
            range(4),
            quarters,
            **_look(j),
            label=f"{style.short(name)}: {_explains(metrics['explained_variance'])}",
        )
        top = max(top, *(q for q in quarters if np.isfinite(q)), 0)
    axes.set_xticks(range(4), ["first quarter\nof the response", "second", "third", "last"])
    axes.set_xlim(-0.25, 3.25)
    axes.set_ylim(top=min(1.02, top * 1.25))
    _legend(axes, loc="upper left")
    return figure


@style.styled
def learning_curve(history: list[dict[str, Any]]) -> Figure:
    """Loss by optimizer step and held-out explained variance by epoch. In: epochs as trained."""
    objectives = list(dict.fromkeys(name for epoch in history for name in epoch.get("held_out") or {}))
    losses = np.array([loss for epoch in history for loss in epoch["losses"]], dtype=float)
    steps = np.arange(1, len(losses) + 1)
    window = max(len(losses) // 20, 1)
    figure = style.new_figure(5.6 if objectives else 3.8)
    panels = figure.subplots(
        2 if objectives else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + bool(objectives)]
    )
    top = panels[0, 0]
    style.entitle(
        top,
        "Learning the values",
        f"Thin: loss of each step; bold: mean of {window} steps."
        + (" Below: whether it holds for prompts never trained on." if objectives else ""),
    )
    top.plot(steps, losses, color=style.VAS_COLOUR, alpha=0.35, linewidth=1)
    top.plot(*_running_mean(steps, losses, window), color=style.VAS_COLOUR, linewidth=2.2)
    top.set_ylabel("training loss")
    ends = np.cumsum([len(epoch["losses"]) for epoch in history])
    _mark_epochs(panels[:, 0], ends)
    if objectives:
        _held_out(panels[1, 0], history, objectives, ends)
    panels[-1, 0].set_xlabel("optimizer step")
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _held_out(axes: Axes, history: list[dict[str, Any]], objectives: list[str], ends: np.ndarray) -> None:
    for j, name in enumerate(objectives):
        reached = [(epoch.get("held_out") or {}).get(name, {}).get("explained_variance", np.nan) for epoch in history]
        axes.plot(ends, reached, **_look(j), label=f"{style.short(name)}: {reached[-1]:.2f}")
    axes.set_ylabel("held-out\nexplained variance")
    axes.margins(y=0.2)
    _legend(axes, loc="best")


def _mark_epochs(panels: np.ndarray, ends: np.ndarray) -> None:
    for epoch, end in enumerate(ends, start=1):
        for axes in panels:
            axes.axvline(end, **style.REFERENCE)
        panels[0].annotate(
            f"epoch {epoch}", (end, 1), (-4, -2), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="right", va="top", color=style.MUTED, fontsize=8.5,
        )  # fmt: skip


def _running_mean(steps: np.ndarray, losses: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each `window` steps, drawn at their middle."""
    middle = steps[: len(steps) - window + 1] + (window - 1) / 2
    return middle, np.convolve(losses, np.ones(window) / window, mode="valid")


def _diagonal(axes: Axes, ends: list[float]) -> None:
    """The line of perfection, in a square that holds these numbers."""
    finite = [end for end in ends if np.isfinite(end)] or [-1.0, 1.0]
    margin = 0.06 * (max(finite) - min(finite)) or 0.1
    low, high = min(finite) - margin, max(finite) + margin
    axes.plot([low, high], [low, high], **style.REFERENCE)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)


def _explains(share: float) -> str:
    return f"explains {100 * share:.0f} % of the variance" if np.isfinite(share) else "reward never varies"


def _look(j: int) -> dict[str, Any]:
    """Colour and marker of the j-th objective, the same in every figure."""
    return {
        "color": style.OBJECTIVE_COLOURS[j % len(style.OBJECTIVE_COLOURS)],
        "marker": style.OBJECTIVE_MARKERS[j % len(style.OBJECTIVE_MARKERS)],
        "markersize": 7.5,
        "markeredgecolor": "white",
        "linewidth": 2,
        "zorder": 3,
    }


def _legend(axes: Axes, loc: Literal["upper left", "best"]) -> None:
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_child")]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc=loc)
