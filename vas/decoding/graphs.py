"""CUDA graphs: work whose shapes come up again and again is recorded once, and then started by a single call.

A small model's pass is hundreds of kernels of a few microseconds each, and to start one takes as long. Nothing here
is needed on a CPU, where work is simply done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from vas.decoding import switches

AFTER = 3  # times that work is done as it is before it is recorded: which costs as much as a few times more
MOST = 64  # recordings at once; each holds its output

Work = Callable[..., Tensor]


def upload(numbers: Any, device: torch.device) -> Tensor:
    """Numbers on a device, without waiting for what it has to do."""
    return torch.as_tensor(numbers).to(device, non_blocking=True)


class Graphs:
    """Does work, by replaying it where it has been recorded.

    All that changes from time to time must come in as tensors, of the same shapes for the same key. What comes out lies
    where the next replay puts its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recording = device.type == "cuda" and not switches.off("cuda_graphs")
        # of its own, for the libraries' working memory goes by streams, and goes with the recordings of one
        self._stream = torch.cuda.Stream(device) if self._recording else None
        self._pool: Any = None
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._met: Counter[Hashable] = Counter()

    def forget(self) -> None:
        """Let go of all recordings: what they read or write has moved, or memory is short."""
        self._recorded.clear()
        self._pool = None  # with nothing recorded in it a pool is of no more use

    def __call__(self, key: Hashable, work: Work, *inputs: Tensor) -> Tensor:
        """work(*inputs), with the inputs on the device. It must not wait for the device."""
        if self._recording and key not in self._recorded:
            self._met[key] += 1
            if self._met[key] > AFTER:
                if len(self._recorded) == MOST:
                    self.forget()
                self._recorded[key] = self._record(work, inputs)
        if key not in self._recorded:
            return work(*(upload(each, self._device) for each in inputs))
        graph, held, output = self._recorded[key]
        for each, fresh in zip(held, inputs, strict=True):
            each.copy_(fresh, non_blocking=True)
        graph.replay()
        return output

    def _record(self, work: Work, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        held = [each.to(self._device, copy=True) for each in inputs]
        with torch.cuda.device(self._device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads may use the GPU meanwhile
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = work(*held)
        return graph, held, output
