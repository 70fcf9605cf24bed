"""What is asked for, what is under way, and what comes out."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from statistics import fmean
from typing import TYPE_CHECKING, Literal, NamedTuple

from vas.choices import LEAST_TEMPERATURE, SCHEDULE
from vas.decoding.detokenizer import Detokenizer
from vas.errors import VasError

if TYPE_CHECKING:
    from vas import config
    from vas.decoding.blocks import Block


MOST_LOGPROBS = 100
MOST_NATS = 1e4  # of a strength or a bias; far beyond what changes a distribution, far from overflow


def _whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample from π0; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id → what is added to its logit, before temperature and truncation."""
    logprobs: int = 0
    """How many of the likeliest tokens to report beside each sampled one."""

    @classmethod
    def of(cls, sampling: config.Sampling, seed: int) -> SamplingParams:
        """A run's sampling, with a seed."""
        return cls(**sampling.model_dump(exclude={"stop"}), stop=tuple(sampling.stop), seed=seed)

    def __post_init__(self) -> None:
        for name, good in {
            "temperature": self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "top_k": _whole(self.top_k) and self.top_k >= 0,
            "min_p": 0 <= self.min_p < 1,
            "max_tokens": _whole(self.max_tokens) and self.max_tokens > 0,
            "seed": _whole(self.seed),
            "logprobs": _whole(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS,
            "logit_bias": all(_whole(t) and abs(b) <= MOST_NATS for t, b in self.logit_bias.items()),
            "stop": all(self.stop),  # an empty string would stop before the first token
        }.items():
            if not good:
                raise VasError(f"{name} is out of its range: {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class GuidanceParams:
    """Which objectives steer, and how strongly (design: π ∝ π0·exp(Σ β·A))."""

    objectives: dict[str, float] = field(default_factory=dict)
    """Objective → strength β, per standard deviation of reward."""
    candidates: int = 20
    value: Literal["expected", "soft"] = "expected"
    baseline: Literal["policy", "mean"] = "policy"
    outside: Literal["keep", "drop"] = "keep"
    candidate_mass: float = 1.0
    """Adaptive k: no more candidates once those taken have this probability under π0; 1 takes all k."""
    schedule: str = "token"
    """Which steps are guided: `token`, all; `entropy:h`, those where π0's entropy exceeds h nats; `block:b`, a
    choice between as many continuations of b tokens as there are `candidates`."""
    on_error: Literal["fail", "unguided"] = "fail"
    """Whether a response whose value model cannot be reached fails, or goes on as π0's. Callers see to it: the engine
    counts `Completion.lost_steps`."""

    @classmethod
    def of(cls, evaluation: config.Evaluation, strengths: config.Strengths) -> GuidanceParams:
        """A run's way of guiding, with these strengths."""
        names = {each.name for each in fields(cls)} - {"objectives"}
        return cls(strengths, **evaluation.model_dump(include=names))

    def __post_init__(self) -> None:
        for name, strength in self.objectives.items():
            if not math.isfinite(strength):
                raise VasError(f"the strength of '{name}' is not finite: {strength}", mend="give a number, e.g. 2")
            if abs(strength) > MOST_NATS:
                raise VasError(f"the strength of '{name}' is out of its range: {strength}", mend="give ±10,000 at most")
        if not _whole(self.candidates) or self.candidates < 1:
            raise VasError(f"candidates must be a whole number of at least 1, not {self.candidates}")
        if not 0 < self.candidate_mass <= 1:
            raise VasError(f"candidate_mass is out of its range: {self.candidate_mass}", mend="give 0 < mass <= 1")
        if not re.fullmatch(SCHEDULE, self.schedule):
            raise VasError(f"unknown schedule '{self.schedule}'", mend="give `token`, `entropy:NATS` or `block:TOKENS`")

    @property
    def entropy_threshold(self) -> float | None:
        """Nats of π0's entropy above which a step is guided; None guides every step."""
        kind, _, threshold = self.schedule.partition(":")
        return float(threshold) if kind == "entropy" else None

    @property
    def active(self) -> frozenset[str]:
        """Objectives with a strength other than 0."""
        return frozenset(name for name, strength in self.objectives.items() if strength)

    @property
    def block_size(self) -> int | None:
        """Tokens of a continuation, for the schedule `block`."""
        kind, _, size = self.schedule.partition(":")
        return int(size) if kind == "block" else None

    @property
    def blockwise(self) -> bool:
        """Whether it guides by blocks."""
        return bool(self.active) and self.block_size is not None

    @property
    def rows(self) -> int:
        """Rows that a request takes in the caches: as many as it has continuations."""
        return self.candidates if self.blockwise else 1


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    guidance: GuidanceParams = field(default_factory=GuidanceParams)
    begun: tuple[int, ...] = ()
    """Tokens that the response has already, from an engine that is gone; it goes on as it would have there.

    They count towards `max_tokens`; a completion has those alone that come after them.
    """
    messages: tuple[Mapping[str, str], ...] = ()
    """The chat that the prompt is of, for base models behind a server that takes nothing else; one that ends with the
    assistant's words has a response that has begun."""


class Drawn(NamedTuple):
    """A token as it was drawn."""

    token: int
    logprob: float
    guided_logprob: float
    kl: float
    top: tuple[tuple[int, float, float], ...] = ()


class Score(NamedTuple):
    """What a value model says of a token that was drawn, for one objective."""

    value: float | None
    """V of the state after it; None if the value model only compares tokens, or the token was no candidate."""
    advantage: float
    """A of the token, 0 if it was no candidate."""


@dataclass(slots=True)
class Token:
    """One sampled token, as it is streamed."""

    request_id: str
    token_id: int
    text: str
    """Text that became final with this token; may be empty, may hold several tokens' text."""
    logprob: float
    """log π0 of the token."""
    guided_logprob: float
    """log π of the token; equal to `logprob` without guidance."""
    kl: float
    """KL(π‖π0) of the step, nats."""
    top: tuple[tuple[int, float, float], ...]
    """The likeliest tokens under π, each with its log π0 and log π; as many as the request's `logprobs`."""
    finish_reason: str | None = None
    """stop | length, on the last token."""
    scores: dict[str, Score] = field(default_factory=dict)
    """For each objective that had a say in the step; empty under the schedule `block`."""


@dataclass(slots=True)
class Completion:
    """A finished response with what guidance did to it."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    """Ends with EOS when the model ended the response itself."""
    text: str = ""
    finish_reason: str = ""
    logprobs: list[float] = field(default_factory=list)
    guided_logprobs: list[float] = field(default_factory=list)
    kl: float = 0.0
    """Sum of the steps' KL(π‖π0), nats."""
    guided_steps: int = 0
    """Steps that a value model had a say in; fewer than the tokens under an `entropy` schedule."""
    base_positions: int = 0
    """Token positions run through the base model, prompt included."""
    value_positions: dict[str, int] = field(default_factory=dict)
    """The same for each scorer, by its name."""
    seconds: float = 0.0
    """Its share of the time of the steps it was in, where somebody counts it; else 0."""

    top: list[tuple[tuple[int, float, float], ...]] = field(default_factory=list)
    """Each step's likeliest tokens, if the request wants any: see `Token.top`."""
    lost_steps: int = 0
    """Steps that a value model was to have a say in, but could not be reached for; they were π0's."""
    _values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def mean_values(self) -> dict[str, float]:
        """For each objective, V after the response's tokens on average, in standard deviations of the reward."""
        return {name: fmean(values) for name, values in self._values.items()}

    def scored(self, scorer: str, positions: int) -> None:
        """Count positions run through a scorer."""
        self.value_positions[scorer] = self.value_positions.get(scorer, 0) + positions

    def add(self, token: Token) -> None:
        """Take in the next token."""
        self.token_ids.append(token.token_id)
        self.text += token.text
        self.logprobs.append(token.logprob)
        self.guided_logprobs.append(token.guided_logprob)
        self.kl += token.kl
        if token.top:
            self.top.append(token.top)
        for name, score in token.scores.items():
            if score.value is not None:
                self._values.setdefault(name, []).append(score.value)
        self.finish_reason = token.finish_reason or ""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way. Its last token is not in the KV cache yet: the next step runs it."""

    request: Request
    number: int
    """How many requests came before it."""
    completion: Completion
    text: Detokenizer
    response: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens in the base model's KV cache."""
    read: dict[str, int] = field(default_factory=dict)
    """Tokens that each scorer has read, by its name."""
    source: Sequence | None = None
    """A running sequence whose KV it will copy before it reads the rest of its prompt."""
    shared: int = 0
    """How many tokens of it."""
    fork: int = 0
    """Which of the request's continuations it is, under the schedule `block`; else 0."""
    block: Block | None = None
    """The continuations it is one of."""
    pending: list[Drawn] = field(default_factory=list)
    """Tokens at the end of `response` that a block has not chosen yet."""
    resting: bool = False
    """Waits for the other continuations of its block."""

    def __len__(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.response)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and response so far."""
        return (*self.request.prompt_token_ids, *self.response)

    @property
    def owner(self) -> Hashable:
        """Its name in the caches."""
        return self.request.request_id, self.fork

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Its tokens from place `start` up to `stop`."""
        prompt, length = self.request.prompt_token_ids, len(self.request.prompt_token_ids)
        return (*prompt[start:stop], *self.response[max(0, start - length) : max(0, stop - length)])

    @property
    def last_token(self) -> int:
        return self.response[-1] if self.response else self.request.prompt_token_ids[-1]

    @property
    def unread(self) -> int:
        """Tokens to prefill: all that are not cached, but the last."""
        return len(self) - 1 - self.cached

    @property
    def ready(self) -> bool:
        """Whether the next step can append a token."""
        return self.unread == 0 and not self.resting

    @property
    def blockwise(self) -> bool:
        """Whether it is guided by blocks."""
        return self.request.guidance.blockwise

    @property
    def steered(self) -> bool:
        """Whether value models may be asked about each of its tokens."""
        return bool(self.request.guidance.active) and not self.blockwise

    @property
    def fresh(self) -> bool:
        """Whether nothing of its response has been told yet."""
        return not self.completion.token_ids

    @property
    def rows(self) -> int:
        """Rows that it takes in the caches, its continuations' included."""
        if self.fork:
            return 0  # the first continuation has counted it
        return self.request.guidance.rows

    @property
    def reach(self) -> int:
        """Tokens that it may have before anybody looks for room again: a block may come whole."""
        size = self.request.guidance.block_size if self.blockwise else None
        left = self.request.sampling.max_tokens - len(self.response)
        return len(self) + max(0, min((size or 1) - len(self.pending), left) - 1)

    def restart(self) -> None:
        """Forget what the caches held, and tokens that were not chosen yet."""
        self.cached, self.source, self.shared = 0, None, 0
        self.read.clear()
        del self.response[len(self.response) - len(self.pending) :]
        self.pending, self.resting, self.block = [], False, None
