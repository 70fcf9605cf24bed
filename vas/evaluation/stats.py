"""The statistics of the report: best-of-N without waste, bootstrap intervals, distinct-n."""

from __future__ import annotations

import math

import numpy as np


def best_of_n_weights(count: int, n: int) -> np.ndarray:
    """Chance that the i-th best of `count` samples is the best of n drawn without replacement: [count].

    So the mean over all subsets is exact, instead of one draw's luck (0 is the best sample).
    """
    total = math.comb(count, n)
    return np.array([math.comb(count - 1 - i, n - 1) / total for i in range(count)])


def best_of_n_kl(n: int) -> float:
    """Upper bound of KL(best-of-n ‖ π0): log n − (n−1)/n (Stiennon et al., arXiv:2009.01325), nats."""
    return math.log(n) - (n - 1) / n


def bootstrap_interval(per_prompt: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling prompts; NaN without data."""
    if not len(per_prompt):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = [generator.choice(per_prompt, len(per_prompt)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def distinct_n(responses: list[list[int]], n: int) -> float:
    """Different n-grams ÷ n-grams, over all responses; NaN when there is none."""
    grams = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
