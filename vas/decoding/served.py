"""Runs a base model that is behind a server: in the engine it takes the place of `runner.ModelRunner`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from vas.decoding.sampler import fork
from vas.decoding.sequence import Drawn, SamplingParams
from vas.decoding.sequence import Sequence as Running
from vas.models.served import Ahead, ServedModel


class Texts:
    """The tokens of the sequences, in place of their keys and values, which the server has."""

    limit = None

    def __init__(self) -> None:
        self.tokens: dict[Hashable, list[int]] = {}

    def fits(self, rows: int, width: int) -> bool:
        """There is always room."""
        return True

    def allocated(self, rows: int, width: int) -> int:
        """Nothing is."""
        return 0

    def add(self, owner: Hashable) -> None:
        """A new sequence."""
        self.tokens[owner] = []

    def copy(self, source: Hashable, target: Hashable, length: int) -> None:
        """Begin `target` as `source` begins."""
        self.tokens[target] = self.tokens[source][:length]

    def free(self, owner: Hashable) -> None:
        """Forget a sequence."""
        del self.tokens[owner]

    def memory(self) -> int:
        """Bytes of keys and values."""
        return 0


class ServedRunner:
    """Asks the server for the next tokens of every sequence, all at once.

    Log-probs have a column more than there are tokens, for all that the server does not tell: its mass is known. Where
    that is drawn, `settle` has the server draw one of them.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.device = model.device
        self.cache = Texts()
        self._ahead: dict[Hashable, Ahead] = {}

    def extend(self, owners: Sequence[Hashable], tokens: Sequence[Sequence[int]], logits: bool = False) -> Tensor:
        """Append tokens to sequences; with logits, log π0 of what follows each: [B, V + 1], else nothing."""
        for owner, each in zip(owners, tokens, strict=True):
            self.cache.tokens[owner] += each
        width = self._model.vocabulary + 1
        found = torch.full((len(owners) if logits else 0, width), -math.inf)
        if not logits:
            return found
        told = self._model.ahead([self.cache.tokens[owner] for owner in owners])
        self._ahead = dict(zip(owners, told, strict=True))
        for row, ahead in zip(found, told, strict=True):
            row[list(ahead.tokens)] = torch.tensor(ahead.logprobs)
            row[-1] = ahead.rest
        return found

    def cut(self, logprobs_BV: Tensor, knobs: Sequence[SamplingParams]) -> None:
        """Leave out what the server has not told where its mass says nothing: at other temperatures, or truncated."""
        for row, knob in zip(logprobs_BV, knobs, strict=True):
            if knob.temperature != 1 or knob.top_k or knob.top_p < 1 or knob.min_p:
                row[-1] = -math.inf

    def settle(self, sequences: Sequence[Running], drawn: Sequence[Drawn]) -> list[Drawn]:
        """What was drawn, with a token that the server draws where it was one that it had not told."""
        return [self._settle(*each) for each in zip(sequences, drawn, strict=True)]

    def _settle(self, sequence: Running, drawn: Drawn) -> Drawn:
        if drawn.token < self._model.vocabulary:
            return drawn
        seed = fork(sequence.request.sampling.seed, len(sequence.response) + 1) & 0x7FFFFFFF
        token, logprob = self._model.draw(self.cache.tokens[sequence.owner], self._ahead[sequence.owner], seed)
        guided = drawn.guided_logprob - drawn.logprob + logprob  # what no value model has looked at keeps its odds
        return drawn._replace(token=token, logprob=logprob, guided_logprob=guided)
