"""What a device can do, measured here and now, to hold speeds against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from vas.models import onednn

SIZE = 2048
SECONDS = 0.3


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product, with this process's threads."""
    a, b = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    product: Callable[[Tensor, Tensor], Tensor] = onednn.linear if onednn.takes(a) else torch.mm
    product(a, b)
    _wait(device)
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        product(a, b)
        _wait(device)
        runs += 1
    return 2 * SIZE**3 * runs / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
