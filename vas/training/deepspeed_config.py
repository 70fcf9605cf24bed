"""The DeepSpeed JSON of a run: ours, with the user's merged over it."""

from __future__ import annotations

from typing import Any

from vas.config import Train
from vas.errors import VasError


def deepspeed_config(train: Train, workers: int, on_gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` gets. `train.deepspeed` wins wherever both speak.

    The largest micro batch up to `train.micro_batch_size` that divides a worker's share is taken.
    Raises VasError if the batch can't be shared out evenly.
    """
    share, rest = divmod(train.batch_size, workers)
    if rest or not share:
        raise VasError(
            f"a batch of {train.batch_size} prompts cannot be shared evenly by {workers} workers",
            "train.batch_size",
            f"make it a multiple of {workers}",
        )
    micro = max(size for size in range(1, min(train.micro_batch_size, share) + 1) if share % size == 0)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": train.gradient_clipping,
        "bf16": {"enabled": on_gpu},
        "zero_optimization": {"stage": 2 if on_gpu and workers > 1 else 0},
        # the fused optimizers are compiled on first use; torch's needs no compiler
        "optimizer": {"type": "AdamW", "params": {"lr": train.lr, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return merge(ours, train.deepspeed)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` merged into it, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
