"""How fast the engine decodes: against Hugging Face `generate`, two references for guidance, and the machine's limits.

    make bench-decoding        or        python -m benchmarks.decoding --json FILE [--quick]

The base is the bundled 135M model; the value model is its first ten layers with a random head (speed
does not depend on what it has learned). All cases run in this one process, on the same prompts and
threads, so their ratios can be compared; absolute figures are this machine's. What guidance is worth at
each speed is `benchmarks/schedules.py`'s to measure.

Needs torch and transformers alone, besides gguf and accelerate for the bundled model; or give another
--model. On a GPU: --device cuda --dtype bfloat16. VAS_OFF=NAME,... turns optimisations of the engine off: see
`vas/decoding/switches.py`.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.floors import bandwidth, floor, kv_bytes_per_token
from benchmarks.reference import FullRows, one_at_a_time
from benchmarks.rows import Row, show, write
from benchmarks.setting import (
    CANDIDATES,
    MODEL,
    SHAPES,
    Setting,
    generate,
    guided,
    median_entropy,
    rates,
    run,
)
from vas.decoding.cache import COLUMNS
from vas.decoding.engine import Engine
from vas.decoding.linears import settle
from vas.decoding.sequence import Completion, Request, SamplingParams

NEW_TOKENS = 32
MASS = 0.9  # of adaptive k
BLOCK, CONTINUATIONS = 8, 4
CONTEXT = 1024
HELD, MANY = 16, 1000  # sequences that the small cache holds, requests that go through it


def throughput(setting: Setting, batch: int, rounds: int, new_tokens: int) -> list[Row]:
    """Tokens per second of every way to decode a fixed batch, and their ratios."""
    plain = setting.requests(batch, new_tokens)
    steered = guided(plain)
    vocab = setting.with_vocab_heads()
    few = steered[:1]  # one sequence at a time: its rate does not depend on the batch
    by_reference: dict[str, list[list[int]]] = {}
    median = median_entropy(setting.engine(setting.value, batch), steered)
    fast = settle(setting.base.model, "fastest")
    engines = {
        "engine": (setting.engine(None, batch), plain),
        "guided": (setting.engine(setting.value, batch), steered),
        "guided, vocab head": (setting.engine(vocab, batch), steered),
        "guided, adaptive k": (setting.engine(setting.value, batch), guided(plain, candidate_mass=MASS)),
        "guided, half the steps": (setting.engine(setting.value, batch), guided(plain, schedule=f"entropy:{median}")),
        "guided, blocks": (
            setting.engine(setting.value, batch),
            guided(plain, schedule=f"block:{BLOCK}", candidates=CONTINUATIONS),
        ),
        f"engine, {fast} linears": (setting.engine(None, batch, fast), plain),
        f"guided, {fast} linears": (setting.engine(setting.value, batch, fast), steered),
        f"guided, vocab head, {fast} linears": (setting.engine(vocab, batch, fast), steered),
    }

    def by(name: str, responses: list[list[int]]) -> int:
        by_reference[name] = responses
        return sum(map(len, responses))

    cases: dict[str, Callable[[], int]] = {
        "generate": lambda: generate(setting.base, plain),
        "one at a time": lambda: by("one at a time", [one_at_a_time(setting.base, setting.value, r) for r in few]),
        "full rows": lambda: by("full rows", FullRows(setting.base, setting.value, steered).generate()),
    }
    cases |= {name: (lambda e=engine, r=requests: run(e, r)) for name, (engine, requests) in engines.items()}
    for case in cases if torch.cuda.is_available() else ("generate", "engine", "guided"):
        cases[case]()  # warm up; on a GPU, every engine records its own steps
    speed = rates(cases, rounds)

    def ratio(one: str, other: str, goal: str | None = None) -> Row:
        return Row(f"batch {batch}: {one} / {other}", "ratio", speed[one] / speed[other], "x", goal)

    rows = [Row(f"batch {batch}: {name}", "throughput", rate, "tokens/s") for name, rate in speed.items()]
    rows += [
        ratio("engine", "generate", ">= 1.0"),
        ratio("guided", "one at a time", {1: ">= 3", 32: ">= 8"}.get(batch)),
        ratio("guided", "full rows", ">= 1.0"),
        ratio("guided", "engine"),
        ratio("guided, vocab head", "engine", ">= 0.7"),
        *(ratio(name, "generate") for name in speed if name.startswith("guided")),
    ]
    ours = [done.token_ids for done in engines["guided"][0].generate(steered)]
    for name, theirs in by_reference.items():
        same = float(np.mean([one == other for one, other in zip(ours, theirs, strict=False)]))
        # in float32 a near tie may fall the other way; in float64 the tests have them all alike
        goal = ">= 0.9" if setting.base.model.dtype == torch.float32 else None
        rows.append(Row(f"batch {batch}: of {len(theirs)} responses, as by {name}", "share", same, "", goal))
    return rows


def arriving(setting: Setting, batch: int) -> list[Row]:
    """Requests of geometric lengths that arrive at random, as many in a second as the engine can just serve."""
    lengths = np.random.default_rng(0).geometric(1 / NEW_TOKENS, 4 * batch).tolist()
    requests = [
        Request(str(i), setting.prompts[i], SamplingParams(max_tokens=length, seed=i))
        for i, length in enumerate(lengths)
    ]
    full = setting.requests(batch, NEW_TOKENS)
    engine = setting.engine(None, batch)
    speed = rates({"engine": lambda: run(engine, full)}, 2)["engine"]
    gaps = np.random.default_rng(1).exponential(NEW_TOKENS / speed, len(requests))
    times = (gaps.cumsum() - gaps[0]).tolist()

    def by_engine() -> int:
        waiting, started = list(zip(times, requests, strict=True)), time.time()
        while waiting or engine.busy:
            while waiting and waiting[0][0] <= time.time() - started:
                engine.add(waiting.pop(0)[1])
            if engine.busy:
                for token in engine.step():
                    if token.finish_reason:
                        engine.take(token.request_id)
            else:
                time.sleep(0.001)
        return sum(lengths)

    def by_generate() -> int:
        waiting, started = list(zip(times, requests, strict=True)), time.time()
        while waiting:
            here = [request for at, request in waiting[:batch] if at <= time.time() - started]
            if here:
                generate(setting.base, here)
                waiting = waiting[len(here) :]
            else:
                time.sleep(0.001)
        return sum(lengths)

    found = rates({"generate": by_generate, "engine": by_engine}, 1)
    case = f"batch {batch}, arriving at random"
    return [
        *(Row(f"{case}: {name}", "throughput", rate, "tokens/s") for name, rate in found.items()),
        Row(f"{case}: engine / generate", "ratio", found["engine"] / found["generate"], "x", ">= 1.5"),
    ]


def parts(setting: Setting, batch: int, rate: float) -> list[Row]:
    """The time of a step with and without guidance, and that of a guided one by part, beside each pass's floor."""
    plain = setting.requests(batch, 80)
    unguided = _step_seconds(setting.engine(None, batch), plain)
    engine = setting.engine(setting.value, batch)
    whole = _step_seconds(engine, guided(plain))
    engine.clock.wait = True  # which takes time of its own on a GPU
    scorer = engine._scorers[0]
    floors = {
        "base": floor(setting.base.model, engine._runner.cache, batch, 1, rate),
        "value": floor(setting.value.backbone, scorer._runner.cache, batch, CANDIDATES, rate),
    }
    steps, best, seconds = 8, float("inf"), {}
    for _ in range(3):
        engine.clock.seconds.clear()
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        spent = (time.perf_counter() - started) / steps
        if spent < best:
            best, seconds = spent, {name: each / steps for name, each in engine.clock.seconds.items()}
    least = sum(each.seconds for each in floors.values())
    case = f"batch {batch}: guided step"
    rows = [Row(f"{case}, {part}", "time", 1e3 * each, "ms") for part, each in seconds.items() if part != "prefill"]
    for part, each in floors.items():
        rows += [
            Row(f"{case}, {part}: matrix products alone", "floor", 1e3 * each.products, "ms"),
            Row(f"{case}, {part}: weights and KV at {rate / 1e9:.0f} GB/s", "floor", 1e3 * each.memory, "ms"),
            Row(f"{case}, {part} / its floor", "ratio", seconds[part] / each.seconds, "x"),
        ]
    quarter = 4 * setting.value.backbone.config.num_hidden_layers <= setting.base.model.config.num_hidden_layers
    goal = ">= 0.75" if setting.base.device.type == "cuda" and quarter and batch <= 8 else None
    return [
        *rows,
        Row(case, "time", 1e3 * whole, "ms"),
        Row(f"batch {batch}: unguided step", "time", 1e3 * unguided, "ms"),
        Row(f"batch {batch}: unguided step / guided step", "ratio", unguided / whole, "x", goal),
        Row(f"{case} / the two models' floors", "ratio", whole / least, "x", "<= 1.3"),
    ]


def _step_seconds(engine: Engine, requests: list[Request]) -> float:
    """Seconds of a step that decodes all of them: the median of the quickest of three series."""
    for request in requests:
        engine.add(request)
    for _ in range(20 if torch.cuda.is_available() else 6):  # until all is recorded
        engine.step()
    medians = []
    for _ in range(3):
        times = []
        for _ in range(8):
            started = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - started)
        medians.append(float(np.median(times)))
    return min(medians)


def long_context(setting: Setting, batch: int) -> list[Row]:
    """Decoding alone, after prompts that fill a context of 1,024 with the new tokens."""
    new_tokens = 8
    everything = [token for prompt in setting.prompts for token in prompt]
    size = CONTEXT - new_tokens
    requests = guided(
        [
            Request(str(i), tuple(everything[i * size : (i + 1) * size]), SamplingParams(max_tokens=new_tokens, seed=i))
            for i in range(batch)
        ]
    )
    engine = setting.engine(setting.value, batch, prefill_tokens=batch * CONTEXT)
    for request in requests:
        engine.add(request)
    while len(engine.step()) < batch:
        pass  # the first step in which all decode
    started = time.perf_counter()
    tokens = sum(len(engine.step()) for _ in range(new_tokens - 1))
    ours = tokens / (time.perf_counter() - started)
    assert tokens == batch * (new_tokens - 1)
    held = engine._scorers[0].kv_bytes
    reference = FullRows(setting.base, setting.value, requests)
    reference.generate()
    theirs = batch * (new_tokens - 1) / reference.seconds
    case = f"batch {batch}, context {CONTEXT:,}"
    return [
        Row(f"{case}: full rows", "throughput", theirs, "tokens/s"),
        Row(f"{case}: guided", "throughput", ours, "tokens/s"),
        Row(f"{case}: guided / full rows", "ratio", ours / theirs, "x", ">= 1.5"),
        Row(f"{case}: KV of the value model / that of full rows", "ratio", held / reference.memory, "x", "<= 0.1"),
    ]


def memory(setting: Setting, many: int) -> list[Row]:
    """Many requests through a cache that holds 16: what it holds, and whether outputs are those decoded alone."""
    width = 2 * COLUMNS
    lengths = np.random.default_rng(2).geometric(1 / 6, many).clip(max=24).tolist()
    prompts = [prompt for prompt in setting.prompts if len(prompt) + 24 < width]
    requests = [
        Request(str(i), prompts[i % len(prompts)], SamplingParams(max_tokens=length, seed=i))
        for i, length in enumerate(lengths)
    ]
    requests = [*guided(requests[: many // 2], candidates=8), *requests[many // 2 :]]
    engine = setting.engine(setting.value, 4 * HELD, kv_tokens=HELD * width)
    done = engine.generate(requests[: many // 5])
    early, most = _resident(), 0
    for request in requests[many // 5 :]:
        engine.add(request)
    while engine.busy:
        done += [engine.take(token.request_id) for token in engine.step() if token.finish_reason]
        most = max(most, engine.kv_bytes)
    base, value = (runner.cache for runner in (engine._runner, engine._scorers[0]._runner))
    planned = sum(HELD * (width + cache.aside) * kv_bytes_per_token(cache) for cache in (base, value))
    if not value.aside:  # then the candidates of a step lie beside the value model's cache
        planned += HELD * 8 * kv_bytes_per_token(value)
    sample = range(0, many, max(1, many // 25))
    alone = setting.engine(setting.value, 1)
    found = {each.request_id: each for each in done}
    compared = [_compared(found[str(i)], alone.generate([requests[i]])[0]) for i in sample]
    same, apart = zip(*compared, strict=True)
    case = f"{many:,} requests, cache of {HELD}"
    return [
        Row(f"{case}: finished", "share", len(done) / many, "", "== 1"),
        Row(f"{case}: of {len(same)}, as decoded alone", "share", float(np.mean(same)), "", "== 1"),
        Row(f"{case}: log-probs / decoded alone", "most apart", max(apart), "nats"),
        Row(f"{case}: KV held at most / planned", "ratio", most / planned, "x", "<= 1.05"),
        Row(f"{case}: planned / KV held at most", "ratio", planned / most, "x", "<= 1.05"),
        Row(f"{case}: sent back to wait", "count", engine.preempted, ""),
        Row(f"{case}: process at the end / after a fifth", "ratio", _resident() / early, "x", "<= 1.05"),
    ]


def _compared(one: Completion, other: Completion) -> tuple[bool, float]:
    """Whether tokens are the same, and how far log-probs are apart at most, to where tokens part.

    Tokens of log-probs that are apart by rounding part at a near tie alone.
    """
    pairs = list(zip(one.token_ids, other.token_ids, strict=True))
    end = next((place for place, (mine, its) in enumerate(pairs) if mine != its), len(pairs))
    mine, its = (np.array([*each.logprobs[:end], *each.guided_logprobs[:end]]) for each in (one, other))
    return end == len(pairs), float(np.abs(mine - its).max(initial=0))


def _resident() -> float:
    """The process's memory now, in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * float(resource.getpagesize())


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="batch 1 and 8 once, fewer requests: under 3 minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--model", default=MODEL, help="base model (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="only the steps of a model of this size, with random weights")
    parser.add_argument("--layers", type=int, default=10, help="layers of the value model (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (default)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.shape:
        setting = Setting.random(options.shape, options.layers, options.device or "cuda", options.dtype)
    else:
        setting = Setting.load(options.model, options.layers, options.device, options.dtype)
    rate = bandwidth(setting.base.model.device)
    batches = [1, 8] if options.quick else [1, 8, 32]
    every: list[Row] = []

    def measured(title: str, rows: list[Row]) -> None:
        every.extend(rows)
        show(rows, title)
        write(every, options.json)  # what there is so far, should the rest fail

    if options.shape:
        for batch in batches:
            measured(f"{options.shape}: a step, batch {batch}", parts(setting, batch, rate))
        return
    for batch in batches:
        measured(
            f"Throughput, batch {batch}", throughput(setting, batch, *((1, 12) if options.quick else (2, NEW_TOKENS)))
        )
        measured(f"A guided step, batch {batch}", parts(setting, batch, rate))
        if batch > 1:
            measured(f"Requests arriving at random, batch {batch}", arriving(setting, batch))
        if batch == 1 or (batch == 8 and not options.quick):  # k full rows of 32 sequences would take 10 GB
            measured(f"Long context, batch {batch}", long_context(setting, batch))
    measured("Memory", memory(setting, MANY // 10 if options.quick else MANY))


if __name__ == "__main__":
    main()
