"""Rollouts to training rows: a prompt once, with all its responses behind it (see batches.py).

Runs in Ray's tasks, so it keeps clear of torch, whose import takes longer than the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from vas import storage
from vas.digests import digest
from vas.progress import Tracker
from vas.training.spelling import Spelling

if TYPE_CHECKING:
    from vas.models.translation import Translation

ROW_TOKENS = 2048  # a longer row is split; each part brings the prompt again
FILE_ROLLOUTS = 4096  # rollouts that one task packs into one file

PACKED_SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.list_(pa.int32()))),
        ("rewards", pa.list_(pa.list_(pa.float32()))),  # responses × objectives
        ("ended", pa.list_(pa.bool_())),  # the response ended itself, so its last state is terminal
        ("first", pa.list_(pa.int32())),  # state that π0 took over at: those before have no target of π0's
    ]
)

INDEX = "index.parquet"  # written last: a row a packed row, with `file`, `tokens`, `states`
COLUMNS = [
    *("prompt_id", "prompt_token_ids", "response_token_ids", "finish_reason", "error", "held_out", "rewards"),
    "roll_in_length",
]


def pack_all(
    files: list[str], rows: list[int], objectives: list[str], location: str, spelling: Spelling | None = None
) -> dict[str, str]:
    """Pack rollout files into training rows, a side of the split each; returns side → location.

    rows: rollouts in each of the files. spelling: of a value model that reads text in tokens of its own. What is
    packed already, from the same files for the same objectives, is not packed again: the locations are named after
    them.
    """
    target = storage.join(location, digest("packed since", *objectives, *(spelling or ()), *sorted(files)))
    sides = {side: storage.join(target, side) for side in ("train", "held_out")}
    if storage.exists(storage.join(sides["held_out"], INDEX)):
        return sides
    groups = _groups(files, rows)
    tasks = ray.data.from_items([{"number": n, "files": group} for n, group in enumerate(groups)])
    packed = tasks.map(partial(_pack_group, objectives=objectives, sides=sides, spelling=spelling), num_cpus=1)
    found: list[dict[str, Any]] = []
    with Tracker("packing", len(groups)) as tracker:
        for row in packed.iter_rows():
            found.append(row)
            tracker.advance(1)
    found.sort(key=lambda row: row["number"])
    for side, place in sides.items():
        write_index(place, [(row[f"{side}_tokens"], row[f"{side}_states"]) for row in found])
    return sides


def _groups(files: list[str], rows: list[int]) -> list[list[str]]:
    """Files in order, in groups of about `FILE_ROLLOUTS` rollouts."""
    number = (np.cumsum(rows) - 1) // FILE_ROLLOUTS
    return [[files[i] for i in np.flatnonzero(number == n)] for n in np.unique(number)]


def _pack_group(
    task: dict[str, Any], objectives: list[str], sides: dict[str, str], spelling: Spelling | None
) -> dict[str, Any]:
    """Pack one group into a file of each side; says how long the rows are."""
    table = storage.read_table(list(task["files"]), columns=COLUMNS)
    about: dict[str, Any] = {"number": task["number"]}
    translation = spelling.load() if spelling is not None else None
    for side, place in sides.items():
        packed = pack(table.filter(pc.equal(table["held_out"], side == "held_out")), objectives, translation)
        storage.write_table(packed_file(place, task["number"]), packed)
        about[f"{side}_tokens"], about[f"{side}_states"] = lengths(packed)
    return about


def packed_file(location: str, number: int) -> str:
    """Where a file of packed rows lies."""
    return storage.join(location, f"{number:06d}.parquet")


def write_index(location: str, files: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Write the index of packed files, given the `lengths` of each; readers look for it first."""
    tokens, states = ([number for each in column for number in each] for column in zip(*files, strict=True))
    file = np.repeat(np.arange(len(files)), [len(each) for each, _ in files])
    table = pa.table({"file": file, "tokens": pa.array(tokens, pa.int64()), "states": pa.array(states, pa.int64())})
    storage.write_table(storage.join(location, INDEX), table)


def lengths(packed: pa.Table) -> tuple[list[int], list[int]]:
    """Tokens of each packed row, and its states that have a target (see `batches.Batch`)."""
    tokens, states = [], []
    for row in packed.to_pylist():
        written = sum(map(len, row["responses"]))
        tokens.append(len(row["prompt"]) + written)
        # the prompt's end counts, a cut response's last state doesn't
        states.append(written + sum(row["ended"]) - sum(row["first"]))
    return tokens, states


def pack(table: pa.Table, objectives: list[str], translation: Translation | None = None) -> pa.Table:
    """Rollout rows to packed rows, in other tokens if asked; failed rollouts stay out."""
    full: list[dict[str, Any]] = []
    open_: dict[str, dict[str, Any]] = {}
    for row in table.to_pylist():
        if row["error"] is None and translation is not None:
            row |= _translated(row, translation)
        if row["error"] is not None or not row["response_token_ids"]:
            continue
        group = open_.get(row["prompt_id"])
        size = len(row["response_token_ids"])
        if group is None or group["size"] + size > ROW_TOKENS:
            if group is not None:
                full.append(group)
            group = {
                "prompt": row["prompt_token_ids"],
                "responses": [],
                "rewards": [],
                "ended": [],
                "first": [],
                "size": 0,
            }
            group["size"] = len(group["prompt"])
            open_[row["prompt_id"]] = group
        group["responses"].append(row["response_token_ids"])
        group["rewards"].append([row["rewards"][name] for name in objectives])
        group["ended"].append(row["finish_reason"] == "stop")
        group["first"].append(row["roll_in_length"] or 0)
        group["size"] += size
    return pa.Table.from_pylist([*full, *open_.values()], schema=PACKED_SCHEMA)


def _translated(row: dict[str, Any], translation: Translation) -> dict[str, Any]:
    """A rollout in the value model's tokens."""
    response, roll_in = row["response_token_ids"], row["roll_in_length"] or 0
    tokens = translation.response(response)
    return {
        "prompt_token_ids": translation.prompt(row["prompt_token_ids"]),
        "response_token_ids": tokens,
        "roll_in_length": min(len(translation.response(response[:roll_in])), len(tokens)) if roll_in else 0,
    }
