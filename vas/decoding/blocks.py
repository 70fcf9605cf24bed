"""Blockwise guidance: k continuations of b tokens are sampled from π0, and one of them is drawn by exp(Σ β·V).

Controlled Decoding (arXiv:2310.17022) and IVO (arXiv:2503.02368) guide so. The value model runs the b
tokens of each continuation instead of k candidates for every token, and the base model decodes k rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vas.decoding.guide import Guide
from vas.decoding.sampler import fork, uniforms
from vas.decoding.sequence import Drawn, Sequence

CHOICE = -1  # the random numbers that choose between continuations; theirs are forks 0, 1, …


@dataclass(slots=True, eq=False)
class Block:
    """The continuations of one request. The first is the sequence that was admitted, the trunk."""

    continuations: list[Sequence]

    @classmethod
    def of(cls, trunk: Sequence) -> Block:
        """Begin with continuations that hold nothing yet but the trunk's tokens."""
        guiding = trunk.request.guidance
        others = [
            Sequence(trunk.request, trunk.number, trunk.completion, trunk.text, list(trunk.response), fork=number)
            for number in range(1, guiding.candidates)
        ]
        block = cls([trunk, *others])
        for each in block.continuations:
            each.block = block
        return block

    @torch.inference_mode()
    def choose(self, guide: Guide) -> tuple[Sequence, Iterator[Drawn]]:
        """Draw a continuation by exp(Σ β·V) of its last state, or take the best if the request is greedy.

        Returns it, and its tokens with their figures. The weight of the choice, log(p·k), counts as part of
        the last token's log π, and the choice's KL against a uniform one as that token's KL.
        """
        many, request = self.continuations, self.continuations[0].request
        last = torch.tensor([[each.last_token] for each in many])
        strengths = guide.strengths(many)
        rows = list(range(len(many)))
        values_K1J = guide.values(many, rows, last, torch.ones_like(last, dtype=torch.bool), strengths, unread=1)
        logits = (values_K1J[:, 0] * strengths).sum(-1).double()
        logprobs = torch.log_softmax(logits, dim=0)
        probs = logprobs.exp()
        if request.sampling.temperature == 0:
            number = int(logits.argmax())
        else:
            start = len(many[0].response) - len(many[0].pending)
            point = uniforms([fork(request.sampling.seed, CHOICE)], [start])[0]
            number = min(int((probs.cumsum(0) <= point).sum()), len(many) - 1)
        many[0].completion.guided_steps += 1
        chosen, weight = many[number], float(logprobs[number]) + math.log(len(many))
        kl = float((probs * logprobs).sum()) + math.log(len(many))
        return chosen, _weighted(chosen.pending, weight, kl)


def _weighted(tokens: list[Drawn], weight: float, kl: float) -> Iterator[Drawn]:
    """The tokens, with the choice's weight and KL on the last one."""
    *before, last = tokens
    yield from before
    yield last._replace(guided_logprob=last.guided_logprob + weight, kl=last.kl + kl)
