"""Matrix products for decoding: the same numbers sooner, or nearly the same ones much sooner.

torch hands a float32 product to one library whatever its shape. Decoding multiplies a few rows with
large weights, again and again. There a weight that was reordered once for the processor's vector
units (oneDNN's blocked layout) is read about twice as fast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vas.choices import Linears
from vas.decoding import switches
from vas.errors import VasError
from vas.models import onednn

ROWS = (1, 8, 32, 128)  # of decoding passes, by which `fastest` judges
TIMED_WEIGHTS = 40_000_000  # more than a processor's cache holds, even with 8 bits each


class PackedLinear(nn.Module):
    """A linear layer with its weight in oneDNN's layout, computed in float32 or bfloat16.

    It takes and returns the same dtype, whatever it computes in.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), None)
        self._bias = None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if x.dtype == self._dtype:
            return onednn.linear(x, self._weight, self._bias)
        return onednn.linear(x.to(self._dtype), self._weight, self._bias).to(x.dtype)


class Int8Linear(nn.Module):
    """A linear layer with its weight rounded to 8 bits, each output's by a scale of its own."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._scale = (weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()
        self._weight = (weight.float() / self._scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch._weight_int8pack_mm(rows, self._weight, self._scale).to(x.dtype)
        return (y if self._bias is None else y + self._bias).view(*x.shape[:-1], -1)


class PlainLinear(nn.Module):
    """torch's own linear layer, over a weight that others may hold too."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self._weight, self._bias)


def _int8(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """8-bit weights where the kernel takes them: other widths than multiples of 16 crash it."""
    return PackedLinear(weight, bias, weight.dtype) if weight.shape[1] % 16 else Int8Linear(weight, bias)


_KINDS: dict[str, Callable[[Tensor, Tensor | None], nn.Module]] = {
    "exact": lambda weight, bias: PackedLinear(weight, bias, weight.dtype),
    "bfloat16": lambda weight, bias: PackedLinear(weight, bias, torch.bfloat16),
    "int8": _int8,
}


def make(weight: Tensor, bias: Tensor | None, kind: Linears) -> nn.Module:
    """The linear layer x·weightᵀ + bias for decoding; torch's own on a GPU, or in a dtype without kernels.

    Raises VasError for a kind that this processor has no instructions for.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if not _packable(weight) or switches.off("packed_linears"):
        return PlainLinear(weight, bias)
    if kind not in kinds():
        raise VasError(
            f"this processor has no instructions for {kind} matrix products",
            "linears",
            f"take one of: {', '.join(kinds())}, fastest",
        )
    return _KINDS[kind](weight, bias)


@cache
def kinds() -> tuple[str, ...]:
    """The kinds of linear layers that this processor can compute; bfloat16 needs AVX-512 or its like."""
    return tuple(kind for kind in _KINDS if kind != "bfloat16" or _computes(torch.bfloat16))


@cache
def _computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes weights of this dtype here: only an attempt tells."""
    try:
        PackedLinear(torch.zeros(16, 16), None, dtype)(torch.zeros(1, 16))
    except RuntimeError:
        return False
    return True


def pack(model: nn.Module, kind: Linears) -> None:
    """Replace all linear layers of a model, in place. It can then neither be trained nor saved."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and _packable(child.weight):
                setattr(parent, name, make(child.weight, child.bias, kind))


def settle(model: nn.Module, kind: Linears, among: Container[str] = _KINDS) -> Linears:
    """What `fastest` means for this model on this machine: measured, not guessed. Other kinds stay what they are.

    Times the first layers, enough of them to overflow a processor's cache, at several numbers of rows,
    and compares the geometric means. Kinds that are nearly level may win by chance: each process measures.
    """
    if kind != "fastest":
        return kind
    weights: list[Tensor] = []
    for module in model.modules():
        if type(module) is nn.Linear and _packable(module.weight) and sum(map(Tensor.numel, weights)) < TIMED_WEIGHTS:
            weights.append(module.weight.detach())
    if not weights:
        return "exact"
    times = {name: _seconds([_KINDS[name](w, None) for w in weights], weights) for name in kinds() if name in among}
    return cast(Linears, min(times, key=lambda name: times[name]))


@torch.inference_mode()
def _seconds(layers: list[nn.Module], weights: list[Tensor]) -> float:
    """Geometric mean, over the numbers of rows, of the best of a few passes over the layers."""
    product = 1.0
    for rows in ROWS:
        inputs = [torch.randn(rows, weight.shape[1], dtype=weight.dtype) for weight in weights]
        best = math.inf
        for _ in range(4):
            started = time.perf_counter()
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)
            best = min(best, time.perf_counter() - started)
        product *= best
    return product ** (1 / len(ROWS))


def _packable(weight: Tensor) -> bool:
    """Whether oneDNN's layout can hold it."""
    kernels = onednn.AVAILABLE and weight.device.type == "cpu"
    return kernels and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _computes(weight.dtype)))
