"""A base model that can only be called: its next tokens and continuations, in its own tokenizer's ids.

A call tells the likeliest next tokens of a text. What the others have together is known, too, and one of them can be
drawn by a second call in which the first are forbidden, so nothing of π0 is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from vas.errors import Rejected, VasError
from vas.models.answers import TORN, Answer, ForeignTokens, Reader, next_tokens
from vas.models.base import BaseModel, load_base
from vas.models.server import Ask, Prefix, Server

if TYPE_CHECKING:
    from vas.config import Base
    from vas.http import Meter

MANY = 8  # choices of a call that are tried
MOST = (200, 100, 50, 20, 10, 5)  # log-probs to ask for, until the server gives as many
SPACING = 7919  # of the seeds of a call's choices, for some count on from it
DRAWS = 4  # of a token that can be sent again
FORBIDDEN = -100.0  # OpenAI's bias of a token that must not come


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a server says of a text's next token: the likeliest, with their log π0, in falling order."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    torn: tuple[int, ...] = ()
    """Other tokens that it tells, which cannot be sent again: halves of characters, where text is sent."""
    torn_share: float = 0.0
    """What these have together."""

    @property
    def rest(self) -> float:
        """log of what all other tokens have together; -inf if nothing is left."""
        left = 1.0 - self.torn_share - math.fsum(math.exp(each) for each in self.logprobs)
        return math.log(left) if left > 1e-6 else -math.inf  # below that it is rounding


class ServedModel:
    """Next tokens and continuations of texts, many calls at once.

    vocabulary: how many token ids there are. Futures that fail raise VasError, for that text alone, or Rejected.
    Raises VasError for a server that cannot be reached, or that has other tokens.
    """

    context_length = None  # only the server knows
    device = torch.device("cpu")

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name, self.tokenizer, self.eos_token_ids = server.name, server.tokenizer, server.eos_token_ids
        self.tokenizer_digest = server.tokenizer_digest
        self.vocabulary = max(len(server.tokenizer), max(server.eos_token_ids) + 1)
        self._pool = ThreadPoolExecutor(server.concurrency, "served model")
        self._read = Reader(server.tokenizer, server.eos_token_ids)
        self._hello = Prefix(server.tokenizer("a").input_ids, (), ({"role": "user", "content": "Hello"},))
        self._whole = server.tokenizer(" a", add_special_tokens=False).input_ids[-1]
        self.top = self._find_top()
        """How many of the likeliest tokens a call tells; 0 if none."""
        self.forbids = self.top > 0 and self._obeys_bias()
        """Whether it can draw one of the tokens that it does not tell."""
        self._most_choices: int | None = None
        self._continues = server.form != "chat" or server.continues  # asked now: later an event loop would wait for it

    def abilities(self) -> str:
        """What the server can do, in words. Raises VasError as continuations do."""
        try:
            self._continue(self._hello, Ask(1, n=MANY))
        except Rejected as rejected:
            raise rejected.error from None
        form = {"ids": "token ids", "text": "text", "chat": "chats only"}[self.server.form or "ids"]
        anew = "" if self._continues else " and begins every response anew"
        bias = "" if not self.top else " and heeds logit_bias" if self.forbids else " but no logit_bias"
        choices = self._most_choices or f"{MANY} or more"
        return f"takes {form}{anew}, tells {self.top or 'no'} log-probs{bias}, gives {choices} choices a call"

    def check(self, blockwise: bool, whole: bool) -> None:
        """Raise VasError if the server can't do what this way of guiding needs.

        blockwise: continuations instead of next tokens. whole: a response is one continuation.
        """
        if not (self.top or blockwise):
            raise VasError(
                "the server tells no log-probs of next tokens",
                self.server.client.url,
                "guide by blocks (schedule `block:8`), or call one that does (vLLM, llama.cpp)",
            )
        if not self._continues and not (blockwise and whole):
            raise VasError(
                "the server takes chats only, and begins every response anew: it cannot be asked for what comes next",
                self.server.client.url,
                "guide by whole responses: schedule `block:N` with N of at least max_tokens",
            )

    def ahead(self, prefix: Prefix) -> Future[Ahead]:
        """The next tokens."""
        return self._pool.submit(self._ahead, prefix, self.top)

    def draw(
        self, prefix: Prefix, ahead: Ahead, seed: int, bias: Mapping[int, float] | None = None
    ) -> Future[tuple[int, float]]:
        """One of the tokens that `ahead` does not tell, as π0 has them at temperature 1, and its log π0.

        The latter is NaN if it is not told. bias: of the request, in OpenAI's sense.
        """
        return self._pool.submit(self._draw, prefix, ahead, seed, bias or {})

    def continuations(self, prefix: Prefix, ask: Ask) -> list[Future[list[Answer]]]:
        """`ask.n` continuations, in as few calls as the server allows."""
        most = self._most_choices or ask.n
        parts = range(0, ask.n, most)
        seed = ask.seed or 0
        return [
            self._pool.submit(
                self._continue, prefix, replace(ask, n=min(most, ask.n - start), seed=seed + SPACING * start)
            )
            for start in parts
        ]

    def close(self) -> None:
        """Break off all calls."""
        self.server.client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _continue(self, prefix: Prefix, ask: Ask) -> list[Answer]:
        found: list[Answer] = []
        most = self._most_choices or ask.n
        while len(found) < ask.n:
            n = min(ask.n - len(found), most)
            try:
                choices = self.server.ask(prefix, replace(ask, n=n, seed=(ask.seed or 0) + SPACING * len(found)))
            except Rejected as rejected:
                if rejected.whole or n == 1:
                    raise _alone(rejected) from None
                most = n // 2  # if it is the number that it minds
                continue
            if most < (self._most_choices or ask.n):
                self._most_choices = most
            if len(choices) < n:
                most = self._most_choices = len(choices)
            found += [self._answer(choice, bool(ask.stop)) for choice in choices]
        return found[: ask.n]

    def _find_top(self) -> int:
        for most in MOST:
            try:
                return min(most, len(self._told(self._hello, most, self.server.insist)))
            except Rejected as rejected:
                if rejected.whole:
                    raise rejected.error from None
        self.server.tells = False  # whatever number is asked for, it refuses; or log-probs are not what it minds
        self._ask(self._hello, Ask(1, logprobs=0))
        return 0

    def _obeys_bias(self) -> bool:
        try:
            [choice, *_] = self._ask(self._hello, Ask(1, logit_bias={self._whole: -FORBIDDEN}))
            return self._answer(choice).tokens[:1] == [self._whole]
        except VasError:
            return False

    def _ahead(self, prefix: Prefix, top: int) -> Ahead:
        best: dict[int, float] = {}
        torn: dict[int, float] = {}
        for token, logprob in self._told(prefix, top, self._ask):
            if token < self.vocabulary:
                kept = best if self._can_stand(prefix, token) else torn
                kept[token] = max(logprob, kept.get(token, -math.inf))
        if not best:
            what = "no log-probs of next tokens but halves of characters" if torn else "no log-probs of next tokens"
            raise VasError(f"the server tells {what}", self.server.client.url)
        ordered = sorted(best.items(), key=lambda item: -item[1])
        share = math.fsum(map(math.exp, torn.values()))
        return Ahead(tuple(token for token, _ in ordered), tuple(at for _, at in ordered), tuple(torn), share)

    def _told(self, prefix: Prefix, top: int, ask: Callable[[Prefix, Ask], list[Any]]) -> list[tuple[int, float]]:
        """What the server tells beside a token that it draws; nothing if it tells nothing.

        Where the token is half a character, llama.cpp tells nothing. Then it is made to draw a whole one: of all
        servers known, log-probs are those before any bias.
        """
        for bias in ({}, {self._whole: -FORBIDDEN}):
            [choice, *_] = ask(prefix, Ask(1, logprobs=top, logit_bias=bias))
            with self._ours():
                told = next_tokens(choice, self._read)
            if told or TORN not in str(choice.get("text") or TORN):
                break
        return told

    def _can_stand(self, prefix: Prefix, token: int) -> bool:
        """Whether a prefix with this token can be sent: as text, characters must be whole."""
        return self.server.form == "ids" or not self.server.text([*prefix.response[-8:], token]).endswith(TORN)

    def _draw(self, prefix: Prefix, ahead: Ahead, seed: int, bias: Mapping[int, float]) -> tuple[int, float]:
        forbidden = dict(bias) | dict.fromkeys((*ahead.tokens, *ahead.torn), FORBIDDEN)
        for attempt in range(DRAWS):
            [choice, *_] = self._ask(prefix, Ask(1, seed=seed + attempt, logit_bias=forbidden))
            try:
                told = self._answer(choice)
            except VasError:  # half a character, and its token is not told
                continue
            token, logprob = told.tokens[0], told.logprobs[0]
            if token not in ahead.tokens and token < self.vocabulary and self._can_stand(prefix, token):
                return token, logprob
        raise VasError(
            "the server draws tokens that it was not to draw, or torn characters",
            self.server.client.url,
            "set top_k to no more than the log-probs it tells, so that none of the others is drawn",
        )

    def _ask(self, prefix: Prefix, ask: Ask) -> list[Any]:
        try:
            return self.server.ask(prefix, ask)
        except Rejected as rejected:
            raise _alone(rejected) from None

    def _answer(self, choice: Any, stops: bool = False) -> Answer:
        with self._ours():
            return self._read(choice, self.server.client.url, stops)

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """What is read in it must be tokens of this vocabulary."""
        try:
            yield
        except ForeignTokens:
            raise Rejected(foreign(self.server), whole=True) from None


def open_base(spec: Base, device: str | None = None, meter: Meter | None = None) -> BaseModel | ServedModel:
    """The base model, loaded or only called. Raises VasError as `load_base` and ServedModel do.

    meter: of a server's calls.
    """
    return ServedModel(Server(spec, meter)) if spec.called else load_base(spec, device)


def foreign(server: Server) -> VasError:
    """The server's tokens are not ours."""
    return VasError(
        f"the server's tokens are not those of {server.name}",
        server.client.url,
        "let base.model or base.tokenizer name the model that the server serves, or base.served_name ours there",
    )


def _alone(rejected: Rejected) -> Exception:
    """A refusal that concerns one text only is its VasError."""
    return rejected if rejected.whole else rejected.error
