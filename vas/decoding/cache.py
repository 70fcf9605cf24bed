"""The KV cache: a row a sequence, rows kept without gaps, tokens written at any column.

Rows 0..n-1 are in use, so a step over all sequences reads plain slices. When a sequence
leaves, the last row moves into its place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

ROWS, COLUMNS = 8, 64  # the cache grows by so many at a time


class SlotCache(Cache):
    """Keys and values of many sequences, for any Hugging Face model that takes a `Cache`.

    `plan` says where the next forward pass writes; `update` is what the model's attention calls.

    limit: tokens (rows times columns) to hold at most, room for growth included; None for no limit.
    It is kept as long as `fits` is asked before a row or a column is added.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(layers=[])
        self._limit = limit
        self.keys: list[Tensor] = []  # a layer each: [rows, columns, heads, head_dim]
        self.values: list[Tensor] = []
        self.row_of: dict[Hashable, int] = {}
        self.lengths: dict[Hashable, int] = {}
        self._owners: list[Hashable] = []
        self._plan: tuple[Tensor, Tensor, int, bool] | None = None

    def __len__(self) -> int:
        return len(self._owners)

    def fits(self, rows: int, width: int) -> bool:
        """Whether so many sequences of up to `width` tokens stay within the limit."""
        return self._limit is None or _up(rows, ROWS) * _up(width, COLUMNS) <= self._limit

    def add(self, owner: Hashable) -> None:
        """Give a new sequence a row; it is empty."""
        assert owner not in self.row_of, f"{owner} has a row already"
        self.row_of[owner] = len(self._owners)
        self.lengths[owner] = 0
        self._owners.append(owner)

    @torch.inference_mode()
    def free(self, owner: Hashable) -> None:
        """Take a sequence out; the last row moves into its place."""
        row, last = self.row_of.pop(owner), len(self._owners) - 1
        del self.lengths[owner]
        mover = self._owners.pop()
        if mover != owner:
            self._owners[row] = mover
            self.row_of[mover] = row
            # all of it: a scorer's candidates lie behind the row's length and may yet be kept
            for layer in (*self.keys, *self.values):
                layer[row] = layer[last]

    def copy(self, source: Hashable, target: Hashable) -> None:
        """Let `target` hold what `source` holds."""
        width = self.lengths[target] = self.lengths[source]
        self._grow(len(self._owners), width)
        for layer in (*self.keys, *self.values):
            layer[self.row_of[target], :width] = layer[self.row_of[source], :width]

    def move_columns(self, owners: Sequence[Hashable], sources: list[int], targets: list[int]) -> None:
        """Within each sequence's row, copy one column over another."""
        if not owners or not self.keys:
            return
        device = self.keys[0].device
        rows = torch.tensor([self.row_of[owner] for owner in owners], device=device)
        source, target = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for layer in (*self.keys, *self.values):
            layer[rows, target] = layer[rows, source]

    def plan(self, owners: Sequence[Hashable], columns_BT: Tensor, width: int) -> None:
        """Say where the next pass writes: token t of owner b at `columns_BT[b, t]`; it reads `width` columns."""
        rows = torch.tensor([self.row_of[owner] for owner in owners], device=columns_BT.device)
        in_order = rows.tolist() == list(range(len(owners)))
        self._plan = rows, columns_BT, width, in_order
        self._grow(len(self._owners), width)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write a layer's new keys and values [B, H, T, D] as planned; return all [B, H, width, D]."""
        assert self._plan is not None, "plan() comes before a forward pass"
        rows, columns, width, in_order = self._plan
        if layer_idx == len(self.keys):
            for store, states in ((self.keys, key_states), (self.values, value_states)):
                shape = (_up(len(self._owners), ROWS), _up(width, COLUMNS), states.shape[1], states.shape[3])
                store.append(states.new_zeros(shape))
        found = []
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            layer = store[layer_idx]
            layer[rows[:, None], columns] = states.transpose(1, 2)
            here = layer[: len(rows), :width] if in_order else layer[rows, :width]
            found.append(here.transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Models ask this for positions that we always give them ourselves."""
        return 0

    def memory(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in (*self.keys, *self.values))

    def _grow(self, rows: int, width: int) -> None:
        """Make room for so many rows and columns."""
        if not self.keys or (rows <= self.keys[0].shape[0] and width <= self.keys[0].shape[1]):
            return
        shape = max(_up(rows, ROWS), self.keys[0].shape[0]), max(_up(width, COLUMNS), self.keys[0].shape[1])
        if self._limit is not None and shape[0] * shape[1] > self._limit:
            # give up what an earlier, other shape left over
            shape = _up(rows, ROWS), _up(max(width, *self.lengths.values()), COLUMNS)
            assert shape[0] * shape[1] <= self._limit, "fits() comes before a row or a column more"
        for store in (self.keys, self.values):
            for i, layer in enumerate(store):
                held = layer[: shape[0], : shape[1]]
                store[i] = layer.new_zeros((*shape, *layer.shape[2:]))
                store[i][: held.shape[0], : held.shape[1]] = held


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
