"""What each way of guiding less keeps of the reward, and how fast it is: one table for choosing.

    make bench-schedules        or        python -m benchmarks.schedules --run runs/bench [--json FILE]

Takes a finished run (its base, value model, rewards and held-out prompts) and decodes the held-out prompts at
several strengths with guidance of every step by k candidates, and then with less: only the steps at which π0
is uncertain, only a random half of the steps (the control: uncertainty must do better), fewer candidates,
adaptive k, and vocab heads distilled from the value model (`vas value distill`; done first if the run has
none). What a way keeps of full guidance's gain is said three times: at the same strength; against full
guidance that goes as far from π0 as the way does (the same KL); and at the strength of its own that goes as
far as full guidance does. Strengths between those measured are interpolated, none beyond them is guessed.
--ways uncertain random measures the two halves of the steps alone.

Then it times each, beside Hugging Face `generate` without guidance. --no-speed leaves that out; --speed-only
adds it to the rewards that --json holds already. The run that docs/results.md quotes:

    vas run configs/demo.yaml --set name=bench --set value.layers=10
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.rows import Row, show, write
from benchmarks.setting import Watching, generate, guide_by, rates
from vas import storage
from vas.decoding.engine import Engine
from vas.decoding.guide import Guide
from vas.decoding.sampler import gumbels
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.decoding.sequence import Sequence as Decoded
from vas.evaluation.figure_style import REFERENCE, VAS_COLOUR, entitle, new_figure, styled
from vas.models.base import BaseModel, encode_prompt, load_base
from vas.models.value import ValueModel
from vas.progress import Tracker
from vas.prompts import load_prompts
from vas.rewards.loading import load_rewards
from vas.run.directory import RunDirectory
from vas.run.distilling import distill_run
from vas.schema import Prompt
from vas.training.history import best

BATCH = 64
RESAMPLES = 2000
KEEP = 0.95  # of the gain, for a setting to count as good
HALF = 0.9  # of the gain, that guiding the uncertain half of the steps is to keep
FULL, UNCERTAIN, RANDOM = "every step", "uncertain half", "random half"
AS_FAR = "at full guidance's KL"


class RandomHalf(Guide):
    """Guides a random half of the steps, whatever they are."""

    def wanted(self, sequences: Sequence[Decoded], base_BV: Tensor) -> list[int]:
        """Each row by the toss of a coin that its seed and place decide."""
        rows = super().wanted(sequences, base_BV)
        coins = gumbels([~s.request.sampling.seed for s in sequences], [len(s.response) for s in sequences], 2)
        return [b for b in rows if coins[b, 0] < coins[b, 1]]


@dataclass
class Material:
    """What a run brings."""

    base: BaseModel
    value: ValueModel
    vocab: ValueModel | None
    """With vocab heads; None if no way needs them."""
    agreement: dict[str, dict[str, float]]
    """Of the vocab heads with the value model, as `vas.training.agreement` has it."""
    prompts: list[Prompt]
    tokens: list[tuple[int, ...]]
    score: Callable[[list[Prompt], list[str]], np.ndarray]
    sampling: SamplingParams
    objective: str
    candidates: int
    beginnings: tuple[str, ...] = ("",)
    """Of the names of the ways to measure; beside them, full guidance always is."""

    def engine(self, value: ValueModel | None, batch: int, guide: type[Guide] = Guide) -> Engine:
        """An engine, guided if there is a value model."""
        scorers = [] if value is None else [make_scorer("value", value)]
        return guide_by(Engine(self.base, scorers, batch), guide)

    def requests(self, samples: int, strength: float, **how: float | int | str) -> list[Request]:
        """Every held-out prompt so many times, guided as asked."""
        params = GuidanceParams(**({"objectives": {self.objective: strength}, "candidates": self.candidates} | how))
        return [
            Request(f"{i}/{n}", tokens, replace(self.sampling, seed=i * samples + n), params)
            for i, tokens in enumerate(self.tokens)
            for n in range(samples)
        ]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to guide. guide: how it chooses its steps."""

    name: str
    how: dict[str, float | int | str]
    value: ValueModel | None
    guide: type[Guide] = Guide


@dataclass(frozen=True, slots=True)
class Point:
    """What decoding at one strength brought: mean reward of each of P prompts, mean KL, share of steps guided."""

    reward_P: np.ndarray
    kl: float
    guided: float = 0.0


def load(location: str, objective: str, candidates: int, with_vocab: bool) -> Material:
    """A run's material; distils vocab heads if they are wanted and it has none."""
    run = RunDirectory.open(location)
    base = load_base(run.config.base)
    value, vocab, agreement = ValueModel.load(run.value, base.model.device), None, {}
    if with_vocab:
        place = run.path("value", "vocab")
        if not storage.exists(storage.join(place, "config.json")):
            distill_run(location, "vocab")
        history = json.loads(storage.read_bytes(storage.join(place, "training.json")))
        vocab, agreement = ValueModel.load(place, base.model.device), history[best(history)]["unseen"]
    prompts = [prompt for prompt in load_prompts(run.config.prompts) if prompt.held_out]
    reward = load_rewards(run.config.rewards)[objective]
    return Material(
        base,
        value,
        vocab,
        agreement,
        prompts,
        [tuple(encode_prompt(base.tokenizer, prompt)) for prompt in prompts],
        lambda of, responses: np.asarray(list(reward(of, responses)), dtype=float),
        SamplingParams.of(run.config.rollouts.sampling, 0),
        objective,
        candidates,
    )


def decode(material: Material, way: Way, strength: float, samples: int) -> tuple[Point, list[float]]:
    """What a way brings at one strength, and π0's entropies at its steps if they were watched."""
    engine = material.engine(way.value, BATCH, way.guide)
    done = engine.generate(material.requests(samples, strength, **way.how))
    prompts = [prompt for prompt in material.prompts for _ in range(samples)]
    reward_P = material.score(prompts, [each.text for each in done]).reshape(-1, samples).mean(-1)
    guided = sum(each.guided_steps for each in done) / sum(len(each.token_ids) for each in done)
    entropies = getattr(engine._stepper.guide, "entropies", [])
    return Point(reward_P, float(np.mean([each.kl for each in done])), guided), entropies


def median_entropy(material: Material, value: ValueModel, strength: float) -> float:
    """The threshold that half the steps exceed when those alone are guided; one response a prompt tells.

    Guided responses are surer than π0's, the surer the more steps are guided: hence the second look.
    """
    threshold = 0.0
    for _ in range(2):
        way = Way(UNCERTAIN, {"schedule": f"entropy:{threshold}"}, value, Watching)
        threshold = round(float(np.median(decode(material, way, strength, 1)[1])), 3)
    return threshold


def medians(material: Material, strength: float) -> dict[str, float]:
    """`median_entropy` for the value model and the vocab heads."""
    models = {"value": material.value, "vocab": material.vocab}
    return {name: median_entropy(material, model, strength) for name, model in models.items() if model}


def ways(material: Material, thresholds: dict[str, float]) -> list[Way]:
    """All ways that are measured. thresholds: of entropy, for the value model and the vocab heads."""
    value, vocab = material.value, material.vocab
    every = [
        Way(FULL, {}, value),
        Way(UNCERTAIN, {"schedule": f"entropy:{thresholds['value']}"}, value),
        Way(RANDOM, {}, value, RandomHalf),
        Way("k = 8", {"candidates": 8}, value),
        Way("adaptive k, 0.95", {"candidate_mass": 0.95}, value),
        Way("adaptive k, 0.97", {"candidate_mass": 0.97}, value),
    ]
    if vocab:
        every.append(Way("vocab head", {}, vocab))
        every.append(Way("vocab head, uncertain half", {"schedule": f"entropy:{thresholds['vocab']}"}, vocab))
    return [way for way in every if way.name == FULL or way.name.startswith(material.beginnings)]


def at_kl(curve: list[Point], kl: float) -> np.ndarray | None:
    """Each prompt's reward where a curve has this KL, linear between its points; None beyond the last of them."""
    for low, high in pairwise(sorted(curve, key=lambda point: point.kl)):
        if low.kl <= kl <= high.kl:
            share = (kl - low.kl) / max(high.kl - low.kl, 1e-9)
            return (1 - share) * low.reward_P + share * high.reward_P
    return None


def kept(base: np.ndarray, full: np.ndarray, way: np.ndarray) -> tuple[float, float, float]:
    """The share of full guidance's gain that a way keeps, with a 95 % interval over prompts."""
    picks = np.random.default_rng(0).integers(0, len(base), (RESAMPLES, len(base)))
    shares = (way[picks] - base[picks]).mean(-1) / (full[picks] - base[picks]).mean(-1)
    return float((way - base).mean() / (full - base).mean()), *map(float, np.percentile(shares, [2.5, 97.5]))


def measure(material: Material, strengths: list[float], samples: int, path: Path | None) -> list[Row]:
    """Rewards of every way at every strength, and what each keeps; written as it goes."""
    base, _ = decode(material, Way("base", {"objectives": {}}, None), 0.0, samples)
    curves: dict[str, list[Point]] = {}
    rows = [Row("base", "reward", float(base.reward_P.mean()), "")]
    for name, figures in material.agreement.items():
        rows += [Row(f"vocab head, {name}, unseen prompts", figure, value, "") for figure, value in figures.items()]
    with Tracker("rewards", len(strengths) * len(ways(material, dict.fromkeys(("value", "vocab"), 0.0)))) as tracker:
        for strength in strengths:
            thresholds = medians(material, strength)
            rows.append(Row(f"{UNCERTAIN}, β = {strength:g}", "threshold", thresholds["value"], "nats"))
            for way in ways(material, thresholds):
                point, _ = decode(material, way, strength, samples)
                curves.setdefault(way.name, [replace(base, kl=0.0)]).append(point)
                case = f"{way.name}, β = {strength:g}"
                rows += [
                    Row(case, "reward", float(point.reward_P.mean()), ""),
                    Row(case, "KL", point.kl, "nats"),
                    Row(case, "steps guided", point.guided, ""),
                    _kept(case, "kept at the same β", base, curves[FULL][-1].reward_P, point.reward_P),
                ]
                write(rows, path)  # what there is so far, should the rest fail
                tracker.advance(1, case)
    for name, curve in curves.items():
        for strength, point, full in zip(strengths, curve[1:], curves[FULL][1:], strict=True):
            case = f"{name}, β = {strength:g}"
            rival, own = at_kl(curves[FULL], point.kl), at_kl(curve, full.kl)
            if rival is not None:
                rows.append(_kept(case, "kept against full guidance of its KL", base, rival, point.reward_P))
            if own is not None:
                rows.append(_kept(f"{name}, {AS_FAR} (β = {strength:g})", "kept", base, full.reward_P, own))
    write(rows, path)
    return rows


def _kept(case: str, metric: str, base: Point, full_P: np.ndarray, way_P: np.ndarray) -> Row:
    """A row of what is kept; the two halves of the steps have goals."""
    share, low, high = kept(base.reward_P, full_P, way_P)
    goal = {UNCERTAIN: f">= {HALF}", RANDOM: f"<= {HALF}"}.get(case.split(",")[0])
    return Row(case, metric, share, f"[{low:.2f}, {high:.2f}]", goal)


def speeds(material: Material, strength: float, batch: int, rounds: int) -> dict[str, float]:
    """Tokens per second of each way, and of Hugging Face `generate` without guidance, at a fixed batch."""
    thresholds = medians(material, strength)
    tireless = replace(material, base=replace(material.base, eos_token_ids=()))
    tireless.base.model.generation_config.eos_token_id = None
    plain = tireless.requests(1, 0.0)[:batch]
    cases: dict[str, Callable[[], int]] = {"generate": lambda: generate(tireless.base, plain)}
    for way in ways(material, thresholds):
        engine = tireless.engine(way.value, batch, way.guide)
        requests = tireless.requests(1, strength, **way.how)[:batch]
        cases[way.name] = lambda e=engine, r=requests: sum(len(done.token_ids) for done in e.generate(r))
    return rates(cases, rounds)


def fast(material: Material, rows: list[Row], strength: float, batch: int, rounds: int, path: Path | None) -> list[Row]:
    """Speeds of every way, and the fastest that keeps enough of the gain, by the rewards that were measured."""
    speed = speeds(material, strength, batch, rounds)
    ratios = {name: rate / speed["generate"] for name, rate in speed.items()}
    found = [Row(f"batch {batch}: generate, no guidance", "throughput", speed["generate"], "tokens/s")]
    found += [
        Row(f"batch {batch}: {name} / generate", "ratio", ratio, "x")
        for name, ratio in ratios.items()
        if name != "generate"
    ]
    same = {row.case: row.value for row in rows if row.metric == "kept at the same β"}
    own = {row.case: row.value for row in rows if row.metric == "kept"}
    for what, suffix, shares, mark in (
        ("at the same β", f", β = {strength:g}", same, "-same"),
        (AS_FAR, f", {AS_FAR} (β = {strength:g})", own, ""),
    ):
        shares = {case.removesuffix(suffix): share for case, share in shares.items() if case.endswith(suffix)}
        good = [name for name, share in shares.items() if share >= KEEP and name != RANDOM]
        if good:
            best = max(good, key=lambda name: ratios[name])
            case = f"batch {batch}: fastest that keeps {KEEP:.0%} {what} ({best}) / generate"
            found.append(Row(case, "ratio", ratios[best], "x", ">= 1.0"))
        if path and len(shares) > 1:
            drawn = path.with_name(f"{path.stem}-{batch}{mark}.png")
            drawn.parent.mkdir(parents=True, exist_ok=True)
            drawn.write_bytes(figure(shares, ratios, batch, what))
    return found


@styled
def figure(shares: dict[str, float], ratios: dict[str, float], batch: int, what: str) -> Figure:
    """What each way keeps of the gain against how fast it is."""
    drawn = new_figure(4.6)
    axes = drawn.subplots()
    entitle(axes, f"Guiding less, {what}, batch {batch}", "up: more of the reward · right: faster · dashed: the goals")
    axes.axhline(KEEP, **REFERENCE)
    axes.axvline(1.0, **REFERENCE)
    for name, share in shares.items():
        axes.scatter(ratios[name], share, color=VAS_COLOUR, zorder=3)
        axes.annotate(name, (ratios[name], share), (5, 5), textcoords="offset points", fontsize=8.5)
    axes.set_xlabel("tokens/s, of unguided `generate`")
    axes.set_ylabel("share of the reward gain kept")
    axes.set_xlim(0, 1.25 * axes.get_xlim()[1])  # room for the names
    return drawn


def main() -> None:
    """Measure, print, draw, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/bench", help="a finished run (default: %(default)s)")
    parser.add_argument("--objective", default="positive", help="which reward (default: %(default)s)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[3.0, 7.0, 12.0], help="βs (default: 3 7 12)")
    parser.add_argument("--at", type=float, default=7.0, help="the β that is timed (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=20, help="k of full guidance (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", default=[""], help="some ways, by how their names begin (default: all)")
    parser.add_argument("--samples", type=int, default=4, help="responses a prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of timing (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here, and a figure beside them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--no-speed", action="store_true", help="rewards alone")
    only.add_argument("--speed-only", action="store_true", help="speeds, added to the rewards that --json has")
    options = parser.parse_args()
    if options.speed_only and not options.json:
        parser.error("--speed-only needs --json, the file with the rewards")
    torch.set_num_threads(options.threads)
    with_vocab = any(each.startswith("vocab") or not each for each in options.ways)
    material = load(options.run, options.objective, options.candidates, with_vocab)
    material = replace(material, beginnings=tuple(options.ways))
    if options.speed_only:
        rows = [Row(**row) for row in json.loads(options.json.read_text()) if not row["case"].startswith("batch ")]
    else:
        rows = measure(material, sorted(options.strengths), options.samples, options.json)
    if not options.no_speed:
        timed: list[Row] = []
        for batch in (8, 32):
            timed += fast(material, rows, options.at, batch, options.rounds, options.json)
            write(rows + timed, options.json)
        rows += timed
    show(rows, f"Guiding less, {options.run}, {options.objective}")


if __name__ == "__main__":
    main()
