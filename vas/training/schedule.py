"""The learning rate as a function of the step, so that nothing of it has to be kept."""

from __future__ import annotations

import math

LEAST = 0.1


def factor(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step: a linear rise over `warmup`·steps, then a cosine down to a tenth."""
    rise = max(1, int(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    share = min(1.0, (step - rise) / max(1, steps - rise))
    return LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * share))
