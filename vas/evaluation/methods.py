"""The methods compared: base and best-of-N from stored rollouts, VAS from guided responses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vas.config import RunConfig, Strengths
from vas.evaluation.flops import best_of_n
from vas.evaluation.results import BASE, BEST_OF_N, VAS, Result
from vas.evaluation.stats import best_of_n_kl, best_of_n_weights, bootstrap_interval, distinct_n

Row = dict[str, Any]


@dataclass
class Judge:
    """Turns responses to results; holds what all methods share.

    base_parameters, value_parameters: weights per token position (see flops.py).
    scale: objective → (mean, std) of the training rollouts, for weighing objectives.
    """

    config: RunConfig
    base_parameters: int
    value_parameters: int
    scale: dict[str, tuple[float, float]]
    revision: str
    _shared: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._shared = {"seed": self.config.seed, "git_revision": self.revision}

    def base(self, rollouts: dict[str, list[Row]]) -> list[Result]:
        """The base model: every stored sample of every held-out prompt."""
        rows = [row for samples in rollouts.values() for row in samples]
        flops = self._sampling_flops(rollouts, 1)
        return self._results(BASE, "{}", list(rollouts.values()), rows, 0.0, flops, 1, _rate(rows))

    def best_of(self, rollouts: dict[str, list[Row]], n: int, by: Strengths) -> list[Result]:
        """Best-of-n, picking by the weighed sum of standardised rewards; the mean over all n-subsets."""
        enough = {prompt: rows for prompt, rows in rollouts.items() if len(rows) >= n}
        ranked = [sorted(rows, key=lambda row: -self._weigh(row, by)) for rows in enough.values()]
        picked = [rows[0] for rows in ranked]  # texts for distinct-n: the best of all
        flops = self._sampling_flops(enough, n)
        setting = json.dumps({"n": n, "by": by})
        rate = _rate([row for rows in ranked for row in rows]) / n
        return self._results(BEST_OF_N, setting, ranked, picked, best_of_n_kl(n), flops, n, rate, best_of=n)

    def vas(self, setting: str, responses: dict[str, list[Row]]) -> list[Result]:
        """VAS in one setting of β: every guided response."""
        rows = [row for samples in responses.values() for row in samples]
        kl = float(np.mean([row["kl"] for row in rows])) if rows else float("nan")
        flops = float(
            np.mean(
                [
                    2.0
                    * (
                        self.base_parameters * self._base_positions(row)
                        + self.value_parameters * row["value_positions"]
                    )
                    for row in rows
                ]
            )
        )
        return self._results(VAS, setting, list(responses.values()), rows, kl, flops, 1, _rate(rows))

    def _results(
        self,
        method: str,
        setting: str,
        by_prompt: list[list[Row]],
        rows: list[Row],
        kl: float,
        flops: float,
        drawn: int,
        rate: float,
        best_of: int | None = None,
    ) -> list[Result]:
        def mean(samples: list[Row], what: Any) -> float:
            figures = np.array([what(row) for row in samples], dtype=np.float64)
            weights = best_of_n_weights(len(samples), best_of) if best_of else np.full(len(samples), 1 / len(samples))
            return float(figures @ weights)

        length = float(np.mean([mean(samples, _length) for samples in by_prompt])) if by_prompt else float("nan")
        tokens = [row["response_token_ids"] for row in rows]
        generated = float(np.mean([_length(r) for samples in by_prompt for r in samples])) * drawn
        results = []
        for objective in self.config.rewards:
            per_prompt = np.array([mean(samples, lambda r, o=objective: r["rewards"][o]) for samples in by_prompt])
            low, high = bootstrap_interval(per_prompt, self.config.evaluation.bootstrap, self.config.seed)
            results.append(
                Result(
                    method=method,
                    setting=setting,
                    objective=objective,
                    n=len(per_prompt),
                    reward_mean=float(per_prompt.mean()),
                    ci_low=low,
                    ci_high=high,
                    kl=kl,
                    length=length,
                    decode_flops=flops,
                    tokens_generated=generated,
                    tokens_per_s=rate,
                    distinct_1=distinct_n(tokens, 1),
                    distinct_2=distinct_n(tokens, 2),
                    **self._shared,
                )
            )
        return results

    def _sampling_flops(self, rollouts: dict[str, list[Row]], n: int) -> float:
        """FLOPs of n samples from π0, mean over prompts."""
        return float(
            np.mean(
                [
                    best_of_n(
                        self.base_parameters,
                        len(rows[0]["prompt_token_ids"]),
                        float(np.mean([_length(r) for r in rows])),
                        n,
                    )
                    for rows in rollouts.values()
                ]
            )
        )

    @staticmethod
    def _base_positions(row: Row) -> int:
        """Prompt and response positions; samples that shared a prefill are charged for it all the same."""
        return len(row["prompt_token_ids"]) + len(row["response_token_ids"])

    def _weigh(self, row: Row, by: Strengths) -> float:
        return sum(
            beta * (row["rewards"][name] - self.scale[name][0]) / self.scale[name][1] for name, beta in by.items()
        )


def _length(row: Row) -> int:
    return len(row["response_token_ids"])


def _rate(rows: list[Row]) -> float:
    seconds = sum(row["decode_seconds"] for row in rows)
    return sum(map(_length, rows)) / seconds if seconds else float("nan")
