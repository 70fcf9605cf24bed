"""Benchmark rows: what a figure is of, and the goal beside it; as a table and as JSON."""

from __future__ import annotations

import json
import operator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from vas.progress import console

_COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. goal: e.g. `>= 1.5`, or None for a figure that is there to be read."""

    case: str
    metric: str
    value: float
    unit: str
    goal: str | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        compare, number = self.goal.split()
        return bool(_COMPARE[compare](self.value, float(number)))


def show(rows: list[Row], title: str) -> None:
    """Print rows as a table."""
    table = Table(title=title, title_justify="left")
    for heading in ("case", "metric", "value", "unit", "goal", ""):
        table.add_column(heading, justify="right" if heading == "value" else "left", no_wrap=heading != "case")
    for row in rows:
        mark = {True: "[green]met", False: "[red]missed", None: ""}[row.met]
        number = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.3g}"
        table.add_row(escape(row.case), row.metric, number, row.unit, row.goal or "", mark)
    console.print(table)


def write(rows: list[Row], path: Path | None) -> None:
    """Write rows as JSON, if anybody wants them."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
