"""Rollouts to training rows: a prompt once, with all its responses behind it.

The responses of a prompt share its tokens, so a row holds the prompt and then every
response; a tree mask lets each response see the prompt and itself, not the others, and its
positions go on from the prompt's. It is what separate rows would compute, with the prompt
run once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

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
            group = {"prompt": row["prompt_token_ids"], "responses": [], "rewards": [], "ended": [], "size": 0}
            group["size"] = len(group["prompt"])
            groups[row["prompt_id"]] = group
        group["responses"].append(row["response_token_ids"])
        group["rewards"].append([row["rewards"][name] for name in objectives])
        group["ended"].append(row["finish_reason"] == "stop")
        group["size"] += size
    return pa.Table.from_pylist(list(groups.values()), schema=PACKED_SCHEMA)


@dataclass
class Batch:
    """Packed rows as tensors. B rows of T tokens; N responses, S states each, in all of them.

    State t of a response is the prefix with t of its tokens; state 0 ends the prompt.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    attention_mask_B1TT: Tensor
    """Additive."""
    row_N: Tensor
    """Row of each response."""
    state_NS: Tensor
    """Column of each state in its row."""
    last_N: Tensor
    """Index of each response's final state: its length."""
    trained_NS: Tensor
    """True for states that have a target: all, but the last one of a response that was cut off."""
    rewards_NJ: Tensor
    tokens: int
    """Real tokens in the batch."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On a device, with the mask in the model's dtype."""
        moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in vars(self).items()}
        moved["attention_mask_B1TT"] = additive_mask(moved["attention_mask_B1TT"], dtype)
        return Batch(**moved)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, the dtype's lowest number elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Packed rows to a batch; the mask is boolean until `Batch.to`."""
    widths = [len(row["prompt"]) + sum(map(len, row["responses"])) for row in rows]
    width = max(widths)
    longest = max(len(response) for row in rows for response in row["responses"])
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), -1)  # 0 the prompt, then a number a response; -1 padding
    row_of, states, last, ended, rewards = [], [], [], [], []
    for b, row in enumerate(rows):
        prompt = len(row["prompt"])
        start = prompt
        input_ids[b, :prompt] = torch.as_tensor(row["prompt"])
        positions[b, :prompt] = torch.arange(prompt)
        segments[b, :prompt] = 0
        for number, response in enumerate(row["responses"], 1):
            end = start + len(response)
            input_ids[b, start:end] = torch.as_tensor(response)
            positions[b, start:end] = torch.arange(prompt, prompt + len(response))
            segments[b, start:end] = number
            columns = torch.full((longest + 1,), prompt - 1)
            columns[1 : len(response) + 1] = torch.arange(start, end)
            states.append(columns)
            row_of.append(b)
            last.append(len(response))
            start = end
        ended.extend(row["ended"])
        rewards.extend(list(reward) for reward in row["rewards"])
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    last_N = torch.tensor(last)
    step = torch.arange(longest + 1)
    until = last_N - (~torch.tensor(ended)).long()
    return Batch(
        input_ids_BT=input_ids,
        position_ids_BT=positions,
        attention_mask_B1TT=((same | (segments == 0)[:, None, :]) & causal)[:, None],
        row_N=torch.tensor(row_of),
        state_NS=torch.stack(states),
        last_N=last_N,
        trained_NS=step <= until[:, None],
        rewards_NJ=torch.tensor(rewards, dtype=torch.float32),
        tokens=sum(widths),
    )
