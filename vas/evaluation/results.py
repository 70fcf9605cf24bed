"""A row of results.parquet: how one method, in one setting, does on one objective."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import pyarrow as pa

BASE, BEST_OF_N, VAS = "base", "best-of-n", "vas"


@dataclass(frozen=True, slots=True)
class Result:
    """One method in one setting, judged by one objective on the held-out prompts."""

    method: str
    """base | best-of-n | vas"""
    setting: str
    """JSON. vas: objective → strength. best-of-n: `n`, and `by`, the weights it picks by. base: {}."""
    objective: str
    n: int
    """Held-out prompts."""
    reward_mean: float
    """In the reward's own units."""
    ci_low: float
    ci_high: float
    """95 % bootstrap interval over prompts."""
    kl: float
    """KL(π‖π0) of a response, nats; for best-of-n the bound log n − (n−1)/n."""
    length: float
    """Tokens of the response."""
    decode_flops: float
    """Model FLOPs spent per response, prompts included."""
    tokens_generated: float
    """Tokens sampled per response that is handed over (n times as many for best-of-n)."""
    tokens_per_s: float
    """Handed-over tokens per second on one actor."""
    distinct_1: float
    """Different tokens ÷ tokens, over all responses."""
    distinct_2: float
    """The same for pairs of neighbours."""
    seed: int
    git_revision: str

    def label(self) -> str:
        """How tables and figures name the method and setting."""
        setting = json.loads(self.setting)
        if self.method == BEST_OF_N:
            by = ", ".join(setting["by"])
            return f"best of {setting['n']} by {by}"
        if self.method == VAS:
            return "VAS " + ", ".join(f"{name} β={beta:g}" for name, beta in setting.items())
        return "base"


def to_table(results: list[Result]) -> pa.Table:
    """Results as Arrow, a column a field."""
    return pa.Table.from_pylist([asdict(result) for result in results])
