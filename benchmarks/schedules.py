"""What each way of guiding less keeps of the reward, and how fast it is: one table for choosing.

    make bench-schedules        or        python benchmarks/schedules.py --run runs/bench [--json FILE]

Takes a finished run (its base, value model, rewards and held-out prompts), decodes the held-out prompts
with guidance of every step by k candidates, and then with less: fewer candidates, adaptive k, only the
steps at which π0 is uncertain, only a random half of the steps (the control: uncertainty must do better),
blocks, and vocab heads distilled from the value model. Then it times each, beside Hugging Face `generate`
without guidance. The run that docs/results.md quotes:

    vas run configs/demo.yaml --set name=bench --set value.layers=10
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow.dataset
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from benchmarks.rows import Row, show, write
from benchmarks.setting import Watching, generate, guide_by, rates
from vas.decoding.engine import Engine
from vas.decoding.guide import Guide
from vas.decoding.sampler import uniforms
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.decoding.sequence import Sequence as Decoded
from vas.evaluation.figure_style import REFERENCE, VAS_COLOUR, entitle, new_figure, styled
from vas.models.base import BaseModel, encode_prompt, load_base
from vas.models.value import ValueModel
from vas.prompts import load_prompts
from vas.rewards.loading import load_rewards
from vas.run.directory import RunDirectory
from vas.schema import Prompt
from vas.training.distill import distill

BATCH = 64
DISTILLED = 200  # rollouts
RESAMPLES = 2000
KEEP = 0.95  # of the gain, for a setting to count as good


class RandomHalf(Guide):
    """Guides a random half of the steps, whatever they are."""

    def wanted(self, sequences: Sequence[Decoded], base_BV: Tensor) -> list[int]:
        """Each row by the toss of a coin that its seed and place decide."""
        rows = super().wanted(sequences, base_BV)
        coins = uniforms([~s.request.sampling.seed for s in sequences], [len(s.response) for s in sequences])
        return [b for b in rows if coins[b] < 0.5]


@dataclass
class Material:
    """What a run brings."""

    base: BaseModel
    value: ValueModel
    vocab: ValueModel
    prompts: list[Prompt]
    tokens: list[tuple[int, ...]]
    score: Callable[[list[Prompt], list[str]], np.ndarray]
    sampling: SamplingParams
    strengths: dict[str, float]
    candidates: int

    def engine(self, value: ValueModel | None, batch: int, guide: type[Guide] = Guide) -> Engine:
        """An engine, guided if there is a value model."""
        scorers = [] if value is None else [make_scorer("value", value)]
        return guide_by(Engine(self.base, scorers, batch), guide)

    def requests(self, samples: int, **how: float | int | str) -> list[Request]:
        """Every held-out prompt so many times, guided as asked."""
        params = GuidanceParams(**({"objectives": self.strengths, "candidates": self.candidates} | how))
        return [
            Request(f"{i}/{n}", tokens, replace(self.sampling, seed=i * samples + n), params)
            for i, tokens in enumerate(self.tokens)
            for n in range(samples)
        ]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to guide."""

    name: str
    how: dict[str, float | int | str]
    value: ValueModel | None
    guide: type[Guide] = Guide


def load(location: str, objective: str, strength: float, candidates: int) -> tuple[Material, float]:
    """A run's material, with freshly distilled vocab heads and the share of variance they explain."""
    run = RunDirectory.open(location)
    base = load_base(run.config.base)
    value = ValueModel.load(run.value, base.model.device)
    sampling = SamplingParams.of(run.config.rollouts.sampling, 0)
    rows = pyarrow.dataset.dataset(run.rollouts).to_table().to_pylist()
    by_prompt: dict[str, list[tuple[list[int], list[int]]]] = {}
    for row in rows:
        if row["error"] is None and not row["held_out"]:
            by_prompt.setdefault(row["prompt_id"], []).append((row["prompt_token_ids"], row["response_token_ids"]))
    order = np.random.default_rng(0).permutation(sorted(by_prompt))
    rollouts = [rollout for prompt_id in order for rollout in by_prompt[prompt_id]]  # the last are of other prompts
    vocab, explained = distill(base, value, rollouts[:DISTILLED], candidates, sampling.temperature or 1.0)
    prompts = [prompt for prompt in load_prompts(run.config.prompts) if prompt.held_out]
    reward = load_rewards(run.config.rewards)[objective]
    tokens = [tuple(encode_prompt(base.tokenizer, prompt)) for prompt in prompts]
    material = Material(
        base,
        value,
        vocab,
        prompts,
        tokens,
        lambda of, responses: np.asarray(list(reward(of, responses)), dtype=float),
        sampling,
        {objective: strength},
        candidates,
    )
    return material, explained


def rewards(material: Material, way: Way, samples: int) -> tuple[np.ndarray, float, float, list[float]]:
    """Mean reward of each prompt, the share of steps guided, mean KL, and entropies if they were watched."""
    engine = material.engine(way.value, BATCH, way.guide)
    done = engine.generate(material.requests(samples, **way.how))
    prompts = [prompt for prompt in material.prompts for _ in range(samples)]
    scores = material.score(prompts, [each.text for each in done]).reshape(-1, samples).mean(-1)
    steps = sum(each.guided_steps for each in done) / sum(len(each.token_ids) for each in done)
    return scores, steps, float(np.mean([each.kl for each in done])), getattr(engine._guide, "entropies", [])


def kept(base: np.ndarray, full: np.ndarray, way: np.ndarray) -> tuple[float, float, float]:
    """The share of full guidance's gain that a way keeps, with a 95 % interval over prompts."""
    picks = np.random.default_rng(0).integers(0, len(base), (RESAMPLES, len(base)))
    shares = (way[picks] - base[picks]).mean(-1) / (full[picks] - base[picks]).mean(-1)
    return float((way - base).mean() / (full - base).mean()), *map(float, np.percentile(shares, [2.5, 97.5]))


def speeds(material: Material, ways: list[Way], batch: int, rounds: int) -> dict[str, float]:
    """Tokens per second of each way, and of Hugging Face `generate` without guidance, at a fixed batch."""
    tireless = replace(material, base=replace(material.base, eos_token_ids=()))
    tireless.base.model.generation_config.eos_token_id = None
    cases: dict[str, Callable[[], int]] = {"generate": lambda: generate(tireless.base, tireless.requests(1)[:batch])}
    for way in ways:
        engine, requests = tireless.engine(way.value, batch, way.guide), tireless.requests(1, **way.how)[:batch]
        cases[way.name] = lambda e=engine, r=requests: sum(len(done.token_ids) for done in e.generate(r))
    return rates(cases, rounds)


@styled
def figure(shares: dict[str, float], speed: dict[str, float], batch: int) -> Figure:
    """What each way keeps of the gain against how fast it is."""
    drawn = new_figure(4.6)
    axes = drawn.subplots()
    entitle(axes, f"Guiding less, batch {batch}", "up: more of the reward · right: faster · dashed: the goals")
    axes.axhline(KEEP, **REFERENCE)
    axes.axvline(1.0, **REFERENCE)
    for name, share in shares.items():
        place = speed[name] / speed["generate"], share
        axes.scatter(*place, color=VAS_COLOUR, zorder=3)
        axes.annotate(name, place, (5, 5), textcoords="offset points", fontsize=8.5)
    axes.set_xlabel("tokens/s, of unguided `generate`")
    axes.set_ylabel("share of the reward gain kept")
    axes.set_xlim(0, 1.25 * axes.get_xlim()[1])  # room for the names
    return drawn


def main() -> None:
    """Measure, print, draw, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/bench", help="a finished run (default: %(default)s)")
    parser.add_argument("--objective", default="positive", help="which reward (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=7.0, help="its β (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=20, help="k of full guidance (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="responses a prompt (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here, and a figure beside them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    material, explained = load(options.run, options.objective, options.strength, options.candidates)

    base, *_ = rewards(material, Way("base", {"objectives": {}}, None), options.samples)
    full = Way(f"every step, k = {options.candidates}", {}, material.value, Watching)
    gained, _, full_kl, entropies = rewards(material, full, options.samples)
    median = round(float(np.median(entropies)), 3)
    ways = [
        replace(full, guide=Guide),
        Way("uncertain half", {"schedule": f"entropy:{median}"}, material.value),
        Way("random half", {}, material.value, RandomHalf),
        Way("vocab head", {}, material.vocab),
        Way("k = 8", {"candidates": 8}, material.value),
        Way("adaptive k, 0.8", {"candidate_mass": 0.8}, material.value),
        Way("uncertain half, k = 8", {"schedule": f"entropy:{median}", "candidates": 8}, material.value),
        Way("k = 4", {"candidates": 4}, material.value),
        Way("adaptive k, 0.95", {"candidate_mass": 0.95}, material.value),
        Way("blocks of 8, 4 continuations", {"schedule": "block:8", "candidates": 4}, material.value),
    ]
    case = f"{options.objective} β = {options.strength:g}"
    rows = [
        Row(f"{case}: base", "reward", float(base.mean()), ""),
        Row(f"{case}: every step", "reward", float(gained.mean()), ""),
        Row(f"{case}: every step", "KL", full_kl, "nats"),
        Row("vocab head: advantages on unseen rollouts", "variance explained", explained, ""),
        Row("entropy that half the steps exceed", "threshold", median, "nats"),
    ]
    shares: dict[str, float] = {}
    for way in track(ways, "rewards", transient=True):
        each, steps, kl, _ = rewards(material, way, options.samples)
        share, low, high = kept(base, gained, each)
        shares[way.name] = share
        goal = {"uncertain half": ">= 0.9", "random half": "<= 0.9"}.get(way.name)
        rows += [
            Row(f"{way.name}: of the gain", "kept", share, f"[{low:.2f}, {high:.2f}]", goal),
            Row(f"{way.name}: steps guided", "share", steps, ""),
            Row(f"{way.name}: KL", "KL", kl, "nats"),
        ]
        write(rows, options.json)  # what there is so far, should the rest fail
    for batch in (8, 32):
        speed = speeds(material, ways, batch, 1)
        rows += [Row(f"batch {batch}: generate, no guidance", "throughput", speed["generate"], "tokens/s")]
        for way in ways:
            rows.append(Row(f"batch {batch}: {way.name} / generate", "ratio", speed[way.name] / speed["generate"], "x"))
        good = [way.name for way in ways if shares[way.name] >= KEEP and way.name != "random half"]
        best = max(good, key=lambda name: speed[name])
        rows.append(
            Row(
                f"batch {batch}: fastest that keeps {KEEP:.0%} ({best}) / generate",
                "ratio",
                speed[best] / speed["generate"],
                "x",
                ">= 1.0",
            )
        )
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.with_name(f"{options.json.stem}-{batch}.png").write_bytes(figure(shares, speed, batch))
    show(rows, f"Guiding less, {options.run}")
    write(rows, options.json)


if __name__ == "__main__":
    main()
