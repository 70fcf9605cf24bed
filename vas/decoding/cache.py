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
DOUBLING = 1024  # columns up to which they double instead, where a new shape costs more than the room


class KVCache:
    """Keys and values of many sequences.

    limit: tokens (rows times columns) to hold at most, room for growth included; None for no limit.
    It is kept as long as `fits` is asked before a row or a column is added. aside: columns in front of every row's
    own, beside the limit, for states that are not kept.
    """

    def __init__(self, device: torch.device, limit: int | None = None, aside: int = 0) -> None:
        self.device, self.limit, self.aside = device, limit, aside
        self._doubling = device.type == "cuda"  # CUDA graphs are recorded for each shape
        self.grown = 0
        """How often its memory has moved."""
        self._layers: list[Tensor] = []  # keys and values of each: [2, rows, heads, columns, head_dim]
        self.row_of: dict[Hashable, int] = {}
        self.lengths: dict[Hashable, int] = {}
        self._owners: list[Hashable] = []
        self._shape = (0, 0)

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def depth(self) -> int:
        """Layers that have memory: each gets it when it is first written to."""
        return len(self._layers)

    @property
    def keys(self) -> list[Tensor]:
        """The keys of each layer: [rows, heads, columns, head_dim]."""
        return [layer[0, :, :, self.aside :] for layer in self._layers]

    @property
    def values(self) -> list[Tensor]:
        """The values of each layer: [rows, heads, columns, head_dim]."""
        return [layer[1, :, :, self.aside :] for layer in self._layers]

    def fits(self, rows: int, width: int) -> bool:
        """Whether so many sequences of up to `width` tokens, and a spare column, stay within the limit."""
        return self.limit is None or self.allocated(rows, width) <= self.limit

    def allocated(self, rows: int, width: int) -> int:
        """Tokens that so many sequences of up to `width` tokens take: rows and columns come in steps."""
        return allocated(rows, width, self._doubling)

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
            if self.aside:
                self._clear(row, -self.aside, 0)
        self._clear(last, -self.aside, length)

    @torch.inference_mode()
    def copy(self, source: Hashable, target: Hashable, length: int) -> None:
        """Let `target` hold the first `length` tokens of `source`, and nothing else."""
        assert length <= self.lengths[source], "only what the source holds"
        self.grow(length)
        self.lengths[target] = length
        if source != target:
            self._copy(self.row_of[source], self.row_of[target], length)

    def _copy(self, source: int, target: int, length: int) -> None:
        if not length:  # and perhaps no memory yet
            return
        for layer in self._layers:
            own = layer[:, :, :, self.aside : self.aside + length]
            own[:, target] = own[:, source]

    def _clear(self, row: int, start: int, stop: int) -> None:
        """Forget a freed row's columns: one that is not a number would reach the next owner through any mask.

        start: negative for those that are aside.
        """
        if row >= self._shape[0]:  # it was never given memory
            return
        for layer in self._layers:
            layer[:, row, :, self.aside + start : self.aside + stop] = 0

    def rows(self, owners: Sequence[Hashable]) -> np.ndarray:
        """The rows of some sequences."""
        return np.array([self.row_of[owner] for owner in owners])

    def write(self, layer: int, row_N: Tensor, place_N: Tensor, states_N2HD: Tensor) -> None:
        """Store a layer's keys and values of N tokens at their places; `grow` comes before.

        A row's places are those that are aside and then its columns.
        """
        if layer == len(self._layers):  # only now is known what a layer's states look like
            (rows, columns), (_, _, heads, dim) = self._shape, states_N2HD.shape
            self._layers.append(states_N2HD.new_zeros((2, rows, heads, self.aside + columns, dim)))
        self._layers[layer].permute(1, 3, 0, 2, 4)[row_N, place_N] = states_N2HD

    def read(self, layer: int, rows: slice | Tensor, width: int, aside: bool = False) -> tuple[Tensor, Tensor]:
        """A layer's keys and values: [B, heads, width, head_dim]; columns without a token hold anything finite.

        aside: with the places that are aside before them.
        """
        first, last = 0 if aside else self.aside, self.aside + width
        keys, values = self._layers[layer][:, rows, :, first:last].unbind()  # sooner than to iterate over it
        return keys, values

    def memory(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in self._layers)

    def columns(self, width: int) -> int:
        """Columns to read for the first `width`, which have room: few different numbers of them."""
        return _columns(width, self._doubling)

    @property
    def batch(self) -> int:
        """Rows to run for all sequences: few different numbers of them."""
        return _rows(len(self._owners), self._doubling)

    def grow(self, width: int) -> None:
        """Make room for every sequence that has a row, and for `width` columns."""
        rows, doubling = len(self._owners), self._doubling
        if rows <= self._shape[0] and width <= self._shape[1]:
            return
        shape = max(_rows(rows, doubling), self._shape[0]), max(_columns(width, doubling), self._shape[1])
        if self.limit is not None and shape[0] * shape[1] > self.limit:
            # give up what an earlier, other shape left over
            shape = _rows(rows, doubling), _columns(max(width, *self.lengths.values()), doubling)
            assert shape[0] * shape[1] <= self.limit, "fits() comes before a row or a column more"
        self.grown += 1
        for i, layer in enumerate(self._layers):
            # should memory run out meanwhile, no layer has less room than it says
            self._shape = min(shape[0], self._shape[0]), min(shape[1], self._shape[1])
            held = layer[:, : shape[0], :, : self.aside + shape[1]]
            grown = layer.new_zeros((2, shape[0], layer.shape[2], self.aside + shape[1], layer.shape[4]))
            grown[:, : held.shape[1], :, : held.shape[3]] = held
            self._layers[i] = grown
        self._shape = shape


def leading(rows: np.ndarray) -> bool:
    """Whether these are a cache's first rows, in order."""
    return bool((rows == np.arange(len(rows))).all())


def together(rows: np.ndarray) -> slice | None:
    """The slice that reads these rows of a cache, if they lie one after the other."""
    first = int(rows[0])
    return slice(first, first + len(rows)) if leading(rows - first) else None


def allocated(rows: int, width: int, doubling: bool = False) -> int:
    """Tokens that a cache of so many sequences of up to `width` tokens, and a spare column, takes."""
    return _rows(rows, doubling) * _columns(width + 1, doubling)


def widest(limit: int, rows: int, doubling: bool = False) -> int:
    """Tokens that each of so many sequences may have at most, if `allocated` is to be within a limit."""
    columns = limit // _rows(rows, doubling)
    step = COLUMNS if not doubling else DOUBLING if columns >= DOUBLING else 1 << max(columns.bit_length() - 1, 0)
    whole = columns // step * step
    return max(0, whole - 1) if not doubling or whole >= 2 * COLUMNS else 0


def _columns(number: int, doubling: bool) -> int:
    """In steps of 64; or doubling from 128 to 1,024, and then in steps of that."""
    if not doubling:
        return _up(number, COLUMNS)
    return max(2 * COLUMNS, power(number)) if number <= DOUBLING else _up(number, DOUBLING)


def _rows(number: int, doubling: bool) -> int:
    """Few rows come as 1, 2, 4 or 8, more in steps of 8, or doubling further."""
    return power(number) if number <= ROWS or doubling else _up(number, ROWS)


def power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
