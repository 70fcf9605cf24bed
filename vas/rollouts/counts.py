"""What a pass over the pipeline did, counted batch by batch as they are committed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pyarrow as pa

COMMITTED_SCHEMA = pa.schema(
    [
        ("rows", pa.int32()),
        ("tokens", pa.int64()),
        ("errors", pa.list_(pa.string())),
        ("peak_share", pa.float32()),
    ]
)


def kind(error: str) -> str:
    """What an error is counted as: its first line, whatever the numbers in it are."""
    return re.sub(r"\d+", "N", error.splitlines()[0])


@dataclass
class Summary:
    """What a pass over the pipeline did."""

    rows: int = 0
    """Rows there are now, those of earlier passes included."""
    sampled: int = 0
    tokens: int = 0
    seconds: float = 0.0
    actors: int = 1
    peak_share: float = 0.0
    """Share of its processor's measured product rate that an actor makes use of, by the last batches."""
    errors: dict[str, int] = field(default_factory=dict)
    """Kind of an error → rows."""

    @property
    def tokens_per_s(self) -> float:
        """Response tokens per second, all actors together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def add(self, committed: pa.Table) -> int:
        """Count batches that were committed; returns their rows."""
        rows = sum(committed["rows"].to_pylist())
        self.rows += rows
        self.sampled += rows
        self.tokens += sum(committed["tokens"].to_pylist())
        for errors in committed["errors"].to_pylist():
            for error in errors:
                name = kind(error)
                self.errors[name] = self.errors.get(name, 0) + 1
        for share in committed["peak_share"].to_pylist():
            self.peak_share += 0.2 * (share - self.peak_share) if self.peak_share else share
        return rows

    def note(self) -> str:
        """How it goes, for a progress line."""
        parts = [f"{self.tokens_per_s:.0f} tokens/s"]
        if self.actors > 1:
            parts.append(f"{self.tokens_per_s / self.actors:.0f} an actor")
        if self.peak_share:
            parts.append(f"MFU {self.peak_share:.0%}")
        if self.errors:
            parts.append(f"{sum(self.errors.values())} errors")
        return ", ".join(parts)
