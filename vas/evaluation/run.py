"""The evaluation stage: guided responses, results.parquet, figures and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from transformers import AutoConfig

from vas import storage
from vas.config import Base, RunConfig
from vas.errors import VasError
from vas.evaluation import console, samples
from vas.evaluation.completions import measure
from vas.evaluation.figures import draw_all
from vas.evaluation.flops import parameters_per_position
from vas.evaluation.grouping import number
from vas.evaluation.methods import Judge, Row
from vas.evaluation.report import ReportData, render_report
from vas.evaluation.results import Result, to_table
from vas.evaluation.trust import Trust
from vas.models.base import load_pretrained, load_tokenizer
from vas.models.value import ValueModelConfig
from vas.progress import console as terminal
from vas.rollouts.ledger import Ledger, words
from vas.rollouts.pipeline import sample
from vas.rollouts.plan import Plan, setting_key
from vas.rollouts.stored import by_prompt, read_rollouts
from vas.schema import Prompt
from vas.training.history import best


@dataclass(frozen=True)
class Inputs:
    """What the evaluation reads, as locations, and what the report says of the run."""

    rollouts: str
    value: str
    output: str
    stages: dict[str, float]
    about: dict[str, str]
    revision: str
    ledger: Ledger | None = None


def evaluate(config: RunConfig, prompts: Iterable[Prompt], inputs: Inputs) -> list[Result]:
    """Decode the held-out prompts in every setting, compare with base and best-of-N, and see whether values come true.

    Writes responses/, completions/, results.parquet, trust.json, figures/ and report.html under `inputs.output`.
    """
    held_out = [prompt for prompt in prompts if prompt.held_out]
    plans = [
        Plan(held_out, config.evaluation.samples_per_prompt, config.seed, setting=setting_key(strengths))
        for strengths in config.evaluation.strengths
    ]
    responses = storage.join(inputs.output, "responses")
    summary = sample(config, plans, responses, "evaluation", inputs.value, inputs.ledger)
    failed = ", ".join(f"{count} × {kind}" for kind, count in summary.errors.items())
    inputs.about["guided responses"] = f"{summary.rows}" + (f", of which failed {failed}" if failed else "")
    if failed:
        terminal.print(f"of {summary.rows} guided responses failed {failed}", highlight=False, markup=False)
    base = by_prompt(read_rollouts(inputs.rollouts, where=pc.field("held_out")))
    answers = read_rollouts(responses)
    guided = {plan.setting: by_prompt(answers.filter(pc.field("setting") == plan.setting)) for plan in plans}
    if not base or not all(guided.values()):
        raise VasError("every response of some setting failed", responses, "see the `error` column")
    results = compare(config, base, guided, inputs)
    trust = measure(config, held_out, base, inputs.value, inputs.output, inputs.ledger)
    if inputs.ledger is not None:
        inputs.about["server"] = f"{words(inputs.ledger.spent())} in all stages"
    report = _report(config, base, guided, results, trust, held_out, inputs)
    storage.write_table(storage.join(inputs.output, "results.parquet"), to_table(results))
    for name, figure in report.figures.items():
        storage.write_bytes(storage.join(inputs.output, "figures", name), figure)
    storage.write_bytes(storage.join(inputs.output, "report.html"), render_report(report).encode())
    terminal.print(console.results_table(results, terminal.width))
    for each in trust:
        terminal.print(
            f"{each.objective}: V of half-finished responses explains {number(each.explained_variance, 2)} "
            f"of the variance, a perfect V {number(each.ceiling, 2)}",
            highlight=False,
        )
    return results


def compare(
    config: RunConfig, base: dict[str, list[Row]], guided: dict[str, dict[str, list[Row]]], inputs: Inputs
) -> list[Result]:
    """Every method in every setting, judged by every objective."""
    value = ValueModelConfig.load(inputs.value)
    judge = Judge(
        config,
        _base_parameters(config.base),
        parameters_per_position(value.backbone_config, head=False),
        {o["name"]: (o["mean"], o["std"]) for o in value.objectives},
        inputs.revision,
    )
    choices = [{name: 1.0} for name in config.rewards]
    if len(config.rewards) > 1:
        choices.append(dict.fromkeys(config.rewards, 1.0))
    results = judge.base(base)
    for by in choices:
        for n in config.evaluation.best_of:
            results += judge.best_of(base, n, by)
    for setting, responses in guided.items():
        results += judge.vas(setting, responses)
    return results


def _base_parameters(base: Base) -> float:
    """The base model's weights per token position; NaN for one that is only called, if nobody says."""
    try:
        found = load_pretrained(AutoConfig, base.model, base.revision)
    except VasError:
        if base.called:
            return math.nan
        raise
    return parameters_per_position(found, head=True)


def _report(
    config: RunConfig,
    base: dict[str, list[Row]],
    guided: dict[str, dict[str, list[Row]]],
    results: list[Result],
    trust: list[Trust],
    held_out: list[Prompt],
    inputs: Inputs,
) -> ReportData:
    history: list[dict[str, Any]] = json.loads(storage.read_bytes(storage.join(inputs.value, "training.json")))
    metrics = history[best(history)]["held_out"] if history else {}
    return ReportData(
        title=config.name,
        about=inputs.about,
        stages=inputs.stages,
        config_yaml=config.yaml(),
        results=results,
        objectives=list(config.rewards),
        figures=draw_all(results, metrics, history, trust),
        held_out_metrics=metrics,
        trust=trust,
        samples=samples.side_by_side(
            held_out,
            base,
            guided,
            results,
            load_tokenizer(config.base.tokenizer_id, config.base.revision),
            config.evaluation.samples_shown,
        ),
    )
