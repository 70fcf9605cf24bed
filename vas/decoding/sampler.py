"""log π0 as each request wants it, and drawing tokens from log π.

Sampling is counter-based: the random numbers of position t of a request are a function of (seed, t). So
a request gives the same tokens alone or in a crowd, and before or after a replica died.

Log-probs are the same up to rounding only, for a batch's shape decides in which order sums are taken. A token is drawn
by a race that hardly minds: it is the arg-max of log-probs plus Gumbel noise (Gumbel, 1954; Maddison et al., 2014), and
changes only if the first two are as close as the rounding. Where a random number is looked up in the cumulative
distribution instead, each of its hundreds of steps may pass it by.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vas import guidance
from vas.decoding.graphs import upload
from vas.decoding.sequence import Drawn, SamplingParams, Sequence

BLOCK = 256

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def policy(logits_BV: Tensor, knobs: Many[SamplingParams]) -> Tensor:
    """log π0 of the next tokens [B, V]: each row with its own bias, temperature and truncation."""
    biased = [(b, *item) for b, k in enumerate(knobs) for item in k.logit_bias.items()]
    if biased:
        rows, tokens, amounts = (upload(each, logits_BV.device) for each in zip(*biased, strict=True))
        logits_BV = logits_BV.float().index_put((rows, tokens), amounts.float(), accumulate=True)
    return guidance.policy_logprobs(
        logits_BV,
        torch.tensor([float(k.temperature) for k in knobs]),
        torch.tensor([k.top_k for k in knobs]),
        torch.tensor([float(k.top_p) for k in knobs]),
        torch.tensor([float(k.min_p) for k in knobs]),
    )


def draw(
    sequences: Many[Sequence],
    base_BV: Tensor,
    guided_BV: Tensor,
    kl_B: Tensor,
    about: Callable[[Tensor], Tensor],
    vocabulary: int | None = None,
) -> tuple[list[Drawn], list[list[float]]]:
    """The next token of every sequence, with its log π0 and log π, and KL(π‖π0) of the step.

    about: finds more figures [B, X] of the tokens drawn [B]. They are returned beside them, so that a GPU is
    waited for once. vocabulary: columns that are tokens, the first ones; None if all are.
    """
    device, knobs = base_BV.device, [s.request.sampling for s in sequences]
    seeds = [fork(s.request.sampling.seed, s.fork) for s in sequences]
    noise = gumbels(seeds, [len(s.response) for s in sequences], entrants(base_BV.shape[1]))
    # continuations of a greedy request are sampled all the same, and the best of them is taken
    greedy = torch.tensor([k.temperature == 0 and s.block is None for k, s in zip(knobs, sequences, strict=True)])
    chosen_B = sample(guided_BV, upload(noise, device), greedy)
    chosen_B1 = chosen_B[:, None]
    taken = [each.gather(1, chosen_B1) for each in (base_BV, guided_BV)]
    token_B1 = chosen_B1.to(base_BV)  # exact: there are fewer tokens than float32 has whole numbers
    figures = torch.cat([token_B1, *taken, kl_B[:, None], about(chosen_B).to(base_BV)], dim=1).tolist()
    top = _likeliest(base_BV[:, :vocabulary], guided_BV[:, :vocabulary], [k.logprobs for k in knobs])
    drawn = [Drawn(int(row[0]), row[1], row[2], row[3], each) for row, each in zip(figures, top, strict=True)]
    return drawn, [row[4:] for row in figures]


def _likeliest(base_BV: Tensor, guided_BV: Tensor, counts: list[int]) -> list[tuple[tuple[int, float, float], ...]]:
    """For each row so many of the likeliest tokens under π, each with its log π0 and log π."""
    most = min(max(counts), base_BV.shape[1])
    if not most:
        return [()] * len(counts)
    top = guided_BV.topk(most, dim=-1)
    columns = top.indices.tolist(), base_BV.gather(1, top.indices).tolist(), top.values.tolist()
    rows = [tuple(zip(*row, strict=True))[:count] for *row, count in zip(*columns, counts, strict=True)]
    return [tuple(each for each in row if each[2] > guidance.NEVER) for row in rows]


def gumbels(seeds: list[int], positions: list[int], count: int) -> np.ndarray:
    """So many numbers from a standard Gumbel distribution for each (seed, position): [B, count], float64.

    SplitMix64 (Steele et al., 2014) applied to the seed, then to the seed's output plus the position, and then to
    that output plus the place in the row.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64) + _GAMMA)
        state = _mix(state + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * _GAMMA)
        bits = _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA)
    return -np.log(-np.log(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53))


def fork(seed: int, number: int) -> int:
    """A seed for the `number`-th of several continuations of one request; the 0th goes on with the request's own."""
    if number == 0:
        return seed
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) ^ _GAMMA)
        return int(_mix(state + np.array([number & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) * _GAMMA)[0])


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def entrants(vocab: int) -> int:
    """Numbers that a draw from so many tokens needs: one for each block, and one for each place in a block."""
    return -(-vocab // BLOCK) + BLOCK


def sample(logprobs_BV: Tensor, gumbels_BN: Tensor, greedy_B: Tensor) -> Tensor:
    """Draw a token a row by the Gumbel race with `entrants(V)` numbers a row; arg-max where greedy.

    Two races, first of blocks of tokens and then inside the one that won, need few random numbers and read the
    vocabulary once. What has probability 0 never wins.
    """
    rows, vocab = logprobs_BV.shape
    probs_BV = logprobs_BV.exp()
    blocks = (F.pad(probs_BV, (0, -vocab % BLOCK)) if vocab % BLOCK else probs_BV).view(rows, -1, BLOCK)
    count = blocks.shape[1]
    block = (blocks.sum(-1).log() + gumbels_BN[:, :count]).argmax(-1)
    inside = blocks[torch.arange(rows, device=block.device), block]
    drawn = block * BLOCK + (inside.log() + gumbels_BN[:, count:]).argmax(-1)
    if not bool(greedy_B.any()):
        return drawn
    return torch.where(upload(greedy_B, drawn.device), logprobs_BV.argmax(dim=-1), drawn)
