"""Trainings of a tiny value model on made-up rollouts, for the tests of training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tools import ConfigMaker

from vas import schema
from vas.config import RunConfig, parse_config
from vas.configfile import override
from vas.models.value import ValueModel

PROMPTS, SAMPLES, EPOCHS = 27, 3, 2
TOLERANCE = 1e-4  # of a loss near 1, float32 sums in other orders


def write_rollouts(folder: Path) -> str:
    """Rollouts of many lengths, in several files."""
    random = np.random.default_rng(0)
    for file in range(3):
        rows = [_rollout(random, f"{file}-{n}", n % 4 == 0, i) for n in range(PROMPTS // 3) for i in range(SAMPLES)]
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema.rollout_schema(["brief", "words"])), folder / f"{file}.parquet"
        )
    return str(folder)


def _rollout(random: np.random.Generator, prompt: str, held_out: bool, sample: int) -> dict[str, Any]:
    response = random.integers(4, 290, random.integers(2, 24)).tolist()
    return {
        "rollout_id": f"{prompt}/{sample}",
        "prompt_id": prompt,
        "sample_index": sample,
        "prompt_token_ids": [5, 6, 7, 8 + len(prompt)],
        "response_token_ids": response,
        "finish_reason": "stop" if random.random() < 0.7 else "length",
        "held_out": held_out,
        "error": None,
        "rewards": {"brief": -float(len(response)), "words": float(np.mean(response))},
    }


def config_of(make_config: ConfigMaker, *overrides: str) -> RunConfig:
    content = make_config(
        "training",
        "train.micro_batch_size=1",
        f"train.epochs={EPOCHS}",
        "train.head_lr=0.02",
        "train.warmup=0.5",
        "train.track=[]",
        "train.lr=1e-3",
    )
    return parse_config(override(content, overrides), "this test")


def resumed(checkpoint: Path) -> list[int]:
    """Steps after which a training went on from a checkpoint."""
    return [
        step for epoch in json.loads((checkpoint / "training.json").read_text()) for step in epoch.get("resumed", [])
    ]


def losses(checkpoint: Path) -> list[float]:
    return [loss for epoch in json.loads((checkpoint / "training.json").read_text()) for loss in epoch["losses"]]


def workers(number: int, *more: str) -> tuple[str, ...]:
    return (f"resources.workers={number}", "resources.cpus_per_worker=1", *more)


def assert_same_training(one: Path, other: Path) -> None:
    """The same losses, held-out figures and weights, up to the order of sums."""
    assert losses(one) == pytest.approx(losses(other), rel=TOLERANCE)
    theirs = dict(ValueModel.load(str(other)).named_parameters())
    for name, parameter in ValueModel.load(str(one)).named_parameters():
        torch.testing.assert_close(parameter, theirs[name], atol=3e-3, rtol=1e-2, msg=name)
