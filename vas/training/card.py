"""The model card of a value model."""

from __future__ import annotations

from typing import Any

from vas.config import RunConfig
from vas.models.value import ValueModelConfig


def model_card(model: ValueModelConfig, config: RunConfig, history: list[dict[str, Any]]) -> str:
    """README.md of a checkpoint: what it is, how good it is on held-out prompts, how to use it."""
    held_out = history[-1]["held_out"] if history else {}
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {model.base_model}",
        "tags: [value-model, value-augmented-sampling]",
        "---",
        f"# Value model `{config.value.name}` of run `{config.name}`",
        "",
        "Predicts, after every token, the reward that the base model's response will get "
        "(Value Augmented Sampling, arXiv:2405.06639). Values are in standard deviations of each reward.",
        "",
        f"- base model: `{model.base_model}`",
        f"- backbone: `{config.value.backbone or config.base.model}`, "
        f"{model.backbone_config.num_hidden_layers} layers, head `{model.head['kind']}`",
        f"- target: TD(λ), λ = {model.td_lambda}; {len(history)} epochs",
        "",
        "## Objectives",
        "",
        "| objective | reward | mean | std | explained variance | by quarter of the response |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for objective in model.objectives:
        metrics = held_out.get(objective["name"])
        explained = f"{metrics['explained_variance']:.3f}" if metrics else "–"
        quarters = " / ".join(f"{v:.2f}" for v in metrics["by_quarter"]) if metrics else "–"
        lines.append(
            f"| {objective['name']} | {objective['reward_version']} | {objective['mean']:.4g} | "
            f"{objective['std']:.4g} | {explained} | {quarters} |"
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
