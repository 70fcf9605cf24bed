"""Blockwise guidance: k continuations of b tokens are sampled from π0, and one of them is drawn by exp(Σ β·V).

Controlled Decoding (arXiv:2310.17022) and IVO (arXiv:2503.02368) guide so. The value model runs the b
tokens of each continuation instead of k candidates for every token, and the base model decodes k rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from vas.decoding.guide import Guide
from vas.decoding.sampler import entrants, fork, gumbels, sample
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

    @property
    def complete(self) -> bool:
        """Whether every continuation has its tokens."""
        return all(each.resting for each in self.continuations)


@torch.inference_mode()
def choose(blocks: Many[Block], guide: Guide) -> list[tuple[Sequence, list[Drawn]]]:
    """From each block draw a continuation by exp(Σ β·V) of its last state, or the best if the request is greedy.

    One pass of a value model for all blocks. Returns each choice with its tokens and their figures: the weight
    of the choice, log(p·k), counts as part of the last token's log π, and the choice's KL against a uniform
    one as that token's KL. A stop string inside a block cuts it after the choice.
    """
    many = [each for block in blocks for each in block.continuations]
    if not many:
        return []
    last = torch.tensor([[each.last_token] for each in many])
    strengths = guide.strengths(many)
    rows = list(range(len(many)))
    values_B1J = guide.values(many, rows, last, torch.ones_like(last, dtype=torch.bool), strengths, unread=1)
    logits_B = (values_B1J[:, 0] * strengths).sum(-1).double()
    split = logits_B.split([len(block.continuations) for block in blocks])
    return [_choose(block, logits_K) for block, logits_K in zip(blocks, split, strict=True)]


def _choose(block: Block, logits_K: Tensor) -> tuple[Sequence, list[Drawn]]:
    trunk, k = block.continuations[0], len(block.continuations)
    logprobs = torch.log_softmax(logits_K, dim=0)
    probs = logprobs.exp()
    start = len(trunk.response) - len(trunk.pending)
    noise = torch.from_numpy(gumbels([fork(trunk.request.sampling.seed, CHOICE)], [start], entrants(k)))
    greedy = torch.tensor([trunk.request.sampling.temperature == 0])
    number = int(sample(logprobs[None], noise.to(logprobs.device), greedy))
    trunk.completion.guided_steps += 1
    chosen = block.continuations[number]
    *before, last = chosen.pending
    weight, kl = float(logprobs[number]) + math.log(k), float((probs * logprobs).sum()) + math.log(k)
    return chosen, [*before, last._replace(guided_logprob=last.guided_logprob + weight, kl=last.kl + kl)]
