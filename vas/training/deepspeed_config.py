"""The DeepSpeed JSON of a run: ours, with the user's merged over it."""

from __future__ import annotations

import json
from typing import Any

from vas import storage
from vas.config import Train
from vas.configfile import merge
from vas.errors import VasError

# What DeepSpeed must have from us: a step holds the same rows whatever the JSON says
OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "scheduler": "train.warmup",
}


def deepspeed_config(train: Train, workers: int, on_gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` gets. `train.deepspeed` wins wherever both speak.

    The largest micro batch up to `train.micro_batch_size` that divides a worker's share is taken.
    Raises VasError if the batch can't be shared out evenly, or the user's JSON says what is not its to say.
    """
    share, rest = divmod(train.batch_size, workers)
    if rest or not share:
        raise VasError(
            f"a batch of {train.batch_size} prompts cannot be shared evenly by {workers} workers",
            "train.batch_size",
            f"make it a multiple of {workers}",
        )
    micro = max(size for size in range(1, min(train.micro_batch_size, share) + 1) if share % size == 0)
    users = _users(train)
    adam = {"lr": train.lr, "torch_adam": True}
    if "optimizer" not in users:  # theirs may be of another kind, which knows no `fused`
        adam["fused"] = True  # a third of the time on a CPU
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": train.gradient_clipping,
        "bf16": {"enabled": on_gpu if train.precision == "auto" else train.precision == "bfloat16"},
        "zero_optimization": _zero(train, workers, on_gpu),
        # DeepSpeed's own optimizers are compiled on first use; torch's needs no compiler
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return merge(ours, users)


def _zero(train: Train, workers: int, on_gpu: bool) -> dict[str, Any]:
    """ZeRO's stage and where its parts lie."""
    stage = train.zero_stage if train.zero_stage is not None else 2 if on_gpu and workers > 1 else 0
    if train.offload == "none":
        return {"stage": stage}
    where: dict[str, Any] = {"device": train.offload}
    if train.offload == "nvme":
        where["nvme_path"] = train.nvme_path
    return {"stage": stage, "offload_optimizer": where} | ({"offload_param": where} if stage == 3 else {})


def _users(train: Train) -> dict[str, Any]:
    """The user's own JSON: a mapping, or the location of a file."""
    given = train.deepspeed
    if isinstance(given, str):
        try:
            given = json.loads(storage.read_bytes(given))
        except ValueError as error:
            raise VasError(f"this DeepSpeed config is not valid JSON: {error}", str(train.deepspeed)) from None
        if not isinstance(given, dict):
            raise VasError("a DeepSpeed config is a JSON object", str(train.deepspeed))
    # `auto` is what the Hugging Face Trainer fills in; here it means: leave it to the run
    given = _without_auto(given)
    for key, instead in OURS.items():
        if key in given:
            raise VasError(
                f"`{key}` is the run's to say",
                "train.deepspeed",
                f"set {instead} instead, and leave it out of the JSON",
            )
    return given


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    cleaned = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in given.items()}
    return {key: value for key, value in cleaned.items() if value != "auto"}
