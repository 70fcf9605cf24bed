"""What the endpoint costs on top of the engine: throughput and time to the first token, at 16 streams at once.

    make bench-serving

Four ways, with the same models, requests and CPUs, one after the other in one run: the bare engine's loop in one
process; the endpoint with a colocated value model, in one replica that has the CPUs or in a replica for each; and
with the value model in a deployment of its own. The base model is the demo's, the value model its first layers with a
random head; both kinds of requests, steered and not, run in each. Responses have lengths of their own, so that after
the first STREAMS of them requests come one at a time, while the others are under way: the time to the first token is
theirs. Clients are threads of this process that read streams from HTTP; what they cost is part of the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
from ray import serve
from ray.serve.config import HTTPOptions

from benchmarks.rows import Row, show, write
from benchmarks.setting import CANDIDATES, MODEL, STRENGTH, Setting
from vas.config import Resources
from vas.decoding.engine import Engine
from vas.decoding.loop import Loop
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.models.base import set_threads
from vas.run.cluster import ray_cluster
from vas.serving.app import build

STREAMS, REQUESTS, PORT = 16, 64, 8799
LENGTHS = (16, 48)  # tokens of a response, the least and the most
THREADS = 2
APART = "a replica a CPU"


def length(number: int) -> int:
    """How many tokens a request asks for: as if drawn at random, the same in each case."""
    least, most = LENGTHS
    return least + number * 13 % (most - least + 1)


class Measured:
    """Times of the first tokens, and tokens a second of the whole."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.tokens, self.seconds = 0, 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def median_first(self) -> float:
        """Median time to the first token, in ms."""
        return 1000 * statistics.median(self.first)


def drive(ask: Any) -> Measured:
    """REQUESTS in all by STREAMS clients at once. `ask(number)` returns the first token's seconds, and tokens."""
    measured = Measured()
    started = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as threads:
        for number, (first, tokens) in enumerate(threads.map(ask, range(REQUESTS))):
            if number >= STREAMS:
                measured.first.append(first)
            measured.tokens += tokens
    measured.seconds = time.perf_counter() - started
    return measured


def bare(setting: Setting, guided: bool) -> Measured:
    """The engine's loop in this process."""

    def make() -> Engine:
        set_threads(THREADS)
        return Engine(setting.base, [make_scorer("value", setting.value)], max_sequences=STREAMS)

    loop = Loop(make)
    guidance = GuidanceParams({"any": STRENGTH} if guided else {}, CANDIDATES)

    def ask(number: int) -> tuple[float, int]:
        started, first = time.perf_counter(), threading.Event()
        seen: list[float] = []

        def listen(token: Any, completion: Any) -> None:
            if not first.is_set():
                seen.append(time.perf_counter() - started)
                first.set()

        prompt = setting.prompts[number % len(setting.prompts)]
        sampling = SamplingParams(max_tokens=length(number), seed=number, logit_bias={0: -1e4, 2: -1e4})
        done = loop.submit(Request(str(number), prompt, sampling, guidance), listen).result()
        return seen[0], len(done.token_ids)  # type: ignore[union-attr]  # no request of these fails

    ask(0)
    return drive(ask)


def served(setting: Setting, guided: bool) -> Measured:
    """The endpoint that is up, by clients that keep their connections as OpenAI's does."""
    asked = {"model": "bench", "stream": True, "logit_bias": {"0": -100, "2": -100}}
    if guided:
        asked["guidance"] = {"objectives": {"any": STRENGTH}, "candidates": CANDIDATES}

    def ask(number: int, http: httpx.Client) -> tuple[float, int]:
        started, first = time.perf_counter(), 0.0
        body = asked | {
            "prompt": list(setting.prompts[number % len(setting.prompts)]),
            "max_tokens": length(number),
            "seed": number,
            "stream_options": {"include_usage": True},
        }
        tokens = 0
        with http.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - started
                    usage = json.loads(line[6:]).get("usage")
                    tokens = usage["completion_tokens"] if usage else tokens
        return first, tokens

    limits = httpx.Limits(max_connections=STREAMS, max_keepalive_connections=STREAMS)
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=600, limits=limits) as http:
        ask(0, http)
        return drive(lambda number: ask(number, http))


@contextmanager
def endpoint(folder: str, case: str) -> Any:
    """The application on a Ray of its own: `colocated`, APART, or with the value model as a `deployment`."""
    with ray_cluster(Resources(num_cpus=8, object_store_memory=300 * 2**20)):  # as `vas serve` begins it
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=PORT))
        placement = "deployment" if case == "deployment" else "colocated"
        value = {"path": folder, "placement": placement, "replicas": {"cpus": 1}}
        keys = {"base": {"model": MODEL}, "name": "bench", "value_models": [value], "max_sequences": STREAMS}
        keys["replicas"] = {"cpus": THREADS if case == "colocated" else 1, "min": THREADS if case == APART else 1}
        try:
            serve.run(build(keys), name="bench", route_prefix="/")
            yield
        finally:
            serve.shutdown()


def main() -> None:
    """Run the cases and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    setting = Setting.load(MODEL, 8, None, "auto")
    found: dict[tuple[str, bool], Measured] = {}
    with TemporaryDirectory() as folder:
        setting.value.save(folder, setting.base.tokenizer, "# A random one")
        for guided in (False, True):
            found["bare engine", guided] = bare(setting, guided)
        for case in ("colocated", APART, "deployment"):
            with endpoint(folder, case):
                for guided in (False, True):
                    found[case, guided] = served(setting, guided)
    rows = []
    for (case, guided), measured in found.items():
        name = f"{case}, {'steered' if guided else 'base model'}"
        rows.append(Row(name, "throughput", measured.rate, "tokens/s"))
        rows.append(Row(name, "time to first token, median", measured.median_first, "ms"))
    for guided in (False, True):
        kind = "steered" if guided else "base model"
        engine, colocated, apart = (found[case, guided] for case in ("bare engine", "colocated", "deployment"))
        for case in ("colocated", APART):
            name, later = f"{case} / bare engine, {kind}", found[case, guided].median_first - engine.median_first
            rows.append(Row(name, "throughput", found[case, guided].rate / engine.rate, "x", ">= 0.9"))
            rows.append(Row(name, "time to first token, later by", later, "ms", "<= 30"))
        if guided:
            rows.append(
                Row(f"deployment / colocated, {kind}", "throughput", apart.rate / colocated.rate, "x", ">= 0.6")
            )
    show(rows, f"{STREAMS} streams, {REQUESTS} responses of {LENGTHS[0]} to {LENGTHS[1]} tokens, {THREADS} CPUs")
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
