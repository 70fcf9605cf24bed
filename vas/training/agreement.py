"""How well a student's values of candidates agree with its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from vas import guidance

LIKELY = 0.01  # π0 of a candidate that is sampled now and then


def errors(found_PKJ: Tensor, wanted_PKJ: Tensor, logprobs_PK: Tensor, uniform: float = 0.0) -> tuple[Tensor, Tensor]:
    """Squared error of each objective's advantages, and what it would be if they were all 0: [J] each.

    A candidate weighs as much as π0 gives it; uniform: the share of the weight that is spread evenly instead.
    """
    counts = logprobs_PK > guidance.NEVER
    found, wanted = (guidance.advantages(values, logprobs_PK, counts) for values in (found_PKJ, wanted_PKJ))
    weights = (1 - uniform) * torch.softmax(logprobs_PK, dim=-1) + uniform * counts / counts.sum(-1, keepdim=True)
    error_J, variance_J = ((weights[..., None] * each.square()).sum(1).mean(0) for each in (found - wanted, wanted))
    return error_J, variance_J


def agreement(
    found_PKJ: Tensor, wanted_PKJ: Tensor, logprobs_PK: Tensor, objectives: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Figures of agreement over P parent states, for each objective.

    explained: share of the advantages' variance, weighted by π0; 1 for a perfect copy. best: share of the parents
    at which both name the same best candidate. best_likely: the same among candidates of at least 1 %, at parents
    that have two. best_weighted: as `best`, each parent weighted by the teacher's lead of the best candidate over
    the second, for a tie is nobody's mistake.
    """
    error_J, variance_J = errors(found_PKJ, wanted_PKJ, logprobs_PK)
    counts = logprobs_PK > guidance.NEVER
    likely = counts & (logprobs_PK.exp() >= LIKELY)
    same = _same_best(found_PKJ, wanted_PKJ, counts)
    top = wanted_PKJ.masked_fill(~counts[..., None], guidance.NEVER).topk(min(2, counts.shape[1]), dim=1).values
    lead_PJ = torch.nan_to_num(top[:, 0] - top[:, -1], posinf=0.0)  # nothing is missed where one candidate counts
    figures = {
        "explained": 1 - error_J / variance_J,
        "best": same.mean(0),
        "best_likely": _same_best(found_PKJ, wanted_PKJ, likely)[likely.sum(1) > 1].mean(0),
        "best_weighted": (same * lead_PJ).sum(0) / lead_PJ.sum(0),
    }
    return {
        objective: {name: float(each[j]) for name, each in figures.items()} for j, objective in enumerate(objectives)
    }


def _same_best(found_PKJ: Tensor, wanted_PKJ: Tensor, among_PK: Tensor) -> Tensor:
    """1 where both have their highest value at the same candidate, else 0: [P, J]."""
    first, second = (
        values.masked_fill(~among_PK[..., None], guidance.NEVER).argmax(1) for values in (found_PKJ, wanted_PKJ)
    )
    return (first == second).float()
