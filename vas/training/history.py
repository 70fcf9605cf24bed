"""Which epoch of a training is the best: the one whose values explain most of what was kept from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Entry = dict[str, Any]
"""`epoch` (from 1), `losses` (one an optimizer step), `held_out` (as `Held.report` gives it), and `resumed`, steps
from which it went on after a fault, if there was one. Of a distillation, `held_out` is empty, and `unseen` has the
figures of `agreement`."""


def score(entry: Entry) -> float:
    """Mean over objectives of the variance explained, of rewards or a teacher's advantages; -inf if there is none."""
    shares = [metrics["explained_variance"] for metrics in entry["held_out"].values()]
    shares += [figures["explained"] for figures in entry.get("unseen", {}).values()]
    shares = [share for share in shares if not math.isnan(share)]
    return sum(shares) / len(shares) if shares else -math.inf


def best(history: Sequence[Entry]) -> int:
    """Index of the best epoch; of equals the last, so also the last of all if nothing was held out."""
    return max(range(len(history)), key=lambda number: (score(history[number]), number))


def hopeless(history: Sequence[Entry], patience: int | None) -> bool:
    """Whether so many epochs have not been better than the best before them."""
    return bool(patience and history) and len(history) - 1 - best(history) >= (patience or 0)
