"""Packed rows to tensors.

The responses of a prompt share its tokens: a tree mask lets each response see the prompt and
itself, not the others, and its positions go on from the prompt's. It is what separate rows
would compute, with the prompt run once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vas import guidance

_PROMPT, _PADDING = 0, -1  # segments; a response's is its number


@dataclass
class Batch:
    """Packed rows as tensors. B rows of T tokens; N responses, S states each, in all of them.

    State t of a response is the prefix with t of its tokens; state 0 ends the prompt.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segments_BT: Tensor
    """0 for the prompt, then a number a response; -1 for padding."""
    row_N: Tensor
    """Row of each response."""
    state_NS: Tensor
    """Column of each state in its row."""
    last_N: Tensor
    """Index of each response's final state: its length."""
    trained_NS: Tensor
    """True for states that have a target: all from where π0 took over, but the last of a response that was cut off."""
    rewards_NJ: Tensor
    tokens: int
    """Real tokens in the batch."""

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        moved: dict[str, Any] = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in vars(self).items()}
        return Batch(**moved)

    def attention_mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """Additive tree mask [B, 1, T, T]. window: how many tokens each sees at most, itself included."""
        segments, positions = self.segments_BT, self.position_ids_BT
        causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
        own_BTT = segments[:, :, None] == segments[:, None, :]
        allowed_BTT = (own_BTT | (segments == _PROMPT)[:, None, :]) & causal
        if window is not None:
            allowed_BTT &= positions[:, :, None] - positions[:, None, :] < window
        return guidance.additive_mask(allowed_BTT[:, None], dtype)


def collate(rows: list[dict[str, Any]], trained: bool = True) -> Batch:
    """Packed rows to a batch. trained: False if none of its states has a target."""
    widths = [len(row["prompt"]) + sum(map(len, row["responses"])) for row in rows]
    longest = max(len(response) for row in rows for response in row["responses"])
    input_ids, positions = np.zeros((2, len(rows), max(widths)), dtype=np.int64)
    segments = np.full((len(rows), max(widths)), _PADDING)
    row_of, states, last = [], [], []
    for b, row in enumerate(rows):
        start = prompt = len(row["prompt"])
        input_ids[b, :prompt] = row["prompt"]
        positions[b, :prompt] = np.arange(prompt)
        segments[b, :prompt] = _PROMPT
        for number, response in enumerate(row["responses"], 1):
            end = start + len(response)
            input_ids[b, start:end] = response
            positions[b, start:end] = np.arange(prompt, prompt + len(response))
            segments[b, start:end] = number
            columns = np.full(longest + 1, prompt - 1)
            columns[1 : len(response) + 1] = np.arange(start, end)
            states.append(columns)
            row_of.append(b)
            last.append(len(response))
            start = end
    ended = np.array([each for row in rows for each in row["ended"]], dtype=bool)
    state_S = np.arange(longest + 1)
    since_N1 = np.array([each for row in rows for each in row["first"]])[:, None]
    until_N1 = (np.array(last) - ~ended)[:, None]  # a response that was cut has no terminal state
    return Batch(
        input_ids_BT=torch.from_numpy(input_ids),
        position_ids_BT=torch.from_numpy(positions),
        segments_BT=torch.from_numpy(segments),
        row_N=torch.tensor(row_of),
        state_NS=torch.from_numpy(np.stack(states)),
        last_N=torch.tensor(last),
        trained_NS=torch.from_numpy((state_S >= since_N1) & (state_S <= until_N1) & trained),
        rewards_NJ=torch.tensor([reward for row in rows for reward in row["rewards"]], dtype=torch.float32),
        tokens=sum(widths),
    )
