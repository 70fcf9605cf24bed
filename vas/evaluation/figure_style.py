"""How figures look: palette, sizes, titles, file names, PNG bytes."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

P = ParamSpec("P")

INK, MUTED, GRID = "#1f2430", "#667085", "#e6e8ee"
# Okabe and Ito's colours for the methods, Paul Tol's for the objectives: apart in every
# common kind of colour blindness; markers differ too.
BASE_COLOUR, BEST_OF_N_COLOUR, VAS_COLOUR, COMPOSED_COLOUR = "#1f2430", "#E08A00", "#0072B2", "#B8479B"
BEST_OF_N_INK = "#A86500"  # the same orange, dark enough to read as text
OBJECTIVE_COLOURS = ("#332288", "#CC6677", "#44AA99", "#999933", "#882255", "#117733")
OBJECTIVE_MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH, DPI = 8.6, 180  # inches: 10 pt reads as about 14 px on a page 900 px wide

REFERENCE: dict[str, Any] = {"color": "#98a2b3", "linewidth": 1, "linestyle": (0, (4, 4)), "zorder": 1}
"""Look of the lines that say where base, zero or perfection is."""

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # an objective may be called $x$
    "axes.edgecolor": "#b6bcc9",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Turn a function that draws a Figure into one that returns its PNG, in the common style."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        with matplotlib.rc_context(_STYLE):
            buffer = io.BytesIO()
            draw(*args, **kwargs).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()

    return drawn


def new_figure(height: float) -> Figure:
    """An empty figure of the common width; height in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def entitle(axes: Axes, title: str, hint: str) -> None:
    """A title, and below it in grey what to read off the figure."""
    axes.set_title(title, loc="left", fontsize=12.5, pad=26)
    axes.annotate(hint, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color=MUTED, fontsize=9.5)


def file_name(kind: str, objective: str) -> str:
    """`KIND_OBJECTIVE.png` in safe characters only; names that need changing get a digest to stay apart."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", objective)[:60]
    if safe != objective:
        safe += "-" + hashlib.sha256(objective.encode()).hexdigest()[:8]
    return f"{kind}_{safe}.png"


def short(name: str, most: int = 40) -> str:
    """A name cut to fit a title or a legend."""
    return name if len(name) <= most else name[: most - 1] + "…"
