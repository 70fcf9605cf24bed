"""Scoring rows with several rewards, so that a bad row costs that row alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vas.errors import VasError
from vas.rewards.interface import Reward
from vas.schema import Prompt


@dataclass(frozen=True, slots=True)
class Scored:
    """One row's rewards."""

    rewards: dict[str, float | None]
    """Objective → finite reward, or None where scoring failed."""
    error: str | None
    """Why it failed; None when every objective was scored."""


def score(rewards: Mapping[str, Reward], prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Scored]:
    """Score N responses by every reward: one Scored a row, in order.

    A reward that raises on the batch, or returns another count than N, is called again row by
    row, and only the rows it fails on are marked. NaN, infinities and things that are no number
    mark their row. Only a VasError passes through: it says that the reward itself cannot work.
    """
    assert len(prompts) == len(responses)
    by_objective = {name: _results(reward, prompts, responses) for name, reward in rewards.items()}
    rows = []
    for row in range(len(prompts)):
        results = {name: results[row] for name, results in by_objective.items()}
        errors = [f"{name}: {result}" for name, result in results.items() if isinstance(result, str)]
        values = {name: None if isinstance(result, str) else result for name, result in results.items()}
        rows.append(Scored(values, "; ".join(errors) or None))
    return rows


def _results(reward: Reward, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | str]:
    """For each row its reward, or the text of what went wrong."""
    if not prompts:
        return []
    try:
        values = list(reward(prompts, responses))
        if len(values) != len(prompts):
            raise ValueError(f"returned {len(values)} values for {len(prompts)} rows")
    except VasError:
        raise
    except Exception as error:  # whatever a reward may raise, the other rows go on
        if len(prompts) == 1:
            return [f"{type(error).__name__}: {error}"]
        return [_results(reward, [prompt], [response])[0] for prompt, response in zip(prompts, responses, strict=True)]
    return [_checked(value) for value in values]


def _checked(value: Any) -> float | str:
    """A finite float, or what is wrong with `value`. Number-like things (numpy, torch) count as numbers."""
    if not hasattr(value, "__float__"):
        return f"returned {value!r:.80}, which is no number"
    try:
        number = float(value)
    except Exception as error:
        return f"returned {type(value).__name__}, which is no number: {error}"
    return number if math.isfinite(number) else f"returned {number}"
