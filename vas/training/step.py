"""One optimizer step of one worker."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from vas.training.data import Share


def take_step(engine: Any, share: Share) -> float:
    """Run a worker's share of a step through DeepSpeed's engine; the loss is the mean over all workers' states."""
    passes, workers = len(share.batches), torch.distributed.get_world_size()
    total = torch.zeros((), device=engine.device)
    for batch in share.batches:
        loss, _ = engine(batch.to(engine.device))
        # DeepSpeed takes the mean over passes and workers: this makes it the mean over states
        engine.backward(loss * (passes * workers / share.states))
        engine.step()
        total += loss.detach()
    engine.module.follow()
    torch.distributed.all_reduce(total)
    return float(total) / share.states
