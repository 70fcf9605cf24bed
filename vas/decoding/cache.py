"""The KV cache: a row a sequence, rows kept without gaps, a token a column.

Rows 0..n-1 are in use, so a step over all sequences reads plain slices. When a sequence leaves, the
last row moves into its place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

ROWS, COLUMNS = 8, 64  # the cache grows by so many at a time


class KVCache:
    """Keys and values of many sequences.

    limit: tokens (rows times columns) to hold at most, room for growth included; None for no limit.
    It is kept as long as `fits` is asked before a row or a column is added.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self.device, self.limit = device, limit
        self._layers: list[Tensor] = []  # keys and values of each: [2, rows, heads, columns, head_dim]
        self.row_of: dict[Hashable, int] = {}
        self.lengths: dict[Hashable, int] = {}
        self._owners: list[Hashable] = []
        self._shape = (0, 0)

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def keys(self) -> list[Tensor]:
        """The keys of each layer: [rows, heads, columns, head_dim]."""
        return [layer[0] for layer in self._layers]

    @property
    def values(self) -> list[Tensor]:
        """The values of each layer: [rows, heads, columns, head_dim]."""
        return [layer[1] for layer in self._layers]

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
        for layer in self._layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]

    def _clear(self, row: int, start: int, stop: int) -> None:
        """Forget a freed row's tokens: one that is not a number would reach the next owner through any mask."""
        for layer in self._layers:
            layer[:, row, :, start:stop] = 0

    def rows(self, owners: Sequence[Hashable]) -> np.ndarray:
        """The rows of some sequences."""
        return np.array([self.row_of[owner] for owner in owners])

    def write(self, layer: int, row_N: Tensor, column_N: Tensor, states_N2HD: Tensor) -> None:
        """Store a layer's keys and values of N tokens at their places; `grow` comes before."""
        if layer == len(self._layers):  # only now is known what a layer's states look like
            (rows, columns), (_, _, heads, dim) = self._shape, states_N2HD.shape
            self._layers.append(states_N2HD.new_zeros((2, rows, heads, columns, dim)))
        self._layers[layer].permute(1, 3, 0, 2, 4)[row_N, column_N] = states_N2HD

    def read(self, layer: int, rows: slice | Tensor, width: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values: [B, heads, width, head_dim]; columns without a token hold anything finite."""
        keys, values = self._layers[layer][:, rows, :, :width].unbind()  # sooner than to iterate over it
        return keys, values

    def memory(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in self._layers)

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
        for i, layer in enumerate(self._layers):
            held = layer[:, : shape[0], :, : shape[1]]
            grown = layer.new_zeros((2, shape[0], layer.shape[2], shape[1], layer.shape[4]))
            grown[:, : held.shape[1], :, : held.shape[3]] = held
            self._layers[i] = grown


def _rows(number: int) -> int:
    """Few rows come as 1, 2, 4 or 8, more in steps of 8."""
    return 1 << max(number - 1, 0).bit_length() if number <= ROWS else _up(number, ROWS)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
