"""Ray metrics of sampling, for Prometheus and Ray's dashboard: counted where batches are committed."""

from __future__ import annotations

from functools import cache

import pyarrow as pa
from ray.util.metrics import Counter, Gauge

from vas.rollouts.counts import kind

TAGS = ("run",)


class Metrics:
    """This process's counters for one run."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._rows = Counter("vas_rollout_rows", "Rollouts committed.", TAGS)
        self._tokens = Counter("vas_rollout_tokens", "Response tokens of committed rollouts.", TAGS)
        self._errors = Counter("vas_rollout_errors", "Committed rollouts that failed, by kind.", (*TAGS, "kind"))
        self._peak = Gauge("vas_rollout_peak_share", "Share of its product rate that a sampler makes use of.", TAGS)

    @classmethod
    @cache
    def of(cls, run: str) -> Metrics:
        """The one of a run; Ray knows a metric by its name."""
        return cls(run)

    def count(self, committed: pa.Table) -> None:
        """Count batches; the table has the columns `rows`, `tokens`, `errors` and `peak_share`."""
        for batch in committed.to_pylist():
            self._rows.inc(batch["rows"], self._tags)
            self._peak.set(batch["peak_share"], self._tags)
            if batch["tokens"]:
                self._tokens.inc(batch["tokens"], self._tags)
            for error in batch["errors"]:
                self._errors.inc(1, self._tags | {"kind": kind(error).split(":")[0][:40]})
