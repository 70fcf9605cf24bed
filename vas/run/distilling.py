"""Distils a finished run's value model: the same guidance, for one position of a value model a step."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from vas.config import RunConfig
from vas.errors import VasError
from vas.models.base import load_base, quieten
from vas.models.value import ValueModel, ValueModelConfig, check_tokenizers
from vas.progress import console
from vas.rollouts.stored import read_rollouts
from vas.run.directory import RunDirectory
from vas.training.card import heading
from vas.training.distill import EPOCHS, distill
from vas.training.history import best
from vas.training.packing import COLUMNS, pack


def distill_run(location: str, name: str = "vocab", epochs: int | None = None) -> str:
    """Distil a run's value model on the run's training rollouts; returns the location of the new checkpoint.

    name: the checkpoint lies in the run's value/NAME. epochs: over the rollouts; None for `distill`'s own.
    Raises VasError if the run is not finished, or its value model cannot be a teacher.
    """
    run = RunDirectory.open(location)
    if not run.done("train"):
        raise VasError("there is no finished value model", run.location, f"vas train {run.location}")
    if name == run.config.value.name:
        raise VasError(f"'{name}' is the value model to distil", run.value, "give the new one another name")
    quieten()
    if run.config.base.called:
        raise VasError(
            "a vocab head needs the base model's own next tokens by the thousand, and this one is only called",
            run.location,
            "give a run whose base model has weights here (base.local_weights)",
        )
    base = load_base(run.config.base)
    teacher = ValueModel.load(run.value, base.model.device)
    check_tokenizers(teacher.config, base.name, base.tokenizer_digest)
    if teacher.config.reads == "text":
        raise VasError("the value model reads text; vocab heads score the base model's own tokens", run.value)
    if teacher.scores_vocabulary:
        raise VasError("the value model has vocab heads already", run.value, "there is nothing to distil")
    rows = training_rows(run)
    sampling = run.config.rollouts.sampling
    student, history = distill(base, teacher, rows, temperature=sampling.temperature or 1.0, epochs=epochs or EPOCHS)
    output = run.path("value", name)
    student.save(output, base.tokenizer, _card(student.config, run.config, history, len(rows)), history)
    figures = history[best(history)]["unseen"]
    explained = ", ".join(f"{objective} {each['explained']:.2f}" for objective, each in figures.items())
    console.print(f"distilled    explains of the advantages' variance: {explained}", highlight=False)
    return output


def training_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """The run's rollouts that are not held out, packed by prompt. Raises VasError if there are too few."""
    table = read_rollouts(run.rollouts, COLUMNS, where=~pc.field("held_out"))
    rows = pack(table, list(run.config.rewards)).to_pylist()
    if len(rows) < 2:
        raise VasError("distillation needs rollouts of two training prompts or more", run.rollouts)
    return rows


def _card(model: ValueModelConfig, config: RunConfig, history: list[dict[str, Any]], prompts: int) -> str:
    """README.md of a distilled checkpoint: what it is, and how well it agrees with its teacher."""
    figures = history[best(history)]["unseen"]
    lines = [
        *heading(model, f"Vocab value model, distilled from `{config.value.name}` of run `{config.name}`"),
        "Scores every next token from the state before it, in one pass (Value Augmented Sampling, arXiv:2405.06639). "
        "It knows advantages alone, in standard deviations of each reward: values of two states cannot be compared.",
        "",
        f"- base model: `{model.base_model}`",
        f"- backbone: {model.backbone_config.num_hidden_layers} layers, head `{model.head['kind']}`",
        f"- teacher: value model `{config.value.name}` of the run",
        f"- distilled on rollouts of {prompts} prompts in {len(history)} epochs, of which the best is kept",
        "",
        "| objective | reward | variance explained | top-1 agreement | weighted by lead | of likely candidates |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for objective in model.objectives:
        each = figures[objective["name"]]
        lines.append(
            f"| {objective['name']} | {objective['reward_version']} | {each['explained']:.3f} | "
            f"{each['best']:.3f} | {each['best_weighted']:.3f} | {each['best_likely']:.3f} |"
        )
    lines += [
        "",
        "Figures are of prompts that were not distilled on. Variance: of the teacher's advantages, weighted by the "
        "base model. Top-1: places at which both find the same candidate best; weighted by how far the teacher's "
        "best is ahead of its second; and among candidates of at least 1 %.",
        "",
    ]
    return "\n".join(lines)
