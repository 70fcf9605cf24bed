"""The least time a pass can take on this machine: its matrix products alone, or its bytes alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vas.decoding.llama import FusedLlama

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of one pass."""

    products: float
    """Of its matrix products at these shapes, measured one after the other over all layers."""
    memory: float
    """Of reading its weights and KV once, at the measured bandwidth."""

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.products, self.memory)


def bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory, measured on a block that no cache holds."""
    block = torch.ones(2**28, dtype=torch.uint8, device=device).view(torch.float32)
    return block.nbytes / _best(lambda: block.sum(), device)


def floor(model: PreTrainedModel, rows: int, kv_bytes: float, rate: float) -> Floor:
    """Of a pass of `rows` tokens through a Llama-family model, with its output layer if it has one.

    kv_bytes: that the pass reads. rate: `bandwidth`.
    """
    fused, config, device = FusedLlama(model, "exact", free=False), model.config, model.device
    width = config.num_attention_heads * config.head_dim
    sizes = {"qkv": config.hidden_size, "out": width, "gate_up": config.hidden_size, "down": config.intermediate_size}
    inputs = {name: torch.randn(rows, size, device=device, dtype=model.dtype) for name, size in sizes.items()}

    def products() -> None:
        for layer in fused._layers:
            for name, x in inputs.items():
                getattr(layer, name)(x)
        if fused._head is not None:
            fused._head(inputs["qkv"])

    embedding = model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in model.base_model.parameters()) - embedding.nbytes
    weights += embedding.nbytes if fused._head is not None else 0
    return Floor(_best(products, device), (weights + kv_bytes) / rate)


@torch.inference_mode()
def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first warms up
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
