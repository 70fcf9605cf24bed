"""Rollouts to training rows: a prompt once, with all its responses behind it (see batches.py).

Runs in Ray Data's tasks, so it keeps clear of torch, whose import takes longer than the work.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

ROW_TOKENS = 2048  # a longer row is split; each part brings the prompt again

PACKED_SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.list_(pa.int32()))),
        ("rewards", pa.list_(pa.list_(pa.float32()))),  # responses × objectives
        ("ended", pa.list_(pa.bool_())),  # the response ended itself, so its last state is terminal
    ]
)


def pack(table: pa.Table, objectives: list[str]) -> pa.Table:
    """Rollout rows of one block to packed rows; failed rollouts stay out."""
    groups: dict[str, dict[str, Any]] = {}
    for row in table.to_pylist():
        if row["error"] is not None or not row["response_token_ids"]:
            continue
        group = groups.get(row["prompt_id"])
        size = len(row["response_token_ids"])
        if group is None or group["size"] + size > ROW_TOKENS:
            if group is not None:  # full: keep it under another key
                groups[f"{row['prompt_id']}/{len(groups)}"] = group
            group = {
                "prompt": row["prompt_token_ids"],
                "responses": [],
                "rewards": [],
                "ended": [],
                "size": 0,
            }
            group["size"] = len(group["prompt"])
            groups[row["prompt_id"]] = group
        group["responses"].append(row["response_token_ids"])
        group["rewards"].append([row["rewards"][name] for name in objectives])
        group["ended"].append(row["finish_reason"] == "stop")
        group["size"] += size
    return pa.Table.from_pylist(list(groups.values()), schema=PACKED_SCHEMA)
