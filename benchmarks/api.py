"""A base model that can only be called, beside the same model with its weights here: reward, calls and tokens.

    make bench-api        or        python -m benchmarks.api [--work runs/api] [--json FILE]

llama.cpp serves the bundled model; of it there is nothing here but the tokenizer. A run through the server alone,
and the same run with local weights, each with its own rollouts and value model; then, with the first one's value
model and on the same held-out prompts, guidance by tokens through the server and with local weights, and by blocks of
K continuations at several strengths; a value model with another tokenizer, trained on the same rollouts; and greedy
guidance of fifty prompts against local weights, with a server that computes in float32. About 50 minutes on two
cores; what is finished is kept in --work, and not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llama import MODEL, llama_server
from benchmarks.other_tokenizer import save_with_another_tokenizer
from benchmarks.rows import Row, show, write
from vas import storage
from vas.config import Base, RunConfig, load_config
from vas.decoding.engine import Engine
from vas.decoding.loading import load_scorer
from vas.decoding.sequence import Completion, GuidanceParams, Request, SamplingParams
from vas.evaluation.stats import bootstrap_interval
from vas.models.base import BaseModel, encode_prompt, load_base, load_tokenizer
from vas.models.served import ServedModel, open_base
from vas.progress import Tracker
from vas.rewards import load_rewards
from vas.run import stages
from vas.run.directory import RunDirectory
from vas.schema import Prompt

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
OBJECTIVE, BETA = "positive", 7.0
STRONGER = (14.0, 28.0)  # of blocks
OTHER_BETA = 21.0  # of the value model that reads text, which knows less
K, B = 4, 8
PARALLEL = 4  # choices that the server gives a call, and responses that it decodes at once
GREEDY = 50


@dataclass(frozen=True)
class Decoded:
    """What a way of guiding made of the held-out prompts: rewards by prompt, and costs by response."""

    reward_P: np.ndarray
    kl: float
    calls: float
    tokens: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the mean reward."""
        return bootstrap_interval(self.reward_P, 2000, 0)


class Bench:
    """The runs under `work`, and the server that they call."""

    def __init__(self, work: Path, samples: int, overrides: list[str]) -> None:
        self.work, self._samples, self._overrides = work, samples, overrides
        self.url = ""
        for name, save in (("base", load_tokenizer(MODEL).save_pretrained), ("other", save_with_another_tokenizer)):
            if not (work / name).exists():
                save(work / name)

    @contextmanager
    def server(self, exact: bool = False) -> Iterator[str]:
        """The server, while something calls it."""
        with llama_server(PARALLEL, exact, threads=2) as self.url:
            yield self.url

    def config(self, name: str, called: bool, *more: str) -> RunConfig:
        """The demo's config with the sentiment reward alone."""
        fixed = [
            f"name={name}",
            f"runs_dir={self.work}",
            f'rewards={{"{OBJECTIVE}": {{"use": "sentiment"}}}}',
            f"evaluation.strengths=[{{{OBJECTIVE}: {BETA}}}]",
            f"evaluation.samples_per_prompt={self._samples}",
            f"value.backbone={MODEL}",
            "rollouts.sampling.temperature=1.0",
            "rollouts.samples_per_prompt=4",
            "evaluation.best_of=[4]",
            "evaluation.trust_prompts=0",
            "prompts.limit=240",
            "resources.actors=1",
            "train.track=[]",
        ]
        base = [f"base.model={self.work / 'base'}", f"base.openai={self.url}", f"base.concurrency={PARALLEL}"]
        return load_config(DEMO, [*fixed, *(base if called else []), *self._overrides, *more])

    def run(self, config: RunConfig, source: RunDirectory | None = None) -> RunDirectory:
        """A finished run; with the responses of another, if there is one."""
        run = RunDirectory.create(config)
        if source is not None and not run.done("rollouts"):
            stages.rollout(run, source.location)
        stages.run_all(run)
        return run

    def decode(self, run: RunDirectory, base: BaseModel | ServedModel, beta: float, schedule: str, k: int) -> Decoded:
        """Guide a response for each held-out prompt with the run's value model."""
        how = replace(GuidanceParams.of(run.config.evaluation, {OBJECTIVE: beta}), schedule=schedule, candidates=k)
        prompts = held_out(run)
        sampling = SamplingParams.of(run.config.rollouts.sampling, 0)
        asked = requests(base, prompts, 1, sampling, how)
        before = dict(base.server.cost) if isinstance(base, ServedModel) else {}
        done = finish(Engine(base, [load_scorer("value", run.value, base, "exact")]), asked, f"{schedule} β={beta:g}")
        after = dict(base.server.cost) if isinstance(base, ServedModel) else {}
        reward = load_rewards(run.config.rewards)[OBJECTIVE]
        scored = np.array(list(reward([], [each.text for each in done])), float).reshape(len(prompts), -1)
        spent = {name: (after[name] - before[name]) / len(done) for name in after}
        return Decoded(
            scored.mean(1),
            float(np.mean([each.kl for each in done])),
            spent.get("calls", 0.0),
            spent.get("prompt_tokens", 0.0) + spent.get("completion_tokens", 0.0),
        )


def held_out(run: RunDirectory) -> list[Prompt]:
    """A run's held-out prompts."""
    return [prompt for prompt in stages.prepare(run) if prompt.held_out]


def requests(
    base: BaseModel | ServedModel, prompts: list[Prompt], samples: int, sampling: SamplingParams, how: GuidanceParams
) -> list[Request]:
    """Each prompt so many times, with seeds of its own."""
    return [
        Request(
            f"{i}/{n}",
            tuple(encode_prompt(base.tokenizer, prompt)),
            replace(sampling, seed=i * samples + n),
            how,
            messages=prompt.messages,
        )
        for i, prompt in enumerate(prompts)
        for n in range(samples)
    ]


def finish(engine: Engine, asked: list[Request], title: str) -> list[Completion]:
    """Decode with progress."""
    done: dict[str, Completion] = {}
    with Tracker(title, len(asked)) as tracker:
        for request in asked:
            engine.add(request)
        while len(done) < len(asked):
            for token in engine.step():
                if token.finish_reason:
                    done[token.request_id] = engine.take(token.request_id)
                    tracker.advance(1)
            if engine.failed:
                raise next(iter(engine.failed.values()))
    return [done[request.request_id] for request in asked]


def of_run(run: RunDirectory, method: str) -> dict[str, Any]:
    """A row of a run's results."""
    rows = storage.read_table([run.path("evaluation", "results.parquet")]).to_pylist()
    return next(row for row in rows if row["method"] == method)


def reward_rows(case: str, mean: float, low: float, high: float, kl: float) -> list[Row]:
    """A reward with its interval."""
    figures = {"reward": mean, "interval, low": low, "interval, high": high}
    return [*(Row(case, name, value, "reward") for name, value in figures.items()), Row(case, "KL", kl, "nats")]


def compare_runs(called: RunDirectory, local: RunDirectory, other: RunDirectory) -> list[Row]:
    """The runs' guided rewards."""
    rows = []
    base = of_run(called, "base")
    rows += reward_rows("base model, called", base["reward_mean"], base["ci_low"], base["ci_high"], 0.0)
    runs = {"called": called, "local weights": local, "another tokenizer, called": other}
    found = {name: of_run(run, "vas") for name, run in runs.items()}
    for name, each in found.items():
        rows += reward_rows(f"{name}, β={BETA:g}", each["reward_mean"], each["ci_low"], each["ci_high"], each["kl"])
    spent = json.loads(storage.read_bytes(called.path("usage.json")))
    rows += [Row("called, whole run", name, float(count), "") for name, count in spent.items()]
    return rows


def compare_ways(bench: Bench, run: RunDirectory, other: RunDirectory) -> list[Row]:
    """Through the server, a response for each prompt: tokens against blocks, and the value model that reads text."""
    base = open_base(run.config.base.model_copy(update={"openai": bench.url}))
    assert isinstance(base, ServedModel)
    start = of_run(run, "base")
    k = run.config.evaluation.candidates
    token = bench.decode(run, base, BETA, "token", k)
    blocks = {beta: bench.decode(run, base, beta, f"block:{B}", K) for beta in STRONGER}
    text = bench.decode(other, base, OTHER_BETA, "token", k)
    local = bench.decode(run, load_base(Base(model=MODEL)), BETA, "token", k)
    named = {f"token k={k} β={BETA:g}": token, f"the same with local weights, β={BETA:g}": local}
    named |= {f"block K={K} b={B} β={beta:g}": each for beta, each in blocks.items()}
    named |= {f"another tokenizer, token k={k} β={OTHER_BETA:g}": text}
    rows: list[Row] = []
    for name, each in named.items():
        rows += reward_rows(name, float(each.reward_P.mean()), *each.interval, each.kl)
        rows.append(Row(name, "calls a response", each.calls, ""))
        rows.append(Row(name, "tokens charged a response", each.tokens, ""))
    low, high = local.interval
    inside = low <= token.reward_P.mean() <= high
    rows.append(Row("token", "within the interval of local weights", float(inside), "1 = yes", "== 1"))
    best = max(blocks.values(), key=lambda each: each.reward_P.mean())
    gain = (best.reward_P.mean() - start["reward_mean"]) / (token.reward_P.mean() - start["reward_mean"])
    rows.append(Row("block", "calls, of token's", best.calls / token.calls, "x", f"<= {1 / 6:.4f}"))
    rows.append(Row("block", "gain, of token's", float(gain), "x", ">= 0.7"))
    apart = text.interval[0] - start["ci_high"]
    rows.append(Row("another tokenizer", "interval's distance from base's", apart, "reward", ">= 0"))
    return rows


def compare_greedy(bench: Bench, run: RunDirectory) -> list[Row]:
    """Greedy guidance of fifty prompts, called and with local weights."""
    local = load_base(Base(model=MODEL))
    with bench.server(exact=True) as url:
        served = open_base(run.config.base.model_copy(update={"openai": url}))
        how = GuidanceParams.of(run.config.evaluation, {OBJECTIVE: BETA})
        sampling = replace(SamplingParams.of(run.config.rollouts.sampling, 0), temperature=0, logprobs=2, max_tokens=16)
        prompts = list(stages.prepare(run))[:GREEDY]
        done = []
        for base, name in ((local, "greedy, local"), (served, "greedy, called")):
            engine = Engine(base, [load_scorer("value", run.value, base, "exact")])
            done.append(finish(engine, requests(base, prompts, 1, sampling, how), name))
    here, there = done
    same = sum(one.text == other.text for one, other in zip(here, there, strict=True))
    gaps = []
    for one, other in zip(here, there, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b), None)
        if first is not None:
            gaps.append(one.top[first][0][2] - one.top[first][1][2])
    rows = [Row("greedy, exact server", "same text", float(same), f"of {len(here)}", f">= {len(here) - len(gaps)}")]
    if gaps:
        rows.append(Row("greedy, exact server", "widest gap where they part", max(gaps), "nats", "<= 0.002"))
    return rows


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/api"), help="where runs are kept")
    parser.add_argument("--samples", type=int, default=2, help="guided responses of each held-out prompt")
    parser.add_argument("--set", action="append", default=[], help="override a key of the config")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    bench = Bench(arguments.work.absolute(), arguments.samples, arguments.set)
    with bench.server():
        called = bench.run(bench.config("called", called=True))
        other = bench.run(bench.config("other", True, f"value.backbone={bench.work / 'other'}"), called)
    local = bench.run(bench.config("local", called=False))
    rows = compare_runs(called, local, other)
    with bench.server():
        rows += compare_ways(bench, called, other)
    rows += compare_greedy(bench, called)
    show(rows, "A base model that can only be called")
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
