"""The KV cache: a row a sequence, rows kept without gaps, a token a column.

Rows 0..n-1 are in use, so a step over all sequences reads plain slices. When a sequence leaves, the
last row moves into its place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

ROWS, COLUMNS = 8, 64  # the cache grows by so many at a time
Rows = slice | Tensor


class KVCache:
    """Keys and values of many sequences.

    limit: tokens (rows times columns) to hold at most, room for growth included; None for no limit.
    It is kept as long as `fits` is asked before a row or a column is added.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self.device, self.limit = device, limit
        self.keys: list[Tensor] = []  # a layer each: [rows, heads, columns, head_dim]
        self.values: list[Tensor] = []
        self.row_of: dict[Hashable, int] = {}
        self.lengths: dict[Hashable, int] = {}
        self._owners: list[Hashable] = []
        self._shape = (0, 0)

    def __len__(self) -> int:
        return len(self._owners)

    def fits(self, rows: int, width: int) -> bool:
        """Whether so many sequences of up to `width` tokens, and a spare column, stay within the limit."""
        return self.limit is None or self.allocated(rows, width) <= self.limit

    @staticmethod
    def allocated(rows: int, width: int) -> int:
        """Tokens that so many sequences of up to `width` tokens take: rows and columns come in steps."""
        return _rows(rows) * _up(width + 1, COLUMNS)

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
        length = self.lengths.pop(owner)
        mover = self._owners.pop()
        if mover != owner:
            self._owners[row] = mover
            self.row_of[mover] = row
            self._copy(last, row, self.lengths[mover])
            self._clear(row, self.lengths[mover], length)
            length = self.lengths[mover]
        self._clear(last, 0, length)

    @torch.inference_mode()
    def copy(self, source: Hashable, target: Hashable, length: int) -> None:
        """Let `target` hold the first `length` tokens of `source`, and nothing else."""
        assert length <= self.lengths[source], "only what the source holds"
        self.lengths[target] = length
        self.grow(length)
        self._copy(self.row_of[source], self.row_of[target], length)

    def _copy(self, source: int, target: int, length: int) -> None:
        for layer in (*self.keys, *self.values):
            layer[target, :, :length] = layer[source, :, :length]

    def _clear(self, row: int, start: int, stop: int) -> None:
        """Forget a freed row's tokens: one that is not a number would reach the next owner through any mask."""
        for layer in (*self.keys, *self.values):
            layer[row, :, start:stop] = 0

    def rows(self, owners: Sequence[Hashable]) -> Rows:
        """The rows of some sequences, for `read` and `write`; a slice where they are the first, in order."""
        rows = [self.row_of[owner] for owner in owners]
        return slice(0, len(rows)) if rows == list(range(len(rows))) else torch.tensor(rows, device=self.device)

    def write(self, layer: int, row_N: Tensor, column_N: Tensor, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Store a layer's keys and values of N tokens at their places; `grow` comes before."""
        for store, states_NHD in ((self.keys, key_NHD), (self.values, value_NHD)):
            if layer == len(store):  # only now is known what a layer's states look like
                rows, columns = self._shape
                store.append(states_NHD.new_zeros((rows, states_NHD.shape[1], columns, states_NHD.shape[2])))
            store[layer].transpose(1, 2)[row_N, column_N] = states_NHD

    def read(self, layer: int, rows: Rows, width: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values: [B, heads, width, head_dim]; columns without a token hold anything finite."""
        return self.keys[layer][rows, :, :width], self.values[layer][rows, :, :width]

    def memory(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in (*self.keys, *self.values))

    def grow(self, width: int) -> None:
        """Make room for every sequence that has a row, and for `width` columns."""
        rows = len(self._owners)
        if rows <= self._shape[0] and width <= self._shape[1]:
            return
        shape = max(_rows(rows), self._shape[0]), max(_up(width, COLUMNS), self._shape[1])
        if self.limit is not None and shape[0] * shape[1] > self.limit:
            # give up what an earlier, other shape left over
            shape = _rows(rows), _up(max(width, *self.lengths.values()), COLUMNS)
            assert shape[0] * shape[1] <= self.limit, "fits() comes before a row or a column more"
        self._shape = shape
        for store in (self.keys, self.values):
            for i, layer in enumerate(store):
                held = layer[: shape[0], :, : shape[1]]
                store[i] = layer.new_zeros((shape[0], layer.shape[1], shape[1], layer.shape[3]))
                store[i][: held.shape[0], :, : held.shape[2]] = held


def _rows(number: int) -> int:
    """Few rows come as 1, 2, 4 or 8, more in steps of 8."""
    return 1 << max(number - 1, 0).bit_length() if number <= ROWS else _up(number, ROWS)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
