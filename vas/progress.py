"""Progress of long work: a live bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)
_LINE_EVERY_S = 15.0


class Tracker:
    """Counts work done, with a note beside it.

    with Tracker("sampling", total=3200) as tracker:
        tracker.advance(64, "410 tokens/s")
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._done = 0
        self._started = self._spoke = time.monotonic()
        self._begun: tuple[float, int] | None = None
        """When the first were done, or work began again, and how many: what came before was starting up."""
        self._bar = (
            Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Tracker:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, note="")
        else:
            console.print(f"{self._title:<12} 0/{self._total}", highlight=False)
        return self

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done, or less than none where work has to be done again; `note` says how it goes."""
        self._done += count
        if self._begun is None or count < 0:
            self._begun = time.monotonic(), self._done
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=note)
        elif time.monotonic() - self._spoke > _LINE_EVERY_S or self._done >= self._total:
            self._spoke = time.monotonic()
            console.print(
                f"{self._title:<12} {self._done}/{self._total}  {self.elapsed:.0f} s, {self._left:.0f} s to go  {note}",
                highlight=False,
            )

    @property
    def _left(self) -> float:
        """Seconds that the rest takes, at the rate since the first were done."""
        assert self._begun is not None
        since, before = self._begun
        if self._done == before:
            since, before = self._started, 0
        return (time.monotonic() - since) / max(self._done - before, 1) * (self._total - self._done)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
