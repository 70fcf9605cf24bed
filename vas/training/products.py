"""Linear layers whose products, forward and backward, oneDNN computes: in training on a CPU.

torch hands float32 products to MKL, which has older kernels for processors that are not Intel's. At a training
step's shapes oneDNN takes a tenth to a sixth less time on an AMD EPYC (see docs/performance.md). bfloat16 products
and a GPU's are what they were.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vas.models import onednn


class SoonerLinear(nn.Linear):
    """torch's linear layer under another `forward`: the same parameters, the same numbers but for rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if not (onednn.takes(input) and onednn.takes(self.weight)) or torch.is_autocast_enabled("cpu"):
            return F.linear(input, self.weight, self.bias)
        found: Tensor = _Linear.apply(input, self.weight, self.bias)
        return found


def hasten(model: nn.Module) -> None:
    """Have oneDNN compute a model's linear layers where it can, in place; parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SoonerLinear


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # not a view of the weight: ZeRO-3 takes the weight's memory back between the passes
        ctx.save_for_backward(x, weight)
        return onednn.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (of_y,) = gradients
        rows, inputs = of_y.reshape(-1, of_y.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            onednn.linear(of_y, weight.t()) if of_x else None,
            onednn.linear(rows.t(), inputs.t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
