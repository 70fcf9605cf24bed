"""The results as a table for a terminal."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.table import Table
from rich.text import Text

from vas.evaluation.grouping import (
    Setting,
    base_of,
    best,
    clearly,
    decimals,
    flops_ratio,
    group,
    number,
    objectives_of,
    times,
)
from vas.evaluation.results import Result

_ONE_LINE = 2  # objectives whose cells fit beside each other on one line
_WIDE = 100  # columns that this takes
_INTERVAL = 12  # characters that are not to be broken


def results_table(results: list[Result], width: int = _WIDE) -> Table:
    """A row a setting: reward per objective with its 95 % interval, KL, length and cost. width: columns there are."""
    settings, objectives = group(results), objectives_of(results)
    one_line = len(objectives) <= _ONE_LINE and width >= _WIDE
    base = base_of(settings)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=Text("Held-out prompts: mean reward [95 % interval]"),
        title_justify="left",
        caption=Text("▲ ▼ interval wholly above or below base's · KL nats · FLOPs per response, of base's"),
        caption_justify="left",
    )
    table.add_column("method", overflow="fold")
    for objective in objectives:
        table.add_column(Text(objective), justify="right", overflow="fold", min_width=_INTERVAL)
    for name in ("KL", "length", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    top = {objective: best(settings, objective) for objective in objectives}
    for _, family in groupby(settings, key=lambda setting: setting.family):
        for setting in family:
            cells = [
                _cell(results, setting, base, objective, top[objective] is setting, one_line)
                for objective in objectives
            ]
            shared = setting.any
            table.add_row(
                Text(setting.label),
                *cells,
                number(shared.kl, 2),
                number(shared.length, 0),
                times(flops_ratio(setting, base)),
            )
        table.add_section()
    return table


def _cell(
    results: list[Result], setting: Setting, base: Setting | None, objective: str, top: bool, one_line: bool
) -> Text:
    """`▲ 0.71 [0.64, 0.77]`, bold if it is the objective's best."""
    result = setting.by_objective.get(objective)
    if result is None:
        return Text("–")
    places = decimals(results, objective)
    direction = clearly(result, base.by_objective.get(objective) if base else None)
    mark, colour = {1: ("▲ ", "green"), -1: ("▼ ", "red"), 0: ("", "")}[direction]
    text = Text(mark, colour)
    text.append(number(result.reward_mean, places), "bold" if top else "")
    interval = f"[{number(result.ci_low, places)}, {number(result.ci_high, places)}]"
    return text.append(" " if one_line else "\n").append(interval, "dim")
