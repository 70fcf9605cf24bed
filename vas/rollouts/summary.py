"""What the rollouts of a round came to: counts, lengths, and how the rewards are spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from vas import storage
from vas.rollouts.counts import kind

BINS = 40
FILES_EACH = 64  # files that one task reads
IN_FLIGHT = 16
COLUMNS = [
    *("error", "finish_reason", "prompt_token_ids", "logprobs", "roll_in_length", "rewards", "decode_seconds"),
]


def summarize(location: str, objectives: Iterable[str]) -> dict[str, Any]:
    """Rows, errors by kind, finish reasons, sampled tokens, and a histogram of each reward, of all committed rows.

    Read by Ray's tasks; what comes to the driver is a number a row and objective.
    """
    files = storage.list_files(location, ".parquet")
    task = ray.remote(num_cpus=0.25)(_read)
    waiting = [files[start : start + FILES_EACH] for start in range(0, len(files), FILES_EACH)]
    running: list[ray.ObjectRef] = []
    parts: list[dict[str, Any]] = []
    while waiting or running:
        while waiting and len(running) < IN_FLIGHT:
            running.append(task.remote(waiting.pop(), list(objectives)))
        done, running = ray.wait(running)
        parts += ray.get(done)
    return _together(parts, list(objectives))


def _read(files: list[str], objectives: list[str]) -> dict[str, Any]:
    """The figures of some files."""
    table = storage.read_table(files, columns=COLUMNS)
    good = table.filter(pc.is_null(table["error"]))
    return {
        "rows": len(table),
        "prompt_tokens": pc.sum(pc.list_value_length(table["prompt_token_ids"])).as_py() or 0,
        "errors": Counter(kind(error) for error in table["error"].drop_null().to_pylist()),
        "finish": Counter(table["finish_reason"].to_pylist()),
        "seconds": pc.sum(table["decode_seconds"]).as_py() or 0.0,
        "lengths": _numbers(pc.list_value_length(good["logprobs"])),
        "roll_in": _numbers(good["roll_in_length"]),
        "rewards": {name: _numbers(pc.struct_field(good["rewards"], name)) for name in objectives},
    }


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.float32)


def _together(parts: list[dict[str, Any]], objectives: list[str]) -> dict[str, Any]:
    errors: Counter[str] = sum((part["errors"] for part in parts), Counter())
    finish: Counter[str] = sum((part["finish"] for part in parts), Counter())
    lengths = np.concatenate([part["lengths"] for part in parts])
    seconds = sum(part["seconds"] for part in parts)
    rewards = {name: np.concatenate([part["rewards"][name] for part in parts]) for name in objectives}
    return {
        "rows": sum(part["rows"] for part in parts),
        "errors": dict(errors.most_common()),
        "finish_reasons": dict(sorted(finish.items())),
        "prompt_tokens": sum(part["prompt_tokens"] for part in parts),
        "tokens": int(lengths.sum()),
        "tokens_per_actor_second": float(lengths.sum() / seconds) if seconds else None,
        "lengths": _spread(lengths),
        "roll_in_lengths": _spread(np.concatenate([part["roll_in"] for part in parts])),
        "rewards": {name: _spread(values) for name, values in rewards.items()},
    }


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation, quantiles and a histogram; nothing of nothing."""
    if not len(values):
        return {}
    values = values.astype(np.float64)  # in float32 a range of some last digits has no 40 bins
    counts, edges = np.histogram(values, bins=_bins(values))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "quantiles": {str(q): float(np.quantile(values, q)) for q in (0, 0.1, 0.5, 0.9, 1)},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _bins(values: np.ndarray) -> np.ndarray | int:
    """BINS equal bins, or fewer with as many steps in each where all values are steps of one size, as whole numbers.

    With bins of another width some would hold a step more than their neighbours.
    """
    distinct = np.unique(values)
    step = float(np.diff(distinct).min(initial=np.inf))
    if not 1e-5 * np.abs(distinct).max() < step < np.inf:
        return BINS
    places = (distinct - distinct[0]) / step
    if np.abs(places - places.round()).max() > 1e-3:
        return BINS
    steps = round(places[-1]) + 1
    width = -(-steps // BINS)
    return distinct[0] + step * (width * np.arange(-(-steps // width) + 1) - 0.5)
