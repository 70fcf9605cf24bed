"""What an endpoint serves, and within which bounds: the arguments of `vas.serving.app:build`."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator

from vas.choices import SCHEDULE
from vas.config import Base, RunConfig, Strengths, TokenSampling
from vas.configfile import Name, Section, merge, validated
from vas.errors import VasError
from vas.growth import Amounts
from vas.placement import amounts
from vas.run.directory import RunDirectory


class Replicas(Section):
    min: int = Field(1, ge=1)
    """Replicas kept when there is nothing to do."""
    max: int | None = Field(None, ge=1)
    """Most replicas under load; default `min`."""
    cpus: float = Field(1, ge=0)
    """CPUs, and so torch threads, of a replica."""
    gpus: float = Field(0, ge=0)
    """GPUs of a replica; may be a fraction."""
    runs_on: Name | None = None
    """Machines for them: those that have this custom resource. Default any."""
    upscale_delay: float = Field(10.0, ge=0)
    """Seconds of load before replicas are added."""
    downscale_delay: float = Field(120.0, ge=0)
    """Seconds of quiet before replicas are taken away."""

    @property
    def each(self) -> Amounts:
        """What a replica takes."""
        return amounts(self.cpus, self.gpus, self.runs_on)

    @property
    def most(self) -> int:
        """Replicas under load."""
        return max(self.min, self.max or 0)


class ValueModelSpec(Section):
    path: str
    """Checkpoint: a path or a URI."""
    name: Name = "default"
    """Its name in logs and metrics; of several models each needs its own."""
    placement: Literal["colocated", "deployment"] = "colocated"
    """`colocated`: in the base model's process, which is fastest. `deployment`: replicas of its own."""
    replicas: Replicas = Field(default_factory=Replicas)
    """For the placement `deployment`."""


class Preset(Section):
    objectives: Strengths
    """Objective → strength β."""
    candidates: int | None = Field(None, gt=0)
    """Tokens that value models score at each step; default 20."""
    value: Literal["expected", "soft"] | None = None
    """What a categorical head's histogram stands for; default `expected`."""
    schedule: str | None = Field(None, pattern=f"^({SCHEDULE})$")
    """Steps that are guided: `token` (the default), `entropy:NATS` or `block:TOKENS`."""


class Limits(Section):
    body_bytes: int = Field(1024 * 1024, gt=0)
    """Largest request body."""
    prompt_tokens: int = Field(8192, gt=0)
    """Longest prompt."""
    max_tokens: int = Field(2048, gt=0)
    """Longest response that may be asked for; the default of a request is no longer than that either."""
    n: int = Field(16, gt=0)
    """Most choices of one request."""
    candidates: int = Field(64, gt=0)
    """Most candidates of a step."""
    stop: int = Field(16, ge=0)
    """Most stop strings."""
    strength: tuple[float, float] = (-20.0, 20.0)
    """Least and greatest β of an objective that `strengths` does not name."""
    strengths: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Objective → its own bounds of β."""

    @field_validator("strength", "strengths")
    @classmethod
    def _ordered(cls, bounds: Any) -> Any:
        for low, high in bounds.values() if isinstance(bounds, dict) else [bounds]:
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"the bounds [{low}, {high}] are not a range")
        return bounds

    def bounds(self, objective: str) -> tuple[float, float]:
        """Least and greatest β."""
        return self.strengths.get(objective, self.strength)

    def allows(self, objective: str, strength: float) -> bool:
        """Whether β is within them; 0 always is, for it does not steer."""
        low, high = self.bounds(objective)
        return not strength or low <= strength <= high


class Gate(Section):
    """What may change while the endpoint runs, with no restart: the gateway's `user_config`."""

    presets: dict[Name, Preset] = Field(default_factory=dict)
    """Name → guidance, served as the model `MODEL:NAME`."""
    limits: Limits = Field(default_factory=Limits)
    """What requests may ask for."""
    keys: str | None = None
    """File of API keys, see docs/serving.md; without one, whoever reaches the endpoint may use it."""
    system: str | None = None
    """System message of chats that bring none; a run's own is what its value model was trained with."""
    sampling: TokenSampling = Field(default_factory=TokenSampling)
    """How tokens are drawn for requests that do not say; a run's own is what its value model was trained with."""
    guidance: Preset = Field(default_factory=lambda: Preset(objectives={}))
    """Guidance of requests that say nothing of it."""
    on_error: Literal["fail", "unguided"] = "fail"
    """What becomes of a request whose value model cannot be reached, unless it says so itself."""


def merged(first: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The keys of a Gate with others over them; of `limits` and `sampling`, what these do not name stays."""
    return first | merge({name: first.get(name) or {} for name in ("limits", "sampling")}, more)


class Serving(Section):
    run: str | None = None
    """Directory of a trained run: its base model, value model, system message and sampling are the defaults."""
    name: Name | None = None
    """The model's name to clients; default the last part of the base model's."""
    base: Base | None = None
    """The base model; default the run's."""
    value_models: list[ValueModelSpec] | None = None
    """Default the run's value model, colocated; an empty list serves the base model alone."""
    placement: Literal["colocated", "deployment"] | None = None
    """Placement of the run's value model, where `value_models` are not listed."""
    replicas: Replicas = Field(default_factory=Replicas)
    """Of the base model."""
    gateways: Replicas = Field(default_factory=lambda: Replicas(cpus=0.5))
    """Of the HTTP side."""
    max_sequences: int = Field(32, gt=0)
    """Responses that a replica decodes at once."""
    max_waiting: int = Field(32, ge=0)
    """Choices that wait at each replica of the base model before requests are turned away with 503."""
    kv_tokens: int | None = Field(65536, gt=0)
    """Tokens that the KV cache of a replica's base model may hold, and that of each value model."""
    sends_per_second: float | None = Field(None, gt=0)
    """Chunks a second that a replica of the base model sends to the gateway, all streams together; under load
    tokens share a chunk. Default 5 for each of its CPUs, for sending takes time from decoding there; on a GPU there
    is no limit."""
    drain_seconds: float = Field(600.0, gt=0)
    """How long a replica that is to stop finishes what it has begun."""
    gate: Gate = Field(default_factory=Gate)
    """What the gateway lets in, and how."""

    @property
    def sends(self) -> float:
        """Chunks a second, filled in."""
        return self.sends_per_second or (math.inf if self.replicas.gpus else 5 * max(1.0, self.replicas.cpus))

    @property
    def concurrency(self) -> int:
        """Choices that one replica of the base model takes on."""
        return self.max_sequences + self.max_waiting


class Settled(Section):
    """A Serving with its defaults filled in: what the deployments are given."""

    name: Name
    base: Base
    value_models: list[ValueModelSpec]
    serving: Serving


def settle(serving: Serving) -> Settled:
    """Fill in what a run brings. Raises VasError for a run without a value model, or no model at all."""
    base, models, gate = serving.base, serving.value_models, serving.gate
    if serving.run is not None:
        run = RunDirectory.open(serving.run)
        base = base or run.config.base
        gate = _as_run(gate, run.config)
        if models is None:
            if not run.done("train"):
                raise VasError("the run has no finished value model", run.location, f"vas run {run.location}")
            models = [ValueModelSpec(path=run.value, name=run.config.value.name)]
            models[0].placement = serving.placement or models[0].placement
    if base is None:
        raise VasError("there is no base model to serve", "base", "name a run, or a base model")
    names = [model.name for model in models or []]
    for name in names:
        if names.count(name) > 1:
            raise VasError(f"two value models have the name '{name}'", "value_models", "name them apart")
    name = serving.name or _served_name(base.model)
    return Settled(
        name=name, base=base, value_models=models or [], serving=serving.model_copy(update={"gate": gate, "base": base})
    )


def _as_run(gate: Gate, config: RunConfig) -> Gate:
    """A gate whose requests are those of a run, where neither they nor the gate say otherwise."""
    sampled = {name: getattr(config.rollouts.sampling, name) for name in TokenSampling.model_fields}
    brought: dict[str, Any] = {"sampling": TokenSampling(**sampled | gate.sampling.model_dump(exclude_unset=True))}
    if "system" not in gate.model_fields_set:
        brought["system"] = config.prompts.system
    return gate.model_copy(update=brought)


def parse_serving(content: dict[str, Any], where: str) -> Serving:
    """A Serving from a mapping. Raises VasError that names the key."""
    return validated(Serving, content, where)


def _served_name(model: str) -> str:
    """`HuggingFaceTB/SmolLM2-135M` → `SmolLM2-135M`."""
    last = model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last).lstrip("._-") or "base"
