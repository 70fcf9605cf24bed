"""What the endpoint costs on top of the engine: throughput and time to the first token, at 16 streams at once.

    make bench-serving

The same models, requests and CPUs in each case: the endpoint with a colocated value model, in one replica that has the
CPUs or in a replica for each; and with the value model in a deployment of its own. The bare engine's loop, in one
process without HTTP, takes turns with each of them, for a machine's rate moves by more within minutes than what is
measured here: a turn takes seconds, is compared with the two beside it, and the median of several is shown. So Ray
idles beside the bare engine; what that takes of the CPUs has a row of its own.
The base model is the demo's, the value model its first layers with a random head; both kinds of requests, steered
and not, run in each. Responses have lengths of their own, so that after the first STREAMS of them requests come one
at a time, while the others are under way: the time to the first token is theirs. They have 128 tokens on average, as
vLLM's `bench serve` asks for by default; a request costs the processes around the engine some 40 ms of a core, however
long it is, so that short ones (`--lengths 16 48 --requests 48`) are the worst case. Clients are threads of this process
that read streams from HTTP; what they cost is part of the figures.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
import psutil
from ray import serve
from ray.serve.config import HTTPOptions

from benchmarks.apart import Apart
from benchmarks.rows import Row, show, write
from benchmarks.setting import CANDIDATES, MODEL, STRENGTH, Setting
from vas.config import Resources
from vas.decoding.engine import Engine
from vas.decoding.loop import Loop
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.models.base import set_threads
from vas.progress import console
from vas.run.cluster import ray_cluster
from vas.serving.app import build

STREAMS, PORT = 16, 8799
THREADS, LAYERS = 2, 8
BARE, APART = "bare engine", "a replica a CPU"
CASES = ("colocated", APART, "deployment")


def spread(requests: int, least: int, most: int) -> list[int]:
    """How many tokens each request asks for: as if drawn at random, the same in each case."""
    return [least + number * 13 % (most - least + 1) for number in range(requests)]


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
    def first_ms(self) -> float:
        """Median time to the first token, in ms."""
        return 1000 * median(self.first)


def drive(ask: Callable[[int, int], tuple[float, int]], lengths: list[int]) -> Measured:
    """Requests by STREAMS clients at once. `ask(number, length)` returns the first token's seconds, and tokens."""
    ask(0, lengths[0])
    measured = Measured()
    started = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as threads:
        for number, (first, tokens) in enumerate(threads.map(ask, range(len(lengths)), lengths)):
            if number >= STREAMS:
                measured.first.append(first)
            measured.tokens += tokens
    measured.seconds = time.perf_counter() - started
    return measured


class Bare:
    """The engine's loop, with nothing around it."""

    def __init__(self) -> None:
        self._setting = setting = Setting.load(MODEL, LAYERS, None, "auto")

        def make() -> Engine:
            set_threads(THREADS)
            return Engine(setting.base, [make_scorer("value", setting.value)], max_sequences=STREAMS)

        self._loop = Loop(make)

    def measure(self, guided: bool, lengths: list[int]) -> Measured:
        """All requests, by threads of the engine's process."""
        guidance = GuidanceParams({"any": STRENGTH} if guided else {}, CANDIDATES)

        def ask(number: int, length: int) -> tuple[float, int]:
            started, first = time.perf_counter(), threading.Event()
            seen: list[float] = []

            def listen(token: Any, completion: Any) -> None:
                if not first.is_set():
                    seen.append(time.perf_counter() - started)
                    first.set()

            prompt = self._setting.prompts[number % len(self._setting.prompts)]
            sampling = SamplingParams(max_tokens=length, seed=number, logit_bias={0: -1e4, 2: -1e4})
            done = self._loop.submit(Request(str(number), prompt, sampling, guidance), listen).result()
            return seen[0], len(done.token_ids)  # type: ignore[union-attr]  # no request of these fails

        return drive(ask, lengths)


def served(setting: Setting, guided: bool, lengths: list[int]) -> Measured:
    """The endpoint that is up, by clients that keep their connections as OpenAI's does."""
    asked = {"model": "bench", "stream": True, "logit_bias": {"0": -100, "2": -100}}
    if guided:
        asked["guidance"] = {"objectives": {"any": STRENGTH}, "candidates": CANDIDATES}

    def ask(http: httpx.Client, number: int, length: int) -> tuple[float, int]:
        started, first = time.perf_counter(), 0.0
        body = asked | {
            "prompt": list(setting.prompts[number % len(setting.prompts)]),
            "max_tokens": length,
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
        return drive(partial(ask, http), lengths)


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


def ray_seconds() -> float:
    """Processor time that Ray's processes, which this one has begun, have taken so far."""
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "multiprocessing" not in " ".join(process.cmdline()):  # else it is the bare engine's
                seconds += sum(process.cpu_times()[:2])
    return seconds


@dataclass
class Turn:
    """What one turn measured, steered and not. idle: share of the CPUs that Ray took, beside the bare engine."""

    case: str
    measured: dict[bool, Measured]
    idle: float = 0.0

    def __str__(self) -> str:
        told = (f"{each.rate:.1f} tokens/s, {each.first_ms:.0f} ms" for each in self.measured.values())
        return f"{self.case}: base model {', steered '.join(told)}"


def turns(rounds: int, cases: Sequence[str], folder: str, setting: Setting, lengths: list[int]) -> Iterator[Turn]:
    """The bare engine and each case in turn; the bare engine begins and ends."""
    with Apart(Bare) as engine:

        def bare() -> Turn:
            began, before = time.perf_counter(), ray_seconds()
            found = {guided: engine.call("measure", guided, lengths).result() for guided in (False, True)}
            return Turn(BARE, found, (ray_seconds() - before) / (time.perf_counter() - began) / THREADS)

        for case in cases:
            with endpoint(folder, case):
                for _ in range(rounds):
                    yield bare()
                    yield Turn(case, {guided: served(setting, guided, lengths) for guided in (False, True)})
                yield bare()


def rows_of(done: list[Turn], guided: bool) -> Iterator[Row]:
    """Medians over the turns of each case, and of its ratios to the bare engine's turns before and after it."""
    kind = "steered" if guided else "base model"
    ratios: dict[str, float] = {}
    triples = list(zip(done, done[1:], done[2:], strict=False))
    cases = [case for case in CASES if any(turn.case == case for _, turn, _ in triples)]
    for case in (BARE, *cases):
        own = [turn.measured[guided] for turn in done if turn.case == case]
        yield Row(f"{case}, {kind}", "throughput", median(each.rate for each in own), "tokens/s")
        yield Row(f"{case}, {kind}", "time to first token, median", median(each.first_ms for each in own), "ms")
    for case in cases:
        beside = [tuple(turn.measured[guided] for turn in three) for three in triples if three[1].case == case]
        ratios[case] = median(2 * own.rate / (before.rate + after.rate) for before, own, after in beside)
        later = median(own.first_ms - (before.first_ms + after.first_ms) / 2 for before, own, after in beside)
        if case != "deployment":
            yield Row(f"{case} / bare engine, {kind}", "throughput", ratios[case], "x", ">= 0.9")
            yield Row(f"{case} / bare engine, {kind}", "time to first token, later by", later, "ms", "<= 30")
    if guided and ratios.keys() >= {"deployment", "colocated"}:
        ratio = ratios["deployment"] / ratios["colocated"]
        yield Row(f"deployment / colocated, {kind}", "throughput", ratio, "x", ">= 0.6")


def main() -> None:
    """Run the cases and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each case has its turn")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--requests", type=int, default=32, help="in a turn, of each kind")
    parser.add_argument("--lengths", nargs=2, type=int, default=(64, 192), metavar=("LEAST", "MOST"), help="in tokens")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    if arguments.requests <= STREAMS or arguments.lengths[0] > arguments.lengths[1]:
        parser.error(f"--requests: more than {STREAMS}; --lengths: the least first")
    lengths = spread(arguments.requests, *arguments.lengths)
    setting = Setting.load(MODEL, LAYERS, None, "auto")
    done: list[Turn] = []
    with TemporaryDirectory() as folder, suppress(KeyboardInterrupt):  # whoever has no time has what is there so far
        setting.value.save(folder, setting.base.tokenizer, "# A random one")
        for turn in turns(arguments.rounds, arguments.cases, folder, setting, lengths):
            done.append(turn)
            console.print(str(turn), highlight=False)
    if not done:
        return
    rows = [row for guided in (False, True) for row in rows_of(done, guided)]
    idle = median(turn.idle for turn in done if turn.case == BARE)
    rows.append(Row("Ray, idle beside the bare engine", "share of the CPUs", idle, ""))
    tokens = f"{min(lengths)} to {max(lengths)} tokens"
    show(rows, f"{STREAMS} streams, {len(lengths)} responses of {tokens}, {THREADS} CPUs")
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
