"""An object in a process of its own, which keeps it between calls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

_kept: Any = None


class Apart:
    """`make(*arguments)`, built in a fresh process at the first call. Idle, it takes no processor time.

    with Apart(Worker, config) as worker:
        worker.call("fit", "rows").result()
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _keep, (make, *arguments))

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method there. The future raises BrokenProcessPool if the object could not be built."""
        return self._pool.submit(_call, method, *arguments)

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _keep(make: Callable[..., Any], *arguments: Any) -> None:
    global _kept
    _kept = make(*arguments)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_kept, method)(*arguments)
