"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent in named parts; what a part contains of another one counts for the inner part alone.

    wait: let a GPU finish at the ends of each part, so that its work is counted where it was asked
    for. That costs speed; without it a part's time on a GPU is the time it took to ask.
    """

    def __init__(self, wait: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.wait = wait
        self._part, self._since = "", 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`."""
        outer = self._part
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> None:
        if self.wait and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._part:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = name, now
