"""How fast the value model is trained, against Hugging Face `Trainer` on the same rollouts, and what memory ZeRO saves.

    make bench-training        or        python -m benchmarks.training --json FILE [--quick]

Takes a finished run's rollouts, with response lengths as they came, and trains the first layers of its base as the
run would: categorical heads, λ = 1, embeddings frozen, float32. Trainer (benchmarks/hf_trainer.py) gets one rollout a
row, padded to the longest of its batch, as many rollouts a step, and the same loss: that of the first step, from the
same weights, is compared. Every entrant fits the same rollouts in turn, round by round, each in a process of its own
with the same threads; ratios are medians over rounds. What is counted is rollouts per second, the same for all.

Ours differs from Trainer in two ways that are also measured singly: a prompt is run once for all its rollouts, and
rows of like length share a step. The first is timed under Ray Train, too, by `vas.training.trainer.train` as a run
calls it, from the second epoch's own learning curve. Shares of the machine's product rate count the model's products
with its weights (see vas/training/speed.py): of all tokens that were run, without padding; and of those that had to
be, a prompt once with its rollouts.

Memory is the resident memory of each of two workers, with the embeddings trained so that there is more to share out.
A worker loads the whole base before ZeRO shares the model out, so the peaks of building and of a step are told
apart, and what is held between steps. ZeRO is weighed with DeepSpeed's own buckets, which are for large models, and
with small ones.

It is for CPUs, and for Linux. The run that docs/results.md quotes, which `make bench-schedules` makes at need:

    vas run configs/demo.yaml --set name=bench --set value.layers=10
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.apart import Apart
from benchmarks.fitting import Fitted, Weighed, Worker, store
from benchmarks.hf_trainer import Reference
from benchmarks.rows import Row, show, write
from vas import storage
from vas.config import RunConfig, parse_config
from vas.configfile import override
from vas.errors import VasError
from vas.run.cluster import ray_cluster
from vas.run.directory import RunDirectory
from vas.training.packing import PACKED_SCHEMA, pack
from vas.training.trainer import objective_statistics, train

OURS, TRAINER, BY_LENGTH, RAY = "ours", "HF Trainer", "HF Trainer, by length", "ours, under Ray Train"
GOAL = ">= 1.5"
HELD_OUT = 4  # prompts that the training under Ray Train is evaluated on
MEMORY_LAYERS, MEMORY_PROMPTS = 10, 8
# DeepSpeed's own bucket sizes are for models of billions of weights: a small one fits them whole and stays gathered
BUCKETS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
SMALL = 4_000_000  # weights; about a layer of the bundled model
STAGES = [(0, False), (2, False), (2, True), (3, False), (3, True)]
QUICK_STAGES = [(0, False), (3, True)]


@dataclass(frozen=True)
class Material:
    """What a run brings: its rollouts, and a config to train on them."""

    config: RunConfig
    objectives: list[dict[str, Any]]
    """As in ValueModelConfig."""
    rollouts: pa.Table

    @classmethod
    def load(cls, location: str, layers: int) -> Material:
        """Of a run at a location. Raises VasError if there is none, or it has no rollouts."""
        run = RunDirectory.open(location)
        files = storage.list_files(run.rollouts, ".parquet")
        if not files:
            raise VasError("this run has no rollouts", run.rollouts, "`vas rollout` its config, or give another --run")
        kept = run.config.model_dump(mode="json", include={"base", "prompts", "rewards", "rollouts", "evaluation"})
        old = run.config.train
        train: dict[str, Any] = {
            "batch_size": old.batch_size,
            "micro_batch_size": old.batch_size,
            "epochs": 2,
            "warmup": 0,
            "td_lambda": 1.0,
        }
        train |= {"lr": old.lr, "head_lr": old.head_lr, "precision": "float32"}
        content = kept | {"name": "bench-training", "value": {"layers": layers}, "train": train}
        config = parse_config(content, location)
        rollouts = storage.read_table(files)
        return cls(config, objective_statistics(config, rollouts), rollouts)

    def changed(self, *overrides: str) -> RunConfig:
        """The config with `a.b=c` overrides."""
        return parse_config(override(self.config.model_dump(mode="json"), overrides), "this benchmark")

    @property
    def batch(self) -> int:
        """Prompts a step."""
        return self.config.train.batch_size

    @property
    def single(self) -> int:
        """Rollouts a step: rows, where each is one."""
        return self.batch * self.config.rollouts.samples_per_prompt

    def sample(self, prompts: int, seed: int, held_out: bool = False) -> pa.Table:
        """All rollouts of so many random prompts of one side of the split, without those that failed."""
        side = pc.equal(self.rollouts["held_out"], held_out)
        good = self.rollouts.filter(pc.and_(side, pc.is_null(self.rollouts["error"])))
        ids = sorted(pc.unique(good["prompt_id"]).to_pylist())
        chosen = np.random.default_rng(seed).permutation(len(ids))[:prompts]
        return good.filter(pc.is_in(good["prompt_id"], pa.array([ids[i] for i in chosen])))


@dataclass(frozen=True, slots=True)
class Round:
    """Some rollouts, packed both ways."""

    shared: str
    """Where a prompt's rollouts are one row."""
    alone: str
    """Where each is a row."""
    rollouts: int
    tokens: int
    """That have to be run: a prompt once with its rollouts."""

    @classmethod
    def of(cls, table: pa.Table, objectives: list[str], folder: str) -> Round:
        """Pack rollouts into a folder."""
        packed = pack(table, objectives)
        rows = packed.to_pylist()
        single = [
            {"prompt": row["prompt"]} | {name: [row[name][n]] for name in ("responses", "rewards", "ended", "first")}
            for row in rows
            for n in range(len(row["responses"]))
        ]
        return cls(
            store(packed, storage.join(folder, "shared")),
            store(pa.Table.from_pylist(single, schema=PACKED_SCHEMA), storage.join(folder, "alone")),
            len(single),
            sum(len(row["prompt"]) + sum(map(len, row["responses"])) for row in rows),
        )


def throughput(material: Material, prompts: int, rounds: int, threads: int, folder: str) -> list[Row]:
    """Rollouts per second of every entrant, and what of the machine's product rate they make."""
    names = list(material.config.rewards)
    single = material.single
    about = (material.config, material.objectives, threads)
    with Apart(Worker, *about, _free_port()) as worker, Apart(Reference, *about) as reference:
        entrants: dict[str, Callable[[Round], Future[Any]]] = {
            OURS: lambda r: worker.call("fit", r.shared, material.batch),
            TRAINER: lambda r: reference.call("fit", r.alone, single),
            "ours, rows of any length": lambda r: worker.call("fit", r.shared, material.batch, False),
            BY_LENGTH: lambda r: reference.call("fit", r.alone, single, True),
            "ours, a prompt a rollout": lambda r: worker.call("fit", r.alone, single),
            "ours, neither": lambda r: worker.call("fit", r.alone, single, False),
        }
        step = Round.of(material.sample(material.batch, rounds), names, storage.join(folder, "step"))
        first = {name: entrants[name](step).result().losses[0] for name in (OURS, TRAINER)}  # and warms up
        fitted: dict[str, list[Fitted]] = {name: [] for name in entrants}
        rates, all_rounds = [], []
        for number in range(rounds):
            table = material.sample(prompts, number)
            all_rounds.append(Round.of(table, names, storage.join(folder, str(number))))
            rates.append(worker.call("rates").result())
            for name, fit in entrants.items():
                fitted[name].append(fit(all_rounds[-1]).result())
    rate, flops = max(rate for rate, _ in rates), rates[0][1]
    rows = [
        Row("first step's loss", OURS, first[OURS], ""),
        Row("first step's loss", "relative difference", abs(first[OURS] / first[TRAINER] - 1), "", "<= 1e-4"),
        Row("machine", "product rate", rate / 1e9, "GFLOP/s"),
    ]
    for name, each in fitted.items():
        pairs = list(zip(all_rounds, each, strict=True))
        rows += [
            Row(name, "throughput", statistics.median(r.rollouts / f.seconds for r, f in pairs), "rollouts/s"),
            Row(
                name,
                "run, with padding",
                sum(f.places for f in each) / sum(r.rollouts for r in all_rounds),
                "tokens/rollout",
            ),
            Row(name, "of the product rate", statistics.median(f.tokens / f.seconds for f in each) * flops / rate, ""),
            Row(
                name,
                "needed work, of it",
                statistics.median(r.tokens / f.seconds for r, f in pairs) * flops / rate,
                "",
            ),
        ]

    def ratios(name: str, other: str, goal: str | None = None) -> list[Row]:
        pairs = list(zip(fitted[name], fitted[other], strict=True))
        seconds = statistics.median(o.seconds / f.seconds for f, o in pairs)
        processor = statistics.median(o.processor / f.processor for f, o in pairs)
        case = f"{name} / {other}"
        return [Row(case, "ratio", seconds, "x", goal), Row(case, "by processor time", processor, "x")]

    rows += ratios(OURS, TRAINER, GOAL) + ratios(OURS, BY_LENGTH)
    return rows + [row for name in entrants if name not in (OURS, TRAINER) for row in ratios(name, TRAINER)]


def under_ray(material: Material, prompts: int, threads: int, folder: str) -> list[Row]:
    """The same by a whole training under Ray Train, between two of Trainer's passes over the same rollouts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    table = material.sample(prompts, 0)
    rollouts, stored = storage.join(folder, "rollouts"), storage.join(folder, "train")
    held_out = material.sample(HELD_OUT, 0, held_out=True)
    storage.write_table(storage.join(rollouts, "0.parquet"), pa.concat_tables([table, held_out]))
    config = material.changed(f"resources.num_cpus={threads}")
    both = Round.of(table, list(config.rewards), storage.join(folder, "packed"))
    with Apart(Reference, material.config, material.objectives, threads) as reference:

        def trainer() -> float:
            return float(reference.call("fit", both.alone, material.single).result().seconds)

        trainer()  # warms up
        before = trainer()
        with ray_cluster(config.resources):
            started = time.perf_counter()
            train(config, [rollouts], stored, storage.join(folder, "value"))
            seconds = time.perf_counter() - started
        theirs = both.rollouts / statistics.mean((before, trainer()))
    curves = EventAccumulator(storage.join(stored, "tensorboard"))
    curves.Reload()
    speeds = [event.value for event in curves.Scalars("tokens_per_s")]  # each of its epoch so far
    ends = speeds[len(speeds) // 2 - 1], speeds[-1]
    ours = ends[-1] * both.rollouts / both.tokens
    return [
        Row(RAY, "throughput", ours, "rollouts/s"),
        Row(RAY, "of the product rate", curves.Scalars("mfu")[-1].value, ""),
        Row(RAY, "memory at most", curves.Scalars("memory_bytes")[-1].value / 1e6, "MB"),
        Row(RAY, "outside steps", seconds - sum(both.tokens / end for end in ends), "s"),
        Row(f"{RAY} / {TRAINER}", "ratio", ours / theirs, "x", GOAL),
    ]


def memory(material: Material, stages: list[tuple[int, bool]], folder: str) -> list[Row]:
    """Resident memory of the fuller of two workers at ZeRO stages, each with small buckets or DeepSpeed's own."""
    names = list(material.config.rewards)
    data = Round.of(material.sample(MEMORY_PROMPTS, 0), names, storage.join(folder, "memory"))
    rows: list[Row] = []
    held: list[int] = []
    for stage, small in stages:
        own = {"zero_optimization": dict.fromkeys(BUCKETS, SMALL)} if small else {}
        config = material.changed(
            f"value.layers={MEMORY_LAYERS}",
            "train.train_embeddings=true",
            f"train.zero_stage={stage}",
            f"train.deepspeed={json.dumps(own)}",
        )
        about = (config, material.objectives, 1, _free_port())
        with Apart(Worker, *about, 0, 2) as one, Apart(Worker, *about, 1, 2) as other:
            pending = [each.call("weigh", data.shared, material.batch) for each in (one, other)]
            weighed: list[Weighed] = [each.result() for each in pending]
        before, building, steps, between = (max(getattr(w, what) for w in weighed) for what in Weighed.__slots__)
        held.append(steps - before)
        case = f"ZeRO-{stage}{', small buckets' if small else ''}"
        rows += [
            Row(case, "before the model", before / 1e6, "MB"),
            Row(case, "building, above that", (building - before) / 1e6, "MB"),
            Row(case, "a step, above that", held[-1] / 1e6, "MB"),
            Row(case, "between steps, above that", (between - before) / 1e6, "MB"),
            Row(f"{case} / ZeRO-{stages[0][0]}", "a step, above that", held[-1] / held[0], "x"),
        ]
    return rows


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/bench", help="a finished run (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the value model (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of 8 prompts, ZeRO 0 and 3: under 3 minutes")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    options = parser.parse_args()
    prompts, rounds, stages = (8, 1, QUICK_STAGES) if options.quick else (options.prompts, options.rounds, STAGES)
    material = Material.load(options.run, options.layers)
    every: list[Row] = []

    def measured(title: str, rows: list[Row]) -> None:
        every.extend(rows)
        show(rows, title)
        write(every, options.json)  # what there is so far, should the rest fail

    with tempfile.TemporaryDirectory() as folder:
        measured(
            f"Training, {options.layers} layers, {rounds} x {prompts} prompts",
            throughput(material, prompts, rounds, options.threads, folder),
        )
        measured("Training under Ray Train", under_ray(material, prompts, options.threads, folder))
        measured(f"Memory of each of 2 workers, {MEMORY_LAYERS} layers", memory(material, stages, folder))


if __name__ == "__main__":
    main()
