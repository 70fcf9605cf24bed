"""What clients are sent: OpenAI's response bodies, with what guidance did to the response."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean
from typing import Any, Protocol

from vas.decoding.sequence import Token
from vas.serving.relay import Choice


class TokenText(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens."""
        ...


@dataclass
class Answer:
    """One response under way, in the form that its route has."""

    model: str
    tokenizer: TokenText
    prompt_tokens: int
    likeliest: int | None
    """How many of the likeliest tokens are shown beside each; None for no log-probs."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    longest = 16
    """Tokens of a response that names no length; as OpenAI's."""
    prefix = "cmpl-"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        body = self._head(self.kind)
        body["choices"] = [
            self.part(place, choice.tokens, choice.finish_reason, whole=True) | _guidance_of(choice)
            for place, choice in enumerate(choices)
        ]
        return body | {"usage": self.usage(choices)}

    def begin(self, choices: int) -> list[dict[str, Any]]:
        """Chunks that a stream begins with."""
        return []

    def chunk(self, place: int, choice: Choice, tokens: list[Token]) -> dict[str, Any] | None:
        """The next chunk of one choice; the last one has what guidance did. None if there is nothing to say yet."""
        reason = tokens[-1].finish_reason
        if not reason and self.likeliest is None and not any(token.text for token in tokens):
            return None
        earlier = choice.tokens[: -len(tokens)]
        part = self.part(place, tokens, reason, whole=False, earlier=earlier)
        part |= _guidance_of(choice) if reason else {}
        return self._head(self.chunk_kind) | {"choices": [part]}

    def end(self, choices: list[Choice]) -> dict[str, Any]:
        """The chunk with the usage, for those who ask for it."""
        return self._head(self.chunk_kind) | {"choices": [], "usage": self.usage(choices)}

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """Tokens read and sampled."""
        completion = sum(len(choice.tokens) for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def part(
        self, place: int, tokens: list[Token], reason: str | None, whole: bool, earlier: Sequence[Token] = ()
    ) -> dict[str, Any]:
        """An entry of `choices`; earlier: the choice's tokens before these, in chunks of their own."""
        text = "".join(token.text for token in tokens)
        return {"index": place, "text": text, "logprobs": self._logprobs(tokens, earlier), "finish_reason": reason}

    def _logprobs(self, tokens: list[Token], earlier: Sequence[Token]) -> dict[str, Any] | None:
        if self.likeliest is None:
            return None
        return {
            "tokens": [self._text(token.token_id) for token in tokens],
            "token_logprobs": [known(token.guided_logprob) for token in tokens],
            "top_logprobs": [{self._text(t): guided for t, _, guided in token.top} for token in tokens],
            "text_offset": _offsets([*earlier, *tokens])[len(earlier) :],
            "base_logprobs": [known(token.logprob) for token in tokens],
            "advantages": [_advantages(token) for token in tokens],
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.prefix + self.id, "object": kind, "created": self.created, "model": self.model}

    def _text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id])


class ChatAnswer(Answer):
    """The form of chat completions."""

    longest = 1 << 30  # as many as there is room for
    prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def begin(self, choices: int) -> list[dict[str, Any]]:
        """A chunk a choice that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._head(self.chunk_kind)
            | {"choices": [{"index": place, "delta": delta, "logprobs": None, "finish_reason": None}]}
            for place in range(choices)
        ]

    def part(
        self, place: int, tokens: list[Token], reason: str | None, whole: bool, earlier: Sequence[Token] = ()
    ) -> dict[str, Any]:
        """An entry of `choices`."""
        text = "".join(token.text for token in tokens)
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if whole else {}
        if not whole:
            content = {"delta": {"content": text} if text else {}}
        return {"index": place, **content, "logprobs": self._logprobs(tokens, earlier), "finish_reason": reason}

    def _logprobs(self, tokens: list[Token], earlier: Sequence[Token]) -> dict[str, Any] | None:
        if self.likeliest is None:
            return None
        entries = [
            self._entry(token.token_id, token.guided_logprob, token.logprob)
            | {"advantages": _advantages(token)}
            | {"top_logprobs": [self._entry(t, guided, base) for t, base, guided in token.top]}
            for token in tokens
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token_id: int, guided: float, base: float) -> dict[str, Any]:
        text = self._text(token_id)
        return {"token": text, "bytes": list(text.encode()), "logprob": known(guided), "base_logprob": known(base)}


def sse(content: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    data = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}\n\n".encode()


def _guidance_of(choice: Choice) -> dict[str, Any]:
    """What guidance did to a choice; nothing for one without."""
    asked = choice.request.guidance
    if not asked.active:
        return {}
    values: dict[str, list[float]] = {name: [] for name in sorted(asked.active)}
    for token in choice.tokens:
        for name, score in token.scores.items():
            if score.value is not None:
                values[name].append(score.value)
    return {
        "guidance": {
            "objectives": {name: asked.objectives[name] for name in values},
            "mean_value": {name: fmean(each) if each else None for name, each in values.items()},
            "kl": sum(token.kl for token in choice.tokens),
            "guided_steps": choice.guided_steps,
            "lost_steps": choice.lost_steps,
        }
    }


def _advantages(token: Token) -> dict[str, float]:
    return {name: score.advantage for name, score in token.scores.items()}


def _offsets(tokens: Iterable[Token]) -> list[int]:
    """Where each token's text begins."""
    return list(accumulate((len(token.text) for token in tokens), initial=0))[:-1]


def known(logprob: float) -> float | None:
    """A log-prob, or null where a server that the base model is behind has not told it; JSON has no NaN."""
    return None if math.isnan(logprob) else logprob
