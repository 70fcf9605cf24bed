"""The least time a pass can take on this machine: its matrix products alone, or its bytes alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vas.decoding.cache import KVCache
from vas.decoding.llama import FusedLlama

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of one pass."""

    products: float
    """Of its matrix products at these shapes, attention's included, measured one after the other over all layers."""
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


def floor(model: PreTrainedModel, cache: KVCache, sequences: int, each: int, rate: float) -> Floor:
    """Of a pass of so many tokens of each sequence in a cache, with the output layer if the model has one.

    model: of the Llama family. rate: see `bandwidth`.
    """
    with _everything_on():
        fused = FusedLlama(model, "exact", free=False)
    config, device, dtype = model.config, model.device, model.dtype
    rows, heads, dim = sequences * each, config.num_attention_heads, config.head_dim
    sizes = {
        "qkv": config.hidden_size,
        "out": heads * dim,
        "gate_up": config.hidden_size,
        "down": config.intermediate_size,
    }
    inputs = {name: torch.randn(rows, size, device=device, dtype=dtype) for name, size in sizes.items()}
    stream = torch.randn(rows, config.hidden_size, device=device, dtype=dtype)
    width, shared = max(cache.lengths.values()), config.num_key_value_heads
    query = torch.randn(sequences, shared, heads // shared * each, dim, device=device, dtype=dtype)
    weights = torch.randn(*query.shape[:-1], width, device=device, dtype=dtype)

    def products() -> None:
        for number, layer in enumerate(fused._layers):
            keys, values = cache.read(number, slice(0, sequences), width)
            layer.qkv(inputs["qkv"])
            query @ keys.transpose(-1, -2)
            weights @ values
            layer.out(stream, inputs["out"])
            layer.gate_up(inputs["gate_up"])
            layer.down(stream, inputs["down"])
        if fused._head is not None:
            fused._head(inputs["qkv"])

    embedding = model.get_input_embeddings().weight.nbytes
    read = sum(p.nbytes for p in model.base_model.parameters()) - (embedding if fused._head is None else 0)
    read += kv_bytes_per_token(cache) * sum(cache.lengths.values())
    return Floor(_best(products, device), read / rate)


def kv_bytes_per_token(cache: KVCache) -> int:
    """Bytes of keys and values that one token takes in a cache."""
    return sum(layer.shape[1] * layer.shape[3] * layer.element_size() for layer in (*cache.keys, *cache.values))


@contextmanager
def _everything_on() -> Iterator[None]:
    """The floor is that of the fastest layers there are, whatever the engine was denied."""
    denied = os.environ.pop("VAS_OFF", None)
    yield
    if denied is not None:
        os.environ["VAS_OFF"] = denied


@torch.inference_mode()
def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs; on a GPU of one recording, without the calls that start its kernels."""
    if device.type == "cuda":
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first warms up
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
