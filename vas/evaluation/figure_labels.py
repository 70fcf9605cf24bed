"""Labels beside the points of a figure, kept out of each other's way."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

_OFFSETS = [
    (direction * step, lift * step, anchor_x, anchor_y)
    for step in (1.0, 2.2, 3.6)
    for direction, lift, anchor_x, anchor_y in (
        (8, 5, "left", "bottom"),
        (8, -5, "left", "top"),
        (-8, 5, "right", "bottom"),
        (-8, -5, "right", "top"),
        (9, 0, "left", "center"),
        (-9, 0, "right", "center"),
        (0, 9, "center", "bottom"),
        (0, -9, "center", "top"),
    )
]  # in points, the favourites first
_FAR = 14  # points from which a thin line leads to the label


def place_labels(axes: Axes, labels: list[tuple[float, float, str, str]], lines: list[np.ndarray]) -> None:
    """Write each (x, y, text, colour) beside its point where it covers least.

    lines: [M, 2] polylines in data coordinates (curves, error bars) to keep clear of.
    """
    figure = axes.get_figure(root=True)
    if figure is None or not labels:
        return
    figure.draw_without_rendering()  # settles the layout
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # of Agg's canvas, not of every one
    inside = axes.get_window_extent(renderer)
    ink = np.concatenate([_dots(axes.transData.transform(line)) for line in lines if len(line)] or [np.zeros((0, 2))])
    points = axes.transData.transform(np.array([(x, y) for x, y, *_ in labels]))
    taken: list[Bbox] = []
    for x, y, text, colour in labels:
        note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", color=colour, fontsize=8.5, zorder=8)
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white", alpha=0.85)])
        cheapest, chosen = np.inf, _OFFSETS[0]
        for rank, offset in enumerate(_OFFSETS):
            _move(note, offset)
            box = note.get_window_extent(renderer)
            cost = 0.02 * rank + _covered(box, ink) * 0.15 + _covered(box.padded(6), points) * 3
            cost += 6 * sum(box.padded(2).overlaps(other) for other in taken)
            cost += 20 * (not (inside.x0 <= box.x0 and box.x1 <= inside.x1 + 40 and inside.y0 <= box.y0))
            cost += 20 * (box.y1 > inside.y1)
            if cost < cheapest:
                cheapest, chosen = cost, offset
        _move(note, chosen)
        if np.hypot(*chosen[:2]) > _FAR:
            line = {
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.5,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 4,
            }
            axes.annotate("", (x, y), chosen[:2], textcoords="offset points", arrowprops=line)
        taken.append(note.get_window_extent(renderer))


def _move(note: Any, offset: tuple[float, float, str, str]) -> None:
    note.set_position(offset[:2])
    note.set_horizontalalignment(offset[2])
    note.set_verticalalignment(offset[3])


def _dots(line: np.ndarray) -> np.ndarray:
    """A polyline in pixels as dots some 8 pixels apart: [M, 2]."""
    dots = [line]
    for start, end in pairwise(line):
        if np.isfinite(start).all() and np.isfinite(end).all():
            dots.append(np.linspace(start, end, int(np.hypot(*(end - start)) // 8) + 2))
    return np.concatenate(dots)


def _covered(box: Bbox, dots: np.ndarray) -> int:
    """How many dots lie in the box."""
    x, y = dots[:, 0], dots[:, 1]
    return int(((x >= box.x0) & (x <= box.x1) & (y >= box.y0) & (y <= box.y1)).sum())
