"""From a client's body to requests of the engine: models, presets, bounds and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from vas.config import TokenSampling
from vas.decoding.cache import widest
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.errors import VasError, nearest
from vas.models.base import context_length, encode_prompt, load_pretrained, load_tokenizer
from vas.models.value import ValueModelConfig
from vas.schema import Message, Prompt
from vas.serving.calls import Objective
from vas.serving.config import Gate, Preset, Settled
from vas.serving.errors import ApiError
from vas.serving.keys import Caller
from vas.serving.protocol import ChatMessage, Guidance, SamplingBody, ScoreRequest

CHARACTERS = 32  # a token: no tokenizer makes longer ones of a text


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids, and the chat that it is of."""

    tokens: list[int]
    messages: tuple[Message, ...] = ()


@dataclass
class Served:
    """What an endpoint serves, as far as its gateway must know it."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    objectives: dict[str, Objective]
    room: int | None
    """Longest sequence that all models have positions for."""
    kv_tokens: int | None = None
    """Limit of a replica's KV cache; doubling: whether it grows so, as on a GPU."""
    doubling: bool = False

    @classmethod
    def of(cls, settled: Settled, digests: dict[str, str]) -> Served:
        """Read the configs of all models. Raises VasError for one that is not there."""
        base = settled.base
        rooms = [] if base.called else [context_length(load_pretrained(AutoConfig, base.model, base.revision))]
        objectives: dict[str, Objective] = {}
        for spec in settled.value_models:
            config = ValueModelConfig.load(spec.path)
            if config.reads == "text" and spec.placement == "deployment":
                raise VasError(
                    f"the value model {spec.name} reads text, which needs the base model's tokenizer beside it",
                    "value_models: placement",
                    "set it to colocated",
                )
            rooms.append(config.context_length)
            kind = config.head["kind"]
            for each in config.objectives:
                if each["name"] in objectives:
                    other = objectives[each["name"]].value_model
                    raise VasError(f"the value models {other} and {spec.name} both bring '{each['name']}'")
                objectives[each["name"]] = Objective(
                    name=each["name"],
                    value_model=spec.name,
                    placement=spec.placement,
                    digest=digests[spec.name],
                    head=kind,
                    mean=each["mean"],
                    std=each["std"],
                    reward_version=str(each["reward_version"]),
                    relative=kind == "vocab",
                )
        known = [room for room in rooms if room is not None]
        tokenizer = load_tokenizer(base.tokenizer_id, base.revision)
        room, doubling = min(known) if known else None, bool(settled.serving.replicas.gpus) and not base.called
        return cls(settled.name, tokenizer, objectives, room, settled.serving.kv_tokens, doubling)

    def models(self, gate: Gate) -> list[str]:
        """Names that clients may use: the base model, and each preset."""
        return [self.name, *(f"{self.name}:{preset}" for preset in gate.presets)]

    def check_gate(self, gate: Gate, within: str = "") -> None:
        """Raise VasError for a preset, a default or a bound of no objective, or for guidance that is out of bounds.

        within: what the keys begin with where they stand, for errors.
        """
        presets = {f"{within}presets.{name}": each for name, each in gate.presets.items()}
        presets = {f"{within}guidance": gate.guidance} | presets
        named = {where: list(preset.objectives) for where, preset in presets.items()}
        for where, names in (named | {f"{within}limits.strengths": list(gate.limits.strengths)}).items():
            for name in names:
                if name not in self.objectives:
                    raise VasError(f"there is no objective '{name}'", where, nearest(name, list(self.objectives)))
        for where, preset in presets.items():
            for name, strength in preset.objectives.items():
                if not gate.limits.allows(name, strength):
                    low, high = gate.limits.bounds(name)
                    mend = f"change it, or the bounds: {within}limits.strengths, {within}limits.strength"
                    raise VasError(f"{name}: {strength:g} is not in [{low:g}, {high:g}]", where, mend)
            if (preset.candidates or 0) > gate.limits.candidates:
                mend = f"see {within}limits.candidates"
                raise VasError(f"more than {gate.limits.candidates} candidates", where, mend)

    def preset(self, model: str, gate: Gate) -> Preset:
        """The guidance that a model's name stands for. Raises ApiError (404)."""
        if model == self.name:
            return gate.guidance
        name, _, preset = model.partition(":")
        if name == self.name and preset in gate.presets:
            return gate.presets[preset]
        mend = nearest(model, self.models(gate))
        raise ApiError(404, f"the model '{model}' does not exist; {mend}", "model", "model_not_found")

    def scored(self, body: ScoreRequest, gate: Gate, caller: Caller) -> list[str]:
        """Objectives whose values are asked for; of a request that names none, all that have values of a text.

        Raises ApiError for one that is not there, or that the caller may not use.
        """
        if body.model is not None:
            self.preset(body.model, gate)
        if body.objectives is None:
            return [each.name for each in self.objectives.values() if not each.relative and caller.may_use(each.name)]
        for name in body.objectives:
            if name not in self.objectives:
                raise ApiError(400, f"there is no objective '{name}'", "objectives", "unknown_objective")
            caller.check_use(name, "objectives")
        return body.objectives

    def column(self, name: str) -> int:
        """An objective's place among those of its value model."""
        model = self.objectives[name].value_model
        return [each.name for each in self.objectives.values() if each.value_model == model].index(name)

    def encode_pair(self, gate: Gate, messages: list[ChatMessage] | None, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a chat, if there is one, and of a text that answers it. Raises ApiError as `encode` does."""
        before = self.encode(gate, messages).tokens if messages else []
        if len(text) > CHARACTERS * gate.limits.prompt_tokens:
            raise ApiError(400, f"the text has {len(text):,} characters", "text", "context_length_exceeded")
        after = list(self.tokenizer(text, add_special_tokens=not before).input_ids)
        if not after:
            raise ApiError(400, "the text is empty", "text")
        self.check_length(gate, before + after)
        return before, after

    def encode(self, gate: Gate, prompt: list[ChatMessage] | str) -> Encoded:
        """A chat or a text with its token ids. Raises ApiError for one that is empty, or too long."""
        most = gate.limits.prompt_tokens * CHARACTERS
        length = len(prompt) if isinstance(prompt, str) else sum(len(message.text) for message in prompt)
        if length > most:
            raise ApiError(400, f"the prompt has {length:,} characters", "prompt", "context_length_exceeded")
        try:
            whole = _prompt(prompt, gate.system)
            tokens = encode_prompt(self.tokenizer, whole)
        except Exception as error:  # a chat template may raise anything
            raise ApiError(400, f"the model has no form for this prompt: {error}"[:300], "messages") from None
        return Encoded(self.check_length(gate, tokens), whole.messages)

    def check_length(self, gate: Gate, tokens: list[int]) -> list[int]:
        """The tokens of a prompt. Raises ApiError if there are none, or too many."""
        if not tokens:
            raise ApiError(400, "the prompt is empty", "prompt")
        if len(tokens) > gate.limits.prompt_tokens or (self.room is not None and len(tokens) >= self.room):
            most = min(gate.limits.prompt_tokens, self.room or gate.limits.prompt_tokens)
            message = f"the prompt has {len(tokens)} tokens, more than {most}"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        return tokens

    def requests(
        self, body: SamplingBody, gate: Gate, caller: Caller, prompts: list[Encoded], answer_id: str, default: int
    ) -> list[Request]:
        """The engine's requests, n for each prompt; default: longest response of a request that says nothing.

        Raises ApiError for what is out of bounds.
        """
        limits, n = gate.limits, body.n or 1
        if n * len(prompts) > limits.n:
            raise ApiError(400, f"{n * len(prompts)} choices are asked for, more than {limits.n}", "n")
        if len(body.stops) > limits.stop:
            raise ApiError(400, f"there are {len(body.stops)} stop strings, more than {limits.stop}", "stop")
        guidance = self._guidance(body, gate, caller)
        seed, requests = body.first_seed, []
        for p, prompt in enumerate(prompts):
            longest = self._longest(body, gate, len(prompt.tokens), default, guidance.rows)
            for i in range(n):
                sampling = self._sampling(body, gate, longest, seed + p * n + i)
                name = f"{answer_id}-{p * n + i}"
                requests.append(Request(name, tuple(prompt.tokens), sampling, guidance, messages=prompt.messages))
        return requests

    def _longest(self, body: SamplingBody, gate: Gate, prompt: int, default: int, rows: int) -> int:
        room = gate.limits.max_tokens if self.room is None else min(gate.limits.max_tokens, self.room - prompt)
        asked = body.longest
        if asked is None:
            held = room if self.kv_tokens is None else widest(self.kv_tokens, rows, self.doubling) - prompt
            return max(1, min(default, room, held))
        if asked > gate.limits.max_tokens:
            raise ApiError(400, f"max_tokens may be {gate.limits.max_tokens} at most", "max_tokens")
        if asked > room:
            message = f"prompt and max_tokens make {prompt + asked} tokens; the models have room for {self.room}"
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        return asked

    @staticmethod
    def _sampling(body: SamplingBody, gate: Gate, longest: int, seed: int) -> SamplingParams:
        given = {name: getattr(body, name) for name in TokenSampling.model_fields}
        chosen: dict[str, Any] = gate.sampling.model_dump() | {k: v for k, v in given.items() if v is not None}
        chosen["top_k"] = max(0, chosen["top_k"])  # to some clients -1 is all
        try:
            return SamplingParams(
                **chosen,
                max_tokens=longest,
                stop=tuple(body.stops),
                seed=seed,
                logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
                logprobs=body.likeliest or 0,
            )
        except VasError as error:
            raise ApiError(400, error.what, error.what.partition(" ")[0]) from None

    def _guidance(self, body: SamplingBody, gate: Gate, caller: Caller) -> GuidanceParams:
        """The preset's guidance, with the request's own on top."""
        preset, own = self.preset(body.model, gate), body.guidance or Guidance()
        strengths = preset.objectives | own.objectives
        for name, strength in strengths.items():
            param = f"guidance.objectives.{name}"
            if name not in self.objectives:
                message = f"there is no objective '{name}': {nearest(name, list(self.objectives))}"
                raise ApiError(400, message, param, "unknown_objective")
            if not gate.limits.allows(name, strength):
                low, high = gate.limits.bounds(name)
                raise ApiError(400, f"the strength of '{name}' must be in [{low:g}, {high:g}]", param)
            caller.check_strength(name, strength)
        chosen = {
            name: getattr(own, name) if getattr(own, name) is not None else getattr(preset, name)
            for name in ("candidates", "value", "schedule")
        }
        if (chosen["candidates"] or 0) > gate.limits.candidates:
            raise ApiError(400, f"candidates may be {gate.limits.candidates} at most", "guidance.candidates")
        try:
            return GuidanceParams(
                {name: float(strength) for name, strength in strengths.items() if strength},
                **{name: value for name, value in chosen.items() if value is not None},
                on_error=own.on_error or gate.on_error,
            )
        except VasError as error:
            raise ApiError(400, error.what, "guidance") from None


def _prompt(prompt: list[ChatMessage] | str, system: str | None) -> Prompt:
    """A chat, with the endpoint's system message if it has none; or a plain text."""
    if isinstance(prompt, str):
        return Prompt("", (), prompt)
    roles = {"developer": "system"}
    messages: list[Message] = [
        {"role": roles.get(message.role, message.role), "content": message.text} for message in prompt
    ]
    if system and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return Prompt("", tuple(messages))
