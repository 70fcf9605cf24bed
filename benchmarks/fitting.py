"""One worker of our training without Ray, for a benchmark to time and to weigh: the same rows, engine and step."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from vas import storage
from vas.config import RunConfig
from vas.models.base import quieten, set_threads
from vas.models.value import ValueModel
from vas.training.data import Packed
from vas.training.order import Epoch, Step
from vas.training.packing import lengths, packed_file, write_index
from vas.training.speed import flops_per_token, product_rate
from vas.training.step import take_step


@dataclass(frozen=True, slots=True)
class Fitted:
    """What one pass over some rollouts took."""

    seconds: float
    processor: float
    """Seconds of all its threads: what other work on the machine does not stretch."""
    tokens: int
    """Real ones that the model ran; a prompt counts as often as it was run."""
    places: int
    """The same with padding."""
    losses: list[float]
    """Of each step, the mean over its states."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """Bytes that one worker's process held."""

    before: int
    """With everything imported, before there is a model."""
    building: int
    """At most while the model and the engine were built."""
    steps: int
    """At most during the steps after the first ones."""
    between: int
    """Between steps, once the allocator gave back what it kept."""


def store(rows: pa.Table, location: str) -> str:
    """Write packed rows where `Packed` finds them; returns the location."""
    storage.write_table(packed_file(location, 0), rows)
    write_index(location, [lengths(rows)])
    return location


def fresh_model(config: RunConfig, objectives: list[dict[str, Any]]) -> ValueModel:
    """The model that a training begins with, but for random heads: at zero, no loss would depend on the backbone."""
    from vas.training.build import build_model  # imports DeepSpeed

    model = build_model(config, objectives)
    generator = torch.Generator().manual_seed(0)
    for head in model.heads:
        torch.nn.init.normal_(cast(Any, head).linear.weight, std=0.02, generator=generator)
    return model


class Worker:
    """A worker of `workers`, as `vas.training.loop` has it, without evaluation, tracking and checkpoints.

    Each needs a process of its own; `port` is where they meet.
    """

    def __init__(
        self,
        config: RunConfig,
        objectives: list[dict[str, Any]],
        threads: int,
        port: int,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
        from vas.training.build import initialize  # imports DeepSpeed, which reads DS_ACCELERATOR
        from vas.training.deepspeed_config import deepspeed_config

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls torch by older names
        quieten()
        set_threads(threads)
        self._rank, self._workers = rank, workers
        self._before = _memory("VmRSS")
        model = fresh_model(config, objectives)
        self._engine = initialize(model, config, deepspeed_config(config.train, workers, on_gpu=False))
        self._flops = flops_per_token(model.backbone)
        self._passes = self._engine.gradient_accumulation_steps()

    def fit(self, location: str, batch_size: int, by_length: bool = True) -> Fitted:
        """A pass over packed rows, so many a step; in the training's own order, or without regard to length."""
        packed = Packed(location)
        order = packed.epoch(batch_size, (0,)) if by_length else _at_random(len(packed), batch_size)
        self._engine.train()
        tokens = places = 0
        losses = []
        started, processor = time.perf_counter(), time.process_time()
        for share in packed.shares(order, 0, self._rank, self._workers, self._passes):
            losses.append(take_step(self._engine, share))
            tokens += sum(batch.tokens for batch in share.batches)
            places += sum(batch.input_ids_BT.numel() for batch in share.batches)
        return Fitted(time.perf_counter() - started, time.process_time() - processor, tokens, places, losses)

    def weigh(self, location: str, batch_size: int) -> Weighed:
        """What this process held until now, and in a second pass over packed rows."""
        building = _memory("VmHWM")
        self.fit(location, batch_size)  # AdamW makes its moments at the first step
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak
        self.fit(location, batch_size)
        steps = _memory("VmHWM")
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return Weighed(self._before, building, steps, _memory("VmRSS"))

    def rates(self) -> tuple[float, float]:
        """FLOPs per second of a large product here and now, and FLOPs of the model's own products per token."""
        return product_rate(self._engine.device, torch.float32), self._flops


def _at_random(rows: int, batch_size: int) -> Epoch:
    """Every row once, in an order that knows nothing of lengths."""
    order = np.random.default_rng(0).permutation(rows)
    steps = np.array_split(order, -(-rows // batch_size))
    return Epoch([np.array([0])], [Step(0, each) for each in steps])


def _memory(what: str) -> int:
    """Bytes of this process by Linux's account: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
