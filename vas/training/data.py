"""Packed rows as a worker reads them: in the epoch's order, ahead of the model, a window at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from vas import storage
from vas.training.batches import Batch, collate
from vas.training.order import Epoch, Step, epoch
from vas.training.packing import INDEX, packed_file

AHEAD = 2  # optimizer steps that are made ready before they are needed
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker does in one optimizer step."""

    batches: list[Batch]
    """One a forward pass, as many on every worker."""
    rows: int
    """Of all workers."""
    states: int
    """That have a target, of all workers."""


class Packed:
    """One side of the packed rollouts, at a location."""

    def __init__(self, location: str) -> None:
        self._location = location
        index = storage.read_table([storage.join(location, INDEX)])
        self._file_M, self._tokens_M, self._states_M = (index[name].to_numpy() for name in ("file", "tokens", "states"))
        count = np.bincount(self._file_M) if len(self) else np.zeros(0, dtype=int)
        self._first = count.cumsum() - count

    def __len__(self) -> int:
        return len(self._file_M)

    def epoch(self, batch_size: int, seed: Sequence[int]) -> Epoch:
        """The order of one epoch, for `shares`."""
        return epoch(self._file_M, self._tokens_M, batch_size, seed)

    def shares(self, order: Epoch, start: int, rank: int, workers: int, passes: int) -> Iterator[Share]:
        """One worker's share of every step from `start` on, `passes` forward passes a step."""
        return ahead(self._shares(order, order.steps[start:], (rank, workers, passes)), AHEAD)

    def _shares(self, order: Epoch, steps: list[Step], place: tuple[int, int, int]) -> Iterator[Share]:
        windows = sorted({step.window for step in steps})
        tables = ahead((self._read(order.windows[window]) for window in windows), 1)
        held, files = -1, dict[int, pa.Table]()
        for step in steps:
            if step.window != held:
                held, files = step.window, next(tables)
            batches = [
                # a pass without rows runs one for company, without a target
                collate(self._rows(files, rows if len(rows) else step.rows[:1]), trained=len(rows) > 0)
                for rows in step.share(*place)
            ]
            yield Share(batches, len(step.rows), int(self._states_M[step.rows].sum()))

    def batches(self, size: int, rank: int, workers: int) -> Iterator[Batch]:
        """One worker's part of all rows, in batches of like length; every worker gets as many."""
        return ahead(self._batches(size, rank, workers), AHEAD)

    def _batches(self, size: int, rank: int, workers: int) -> Iterator[Batch]:
        number = 0
        for file in range(len(self._first)):
            rows = np.flatnonzero(self._file_M == file)
            rows = rows[np.argsort(self._tokens_M[rows], kind="stable")]
            mine = [rows[start : start + size] for start in range(0, len(rows), size)]
            mine = mine[(rank - number) % workers :: workers]
            number += -(-len(rows) // size)
            files = self._read(np.array([file])) if mine else {}
            yield from (collate(self._rows(files, each)) for each in mine)
        if number % workers and rank >= number % workers:  # ZeRO-3 gathers weights in every pass of any worker
            files = self._read(self._file_M[:1])
            yield collate(self._rows(files, np.array([0])), trained=False)

    def _read(self, files: np.ndarray) -> dict[int, pa.Table]:
        return {file: storage.read_table([packed_file(self._location, file)]) for file in files.tolist()}

    def _rows(self, files: dict[int, pa.Table], rows: np.ndarray) -> list[dict[str, Any]]:
        places = zip(self._file_M[rows].tolist(), (rows - self._first[self._file_M[rows]]).tolist(), strict=True)
        return [files[file].slice(place, 1).to_pylist()[0] for file, place in places]


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, made in a thread before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
