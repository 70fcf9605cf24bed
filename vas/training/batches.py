"""Packed rows to tensors.

The responses of a prompt share its tokens: a tree mask lets each response see the prompt and
itself, not the others, and its positions go on from the prompt's. It is what separate rows
would compute, with the prompt run once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vas import guidance


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
        moved: dict[str, Any] = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in vars(self).items()}
        moved["attention_mask_B1TT"] = guidance.additive_mask(moved["attention_mask_B1TT"], dtype)
        return Batch(**moved)


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Packed rows to a batch; the mask is boolean until `Batch.to`."""
    widths = [len(row["prompt"]) + sum(map(len, row["responses"])) for row in rows]
    width = max(widths)
    longest = max(len(response) for row in rows for response in row["responses"])
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), -1)  # 0 the prompt, then a number a response; -1 padding
    row_of, states, last, ended = [], [], [], []
    rewards: list[list[float]] = []
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
    until = last_N - (~torch.tensor(ended)).long()  # a response that was cut has no terminal state
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
