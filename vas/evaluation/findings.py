"""What the results say, in a line an objective: computed, with its doubts, never chosen by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vas.evaluation.grouping import (
    Setting,
    base_of,
    best,
    clearly,
    decimals,
    flops_ratio,
    group,
    number,
    times,
)
from vas.evaluation.results import BEST_OF_N, VAS, Result

_LENGTH_CHANGE, _DISTINCT_FALL = 0.25, 0.1  # shares of base's that are worth a caution


@dataclass(frozen=True, slots=True)
class Finding:
    """The headline of one objective, or of one composed setting."""

    name: str
    change: str
    """`0.25 → 0.71`."""
    lines: list[str]
    verdict: str
    """Whether the 95 % intervals bear the change out."""
    clear: bool
    """True if they do."""
    cautions: list[str] = field(default_factory=list)


def findings(results: list[Result], objectives: list[str]) -> list[Finding]:
    """A finding an objective: its best VAS setting on its own, against base and the best best-of-n."""
    settings = group(results)
    base = base_of(settings)
    if base is None:
        return []
    return [_alone(results, settings, base, objective) for objective in objectives if objective in base.by_objective]


def composed(results: list[Result], objectives: list[str]) -> list[Finding]:
    """A finding a VAS setting of several objectives: what becomes of each of them."""
    settings = group(results)
    base = base_of(settings)
    if base is None:
        return []
    several = [s for s in settings if s.method == VAS and len(s.weights) > 1]
    return [_composed(results, setting, base, objectives) for setting in several]


def _alone(results: list[Result], settings: list[Setting], base: Setting, objective: str) -> Finding:
    places = decimals(results, objective)
    before = base.by_objective[objective]
    top = best(
        [s for s in settings if s.method == VAS and s.alone(objective) and s.weights[objective] > 0],
        objective,
    )
    rival = best([s for s in settings if s.method == BEST_OF_N and s.alone(objective)], objective)
    if top is None:
        return Finding(objective, number(before.reward_mean, places), [], "no setting steers by it alone", False)
    after = top.by_objective[objective]
    lines = [
        f"95 % {_interval(after, places)} at β={top.weights[objective]:g}, "
        f"{number(after.kl, 1)} nats from base, {times(flops_ratio(top, base))} base's FLOPs"
    ]
    if rival:
        reached = rival.by_objective[objective]
        lines.append(
            f"best of {rival.n} reaches {number(reached.reward_mean, places)} "
            f"({_interval(reached, places)}) at {times(flops_ratio(rival, base))} the FLOPs: {_compare(after, reached)}"
        )
    direction = clearly(after, before)
    verdict = {1: "clearly above base", 0: "not clearly above base", -1: "clearly below base"}[direction]
    change = f"{number(before.reward_mean, places)} → {number(after.reward_mean, places)}"
    return Finding(objective, change, lines, verdict, direction > 0, _cautions(top, base))


def _composed(results: list[Result], setting: Setting, base: Setting, objectives: list[str]) -> Finding:
    changes, risen, sought = [], [], []
    for name in objectives:
        if name not in setting.weights or name not in setting.by_objective or name not in base.by_objective:
            continue
        places = decimals(results, name)
        before, after = base.by_objective[name], setting.by_objective[name]
        direction = clearly(after, before)
        sought.append(name)
        if direction * math.copysign(1, setting.weights[name]) > 0:
            risen.append(name)
        mark = {1: " ▲", -1: " ▼", 0: ""}[direction]
        changes.append(f"{name} {number(before.reward_mean, places)} → {number(after.reward_mean, places)}{mark}")
    if len(risen) == len(sought):
        verdict = "all move clearly as asked"
    else:
        verdict = f"clearly moved as asked: {', '.join(risen)}" if risen else "none moves clearly as asked"
    line = f"{number(setting.any.kl, 1)} nats from base, {times(flops_ratio(setting, base))} base's FLOPs"
    clear = bool(sought) and len(risen) == len(sought)
    return Finding(setting.label, ", ".join(changes), [line], verdict, clear, _cautions(setting, base))


def _compare(ours: Result, theirs: Result) -> str:
    if ours.ci_low > theirs.ci_high:
        return "VAS is clearly higher"
    if ours.ci_high < theirs.ci_low:
        return "best of n is clearly higher"
    return "the intervals overlap"


def _cautions(setting: Setting, base: Setting) -> list[str]:
    """Side effects that a rise in reward may hide."""
    ours, theirs = setting.any, base.any
    cautions = []
    change = ours.length / theirs.length - 1 if theirs.length else math.nan
    if abs(change) > _LENGTH_CHANGE:
        cautions.append(f"responses are {abs(change) * 100:.0f} % {'longer' if change > 0 else 'shorter'} than base's")
    if ours.distinct_2 < (1 - _DISTINCT_FALL) * theirs.distinct_2:
        cautions.append(f"wording repeats more: distinct-2 {theirs.distinct_2:.2f} → {ours.distinct_2:.2f}")
    return cautions


def _interval(result: Result, places: int) -> str:
    return f"{number(result.ci_low, places)} to {number(result.ci_high, places)}"
