"""The DeepSpeed JSON of a run: ours, with the user's merged over it."""

from __future__ import annotations

from typing import Any

from vas.config import Train


def deepspeed_config(train: Train, workers: int, on_gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` gets. `train.deepspeed` wins wherever both speak."""
    micro = min(train.micro_batch_size, max(1, train.batch_size // workers))
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": max(1, train.batch_size // (micro * workers)),
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
