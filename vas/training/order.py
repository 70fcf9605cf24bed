"""The order in which an epoch reads its rows: a function of the seed and the epoch alone.

It does not depend on the number of workers, so a run can go on with more or fewer of them at any step, and
a step holds the same rows whoever computes it. Files come in a random order; rows are shuffled within
windows of some files, so that a worker never holds more than two windows; and rows of like length share a
step, so that little is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW_ROWS = 8192  # rows that are shuffled among each other
GROUPED = 16  # steps whose rows are sorted by length together


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step: the rows of all workers together, as indices into the index."""

    window: int
    """Which window of files holds them, counted in the epoch."""
    rows: np.ndarray
    """Ordered by length."""

    def share(self, rank: int, workers: int, passes: int) -> list[np.ndarray]:
        """The rows of each of one worker's forward passes; a short step may leave some without any."""
        return np.array_split(self.rows, workers * passes)[rank * passes : (rank + 1) * passes]


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch reads, in order."""

    windows: list[np.ndarray]
    """The files of each window."""
    steps: list[Step]


def epoch(file_M: np.ndarray, tokens_M: np.ndarray, batch_size: int, seed: Sequence[int]) -> Epoch:
    """Every row once, `batch_size` rows a step, or a little less.

    file_M: each row's file; rows of a file stand together. tokens_M: each row's length. seed: any integers.
    """
    random = np.random.default_rng(seed)
    count = np.bincount(file_M)
    first = count.cumsum() - count
    windows: list[np.ndarray] = []
    steps: list[Step] = []
    files = random.permutation(len(count))
    for part in _windows(files, count):
        rows = np.concatenate([first[file] + np.arange(count[file]) for file in part])
        rows = random.permutation(rows)
        for group in _split(rows, batch_size * GROUPED):
            ordered = group[np.argsort(tokens_M[group], kind="stable")]
            batches = _split(ordered, batch_size)
            steps += [Step(len(windows), batches[n]) for n in random.permutation(len(batches))]
        windows.append(part)
    return Epoch(windows, steps)


def _windows(files: np.ndarray, count: np.ndarray) -> list[np.ndarray]:
    """Files in a row that together have about `WINDOW_ROWS` rows."""
    return _groups(files, count[files].cumsum() // WINDOW_ROWS)


def _groups(items: np.ndarray, key: np.ndarray) -> list[np.ndarray]:
    return np.split(items, np.flatnonzero(np.diff(key)) + 1)


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """As few parts as hold `size` rows at most, of like sizes."""
    return np.array_split(rows, -(-len(rows) // size))
