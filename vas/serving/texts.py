"""Values of whole texts, which whatever reads them computes in parts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from torch import Tensor


async def values_of(part: Callable[[], Awaitable[Tensor | None]]) -> list[list[float]]:
    """Values of a text, [T][J]; `part()` waits for the next [t, J] of them, and gives None after the last.

    What computes them does other work between two parts.
    """
    rows: list[list[float]] = []
    while (values := await part()) is not None:
        rows += values.tolist()
    return rows
