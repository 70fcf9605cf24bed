"""A value model's checkpoint as it lies on disk, read without torch: which one is meant, and what it says of itself."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from vas import storage
from vas.errors import VasError, nearest
from vas.run.directory import RunDirectory
from vas.training.history import best

_EXAMPLE = "give the folder that holds its config.json, e.g. runs/NAME/value/default, or the run's directory"


@dataclass(frozen=True)
class Checkpoint:
    """A value model's folder, and the run that it was asked for by, if it was."""

    location: str
    config: dict[str, Any]
    """config.json, as ValueModelConfig has it."""
    run: RunDirectory | None = None

    @classmethod
    def open(cls, target: str) -> Checkpoint:
        """The checkpoint at a path or URI, or of the run there. Raises VasError if there is neither."""
        location, run = storage.absolute(target).rstrip("/"), None
        if storage.exists(storage.join(location, "run.json")):
            run = RunDirectory.open(location)
            location = run.value
        file = storage.join(location, "config.json")
        if not storage.exists(file):
            if run is not None:
                raise VasError("the run has no finished value model", location, f"vas train {run.location}")
            raise VasError("there is no value model here (no config.json)", location, _EXAMPLE)
        config = _read_json(file)
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind != "vas_value":
            raise VasError(f"this is no value model, but a model of type '{kind}'", location, _EXAMPLE)
        return cls(location, config, run)

    @property
    def objectives(self) -> list[str]:
        """The names of its heads, in order."""
        return [objective["name"] for objective in self.config["objectives"]]

    def chosen(self, names: list[str]) -> list[str]:
        """The objectives asked for, all if none is. Raises VasError for one that it has not."""
        for name in names:
            if name not in self.objectives:
                mend = nearest(name, self.objectives)
                raise VasError(f"the value model has no objective '{name}'", self.location, mend)
        return names or self.objectives

    def history(self) -> list[dict[str, Any]]:
        """How training went, an entry an epoch; empty if nothing was kept of it."""
        file = storage.join(self.location, "training.json")
        return _read_json(file) if storage.exists(file) else []

    def parameters(self) -> Counter[str]:
        """Numbers in the weights' files, by the first part of their names: `backbone` and `heads`."""
        found: Counter[str] = Counter()
        for file in storage.list_files(self.location, ".safetensors"):
            for name, tensor in _safetensors_header(file).items():
                if name != "__metadata__":
                    found[name.partition(".")[0]] += math.prod(tensor["shape"])
        return found


def show(checkpoint: Checkpoint) -> None:
    """Print what a checkpoint is, and how good it is on held-out prompts."""
    Console().print(_description(checkpoint))


def _description(checkpoint: Checkpoint) -> RenderableType:
    config, history, parameters = checkpoint.config, checkpoint.history(), checkpoint.parameters()
    backbone, head = config["backbone"], config["head"]
    layers = backbone.get("num_hidden_layers") or backbone.get("n_layer")
    kind = head["kind"] + (f", {head['bins']} bins, {head['label']}" if head["kind"] == "categorical" else "")
    about = {
        "base model": config["base_model"],
        "backbone": f"{backbone['model_type']}, {layers} layers, {_count(parameters['backbone'])} parameters",
        "head": f"{kind}, {_count(parameters['heads'])} parameters",
        "target": f"TD(λ), λ = {config['td_lambda']:g}",
        "epochs": str(len(history)) if history else "–",
        "tokenizer": config["tokenizer_digest"],
        "run": config["run_digest"] or "–",
    }
    facts = Table.grid(padding=(0, 2))
    for name, fact in about.items():
        facts.add_row(Text(name, "dim"), Text(fact, overflow="fold"))
    return Group(Text(checkpoint.location, "bold", overflow="fold"), facts, "", _objectives_table(config, history))


def _objectives_table(config: dict[str, Any], history: list[dict[str, Any]]) -> Table:
    figures = _figures(history)
    distilled = config["head"]["kind"] == "vocab"
    of = "its teacher's advantages" if distilled else "the rewards of held-out prompts, and by quarter of the response"
    table = Table(box=None, header_style="bold", pad_edge=False, caption_justify="left")
    table.caption = Text(f"explained: share of the variance of {of}")
    for title in ("objective", "reward"):
        table.add_column(title, overflow="fold")
    for title in ("mean", "std", "explained", "by quarter"):
        table.add_column(title, justify="right", no_wrap=True)
    for objective in config["objectives"]:
        explained, quarters = figures.get(objective["name"], ("–", "–"))
        numbers = (f"{objective['mean']:.4g}", f"{objective['std']:.4g}", explained, quarters)
        table.add_row(*map(Text, (objective["name"], objective["reward_version"], *numbers)))
    return table


def _figures(history: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Per objective: variance explained by the epoch that was kept, of all states and by quarter of the response."""
    if not history:
        return {}
    kept = history[best(history)]
    figures = {
        name: (f"{each['explained_variance']:.3f}", " / ".join(f"{share:.2f}" for share in each["by_quarter"]))
        for name, each in kept["held_out"].items()
    }
    return figures | {name: (f"{each['explained']:.3f}", "–") for name, each in kept.get("unseen", {}).items()}


def _count(number: int) -> str:
    """1234567 as `1.23M`."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _read_json(file: str) -> Any:
    try:
        return json.loads(storage.read_bytes(file))
    except ValueError as error:
        raise VasError(f"this file is damaged: {error}", file, "restore it") from None


def _safetensors_header(file: str) -> dict[str, Any]:
    """Names, dtypes and shapes: the JSON that a safetensors file begins with, behind its length in 8 bytes."""
    fs, path = storage.filesystem(file)
    try:
        with fs.open_input_stream(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            return json.loads(stream.read(min(length, 100 * 2**20)))  # the format's own limit
    except (OSError, ValueError) as error:
        raise VasError(f"cannot read these weights: {error}", file, "restore the file") from None
