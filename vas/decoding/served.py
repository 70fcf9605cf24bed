"""Runs a base model that can only be called: in the engine it takes the place of `runner.ModelRunner`.

A step of the engine takes along the sequences whose answers are there; the others are not waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import torch
from torch import Tensor

from vas.decoding.base_runner import Arrival
from vas.decoding.blocks import Block
from vas.decoding.cache import allocated
from vas.decoding.sampler import fork
from vas.decoding.sequence import Drawn, SamplingParams
from vas.decoding.sequence import Sequence as Running
from vas.models.answers import Answer
from vas.models.served import Ahead, ServedModel
from vas.models.server import Ask, Prefix

PATIENCE = 0.05  # seconds of waiting for an answer, between looks for new requests


class Calls:
    """The calls of the sequences, in place of their keys and values, which the server has.

    It counts room as if these were here, for a value model's are: limit is of its tokens.
    """

    allocated = staticmethod(allocated)

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.forget: Callable[[Hashable], Any] = lambda owner: None
        """Told of each sequence that leaves."""
        self.of: dict[Hashable, list[Future[Any]]] = {}

    def fits(self, rows: int, width: int) -> bool:
        """Whether so many sequences of up to `width` tokens have room."""
        return self.limit is None or self.allocated(rows, width) <= self.limit

    def add(self, owner: Hashable) -> None:
        """A new sequence, not asked for yet."""

    def copy(self, source: Hashable, target: Hashable, length: int) -> None:
        """Begin `target` as `source` begins."""

    def free(self, owner: Hashable) -> None:
        """Forget a sequence."""
        for future in self.of.pop(owner, ()):
            future.cancel()
        self.forget(owner)

    def memory(self) -> int:
        """Bytes of keys and values."""
        return 0


class ServedRunner:
    """Asks the server for what comes next in every sequence.

    Log-probs have a column more than there are tokens, for all that the server does not tell: its mass is known. Where
    that is drawn, the server is asked to draw one of them, which takes another call.
    """

    joint = 0  # the server reads prompts

    def __init__(self, model: ServedModel, limit: int | None = None) -> None:
        self._model = model
        self.device, self.vocabulary = model.device, model.vocabulary
        self.cache = Calls(limit)
        self.cache.forget = lambda owner: (self._ahead.pop(owner, None), self._half.pop(owner, None))
        self._rest_V = torch.arange(model.vocabulary + 1) == model.vocabulary
        self._ahead: dict[Hashable, Ahead] = {}
        self._half: dict[Hashable, Drawn] = {}
        """What was drawn where the server has not told the token yet."""

    def spare(self) -> None:
        """Nothing: the server has the model."""

    def read(self, owners: Sequence[Hashable], tokens: Sequence[Sequence[int]]) -> None:
        """Nothing: the server reads prompts."""

    def arrived(self, sequences: Sequence[Running]) -> Arrival:
        """What the server has answered; all are asked for, blocks as one. Waits a little if there is no answer."""
        calls = self.cache.of
        sequences = [sequence for sequence in sequences if sequence.fork == 0]
        for sequence in sequences:
            if sequence.owner not in calls:
                calls[sequence.owner] = self._ask(sequence)
        waiting = {future for sequence in sequences for future in calls[sequence.owner] if not future.done()}
        if waiting and not any(_done(calls[sequence.owner]) for sequence in sequences):
            wait(waiting, PATIENCE, FIRST_COMPLETED)
        arrival = Arrival()
        for sequence in sequences:
            if not _done(calls[sequence.owner]):
                continue
            errors = [future.exception() for future in calls[sequence.owner]]
            error = next((each for each in errors if isinstance(each, Exception)), None)
            if error is not None:
                arrival.failed.append((sequence, error))
            elif sequence.block is not None:
                self._fill(sequence.block)
                arrival.blocks.append(sequence.block)
            elif isinstance(calls[sequence.owner][0].result(), Ahead):
                arrival.ahead.append(sequence)
            else:
                arrival.drawn.append((sequence, *self._drawn(sequence)))
        return arrival

    def _fill(self, block: Block) -> None:
        """Give the continuations of a block, whose answer is there, their tokens."""
        trunk = block.continuations[0]
        answers = [answer for call in self.cache.of.pop(trunk.owner) for answer in call.result()]
        for each, answer in zip(block.continuations, answers, strict=True):
            each.response += answer.tokens
            each.pending = _tokens(answer)
            each.cached, each.resting = len(each) - 1, True
            each.completion.base_positions += len(answer.tokens)

    def _drawn(self, sequence: Running) -> tuple[list[Drawn], str | None]:
        """The rest of a response that came in one call, and why it ends; or the token that the server has drawn."""
        [call] = self.cache.of.pop(sequence.owner)
        found = call.result()
        if (half := self._half.pop(sequence.owner, None)) is not None:
            token, logprob = found
            guided = half.guided_logprob - half.logprob + logprob  # what no value model has looked at keeps its odds
            sequence.cached += 1
            return [half._replace(token=token, logprob=logprob, guided_logprob=guided)], None
        sequence.completion.base_positions += len(found[0].tokens)
        return _tokens(found[0]), found[0].reason

    def flight(self, sequences: Sequence[Running]) -> None:
        """None: it is the server's."""

    def logits(self, sequences: Sequence[Running]) -> Tensor:
        """log π0 of what follows sequences whose answers are there: [B, V + 1]."""
        owners = [sequence.owner for sequence in sequences]
        told = [self.cache.of.pop(owner)[0].result() for owner in owners]
        self._ahead |= zip(owners, told, strict=True)
        logprobs_BV = logprobs(told, self._model.vocabulary)
        self._cut(logprobs_BV, [sequence.request.sampling for sequence in sequences])
        return logprobs_BV

    def _cut(self, logprobs_BV: Tensor, knobs: Sequence[SamplingParams]) -> None:
        """Leave out what the server has not told where its mass says nothing: at other temperatures, or truncated."""
        for row, knob in zip(logprobs_BV, knobs, strict=True):
            if not self._model.forbids or knob.temperature not in (0, 1) or knob.top_k or knob.top_p < 1 or knob.min_p:
                row[-1] = -math.inf

    def certain(self, logprobs_BV: Tensor, knobs: Sequence[SamplingParams]) -> Tensor:
        """Log-probs in which a greedy request finds only what the server has told."""
        greedy = torch.tensor([knob.temperature == 0 for knob in knobs])
        if not greedy.any():
            return logprobs_BV
        return logprobs_BV.masked_fill(greedy[:, None] & self._rest_V, -math.inf)

    def settle(self, sequences: Sequence[Running], drawn: Sequence[Drawn]) -> list[Drawn | None]:
        """What was drawn; None where it is of what the server has not told, which then is asked for."""
        vocab = self._model.vocabulary
        settled: list[Drawn | None] = []
        for sequence, each in zip(sequences, drawn, strict=True):
            ahead = self._ahead.pop(sequence.owner)
            if each.token < vocab:
                settled.append(each)
                continue
            knobs = sequence.request.sampling
            seed = fork(knobs.seed, len(sequence.response) + 1) & 0x7FFFFFFF
            self._half[sequence.owner] = each
            self.cache.of[sequence.owner] = [self._model.draw(_prefix(sequence), ahead, seed, knobs.logit_bias)]
            settled.append(None)
        return settled

    def _ask(self, sequence: Running) -> list[Future[Any]]:
        request, prefix, block = sequence.request, _prefix(sequence), sequence.block
        knobs, left = request.sampling, request.sampling.max_tokens - len(sequence.response)
        plain = not request.guidance.active and not knobs.logprobs  # then the server may as well go on to the end
        if not block and not plain:
            return [self._model.ahead(prefix)]
        ask = Ask(
            min(request.guidance.block_size or left, left) if block else left,
            knobs.temperature or (1.0 if block else 0.0),  # of a greedy request's continuations the best is taken
            knobs.top_p,
            knobs.top_k,
            knobs.min_p,
            fork(knobs.seed, len(sequence.response) + 1) & 0x7FFFFFFF,
            n=len(block.continuations) if block else 1,
            stop=() if block else knobs.stop,  # in a block it may be in a continuation that is not chosen
            logit_bias=knobs.logit_bias,
        )
        return list(self._model.continuations(prefix, ask))


def logprobs(told: Sequence[Ahead], vocabulary: int) -> Tensor:
    """log π0 of all tokens, -inf for those that are not told, and of these together: [B, V + 1]."""
    found = torch.full((len(told), vocabulary + 1), -math.inf)
    for row, ahead in zip(found, told, strict=True):
        row[list(ahead.tokens)] = torch.tensor(ahead.logprobs)
        row[-1] = ahead.rest
    return found


def _tokens(answer: Answer) -> list[Drawn]:
    """Tokens that the server has sampled from π0."""
    return [Drawn(token, at, at, 0.0) for token, at in zip(answer.tokens, answer.logprobs, strict=True)]


def _prefix(sequence: Running) -> Prefix:
    return Prefix(sequence.request.prompt_token_ids, tuple(sequence.response), sequence.request.messages)


def _done(futures: list[Future[Any]]) -> bool:
    return all(future.done() for future in futures)
