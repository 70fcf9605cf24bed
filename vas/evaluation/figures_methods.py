"""Figures that compare the methods: reward against KL, against compute, and against another reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from vas.evaluation import figure_style as style
from vas.evaluation.figure_labels import place_labels
from vas.evaluation.grouping import Setting, base_of, flops_ratio, group
from vas.evaluation.results import BASE, BEST_OF_N, VAS, Result

_X = Callable[[Setting], float]
_FAINT = 0.45  # opacity of settings that seek something else


@style.styled
def reward_vs_kl(results: list[Result], objective: str) -> Figure:
    """Reward bought per nat of KL(π‖π0). results: all of them; objective: whose reward is drawn."""
    figure = style.new_figure(4.7)
    axes = figure.subplots()
    style.entitle(
        axes,
        f"{style.short(objective)}: reward against distance from the base model",
        "Higher at the same distance is better. Bars: 95 % intervals. Best of n is placed at its KL bound.",
    )
    axes.set_xlabel("KL(π‖π0) of a response, nats")
    _reward_against(figure, axes, results, objective, lambda setting: setting.any.kl)
    return figure


@style.styled
def reward_vs_compute(results: list[Result], objective: str) -> Figure:
    """Reward bought with decoding FLOPs, as a multiple of the base model's."""
    figure = style.new_figure(4.7)
    axes = figure.subplots()
    style.entitle(
        axes,
        f"{style.short(objective)}: reward against compute",
        "Higher and further left is better. Bars are 95 % intervals.",
    )
    axes.set_xlabel("decode FLOPs per response, as a multiple of the base model's")
    settings = group(results)
    base = base_of(settings)
    ratios = [ratio for ratio in (flops_ratio(s, base) for s in settings) if np.isfinite(ratio) and ratio > 0]
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
    if ratios and max(ratios) > 2.5:
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(*ratios, 1) / 1.15, max(ratios) * 1.3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
    _reward_against(figure, axes, results, objective, lambda setting: flops_ratio(setting, base))
    return figure


@style.styled
def trade_off(results: list[Result], across: str, up: str) -> Figure:
    """Two objectives at once: where each method, in each setting, lands."""
    figure = style.new_figure(6.2)
    axes = figure.subplots()
    style.entitle(
        axes,
        f"{style.short(across, 24)} and {style.short(up, 24)} at once",
        "Towards the upper right both rewards rise. Bars: 95 % intervals. Stars seek several objectives.",
    )
    axes.set_xlabel(f"mean reward: {style.short(across)}")
    axes.set_ylabel(f"mean reward: {style.short(up)}")
    settings = [s for s in group(results) if across in s.by_objective and up in s.by_objective]
    base = base_of(settings)
    curves = _curves(settings, base)
    ends = [curve[-1] for curve in curves] + [s for s in settings if len(s.weights) > 1 and s.method == VAS]
    labels: list[tuple[float, float, str, str]] = []
    lines: list[np.ndarray] = []
    for setting in settings:
        x, y = setting.by_objective[across], setting.by_objective[up]
        look = _look(setting)
        axes.errorbar(
            x.reward_mean,
            y.reward_mean,
            xerr=_bar(x),
            yerr=_bar(y),
            elinewidth=1,
            ecolor=_fade(look["color"]),
            **look,
        )
        labels.append((x.reward_mean, y.reward_mean, _brief(setting, alone=setting not in ends), _ink(setting)))
        lines.append(np.array([(x.ci_low, y.reward_mean), (x.ci_high, y.reward_mean)]))
        lines.append(np.array([(x.reward_mean, y.ci_low), (x.reward_mean, y.ci_high)]))
    for curve in curves:
        path = np.array([(s.by_objective[across].reward_mean, s.by_objective[up].reward_mean) for s in curve])
        axes.plot(path[:, 0], path[:, 1], color=_look(curve[-1])["color"], alpha=0.45, linewidth=1.6, zorder=2)
        lines.append(path)
    axes.margins(0.09)
    if base:
        axes.axvline(base.by_objective[across].reward_mean, **style.REFERENCE)
        axes.axhline(base.by_objective[up].reward_mean, **style.REFERENCE)
    _legend(figure, settings)
    place_labels(axes, labels[::-1], lines)
    return figure


def _reward_against(figure: Figure, axes: Axes, results: list[Result], objective: str, x: _X) -> None:
    """Draw every method's reward on `objective` over `x`: curves for those that seek it, the rest faint."""
    axes.set_ylabel(f"mean reward: {style.short(objective)}")
    settings = [s for s in group(results) if objective in s.by_objective and np.isfinite(x(s))]
    base = base_of(settings)
    curves = [curve for curve in _curves(settings, base) if any(s.alone(objective) for s in curve)]
    seekers = [s for s in settings if s.method == BASE or s.alone(objective)]
    others = [s for s in settings if s.method == VAS and not s.alone(objective)]
    labels: list[tuple[float, float, str, str]] = []
    lines: list[np.ndarray] = []
    axes.margins(x=0.08, y=0.1)
    if base:
        axes.axhline(base.by_objective[objective].reward_mean, **style.REFERENCE)
    for curve in curves:
        path = np.array([(x(s), s.by_objective[objective].reward_mean) for s in curve])
        axes.plot(path[:, 0], path[:, 1], color=_look(curve[-1])["color"], linewidth=2, alpha=0.75, zorder=3)
        lines.append(path)
    for setting in [*others, *seekers]:
        result, look, faint = setting.by_objective[objective], _look(setting), setting in others
        at = x(setting)
        if faint:
            axes.plot(at, result.reward_mean, **look | {"alpha": _FAINT, "zorder": 2})
        else:
            axes.errorbar(
                at, result.reward_mean, yerr=_bar(result), elinewidth=1.3, ecolor=_fade(look["color"]), **look
            )
            lines.append(np.array([(at, result.ci_low), (at, result.ci_high)]))
        colour = style.MUTED if faint else _ink(setting)
        if not faint or (len(setting.weights) > 1 and len(others) <= 8):
            labels.append((at, result.reward_mean, _brief(setting, alone=not faint), colour))
    _legend(figure, [*seekers, *others], faint=others)
    place_labels(axes, labels[::-1], lines)


def _curves(settings: list[Setting], base: Setting | None) -> list[list[Setting]]:
    """Settings that differ by one dial only, in its order, through base, which is β = 0 and n = 1."""
    families: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        if setting.method == BEST_OF_N:
            families.setdefault((BEST_OF_N, *setting.weights.items()), []).append(setting)
        elif setting.method == VAS and len(setting.weights) == 1:
            families.setdefault((VAS, *setting.weights), []).append(setting)
    curves = []
    for family in families.values():
        curve = sorted([*family, *([base] if base else [])], key=_dial)
        if curve[-1].method == BASE:  # a curve takes the colour of its last setting
            curve.reverse()
        curves.append(curve)
    return curves


def _dial(setting: Setting) -> float:
    if setting.method == BEST_OF_N:
        return float(setting.n)
    return next(iter(setting.weights.values()), 0.0 if setting.method == VAS else 0.5)


def _brief(setting: Setting, alone: bool = False) -> str:
    """A label for a point; `alone` leaves out the objective, as the title names it."""
    if setting.method == BASE:
        return "base"
    if setting.method == BEST_OF_N:
        by = "" if alone else " by " + " + ".join(style.short(name, 16) for name in setting.weights)
        return (f"n={setting.n}" if alone else f"best of {setting.n}") + by
    if alone:
        return f"β={next(iter(setting.weights.values())):g}"
    return ", ".join(f"{style.short(name, 16)} β={beta:g}" for name, beta in setting.weights.items())


def _look(setting: Setting) -> dict[str, Any]:
    """Marker and colour of a setting, the same in every figure; a star seeks several objectives."""
    look: dict[str, Any] = {
        "linestyle": "none",
        "markeredgecolor": "white",
        "markeredgewidth": 1,
        "zorder": 4,
    }
    several = {"marker": "*", "markersize": 15, "zorder": 5} if len(setting.weights) > 1 else {}
    if setting.method == BASE:
        return look | {"color": style.BASE_COLOUR, "marker": "o", "markersize": 9, "zorder": 6}
    if setting.method == BEST_OF_N:
        return look | {"color": style.BEST_OF_N_COLOUR, "marker": "s", "markersize": 7.5} | several
    return (
        look
        | {"color": style.COMPOSED_COLOUR if several else style.VAS_COLOUR, "marker": "o", "markersize": 8}
        | several
    )


def _ink(setting: Setting) -> str:
    return style.BEST_OF_N_INK if setting.method == BEST_OF_N else str(_look(setting)["color"])


def _legend(figure: Figure, settings: list[Setting], faint: list[Setting] | None = None) -> None:
    """A legend below the axes, with an entry a kind of setting, drawn as the figure draws it."""
    handles: dict[str, Line2D] = {}
    for setting in settings:
        look = _look(setting)
        name = {BASE: "base", BEST_OF_N: "best of n"}.get(setting.method, "VAS")
        if len(setting.weights) > 1:
            name += ", several objectives"
        elif faint and setting in faint:
            name += ", another objective"
        if faint and setting in faint:
            look |= {"alpha": _FAINT}
        handles.setdefault(name, Line2D([], [], **look))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=5,
        columnspacing=1.4,
        handletextpad=0.2,
    )


def _bar(result: Result) -> np.ndarray:
    """Lengths of an error bar, [2, 1]: down to ci_low, up to ci_high."""
    mean = result.reward_mean
    return np.clip(np.array([[mean - result.ci_low], [result.ci_high - mean]]), 0, None)


def _fade(colour: str) -> tuple[str, float]:
    return colour, 0.55
