"""Counter-based sampling: the random number of position t of a request is a function of (seed, t).

So a request gives the same tokens alone or in a crowd, and before or after a replica died.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: list[int], positions: list[int]) -> np.ndarray:
    """A uniform number in [0, 1) for each (seed, position): [B], float64.

    SplitMix64 (Steele et al., 2014) applied to the seed, then to the seed's output plus the position.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64) + _GAMMA)
        bits = _mix(state + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(logprobs_BV: Tensor, uniforms_B: Tensor, greedy_B: Tensor) -> Tensor:
    """Draw a token a row by inverting the cumulative distribution at `uniforms_B`; arg-max where greedy.

    The inversion takes two steps, first to a block of tokens and then to one inside it, which
    reads the vocabulary once instead of summing it up in double precision.
    """
    rows, vocab = logprobs_BV.shape
    blocks = F.pad(logprobs_BV.exp(), (0, -vocab % BLOCK)).view(rows, -1, BLOCK)
    mass = blocks.sum(-1).double().cumsum(-1)
    target = uniforms_B * mass[:, -1]
    block = torch.searchsorted(mass, target[:, None], right=True)
    before = F.pad(mass, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(rows, device=block.device)[:, None], block].squeeze(1).double().cumsum(-1)
    inside *= (mass.gather(1, block) - before) / inside[:, -1:]  # the two roundings of the block's mass agree
    offset = torch.searchsorted(inside, target[:, None] - before, right=True)
    # rounding may step past the last token that has any probability: never draw an excluded one
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    drawn = (block * BLOCK + torch.minimum(offset, last)).squeeze(1)
    return torch.where(greedy_B, logprobs_BV.argmax(dim=-1), drawn) if bool(greedy_B.any()) else drawn
