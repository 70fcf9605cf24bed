"""Which value model is worth training: its head, λ, and the rollouts a prompt at equal rollouts in all.

    make bench-value        or        python benchmarks/value.py [--prompts FILE] [--json FILE]

On the demo's base model and its sentiment reward, every combination of head, λ and rollouts a prompt is trained
once: on as many rollouts, in as many optimizer steps of as many rollouts each. Designs share rollouts: that of
n a prompt has the first n of each of the first N/n prompts. All are judged on the same held-out prompts: by the
variance of the rewards that their values explain, by rank correlation, and by the reward that guidance reaches
at some distances from π0. Strengths double until the last distance is passed; between them the reward is
interpolated, linear in KL, and none beyond them is guessed. Intervals (95 %) are over held-out prompts: they do not
hold what another training would change, of which the spread of the designs about the sum of the three choices'
effects gives an idea.

The demo's prompts are few: --prompts takes more of them (a file, see docs/data.md), up to --rollouts. What is
finished lies under --work and is not done again; so two calls with one --heads each may share the work, and a
third of all heads gathers it. 1,920 rollouts take about an hour and a half on two busy cores, with
`--set train.precision=bfloat16 --set base.linears=bfloat16` where the CPU has instructions for that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure

from benchmarks.rows import Row, show, write
from benchmarks.schedules import Point, at_kl
from vas import storage
from vas.cli.main import program
from vas.config import RunConfig, load_config
from vas.decoding.engine import Engine
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.errors import VasError
from vas.evaluation.figure_style import OBJECTIVE_COLOURS, OBJECTIVE_MARKERS, entitle, new_figure, styled
from vas.models.base import BaseModel, encode_prompt, load_base, quieten
from vas.models.value import ValueModel
from vas.progress import console
from vas.prompts import load_prompts
from vas.rewards import load_rewards
from vas.rollouts.jobs import Plan, read_rollouts
from vas.rollouts.pipeline import sample
from vas.run.cluster import ray_cluster
from vas.training.batches import collate
from vas.training.metrics import explained_variance, rank_correlation
from vas.training.objective import ValueObjective
from vas.training.packing import pack
from vas.training.trainer import train

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
OBJECTIVE = "positive"
HEADS, LAMBDAS, SAMPLES = ("categorical", "scalar"), (1.0, 0.95), (8, 4, 1)  # the library's default first
HEAD_LR = {"categorical": 6e-3, "scalar": 1e-3}  # what suited each on the demo, see docs/results.md
STEP = 24  # rollouts in an optimizer step, whatever the design
DISTANCES = (2.0, 5.0, 10.0)  # nats from π0
FIRST, MOST = 3.0, 5  # the first strength, and how many there may be
BATCH = 64
RESAMPLES = 400
EXPLAINED, RANKS = "explained variance", "rank correlation"


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


class Estimate(NamedTuple):
    """How good a design is by some measure, and what it would be had the held-out prompts been others: [RESAMPLES]."""

    value: float
    resampled_R: np.ndarray

    @classmethod
    def mean(cls, figures: Sequence[Estimate]) -> Estimate:
        """Of the same figure of several designs."""
        values, resampled = zip(*figures, strict=True)
        return cls(float(np.mean(values)), np.mean(resampled, axis=0))

    def row(self, case: str, metric: str) -> Row:
        """With a 95 % interval for its unit."""
        low, high = np.percentile(self.resampled_R, [2.5, 97.5])
        return Row(case, metric, self.value, f"[{low:.3f}, {high:.3f}]")


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
            train(self.config_of(design), self._share(design.samples), str(self.folder(design) / "train"), value)
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


def of_states(states: dict[str, np.ndarray], measure: Callable[[np.ndarray, np.ndarray], float]) -> Estimate:
    """What a measure says of values and rewards, and of those of resampled prompts."""
    value, reward, row = (states[name] for name in ("value_M", "reward_M", "row_M"))
    parts = np.split(np.arange(len(row)), np.flatnonzero(np.diff(row)) + 1)
    picks = ([parts[p] for p in pick] for pick in _picks(len(parts)))
    resampled = [measure(value[where], reward[where]) for where in map(np.concatenate, picks)]
    return Estimate(measure(value, reward), np.array(resampled))


def of_prompts(reward_P: np.ndarray) -> Estimate:
    """A mean over prompts."""
    return Estimate(float(reward_P.mean()), reward_P[_picks(len(reward_P))].mean(-1))


def _picks(prompts: int) -> np.ndarray:
    """Which prompts there are in each resample: the same for all designs, so that they can be compared in pairs."""
    return np.random.default_rng(0).integers(0, prompts, (RESAMPLES, prompts))


def at(distance: float) -> str:
    """Name of the reward at a distance."""
    return f"reward at KL {distance:g}"


def measure(study: Study, design: Design) -> tuple[list[Row], dict[str, Estimate]]:
    """Train and judge a design: its rows, and the figures among them by which designs are compared."""
    states = study.states(design)
    figures = {EXPLAINED: of_states(states, explained_variance), RANKS: of_states(states, rank_correlation)}
    curve, rows = [], []
    for strength, point in study.curve(design):
        curve.append(point)
        if strength:
            case = f"{design}, β = {strength:g}"
            rows += [of_prompts(point.reward_P).row(case, "reward"), Row(case, "KL", point.kl, "nats")]
    reached = {at(distance): at_kl(curve, distance) for distance in DISTANCES}
    figures |= {name: of_prompts(reward_P) for name, reward_P in reached.items() if reward_P is not None}
    return [figure.row(str(design), name) for name, figure in figures.items()] + rows, figures


def effects(measured: dict[Design, dict[str, Estimate]]) -> list[Row]:
    """What each choice is worth against the library's default, all else being equal: means over pairs of designs.

    And how far designs lie from the sum of these effects: another training alone would move them as well.
    """
    rows = []
    levels: dict[str, tuple[Any, ...]] = {"head": HEADS, "td_lambda": LAMBDAS, "samples": SAMPLES}
    title = {"head": "{}", "td_lambda": "λ = {:g}", "samples": "{} a prompt"}
    for metric in (EXPLAINED, RANKS, *map(at, DISTANCES)):
        have = {design: figures[metric] for design, figures in measured.items() if metric in figures}
        for choice, (usual, *others) in levels.items():
            for other in others:
                pairs = [
                    (have[design], have[replace(design, **{choice: usual})])
                    for design in have
                    if getattr(design, choice) == other and replace(design, **{choice: usual}) in have
                ]
                if pairs:
                    mine, theirs = (Estimate.mean(each) for each in zip(*pairs, strict=True))
                    case = f"{title[choice].format(other)} - {title[choice].format(usual)}"
                    difference = Estimate(mine.value - theirs.value, mine.resampled_R - theirs.resampled_R)
                    rows.append(difference.row(f"{case}, {len(pairs)} pairs", metric))
        spread = _spread({design: figure.value for design, figure in have.items()}, levels)
        if spread is not None:
            rows.append(Row("spread of designs about the sum of the effects", metric, spread, "standard deviation"))
    return rows


def _spread(values: dict[Design, float], levels: dict[str, tuple[Any, ...]]) -> float | None:
    """Residual standard deviation of designs about an additive model; None if too few are there to tell."""
    columns = [(choice, other) for choice, (_, *others) in levels.items() for other in others]
    matrix = np.array([[1.0, *(float(getattr(d, choice) == level) for choice, level in columns)] for d in values])
    if not len(values) or (freedom := len(values) - np.linalg.matrix_rank(matrix)) < 1:
        return None
    observed = np.array(list(values.values()))
    fitted = matrix @ np.linalg.lstsq(matrix, observed, rcond=None)[0]
    return float(np.sqrt(((observed - fitted) ** 2).sum() / freedom))


@styled
def drawing(measured: dict[Design, dict[str, Estimate]], distance: float) -> Figure:
    """Explained variance, and the reward at a distance, of every design."""
    drawn = new_figure(4.2)
    order = sorted({design.samples for design in measured})
    kinds = list(dict.fromkeys((design.head, design.td_lambda) for design in measured))
    for axes, metric in zip(drawn.subplots(1, 2), (EXPLAINED, at(distance)), strict=True):
        entitle(axes, metric[0].upper() + metric[1:], "held-out prompts, 95 % intervals over them")
        for number, (head, td_lambda) in enumerate(kinds):
            have = [
                (order.index(design.samples), figures[metric])
                for design, figures in measured.items()
                if (design.head, design.td_lambda) == (head, td_lambda) and metric in figures
            ]
            for place, figure in have:
                axes.errorbar(
                    place + 0.12 * (number - (len(kinds) - 1) / 2),
                    figure.value,
                    np.abs(np.percentile(figure.resampled_R, [2.5, 97.5]) - figure.value)[:, None],
                    color=OBJECTIVE_COLOURS[number],
                    marker=OBJECTIVE_MARKERS[number],
                    linestyle="none",
                    label=f"{head}, λ = {td_lambda:g}" if place == have[0][0] else None,
                )
        axes.set_xticks(range(len(order)), [f"{samples} a prompt" for samples in order])
        axes.set_xlim(-0.5, len(order) - 0.5)
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds))
    return drawn


def gather(study: Study, designs: list[Design], path: Path | None) -> None:
    """Train, judge and compare all designs; rows are written as they come, and a figure beside them."""
    rows = [
        Row("rollouts trained on", "count", study.total, ""),
        of_prompts(study.unguided).row("base, the prompts that are decoded", "reward"),
    ]
    measured: dict[Design, dict[str, Estimate]] = {}
    for number, design in enumerate(designs, 1):
        console.print(f"[bold]{design}[/bold] ({number} of {len(designs)})", highlight=False)
        found, measured[design] = measure(study, design)
        rows += found
        write(rows, path)
        show(found, str(design))
    compared = effects(measured)
    show(compared, f"What each choice is worth, {study.total:,} rollouts")
    write(rows + compared, path)
    if path:
        path.with_suffix(".png").write_bytes(drawing(measured, DISTANCES[1]))


def main() -> None:
    """Measure, print, draw, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="bundled:demo", help="a prompt file (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=1920, help="training rollouts, at most (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=120, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="rollouts of each of those (default: %(default)s)")
    parser.add_argument(
        "--decoded", type=int, default=60, help="of those, decoded with guidance (default: %(default)s)"
    )
    parser.add_argument("--responses", type=int, default=2, help="guided responses a prompt (default: %(default)s)")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS, help="heads (default: all)")
    parser.add_argument("--lambdas", nargs="+", type=float, choices=LAMBDAS, default=LAMBDAS, help="λs (default: all)")
    parser.add_argument("--per-prompt", nargs="+", type=int, choices=SAMPLES, default=SAMPLES, help="(default: all)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the config")
    parser.add_argument("--work", type=Path, default=Path("runs/value-ablation"), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here, and a figure beside them")
    options = parser.parse_args()
    designs = [Design(*each) for each in product(options.heads, options.lambdas, options.per_prompt)]
    overrides = [f"prompts.source={json.dumps(options.prompts)}", *options.set]
    with program():
        quieten()
        study = Study(
            options.work.absolute(),
            overrides,
            options.rollouts,
            options.held_out,
            options.samples,
            options.decoded,
            options.responses,
        )
        trained = all((study.folder(design) / "states.npz").exists() for design in designs)
        with nullcontext() if trained else ray_cluster(study.config.resources):
            if not trained:
                study.sample()
            gather(study, designs, options.json)


if __name__ == "__main__":
    main()
