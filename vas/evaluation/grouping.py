"""Results gathered by method and setting, in the order tables and figures show them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from vas.evaluation.results import BASE, BEST_OF_N, VAS, Result

_METHODS = (BASE, BEST_OF_N, VAS)


@dataclass(slots=True)
class Setting:
    """One method in one setting, with its result on every objective."""

    method: str
    label: str
    weights: dict[str, float]
    """Objectives that are on: β for VAS, the weights that best-of-n picks by; none for base."""
    n: int
    """Samples a response is picked from; 1 unless best-of-n."""
    by_objective: dict[str, Result] = field(default_factory=dict)

    @property
    def any(self) -> Result:
        """One of the results, for the figures that don't depend on the objective (KL, length, FLOPs)."""
        return next(iter(self.by_objective.values()))

    @property
    def family(self) -> str:
        """Heading of the group of settings this one is compared within."""
        if self.method == BASE:
            return "Base model"
        names = ", ".join(self.weights)
        if self.method == BEST_OF_N:
            return f"Best of n by {names}"
        return f"VAS towards {names}" if len(self.weights) == 1 else "VAS, objectives composed"

    def alone(self, objective: str) -> bool:
        """True if this objective, and no other, steers or picks."""
        return list(self.weights) == [objective]


def group(results: list[Result]) -> list[Setting]:
    """Settings in order: base, best-of-n by growing n, VAS alone by growing β, VAS composed."""
    settings: dict[tuple[str, str], Setting] = {}
    for result in results:
        key = result.method, result.setting
        if key not in settings:
            settings[key] = _setting(result)
        settings[key].by_objective[result.objective] = result
    order = {name: i for i, name in enumerate(objectives_of(results))}
    return sorted(settings.values(), key=lambda setting: _rank(setting, order))


def objectives_of(results: list[Result]) -> list[str]:
    """Objectives in the order results name them."""
    return list(dict.fromkeys(result.objective for result in results))


def base_of(settings: list[Setting]) -> Setting | None:
    """The base model's own row, if it was run."""
    return next((setting for setting in settings if setting.method == BASE), None)


def flops_ratio(setting: Setting, base: Setting | None) -> float:
    """FLOPs per response as a multiple of base's; NaN without a base."""
    spent = base.any.decode_flops if base else 0.0
    return setting.any.decode_flops / spent if spent > 0 else math.nan


def clearly(result: Result, base: Result | None) -> int:
    """1 if the 95 % interval lies wholly above base's, −1 if wholly below, else 0."""
    if base is None or result.method == BASE:
        return 0
    return int(result.ci_low > base.ci_high) - int(result.ci_high < base.ci_low)


def best(settings: list[Setting], objective: str) -> Setting | None:
    """The setting with the highest mean reward on this objective."""
    scored = [s for s in settings if objective in s.by_objective]
    scored = [s for s in scored if math.isfinite(s.by_objective[objective].reward_mean)]
    return max(scored, key=lambda s: s.by_objective[objective].reward_mean, default=None)


def decimals(results: list[Result], objective: str) -> int:
    """Decimals that show this objective's intervals to two significant digits."""
    widths = sorted(r.ci_high - r.ci_low for r in results if r.objective == objective and r.ci_high > r.ci_low)
    if not widths:
        return 2
    return min(max(1 - math.floor(math.log10(widths[len(widths) // 2])), 0), 5)


def number(value: float, places: int) -> str:
    """A number with so many decimals; a dash for what could not be measured."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:,.{places}f}"
    return (text[1:] if float(text.replace(",", "")) == 0 else text).replace("-", "−") if value < 0 else text


def times(ratio: float) -> str:
    """A multiple of base: `1.38×`."""
    return "–" if not math.isfinite(ratio) else f"{ratio:.{2 if ratio < 10 else 1}f}×"


def _setting(result: Result) -> Setting:
    content = json.loads(result.setting)
    n = 1
    if result.method == BEST_OF_N:
        n, picked_by = content["n"], content["by"]
        content = picked_by if isinstance(picked_by, dict) else dict.fromkeys(picked_by, 1.0)
    weights = {name: float(weight) for name, weight in content.items() if weight}
    return Setting(result.method, result.label(), weights, n)


def _rank(setting: Setting, order: dict[str, int]) -> tuple[object, ...]:
    method = _METHODS.index(setting.method) if setting.method in _METHODS else len(_METHODS)
    names = tuple(order.get(name, len(order)) for name in setting.weights)
    return method, len(setting.weights), names, setting.n, tuple(setting.weights.values()), setting.label
