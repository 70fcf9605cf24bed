"""Which value model is worth training: its head, λ, and the rollouts a prompt at equal rollouts in all.

    make bench-value        or        python -m benchmarks.value [--prompts FILE] [--json FILE]

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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.rows import Row, show, write
from benchmarks.schedules import at_kl
from benchmarks.study import DISTANCES, SAMPLES, Design, Study
from vas.cli.main import program
from vas.evaluation.figure_style import OBJECTIVE_COLOURS, OBJECTIVE_MARKERS, entitle, new_figure, styled
from vas.models.base import quieten
from vas.progress import console
from vas.run.cluster import ray_cluster
from vas.training.metrics import explained_variance, rank_correlation

HEADS, LAMBDAS = ("categorical", "scalar"), (1.0, 0.95)  # first what the others are held against
RESAMPLES = 400
EXPLAINED, RANKS = "explained variance", "rank correlation"


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
    """What each choice is worth against the first of its kind, all else being equal: means over pairs of designs.

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
