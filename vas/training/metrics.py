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
        """Per objective: explained variance, by quarter of the response, and the calibration table."""
        if not self.value:
            return {}
        value, reward = np.concatenate(self.value), np.concatenate(self.reward)
        quarter = np.minimum((np.concatenate(self.progress) * 4).astype(int), 3)
        return {
            name: {
                "explained_variance": explained_variance(value[:, j], reward[:, j]),
                "by_quarter": [explained_variance(value[quarter == q, j], reward[quarter == q, j]) for q in range(4)],
                "calibration": calibration(value[:, j], reward[:, j]),
            }
            for j, name in enumerate(objectives)
        }


def explained_variance(value: np.ndarray, reward: np.ndarray) -> float:
    """1 − Var(R − V)/Var(R): 1 is perfect, 0 is what a constant reaches; NaN when R never varies."""
    spread = float(np.var(reward)) if len(reward) else 0.0
    return 1 - float(np.var(reward - value)) / spread if spread > 0 else float("nan")


def calibration(value: np.ndarray, reward: np.ndarray) -> list[dict[str, float]]:
    """Mean value against mean reward in bins of equal count, ordered by value."""
    order = np.argsort(value, kind="stable")
    bins = [part for part in np.array_split(order, CALIBRATION_BINS) if len(part)]
    return [
        {"value": float(value[part].mean()), "reward": float(reward[part].mean()), "states": len(part)} for part in bins
    ]
