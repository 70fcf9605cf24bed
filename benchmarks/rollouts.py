"""How fast rollouts are sampled, and what a million of them cost the driver.

    make bench-rollouts                      our engine against Hugging Face `generate`; two actors against one
    make bench-rollouts ARGS=--million       a million prompts through a 1-layer LM, killed three times and resumed

Prompts are the demo's, alone and several in one, so that their lengths differ; so do the lengths of responses, drawn
from a log-normal distribution. `generate` takes fixed batches in the order in which requests come, padded to the
longest, and the best batch counts. What it makes beyond a request's length is not counted.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.rows import Row, show, write
from benchmarks.setting import MODEL, Setting, generate, rates, run
from vas.config import parse_config
from vas.decoding.sequence import Request, SamplingParams
from vas.prompts import load_prompts
from vas.rollouts.pipeline import CALLS, sample
from vas.rollouts.plan import Plan
from vas.run.cluster import ray_cluster

REQUESTS, LONGEST, BATCHES = 96, 96, (8, 16, 32)
ACTOR_PROMPTS, ACTOR_SAMPLES, ACTOR_TOKENS, ACTOR_BATCH = 320, 4, 32, 32


def mixed(setting: Setting) -> list[Request]:
    """Requests whose prompts and responses have all kinds of lengths, in no order."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.2, 0.8, REQUESTS), 4, LONGEST).astype(int).tolist()
    requests = []
    for number, length in enumerate(lengths):
        joined = [setting.prompts[i] for i in random.integers(0, len(setting.prompts), random.integers(1, 6))]
        prompt = tuple(token for each in joined for token in each)
        requests.append(Request(str(number), prompt, SamplingParams(max_tokens=length, seed=number)))
    return requests


def against_generate() -> list[Row]:
    """Tokens per second of the engine and of `generate`, same model, requests and threads."""
    setting = Setting.load(MODEL, 1, None, "auto")
    requests = mixed(setting)

    def in_batches(size: int) -> int:
        return sum(generate(setting.base, requests[i : i + size]) for i in range(0, len(requests), size))

    cases = {f"generate, batches of {size}": lambda size=size: in_batches(size) for size in BATCHES}
    engines = {size: setting.engine(None, size) for size in BATCHES}
    cases |= {f"engine, {size} at once": lambda size=size: run(engines[size], requests) for size in BATCHES}
    found = rates(cases, 1)
    best = {kind: max(rate for name, rate in found.items() if name.startswith(kind)) for kind in ("engine", "generate")}
    rows = [Row(name, "throughput", rate, "tokens/s") for name, rate in found.items()]
    return [*rows, Row("best engine / best generate", "ratio", best["engine"] / best["generate"], "x", ">= 1.3")]


def actors(count: int) -> float:
    """Tokens per second of so many actors with a thread each, while all are busy.

    That is from the first committed batch until the batches left are fewer than the actors take at once.
    """
    with tempfile.TemporaryDirectory(prefix="vas-") as folder:
        config = parse_config(
            {
                "name": "actors",
                "runs_dir": folder,
                "base": {"model": MODEL},
                "prompts": {"source": "bundled:demo", "limit": ACTOR_PROMPTS},
                "rewards": {"brief": {"use": "brevity"}},
                "rollouts": {
                    "samples_per_prompt": ACTOR_SAMPLES,
                    "batch_size": ACTOR_BATCH,
                    "sampling": {"max_tokens": ACTOR_TOKENS},
                },
                "evaluation": {"best_of": [2, 4]},
                "resources": {"actors": count, "cpus_per_actor": 1},
            },
            "this benchmark",
        )
        plan = Plan(load_prompts(config.prompts), ACTOR_SAMPLES, 0)
        with ray_cluster(config.resources):
            sample(config, [plan], folder, f"{count} actors")
        files = sorted(Path(folder).glob("*.parquet"), key=os.path.getmtime)[: -CALLS * count]
        tokens = [sum(map(len, pq.read_table(file)["logprobs"].to_pylist())) for file in files]
        return sum(tokens[1:]) / (os.path.getmtime(files[-1]) - os.path.getmtime(files[0]))


def more_actors() -> list[Row]:
    """One actor against two."""
    one, two = actors(1), actors(2)
    return [
        Row("1 actor with 1 thread", "throughput", one, "tokens/s"),
        Row("2 actors with 1 thread", "throughput", two, "tokens/s"),
        Row("2 actors / 1 actor", "ratio", two / one, "x", ">= 1.7"),
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--million", action="store_true", help="the dry run of a million prompts instead")
    parser.add_argument("--prompts", type=int, default=1_000_000, help="prompts of the dry run")
    options = parser.parse_args()
    if options.million:
        from benchmarks.million import dry_run

        rows = dry_run(options.prompts)
        show(rows, f"{options.prompts:,} prompts")
    else:
        rows = against_generate()
        show(rows, "Mixed lengths")
        rows += (more := more_actors())
        show(more, "Actors")
    if options.json and options.million:
        options.json = options.json.with_stem(options.json.stem + "-million")
    write(rows, options.json)


if __name__ == "__main__":
    main()
