"""How good a value model is, on rollouts it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

CALIBRATION_BINS = 10


@dataclass
class Held:
    """Predictions and outcomes of held-out states, gathered batch by batch (NumPy, one entry a state)."""

    value: list[np.ndarray] = field(default_factory=list)  # [M, J], standardised
    reward: list[np.ndarray] = field(default_factory=list)  # [M, J], standardised
    progress: list[np.ndarray] = field(default_factory=list)  # [M], share of the response that is written

    def add(self, value: np.ndarray, reward: np.ndarray, progress: np.ndarray) -> None:
        """Take in the states of one batch."""
        self.value.append(value)
        self.reward.append(reward)
        self.progress.append(progress)

    def extend(self, other: Held) -> None:
        """Take in another worker's states."""
        self.value += other.value
        self.reward += other.reward
        self.progress += other.progress

    def report(self, objectives: tuple[str, ...]) -> dict[str, Any]:
        """Per objective: explained variance, by quarter of the response too, rank correlation, calibration table."""
        if not self.value:
            return {}
        value, reward = np.concatenate(self.value), np.concatenate(self.reward)
        quarter = np.minimum((np.concatenate(self.progress) * 4).astype(int), 3)
        return {
            name: {
                "explained_variance": explained_variance(value[:, j], reward[:, j]),
                "by_quarter": [explained_variance(value[quarter == q, j], reward[quarter == q, j]) for q in range(4)],
                "rank_correlation": rank_correlation(value[:, j], reward[:, j]),
                "calibration": calibration(value[:, j], reward[:, j]),
            }
            for j, name in enumerate(objectives)
        }


def explained_variance(value: np.ndarray, reward: np.ndarray) -> float:
    """1 − Var(R − V)/Var(R): 1 is perfect, 0 is what a constant reaches; NaN when R never varies."""
    if not len(reward) or np.ptp(reward) == 0:  # the variance of a constant may be 1e-32
        return float("nan")
    return 1 - float(np.var(reward - value) / np.var(reward))


def rank_correlation(value: np.ndarray, reward: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, those of equals being their mean; NaN when either never varies."""
    if not len(value) or np.ptp(value) == 0 or np.ptp(reward) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(value), _ranks(reward))[0, 1])


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal numbers share the mean of theirs."""
    _, which, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]


def calibration(value: np.ndarray, reward: np.ndarray, bins: int = CALIBRATION_BINS) -> list[dict[str, float]]:
    """Mean value against mean reward in bins of equal count, ordered by value."""
    order = np.argsort(value, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [
        {"value": float(value[part].mean()), "reward": float(reward[part].mean()), "states": len(part)}
        for part in parts
    ]
