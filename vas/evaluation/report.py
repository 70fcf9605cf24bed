"""The report of a run: one self-contained HTML page, without scripts or outside resources."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined

from vas.evaluation.findings import composed, findings
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
from vas.evaluation.results import Result
from vas.evaluation.trust import ROWS, Trust

_FULL_SHADE = 4.0  # nats of shift from which a token is shaded as strongly as can be
_LEAST_SHIFT = 0.05  # nats below which it is not shaded


@dataclass(frozen=True, slots=True)
class SampleToken:
    """A token of a shown response."""

    text: str
    shift: float
    """guided_logprob − logprob, nats; 0 where nothing guided."""
    logprob: float
    """Under π0, nats."""


@dataclass(frozen=True, slots=True)
class SampleColumn:
    """One method's response to a shown prompt."""

    label: str
    tokens: list[SampleToken]
    rewards: dict[str, float]
    cut: bool = False
    """Whether it reached max_tokens before it ended."""


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A prompt and the responses shown side by side."""

    prompt: str
    columns: list[SampleColumn]


@dataclass(frozen=True, slots=True)
class ReportData:
    """All that the page shows."""

    title: str
    about: dict[str, str]
    """What was run, as name → text; `base model` names the model in the headline."""
    stages: dict[str, float]
    """Stage → seconds."""
    config_yaml: str
    results: list[Result]
    objectives: list[str]
    figures: dict[str, bytes]
    """File name → PNG, in reading order (see `figures.draw_all`)."""
    held_out_metrics: dict[str, Any]
    """As `Held.report` gives it."""
    trust: list[Trust]
    """An entry an objective; none if it was not measured."""
    samples: list[SamplePrompt]


def render_report(data: ReportData) -> str:
    """The page. All text is escaped: prompts and responses come from people and models."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("vas.evaluation").joinpath("report.html.j2").read_text("utf-8"))
    places = {name: decimals(data.results, name) for name in data.objectives}
    return template.render(
        title=data.title,
        base_model=data.about.get("base model", "The base model"),
        prompts=max((result.n for result in data.results), default=0),
        objectives=data.objectives,
        goals=_listed(data.objectives),
        findings=findings(data.results, data.objectives),
        composed=composed(data.results, data.objectives),
        about=_about(data),
        stages=[(name, _duration(seconds)) for name, seconds in data.stages.items()],
        total=_duration(sum(data.stages.values())),
        config_yaml=data.config_yaml,
        families=_table(data.results, data.objectives, places),
        figures=[_figure(name, png) for name, png in data.figures.items()],
        quality=[_quality(name, metrics) for name, metrics in data.held_out_metrics.items()],
        trust=data.trust,
        trust_rows=[(name, [cell(each) for each in data.trust]) for name, cell in ROWS.items()],
        samples=[_sample(sample, places) for sample in data.samples],
    )


def _about(data: ReportData) -> dict[str, str]:
    """What the caller says of the run, and the seed and revision if it doesn't."""
    about = dict(data.about)
    if data.results:
        about.setdefault("seed", str(data.results[0].seed))
        about.setdefault("git revision", data.results[0].git_revision)
    return about


def _table(results: list[Result], objectives: list[str], places: dict[str, int]) -> list[dict[str, Any]]:
    """Groups of rows, base first; every cell is text already."""
    settings = group(results)
    base = base_of(settings)
    top = {objective: best(settings, objective) for objective in objectives}

    def reward(setting: Setting, name: str) -> dict[str, Any] | None:
        result = setting.by_objective.get(name)
        if result is None:
            return None
        return {
            "mean": number(result.reward_mean, places[name]),
            "low": number(result.ci_low, places[name]),
            "high": number(result.ci_high, places[name]),
            "best": top[name] is setting,
            "direction": clearly(result, base.by_objective.get(name) if base else None),
        }

    def row(setting: Setting) -> dict[str, Any]:
        shared = setting.any
        figures = [
            number(shared.kl, 2),
            times(flops_ratio(setting, base)),
            number(shared.length, 1),
            f"{number(shared.distinct_1, 2)} / {number(shared.distinct_2, 2)}",
            number(shared.tokens_generated, 0),
            number(shared.tokens_per_s, 0 if shared.tokens_per_s >= 100 else 1),
        ]
        return {
            "label": setting.label,
            "rewards": [reward(setting, name) for name in objectives],
            "figures": figures,
        }

    families = groupby(settings, key=lambda setting: setting.family)
    return [{"name": name, "rows": [row(setting) for setting in family]} for name, family in families]


_CAPTIONS = {
    "reward_vs_kl_": "What a reward costs in distance from the base model. A method whose curve lies above "
    "another's gets more reward for the same drift; where a curve flattens, more strength buys only drift.",
    "reward_vs_compute_": "What a reward costs in compute. Best of n pays for n responses, VAS for a value "
    "model that looks at every candidate token; shorter responses cost less.",
    "trade_off": "Two objectives at once. Steering by one may help or harm the other; a composed setting "
    "sets both strengths per request, with the same value models.",
    "calibration": "States of held-out responses in bins of equal count, ordered by predicted value. "
    "Steeper than the diagonal: the value model is too timid; flatter: too bold.",
    "trust": "Responses cut at half their length, which the base model then completed several times. Thin bars are "
    "one standard error of the mean; the line joins the means of five bins.",
    "explained_variance": "The further a response has gone, the more is settled. Guidance needs values "
    "that are informative early on.",
    "learning_curve": "If held-out explained variance falls while the loss still falls, the value model overfits.",
}


def _figure(name: str, png: bytes) -> dict[str, str]:
    caption = next((text for start, text in _CAPTIONS.items() if name.startswith(start)), "")
    return {"name": name, "caption": caption, "data": base64.b64encode(png).decode()}


def _quality(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """A row of the value model's table. `gap` is the mean of |value − reward| over the calibration bins."""
    bins = metrics["calibration"]
    states = sum(b["states"] for b in bins)
    gap = sum(abs(b["value"] - b["reward"]) * b["states"] for b in bins) / states if states else math.nan
    return {
        "name": name,
        "explained": number(metrics["explained_variance"], 3),
        "quarters": [number(share, 2) for share in metrics["by_quarter"]],
        "ranks": number(metrics.get("rank_correlation", math.nan), 3),  # older value models have none
        "gap": number(gap, 2),
        "states": f"{states:,}",
    }


def _sample(sample: SamplePrompt, places: dict[str, int]) -> dict[str, Any]:
    columns = [
        {
            "label": column.label,
            "tokens": [_token(token) for token in column.tokens],
            "cut": column.cut,
            "rewards": [(name, number(value, places.get(name, 2))) for name, value in column.rewards.items()],
        }
        for column in sample.columns
    ]
    return {"prompt": sample.prompt, "columns": columns}


def _token(token: SampleToken) -> dict[str, Any]:
    """Text, direction and shade (0 to 1) of a token, and what a hover says of it."""
    shift = token.shift if math.isfinite(token.shift) else 0.0
    moved = abs(shift) >= _LEAST_SHIFT
    return {
        "text": token.text,
        "direction": ("up" if shift > 0 else "down") if moved else "",
        "shade": f"{0.1 + 0.65 * min(abs(shift) / _FULL_SHADE, 1):.2f}",
        "hover": f"log-prob {number(token.logprob, 2)} → {number(token.logprob + shift, 2)} "
        f"({'+' if shift >= 0 else ''}{number(shift, 2)})",
    }


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
