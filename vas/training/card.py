"""The model card of a value model."""

from __future__ import annotations

import re
from typing import Any

from vas.config import RunConfig
from vas.models.bundled import hub_id
from vas.models.value import ValueModelConfig
from vas.training.history import best


def model_card(model: ValueModelConfig, config: RunConfig, history: list[dict[str, Any]]) -> str:
    """README.md of a checkpoint: what it is, how good it is on held-out prompts, how to use it."""
    kept = best(history) if history else -1
    held_out = history[kept]["held_out"] if history else {}
    lines = [
        *heading(model, f"Value model `{config.value.name}` of run `{config.name}`"),
        "Predicts, after every token, the reward that the base model's response will get "
        "(Value Augmented Sampling, arXiv:2405.06639). Values are in standard deviations of each reward.",
        "",
        f"- base model: `{model.base_model}`",
        f"- backbone: `{config.value.backbone or config.base.model}`, "
        f"{model.backbone_config.num_hidden_layers} layers, head `{model.head['kind']}`",
        f"- target: TD(λ), λ = {model.td_lambda}; epoch {kept + 1} of {len(history)}",
        "",
        "## Objectives",
        "",
        "| objective | reward | mean | std | explained variance | by quarter of the response | rank correlation |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for objective in model.objectives:
        metrics = held_out.get(objective["name"])
        explained = f"{metrics['explained_variance']:.3f}" if metrics else "–"
        quarters = " / ".join(f"{v:.2f}" for v in metrics["by_quarter"]) if metrics else "–"
        ranks = f"{metrics['rank_correlation']:.3f}" if metrics else "–"
        lines.append(
            f"| {objective['name']} | {objective['reward_version']} | {objective['mean']:.4g} | "
            f"{objective['std']:.4g} | {explained} | {quarters} | {ranks} |"
        )
    lines += ["", "Figures are of held-out prompts.", ""]
    for name, metrics in held_out.items():
        lines += [
            f"## Calibration: {name}",
            "",
            "| mean value | mean reward | states |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {b['value']:.3f} | {b['reward']:.3f} | {b['states']} |" for b in metrics["calibration"]]
        lines.append("")
    return "\n".join(lines)


def heading(model: ValueModelConfig, title: str) -> list[str]:
    """The lines that a card begins with: what the hub reads, and the title."""
    return [
        "---",
        "library_name: transformers",
        f"base_model: {hub_id(model.base_model)}",
        "tags: [value-model, value-augmented-sampling]",
        "---",
        f"# {title}",
        "",
    ]


def with_section(card: str, title: str, text: str) -> str:
    """The card with this section at its end; one of the same title, up to the next, is replaced."""
    parts = re.split(r"^(?=## )", card, flags=re.MULTILINE)
    kept = [part for part in parts if part.partition("\n")[0].rstrip() != f"## {title}"]
    return "".join(kept).rstrip("\n") + f"\n\n## {title}\n\n{text}\n"
