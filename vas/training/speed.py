"""How fast training is, beside what the machine can do."""

from __future__ import annotations

import resource
import time

import torch
from torch import nn

from vas.models.rates import product_rate
from vas.training.data import Share


class Speed:
    """Tokens per second of this worker, and the share of the machine's product rate that they make."""

    def __init__(self, backbone: nn.Module, device: torch.device) -> None:
        self._device, self._dtype = device, next(backbone.parameters()).dtype
        self._rate, self._flops = 0.0, flops_per_token(backbone)

    def start(self) -> None:
        """An epoch begins."""
        # the best of what was measured: others may have had the machine meanwhile
        self._rate = max(self._rate, product_rate(self._device, self._dtype))
        self._tokens, self._started = 0, time.monotonic()

    def figures(self, share: Share) -> dict[str, float]:
        """After a step, of the epoch so far; memory is the most that this process ever held."""
        self._tokens += sum(batch.tokens for batch in share.batches)
        speed = self._tokens / (time.monotonic() - self._started)
        return {"tokens_per_s": speed, "mfu": speed * self._flops / self._rate, "memory_bytes": peak_memory()}


def peak_memory() -> int:
    """Bytes that this worker held at most: of the GPU if it has one, else of main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops_per_token(backbone: nn.Module) -> float:
    """Of the backbone's products: 2 a weight forward, 2 for gradients that flow through it, 2 for its own gradient.

    Embeddings look up and multiply nothing; attention's products with its context, and heads, are left out.
    """
    embeddings = {id(p) for m in backbone.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = any(p.requires_grad for p in backbone.parameters())
    factors = ((p, 6 if p.requires_grad else 4 if trained else 2) for p in backbone.parameters())
    return float(sum(factor * _size(p) for p, factor in factors if id(p) not in embeddings))


def _size(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor behind
