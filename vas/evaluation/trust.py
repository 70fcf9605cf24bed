"""Do values come true? V of half-finished responses against what the base model makes of them.

As in the appendix of arXiv:2405.06639: held-out responses are cut at half their length, π0 completes each
several times, and V at the cut is compared with the mean reward of the completions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vas.evaluation.grouping import number
from vas.training.metrics import calibration, explained_variance, rank_correlation

BINS = 5  # of the calibration: there are few prefixes


@dataclass(frozen=True, slots=True)
class Trust:
    """How far the values of one objective come true; values and rewards are in the reward's standard deviations."""

    objective: str
    prefixes: int
    """Half-finished responses."""
    completions: int
    """Of all of them together."""
    explained_variance: float
    """Of the completions' mean rewards, by V."""
    explained_low: float
    explained_high: float
    """95 % bootstrap interval over prefixes."""
    ceiling: float
    """What a perfect V would explain: the means of so few completions are noisy themselves."""
    rank_correlation: float
    """Spearman's, of V and the mean rewards."""
    rank_low: float
    rank_high: float
    mae: float
    """Mean of |V − mean reward|, the noise of the means included."""
    rmse: float
    error: float
    """RMSE against the reward that π0 expects: the noise of the means is taken out."""
    spread: float
    """Of V over the candidates of the next token: the root of their mean π0-weighted variance."""
    signal_to_noise: float
    """spread ÷ error."""
    finished: int
    """Held-out responses of the same prompts that ended themselves."""
    after_eos_explained: float
    after_eos_rmse: float
    """V of their final states against their rewards."""
    calibration: list[dict[str, float]]
    points: list[dict[str, float]]
    """A prefix each: `value`, mean `reward`, the mean's standard `error`, number of `completions`."""


def judge(
    objective: str,
    value_N: np.ndarray,
    rewards: list[np.ndarray],
    spread_N: np.ndarray,
    final_M: np.ndarray,
    reached_M: np.ndarray,
    resamples: int,
    seed: int,
) -> Trust:
    """Compare values with what came of them.

    value_N: V of N prefixes. rewards: of each prefix's completions, two or more. spread_N: standard deviation
    of the candidates' values. final_M, reached_M: V of final states, and the rewards. resamples, seed: of the
    intervals.
    """
    means = np.array([each.mean() for each in rewards]).round(9)  # of rewards that never vary, they don't either
    noise_N = np.array([each.var(ddof=1) / len(each) for each in rewards])  # variance of each mean
    noise = float(noise_N.mean())
    ceiling = max(1 - noise / float(means.var(ddof=1)), 0.0) if np.ptp(means) > 0 else math.nan
    square = float(np.square(value_N - means).mean())
    error = math.sqrt(max(square - noise, 0.0))
    spread = math.sqrt(float(np.square(spread_N).mean()))
    explained_low, explained_high = _interval(explained_variance, value_N, means, resamples, seed)
    rank_low, rank_high = _interval(rank_correlation, value_N, means, resamples, seed)
    return Trust(
        objective=objective,
        prefixes=len(rewards),
        completions=sum(map(len, rewards)),
        explained_variance=explained_variance(value_N, means),
        explained_low=explained_low,
        explained_high=explained_high,
        ceiling=ceiling,
        rank_correlation=rank_correlation(value_N, means),
        rank_low=rank_low,
        rank_high=rank_high,
        mae=float(np.abs(value_N - means).mean()),
        rmse=math.sqrt(square),
        error=error,
        spread=spread,
        signal_to_noise=spread / error if error > 0 else math.nan,
        finished=len(reached_M),
        after_eos_explained=explained_variance(final_M, reached_M),
        after_eos_rmse=math.sqrt(float(np.square(final_M - reached_M).mean())) if len(reached_M) else math.nan,
        calibration=calibration(value_N, means, BINS),
        points=[
            {"value": float(v), "reward": float(m), "error": math.sqrt(n), "completions": len(each)}
            for v, m, n, each in zip(value_N, means, noise_N, rewards, strict=True)
        ],
    )


def _interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    value: np.ndarray,
    reward: np.ndarray,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of pairs, resampling the pairs; NaN if it can never be had."""
    draws = np.random.default_rng(seed).integers(len(value), size=(resamples, len(value)))
    found = np.array([statistic(value[some], reward[some]) for some in draws])
    found = found[np.isfinite(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def to_json(found: list[Trust]) -> str:
    """Objective → everything measured; null for what could not be."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [plain(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    figures = [asdict(trust) for trust in found]
    return json.dumps({each.pop("objective"): plain(each) for each in figures}, indent=1)


def card_section(found: list[Trust]) -> str:
    """The section of the model card, in Markdown."""
    lines = [
        f"{found[0].prefixes} held-out responses were cut at half their length, and the base model completed each "
        f"about {found[0].completions / found[0].prefixes:.0f} times; V at the cut is compared with the mean reward "
        "of the completions, and V after the end-of-text token with the reward. In standard deviations of the reward.",
        "",
        "| | " + " | ".join(trust.objective for trust in found) + " |",
        "| --- |" + " --- |" * len(found),
    ]
    for text, cell in ROWS.items():
        lines.append(f"| {text} | " + " | ".join(cell(trust) for trust in found) + " |")
    for trust in found:
        lines += ["", f"### Half-finished responses: {trust.objective}", ""]
        lines += ["| mean value | mean reward of completions | prefixes |", "| --- | --- | --- |"]
        lines += [f"| {b['value']:.3f} | {b['reward']:.3f} | {b['states']} |" for b in trust.calibration]
    return "\n".join(lines)


ROWS: dict[str, Callable[[Trust], str]] = {
    "explained variance [95 % interval]": lambda t: _with_interval(
        t.explained_variance, t.explained_low, t.explained_high
    ),
    "what a perfect V would explain": lambda t: number(t.ceiling, 2),
    "rank correlation [95 % interval]": lambda t: _with_interval(t.rank_correlation, t.rank_low, t.rank_high),
    "mean absolute error": lambda t: number(t.mae, 2),
    "error of V, noise of the completions taken out": lambda t: number(t.error, 2),
    "spread of V over the candidates": lambda t: number(t.spread, 2),
    "spread ÷ error": lambda t: number(t.signal_to_noise, 2),
    "explained variance after EOS": lambda t: number(t.after_eos_explained, 2),
    "error after EOS": lambda t: number(t.after_eos_rmse, 2),
}
"""What card and report show: name → text of its cell."""


def _with_interval(figure: float, low: float, high: float) -> str:
    return f"{number(figure, 2)} [{number(low, 2)}, {number(high, 2)}]"
