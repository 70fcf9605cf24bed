"""oneDNN's matrix products: on a CPU often sooner than those that torch takes by itself."""

from __future__ import annotations

import torch
from torch import Tensor

AVAILABLE = torch.backends.mkldnn.is_available()


def takes(x: Tensor) -> bool:
    """Whether `linear` is the way to multiply this tensor: float32 on a CPU; of bfloat16 torch asks oneDNN itself."""
    return AVAILABLE and x.device.type == "cpu" and x.dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias: [..., in] to [..., out]. weight: [out, in], plain or in oneDNN's own layout."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found
