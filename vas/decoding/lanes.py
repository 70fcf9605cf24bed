"""Lanes: threads that share out a pass's sequences, each of which runs the whole model for its own.

With all threads in every product they wait for the slowest of them after each of a pass's hundreds of operations: for
one that wakes late, or whose core another process takes for a moment. Lanes meet once a pass. Each of them reads all
weights, though, so there have to be enough tokens to make that worth while.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from vas.models.base import set_threads

MOST = 4  # lanes; for machines with more cores nobody has measured what so many readers of the weights cost
LEAST = 16  # tokens of a lane: with fewer, reading the weights takes longer than the products
UNEVEN = 1.1  # what the fullest lane may have of its share, for all wait for it

T = TypeVar("T")


def spans(tokens: np.ndarray) -> list[slice]:
    """Which sequences each lane runs, of as many as this thread may use; one span of all where lanes do not pay.

    tokens: how many each sequence has in the pass.
    """
    lanes, total = torch.get_num_threads(), int(tokens.sum())
    whole = [slice(0, len(tokens))]
    if not 1 < lanes <= min(MOST, len(tokens)) or total < LEAST * lanes:
        return whole
    before = np.concatenate([[0], tokens.cumsum()])
    cuts = [int(np.abs(before - total * lane / lanes).argmin()) for lane in range(lanes + 1)]
    fullest = int(np.diff(before[cuts]).max())
    if fullest * lanes > UNEVEN * total:
        return whole
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def run(works: Sequence[Callable[[], T]]) -> list[T]:
    """Do each of these in a lane of its own, the first in this thread; raises what one of them raises."""
    if len(works) == 1:
        return [works[0]()]
    threads = torch.get_num_threads()
    others: list[Future[T]] = []
    try:
        torch.set_num_threads(1)
        others += [_lanes().submit(_inferring, work) for work in works[1:]]
        first = works[0]()
    finally:
        try:
            _wait(others)  # none may write into the KV cache later
        finally:
            torch.set_num_threads(threads)
    return [first, *(other.result() for other in others)]


def _wait(futures: list[Future[T]]) -> None:
    """Wait for all of them, also when Ctrl-C comes meanwhile."""
    try:
        wait(futures)
    except KeyboardInterrupt:
        wait(futures)
        raise


@cache
def _lanes() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST - 1, "lane", set_threads, (1,))


@torch.inference_mode()  # which each thread has to say for itself
def _inferring(work: Callable[[], T]) -> T:
    return work()
