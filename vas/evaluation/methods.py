"""The methods compared: base and best-of-N from stored rollouts, VAS from guided responses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vas.config import RunConfig, Strengths
from vas.evaluation.flops import best_of_n
from vas.evaluation.results import BASE, BEST_OF_N, VAS, Result
from vas.evaluation.stats import best_of_n_kl, best_of_n_weights, bootstrap_interval, distinct_n

Row = dict[str, Any]
ByPrompt = dict[str, list[Row]]


@dataclass(frozen=True)
class Method:
    """One method in one setting: what it may hand over for each prompt, and what that costs."""

    name: str
    setting: str
    samples: list[list[Row]]
    """Responses by prompt."""
    weights: list[np.ndarray]
    """Chance that each of them is the one handed over."""
    shown: list[Row]
    """One response a prompt, for the diversity figures: the same amount of text for every method."""
    kl: float
    flops: float
    drawn: int
    """Responses sampled for the one that is handed over."""
    rate: float

    def mean(self, figure: Callable[[Row], float]) -> np.ndarray:
        """The expected figure of the response that is handed over, for each prompt."""
        return np.array([w @ [figure(row) for row in rows] for rows, w in zip(self.samples, self.weights, strict=True)])


@dataclass(frozen=True)
class Judge:
    """Turns responses to results; holds what all methods share.

    base_parameters, value_parameters: weights per token position (see flops.py).
    scale: objective → (mean, std) of the training rollouts, for weighing objectives.
    """

    config: RunConfig
    base_parameters: float
    value_parameters: int
    scale: dict[str, tuple[float, float]]
    revision: str

    def base(self, rollouts: ByPrompt) -> list[Result]:
        """The base model: every stored sample of every held-out prompt."""
        samples = list(rollouts.values())
        flops, rate = self._sampling_flops(samples, 1), _rate(samples)
        first = [rows[0] for rows in samples]
        return self._results(Method(BASE, "{}", samples, _evenly(samples), first, 0.0, flops, 1, rate))

    def best_of(self, rollouts: ByPrompt, n: int, by: Strengths) -> list[Result]:
        """Best-of-n, picking by the weighed sum of standardised rewards; the mean over all n-subsets."""
        samples = [rows for rows in rollouts.values() if len(rows) >= n]
        picked = [max(rows[:n], key=lambda row: self._weigh(row, by)) for rows in samples]
        ranked = [sorted(rows, key=lambda row: -self._weigh(row, by)) for rows in samples]
        weights = [best_of_n_weights(len(rows), n) for rows in ranked]
        setting = json.dumps({"n": n, "by": by})
        flops, rate = self._sampling_flops(samples, n), _rate(samples) / n
        return self._results(Method(BEST_OF_N, setting, ranked, weights, picked, best_of_n_kl(n), flops, n, rate))

    def vas(self, setting: str, responses: ByPrompt) -> list[Result]:
        """VAS in one setting of β: every guided response."""
        samples = list(responses.values())
        rows = [row for prompt in samples for row in prompt]
        kl = float(np.mean([row["kl"] for row in rows]))
        flops = float(np.mean([self._guided_flops(row) for row in rows]))
        first = [prompt[0] for prompt in samples]
        return self._results(Method(VAS, setting, samples, _evenly(samples), first, kl, flops, 1, _rate(samples)))

    def _results(self, method: Method) -> list[Result]:
        """A result for each objective."""
        tokens = [row["response_token_ids"] for row in method.shown]
        generated = float(np.mean([_length(row) for rows in method.samples for row in rows])) * method.drawn
        results = []
        for objective in self.config.rewards:
            rewards = method.mean(partial(_reward, objective))
            low, high = bootstrap_interval(rewards, self.config.evaluation.bootstrap, self.config.seed)
            results.append(
                Result(
                    method=method.name,
                    setting=method.setting,
                    objective=objective,
                    n=len(rewards),
                    reward_mean=float(rewards.mean()),
                    ci_low=low,
                    ci_high=high,
                    kl=method.kl,
                    length=float(method.mean(_length).mean()),
                    decode_flops=method.flops,
                    tokens_generated=generated,
                    tokens_per_s=method.rate,
                    distinct_1=distinct_n(tokens, 1),
                    distinct_2=distinct_n(tokens, 2),
                    seed=self.config.seed,
                    git_revision=self.revision,
                )
            )
        return results

    def _sampling_flops(self, samples: list[list[Row]], n: int) -> float:
        """FLOPs of n samples from π0, mean over prompts."""

        def one(rows: list[Row]) -> float:
            length = float(np.mean([_length(row) for row in rows]))
            return best_of_n(self.base_parameters, len(rows[0]["prompt_token_ids"]), length, n)

        return float(np.mean([one(rows) for rows in samples]))

    def _guided_flops(self, row: Row) -> float:
        """FLOPs of one guided response, as they were spent: samples of a prompt share its prefill."""
        return 2.0 * (self.base_parameters * row["base_positions"] + self.value_parameters * row["value_positions"])

    def _weigh(self, row: Row, by: Strengths) -> float:
        return sum(
            beta * (row["rewards"][name] - self.scale[name][0]) / self.scale[name][1] for name, beta in by.items()
        )


def _evenly(samples: list[list[Row]]) -> list[np.ndarray]:
    return [np.full(len(rows), 1 / len(rows)) for rows in samples]


def _reward(objective: str, row: Row) -> float:
    return row["rewards"][objective]


def _length(row: Row) -> int:
    return len(row["response_token_ids"])


def _rate(samples: list[list[Row]]) -> float:
    """Tokens per second of actor time."""
    rows = [row for prompt in samples for row in prompt]
    seconds = sum(row["decode_seconds"] for row in rows)
    return sum(map(_length, rows)) / seconds if seconds else float("nan")
