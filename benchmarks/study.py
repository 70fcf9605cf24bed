"""What the benchmark of value models makes and keeps: rollouts that designs share, trainings, guided decoding."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.schedules import Point
from vas import storage
from vas.config import RunConfig, load_config
from vas.decoding.engine import Engine
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.errors import VasError
from vas.models.base import BaseModel, encode_prompt, load_base
from vas.models.value import ValueModel
from vas.prompts import load_prompts
from vas.rewards import load_rewards
from vas.rollouts.pipeline import sample
from vas.rollouts.plan import Plan
from vas.rollouts.stored import read_rollouts
from vas.training.batches import collate
from vas.training.objective import ValueObjective
from vas.training.packing import pack
from vas.training.trainer import train

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
OBJECTIVE = "positive"
SAMPLES = (8, 4, 1)  # rollouts a prompt; the library's default first
HEAD_LR = {"categorical": 6e-3, "scalar": 1e-3}  # what suited each on the demo, see docs/results.md
STEP = 24  # rollouts in an optimizer step, whatever the design
DISTANCES = (2.0, 5.0, 10.0)  # nats from π0
FIRST, MOST = 3.0, 5  # the first strength, and how many there may be
BATCH = 64


@dataclass(frozen=True, slots=True)
class Design:
    """A value model to train."""

    head: str
    td_lambda: float
    samples: int
    """Rollouts a prompt."""

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.head}-{self.td_lambda:g}-{self.samples}"

    def __str__(self) -> str:
        return f"{self.head}, λ = {self.td_lambda:g}, {self.samples} a prompt"

    def overrides(self) -> list[str]:
        """Of the config. An optimizer step has the same number of rollouts in every design."""
        return [
            f"value.head={self.head}",
            f"train.td_lambda={self.td_lambda}",
            f"train.head_lr={HEAD_LR[self.head]}",
            f"train.batch_size={STEP // self.samples}",
            f"train.micro_batch_size={STEP // self.samples}",
        ]


class Study:
    """The prompts, the rollouts, and what of the designs is finished, under `work`.

    total: training rollouts of each design, at most. held_out: held-out prompts. samples: rollouts of each of them.
    decoded: held-out prompts that are decoded with guidance, `responses` times each.
    Raises VasError if `work` holds a study of other settings, or there are too few prompts.
    """

    def __init__(
        self, work: Path, overrides: list[str], total: int, held_out: int, samples: int, decoded: int, responses: int
    ) -> None:
        self._overrides, self._work = overrides, work
        self.config = self.config_of()
        prompts = load_prompts(self.config.prompts)
        every = [prompt for prompt in prompts if not prompt.held_out]
        self.total = min(total, len(every)) // STEP * STEP
        if not self.total:
            raise VasError(f"there are {len(every)} prompts to train on, {STEP} are needed", self.config.prompts.source)
        self._train = every[: self.total]
        self.held_out = [prompt for prompt in prompts if prompt.held_out][:held_out]
        self._samples, self.decoded, self._responses = samples, min(decoded, len(self.held_out)), responses
        self._claim()

    def config_of(self, design: Design | None = None) -> RunConfig:
        """The demo's config with the sentiment reward alone, for a design."""
        fixed = [
            "name=value-ablation",
            f'rewards={{"{OBJECTIVE}": {{"use": "sentiment"}}}}',
            "evaluation.best_of=[]",
            "evaluation.strengths=[]",
            "train.track=[]",
        ]
        return load_config(DEMO, [*fixed, *self._overrides, *(design.overrides() if design else ())])

    def _claim(self) -> None:
        about = {
            "config": self.config.digest(),
            "rollouts": self.total,
            "held_out": [len(self.held_out), self._samples],
            "decoded": [self.decoded, self._responses],
        }
        file = self._work / "settings.json"
        if file.exists() and json.loads(file.read_text()) != about:
            raise VasError("this folder holds results of other settings", str(self._work), "give another --work")
        storage.write_bytes(str(file), json.dumps(about).encode())

    def folder(self, design: Design) -> Path:
        """Where what is made of a design lies."""
        return self._work / design.name

    def sample(self) -> None:
        """Sample and score what all designs need, and the held-out prompts' rollouts."""
        summary = sample(self.config, self._plans(), str(self._rollouts), "rollouts")
        if summary.errors:
            raise VasError(
                f"{sum(summary.errors.values())} rollouts failed: {min(summary.errors)}", str(self._rollouts)
            )

    @property
    def _rollouts(self) -> Path:
        return self._work / "rollouts"

    def _plans(self) -> list[Plan]:
        needs = rollouts_needed(self.total)
        groups = {n: [p for p, need in zip(self._train, needs, strict=True) if need == n] for n in SAMPLES}
        seed = self.config.seed
        return [
            Plan(self.held_out, self._samples, seed),
            *(Plan(prompts, n, seed) for n, prompts in groups.items() if prompts),
        ]

    def states(self, design: Design) -> dict[str, np.ndarray]:
        """The design's values of the held-out rollouts' states; see `judge`."""

        def fit() -> dict[str, np.ndarray]:
            value = str(self.folder(design) / "value")
            train(self.config_of(design), [self._share(design.samples)], str(self.folder(design) / "train"), value)
            return judge(ValueModel.load(value), pack(self._held_out_rows, [OBJECTIVE]).to_pylist())

        return cached(self.folder(design) / "states.npz", fit)

    def _share(self, samples: int) -> str:
        """Where the rollouts of designs with so many a prompt lie, the held-out ones among them."""
        place = self._work / f"rollouts-{samples}"
        if not storage.list_files(str(place), ".parquet"):
            ids = [prompt.prompt_id for prompt in self._train[: self.total // samples]]
            table = read_rollouts(str(self._rollouts))
            wanted = (table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), table["held_out"].to_pylist())
            known = set(ids)
            mask = [held or (prompt in known and i < samples) for prompt, i, held in zip(*wanted, strict=True)]
            storage.write_table(str(place / "all.parquet"), table.filter(pa.array(mask)))
        return str(place)

    @cached_property
    def _held_out_rows(self) -> pa.Table:
        table = read_rollouts(str(self._rollouts))
        return table.filter(table["held_out"])

    @cached_property
    def base(self) -> BaseModel:
        """The base model, to decode with."""
        return load_base(self.config.base)

    @cached_property
    def unguided(self) -> np.ndarray:
        """Mean reward of the rollouts of each prompt that is decoded."""
        rewards: dict[str, list[float]] = {}
        for row in self._held_out_rows.to_pylist():
            rewards.setdefault(row["prompt_id"], []).append(row["rewards"][OBJECTIVE])
        return np.array([np.mean(rewards[prompt.prompt_id]) for prompt in self.held_out[: self.decoded]])

    def curve(self, design: Design) -> Iterator[tuple[float, Point]]:
        """Strengths and what guidance brings at each, from none until the last of the distances is passed."""
        place, kl, strength = self.folder(design), 0.0, FIRST
        yield 0.0, Point(self.unguided, 0.0)
        engines: list[Engine] = []

        def decoded() -> dict[str, np.ndarray]:
            if not engines:
                value = ValueModel.load(str(place / "value"), self.base.model.device)
                scorer = make_scorer("value", value, self.config.base.linears)
                engines.append(Engine(self.base, [scorer], BATCH, linears=self.config.base.linears))
            return self._decode(engines[0], strength)

        for _ in range(MOST):
            found = cached(place / f"strength-{strength:g}.npz", decoded)
            kl = float(found["kl"])
            yield strength, Point(found["reward_P"], kl)
            if kl >= DISTANCES[-1]:
                return
            strength *= 2

    def _decode(self, engine: Engine, strength: float) -> dict[str, np.ndarray]:
        """Decode the held-out prompts: mean reward of each, and the mean KL. Seeds are the same for all designs."""
        prompts = [prompt for prompt in self.held_out[: self.decoded] for _ in range(self._responses)]
        sampling = SamplingParams.of(self.config.rollouts.sampling, 0)
        guidance = GuidanceParams.of(self.config.evaluation, {OBJECTIVE: strength})
        requests = [
            Request(str(i), tuple(encode_prompt(self.base.tokenizer, p)), replace(sampling, seed=i), guidance)
            for i, p in enumerate(prompts)
        ]
        done = engine.generate(requests)
        reward = load_rewards(self.config.rewards)[OBJECTIVE]
        rewards = np.array(list(reward(prompts, [each.text for each in done])), dtype=float)
        return {
            "reward_P": rewards.reshape(-1, self._responses).mean(-1),
            "kl": np.array(np.mean([each.kl for each in done])),
        }


def rollouts_needed(total: int) -> list[int]:
    """How many rollouts each prompt needs so that every design finds its own: the most that any takes of it."""
    return [max(n for n in SAMPLES if prompt < total // n) for prompt in range(total // min(SAMPLES))]


def cached(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from a file; made, and written whole or not at all, if it is not there."""
    if not file.exists():
        arrays: dict[str, Any] = make()
        part = file.with_suffix(f".{os.getpid()}")
        with part.open("wb") as opened:
            np.savez(opened, **arrays)
        part.rename(file)
    with np.load(file) as kept:
        return dict(kept)


@torch.inference_mode()
def judge(model: ValueModel, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Values and rewards (standardised) of all M states of packed rows, and the number of each state's row."""
    objective = ValueObjective(model.float(), td_lambda=1.0)
    found: dict[str, list[np.ndarray]] = {"value_M": [], "reward_M": [], "row_M": []}
    for number, row in enumerate(rows):
        batch = collate([row])
        _, values_NSJ = objective(batch)
        rewards_NS = objective.standardise(batch.rewards_NJ).expand(-1, values_NSJ.shape[1])
        value_M = values_NSJ[..., 0][batch.trained_NS].numpy()
        found["value_M"].append(value_M)
        found["reward_M"].append(rewards_NS[batch.trained_NS].numpy())
        found["row_M"].append(np.full(len(value_M), number))
    return {name: np.concatenate(parts) for name, parts in found.items()}
