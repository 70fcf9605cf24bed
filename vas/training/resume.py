"""Checkpoints that a training goes on from: DeepSpeed's, and the place in the data, inside Ray Train's.

Where a step stands in the data, its learning rate and its random numbers are functions of the step alone, so
this is all there is to keep. With another number of workers, what ZeRO shared out among the old ones is
converted into DeepSpeed's universal form first (arXiv:2406.18820).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch

TAG, UNIVERSAL, ABOUT = "state", "universal", "vas.json"


@dataclass
class Progress:
    """How far a training has come."""

    epoch: int = 0
    """Epochs that are finished."""
    step: int = 0
    """Optimizer steps of the next epoch that are done."""
    losses: list[float] = field(default_factory=list)
    """Of those steps."""
    resumed: list[int] = field(default_factory=list)
    """Steps of that epoch from which a broken-off training went on."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Of the finished epochs, see history.py."""

    def finish_epoch(self, metrics: dict[str, Any]) -> None:
        """An epoch is over; metrics: on the held-out rollouts."""
        self.epoch += 1
        entry = {"epoch": self.epoch, "losses": self.losses, "held_out": metrics}
        self.history.append(entry | ({"resumed": self.resumed} if self.resumed else {}))
        self.step, self.losses, self.resumed = 0, [], []


def save(engine: Any, progress: Progress, metrics: dict[str, Any]) -> None:
    """Report a checkpoint; every worker calls it at the same step."""
    about = {"workers": torch.distributed.get_world_size(), "zero_stage": engine.zero_optimization_stage()}
    # frozen weights are those that the model was built with, but for a target network's
    frozen = engine.module.target is None
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=TAG, client_state=asdict(progress), exclude_frozen_parameters=frozen)
        Path(folder, ABOUT).write_text(json.dumps(about))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


@contextmanager
def opened(config: dict[str, Any], workers: int) -> Iterator[str | None]:
    """The last checkpoint as a local folder, None if there is none; tells DeepSpeed's JSON in which form it is."""
    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint is not None else nullcontext() as folder:
        if folder is None:
            yield None
            return
        about = json.loads(Path(folder, ABOUT).read_text())
        if about["zero_stage"] == 0 or about["workers"] == workers:
            yield folder
            return
        config["checkpoint"] = config.get("checkpoint", {}) | {"load_universal": True}
        with tempfile.TemporaryDirectory() as converted:
            _to_universal(folder, converted)
            yield converted


def restore(engine: Any, folder: str) -> Progress:
    """Load weights and optimizer, and say how far they have come."""
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    _, state = engine.load_checkpoint(folder, load_module_strict=False)
    if engine.load_universal_checkpoint():
        # DeepSpeed 0.19 gives every group the first one's settings at stage 3, and all states one step counter,
        # which each of them would advance
        for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for moments in engine.optimizer.optimizer.state.values():
            if isinstance(moments.get("step"), torch.Tensor):
                moments["step"] = moments["step"].clone()
    progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
    progress.resumed.append(progress.step)
    return progress


def _to_universal(folder: str, target: str) -> None:
    """Convert with DeepSpeed's own tool; each worker for itself, as they need not share a disk."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(Path(folder, TAG)),
        output_folder=str(Path(target, UNIVERSAL)),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with Path(target, "log.txt").open("w") as log, redirect_stdout(log):
        ds_to_universal.main(options)
    Path(target, "latest_universal").write_text(UNIVERSAL)
    Path(target, "latest").write_text(UNIVERSAL)
