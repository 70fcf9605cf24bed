"""Sets up a Ray Train run over stored rollouts."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vas import storage
from vas.config import RunConfig
from vas.errors import VasError
from vas.placement import worker
from vas.progress import Tracker
from vas.rewards import load_rewards
from vas.training import history
from vas.training.deepspeed_config import deepspeed_config
from vas.training.packing import INDEX, pack_all
from vas.training.spelling import Spelling

MAX_FAILURES = 3  # workers that die of other than a machine taken away; those are not counted


def train(config: RunConfig, rollouts: list[str], train_storage: str, output: str) -> dict[str, Any]:
    """Fit a value model to the rollouts of some rounds; returns the best epoch's entry of the history.

    rollouts (the rounds' directories), train_storage (packed rows, learning curves, Ray Train's own resume state)
    and output (the checkpoint) are locations. A run that was interrupted goes on from its last checkpoint.
    Raises VasError if there is nothing to learn from.
    """
    _check(config)
    files = [file for each in rollouts for file in storage.list_files(each, ".parquet")]
    tables = [storage.read_table([file], columns=["held_out", "error", "rewards", "round"]) for file in files]
    objectives = objective_statistics(config, pa.concat_tables(tables, promote_options="default"))
    resources = config.resources
    each = worker(resources)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = _Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # Ray's decorator adds it
    place = storage.join(train_storage, "packed")
    packed = pack_all(files, [len(table) for table in tables], list(config.rewards), place, Spelling.of(config))
    rows = len(storage.read_table([storage.join(packed["train"], INDEX)]))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config,
            "objectives": objectives,
            "packed": packed,
            "threads": int(each["CPU"]),
            "output": output,
            "tracked": storage.join(train_storage, "tensorboard"),
            "board": board,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=each,
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=train_storage,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    with Tracker("training", rows * config.train.epochs) as tracker, _following(board, tracker), _interruptible():
        result = trainer.fit()
    if result.error is not None:
        raise result.error
    entries: list[dict[str, Any]] = json.loads(storage.read_bytes(storage.join(output, "training.json")))
    return entries[history.best(entries)]


def _worker(settings: dict[str, Any]) -> None:
    """Runs in every training worker; the driver needs none of what this imports."""
    if not settings["config"].resources.gpus_per_worker:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
    from vas.training.loop import train_worker

    train_worker(settings)


def _check(config: RunConfig) -> None:
    """Find what every worker would stumble over. Raises VasError."""
    made = deepspeed_config(config.train, config.resources.workers, config.resources.gpus_per_worker > 0)
    if config.train.target_ema is not None and made["zero_optimization"].get("stage") == 3:
        raise VasError(
            "target_ema keeps a second network whole, which ZeRO stage 3 does not",
            "train.deepspeed: zero_optimization.stage",
            "take stage 2 or less",
        )
    if config.value.extends is not None:
        from vas.models.value import (
            ValueModelConfig,
            check_extension,
            head_spec,
        )  # with torch, which the driver else does without

        old = ValueModelConfig.load(config.value.extends)
        check_extension(old, config.value.extends, list(config.rewards), head_spec(config.value))


def objective_statistics(config: RunConfig, table: pa.Table) -> list[dict[str, Any]]:
    """Per objective: mean and std over π0's training rollouts, and the range of the standardised reward, of all rounds.

    Raises VasError if there is nothing to learn.
    """
    good = table.filter(pc.and_(pc.is_null(table["error"]), pc.invert(table["held_out"])))
    if not good.num_rows:
        raise VasError(
            "there is no rollout to learn from",
            mend="all of them failed: see the `error` column of rollouts/",
        )
    versions = {name: reward.version for name, reward in load_rewards(config.rewards).items()}
    found = []
    for name in config.rewards:
        rewards = np.array(pc.struct_field(good["rewards"], name).to_pylist(), dtype=np.float64)
        own = rewards[good["round"].fill_null(0).to_numpy() == 0]  # later rounds begin under guidance
        mean, std = float(own.mean()), float(own.std())
        if np.ptp(own) == 0:  # std of a constant may be 1e-17
            raise VasError(
                f"the reward '{name}' scores every rollout alike ({mean:.4g}): there is nothing to learn",
                f"rewards.{name}",
                "check the reward, or sample with a higher temperature",
            )
        scaled = (rewards - mean) / std
        margin = 0.05 * float(np.ptp(scaled))
        found.append(
            {
                "name": name,
                "mean": mean,
                "std": std,
                "low": float(scaled.min()) - margin,
                "high": float(scaled.max()) + margin,
                "reward_version": versions[name],
            }
        )
    return found


@ray.remote(num_cpus=0)
class _Board:
    """Where the first worker pins its progress, for the driver to read."""

    def __init__(self) -> None:
        self._count, self._note = 0, ""

    def put(self, count: int, note: str) -> None:
        """So many rows in all have been trained on; fewer than before where a worker goes on from a checkpoint."""
        self._count, self._note = count, note

    def read(self) -> tuple[int, str]:
        return self._count, self._note


@contextmanager
def _following(board: Any, tracker: Tracker) -> Iterator[None]:
    """Shows the board's progress while the block runs."""
    stop = threading.Event()

    def follow() -> None:
        shown = 0, ""
        while not stop.wait(1.0):
            count, note = ray.get(board.read.remote())
            if (count, note) != shown:
                tracker.advance(count - shown[0], note)
                shown = count, note

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt: Ray Train makes an exit of it, and would keep its handler for good."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)
