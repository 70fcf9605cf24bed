"""What clients send: OpenAI's request bodies, and `guidance`.

Fields of OpenAI's that would change the answer and that are not built are refused, never ignored.
"""

from __future__ import annotations

import json
import math
import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vas.choices import SCHEDULE
from vas.errors import nearest
from vas.serving.errors import ApiError

LONGEST_STOP = 256  # characters: each token is held against all of them

Strength = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, strict=False)


class Guidance(_Body):
    """How to steer: π(a|s) ∝ π0(a|s)·exp(Σ β·A)."""

    objectives: dict[str, Strength] = Field(default_factory=dict, max_length=64)
    """Objective → strength β, per standard deviation of its reward; 0 switches it off, negative inverts it."""
    candidates: int | None = Field(None, ge=1)
    """Tokens scored at each step; default 20."""
    value: Literal["expected", "soft"] | None = None
    schedule: str | None = Field(None, pattern=f"^({SCHEDULE})$", max_length=40)
    """`token`, `entropy:NATS` or `block:TOKENS`."""
    on_error: Literal["fail", "unguided"] | None = None
    """What to do when a value model cannot be reached: fail, or go on as the base model and say so."""


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Body):
    type: Literal["text"] = "text"


class SamplingBody(_Body):
    """What both kinds of requests have."""

    model: str = Field(max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    """The default, as that of `top_p`, `top_k` and `min_p`, is how the value models' rollouts were drawn."""
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    """0 or -1: all tokens."""
    min_p: float | None = Field(None, ge=0, lt=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed gives the same choices."""
    stop: str | list[str] | None = None
    logit_bias: dict[str, Strength] | None = Field(None, max_length=1024)
    """Token id → what is added to its logit, from -100 to 100."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    guidance: Guidance | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: str | None = None
    """Ignored, as are `metadata`, `store` and `service_tier`."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each; None for no log-probs at all."""
        raise NotImplementedError

    @property
    def longest(self) -> int | None:
        """Longest response, if the request says."""
        return self.max_tokens

    @property
    def first_seed(self) -> int:
        """The request's seed, or one drawn by chance."""
        return secrets.randbits(62) if self.seed is None else self.seed

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        if not all(0 < len(stop) <= LONGEST_STOP for stop in self.stops):
            raise ValueError(f"a stop string is empty, or longer than {LONGEST_STOP} characters")
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise ValueError("logit_bias goes from token ids to numbers")
            if not (math.isfinite(bias) and abs(bias) <= 100):
                raise ValueError("logit_bias has numbers from -100 to 100")
        return self


class ChatRequest(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @property
    def likeliest(self) -> int | None:
        """See SamplingBody."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        """See SamplingBody."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self


class CompletionRequest(SamplingBody):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    """A text or its token ids, or several of either."""
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def likeliest(self) -> int | None:
        """See SamplingBody."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        prompts: Any = self.prompt
        several = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
        return list(prompts) if several else [prompts]


class ScoreRequest(_Body):
    """`POST /v1/score`: the value of every prefix of a text."""

    model: str | None = Field(None, max_length=512)
    text: str = Field(min_length=1)
    messages: list[ChatMessage] | None = None
    """The chat that the text answers; without it, the text is scored as it is."""
    objectives: list[str] | None = Field(None, max_length=64)
    """Default: all."""


def parse(kind: type[Any], body: bytes) -> Any:
    """A request of a kind. Raises ApiError (400) that says what is wrong, and with which parameter."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body cannot be read: {reason}"[:300]) from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])[:200] or None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"this parameter is unknown, or not supported here{_instead(kind, first['loc'])}"
        elif first["type"] == "string_pattern_mismatch":  # of the schedule: nothing else has a pattern
            message = "should be `token`, `entropy:NATS` or `block:TOKENS`"
        raise ApiError(400, f"{param}: {message}" if param else message, param, "invalid_value") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _instead(kind: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """The parameter that was perhaps meant, or all that there are beside it."""
    *above, name = place
    inside: dict[Any, type[BaseModel]] = {
        "guidance": Guidance,
        "stream_options": StreamOptions,
        "messages": ChatMessage,
    }
    known = inside.get(above[0]) if above else kind
    return f"; {nearest(str(name)[:64], list(known.model_fields))}" if known and len(above) < 3 else ""


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")
