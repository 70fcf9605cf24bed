"""Attention over the KV cache for tokens of many sequences in one pass, packed without padding.

A forward pass takes N tokens of B sequences as one row [1, N]. Everything in a transformer but
attention works on each token by itself, so only attention has to know which token belongs where:
a `Pass` says so, and `attend` is what the model's layers call in place of their own attention.

There are two kinds of tokens. A *kept* one goes on with its sequence: its KV is written to the
cache, and it sees the tokens before it and itself. A *branch* is a candidate for the next token: it
sees its sequence and itself, not the other branches, and its KV stays aside until one is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from vas.decoding.cache import KVCache, together
from vas.errors import VasError
from vas.guidance import additive_mask

NAME = "vas"  # as transformers knows this attention
UNKNOWN = ("s_aux", "position_bias")  # attention sinks, learned biases
PADDING = 1 << 15  # scores of a head, of nobody's tokens, that cost as much as to attend in a grid more


class Pass:
    """The tokens of one forward pass: whose they are, where they are written, what they see.

    owners: the B sequences. index: each token's sequence, as an index into `owners`. column: the
    token's place in its sequence, which is also its position; a kept token is written there, and
    a branch would be. The first `kept` tokens are kept ones, the rest branches; within each kind
    tokens are ordered by sequence and place.
    """

    def __init__(
        self, cache: KVCache, owners: Sequence[Hashable], index: np.ndarray, column: np.ndarray, kept: int
    ) -> None:
        device = cache.device
        self._cache, self.kept, self.total, self._batch = cache, kept, len(index), len(owners)
        self._width = int(max(column[:kept].max(initial=-1) + 1, column[kept:].max(initial=0)))
        rows = cache.rows(owners)
        self._rows = together(rows) or torch.from_numpy(rows).to(device)
        self._row_N = torch.from_numpy(rows[index[:kept]]).to(device)
        self.column_N = torch.from_numpy(column).to(device)
        self._kept_place_N = self.column_N[:kept] + cache.aside
        slot = self._shape_padding(index)
        self._slot_N = None if slot is None else torch.from_numpy(slot).to(device)
        self._branching = kept < self.total
        self._masks: dict[tuple[int | None, int, int], Tensor] = {}
        self.branches: list[Tensor] = []
        """Keys and values of the branches, a layer each: [branches, 2, heads, head_dim]."""
        cache.grow(self._width + 1)  # the last column read is where a token's score with itself goes

    def _shape_padding(self, index: np.ndarray) -> np.ndarray | None:
        """Every token's place in a padded grid of B x T, in which attention computes; None if they fill it in order."""
        count = np.bincount(index, minlength=self._batch)
        self._longest = int(count.max())
        if self.kept in (0, self.total) and self._batch * self._longest == self.total:
            return None
        order = np.argsort(index, kind="stable")  # a sequence's kept tokens, then its branches
        place = np.empty_like(order)
        place[order] = np.arange(self.total)
        return index * self._longest + place - (count.cumsum() - count)[index]

    def _grid(self, tokens_NX: Tensor) -> Tensor:
        """[N, ...] to the padded grid [B, T, ...]; padding holds anything."""
        shape = (self._batch, self._longest, *tokens_NX.shape[1:])
        if self._slot_N is None:
            return tokens_NX.reshape(shape)
        grid = tokens_NX.new_empty((shape[0] * shape[1], *shape[2:]))
        return grid.index_copy_(0, self._slot_N, tokens_NX).view(shape)

    def _flat(self, grid_BTX: Tensor) -> Tensor:
        """The padded grid [B, T, ...] back to [N, ...]."""
        flat = grid_BTX.reshape(-1, *grid_BTX.shape[2:])
        return flat if self._slot_N is None else flat.index_select(0, self._slot_N)

    def _mask(self, window: int | None, dtype: torch.dtype, group: int = 1, shared: int = 1) -> Tensor:
        """Additive mask over the columns that are read [B · shared, 1, T · group, columns]; layers share it."""
        key = window, group, shared
        if key not in self._masks:
            # with branches in the pass every token meets itself in the last column, not in its own
            seen_BT1 = self._grid(self.column_N if self._branching else self.column_N + 1)[..., None]
            columns = torch.arange(self._width + self._branching, device=seen_BT1.device)
            allowed = columns < seen_BT1
            if window is not None:
                allowed &= columns > self._grid(self.column_N)[..., None] - window
            if self._branching:
                allowed[..., -1] = True
            mask = additive_mask(allowed[:, None], dtype)
            self._masks[key] = mask.repeat_interleave(shared, 0).repeat_interleave(group, 2)
        return self._masks[key]

    def attend(
        self, layer: int, query: Tensor, states: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """One layer's attention: query [N, H, D], keys and values in one [N, 2, H_kv, D], to [N, H, D]."""
        if self.kept:
            self._cache.write(layer, self._row_N, self._kept_place_N, states[: self.kept])
        if self._branching:
            self.branches.append(states[self.kept :].clone())  # a view would keep all of the pass
        elif cap is None:
            keys, values = self._cache.read(layer, self._rows, self._width)  # [B, H_kv, columns, D]
            mask = partial(self._mask, window, query.dtype)
            return self._flat(attend_grid(self._grid(query), keys, values, mask, scale))
        return self._attend_stepwise(layer, query, states, scale, window, cap)

    def _attend_stepwise(
        self, layer: int, query: Tensor, states: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """The same with branches or a cap; what is kept lies in the cache already."""
        keys, values = self._cache.read(layer, self._rows, self._width + self._branching)  # [B, H_kv, columns, D]
        heads, shared, dim = query.shape[1], keys.shape[1], query.shape[2]
        group = heads // shared
        # the query heads that share a key head become more queries of it: nothing is repeated
        query = query.view(-1, shared, group, dim)
        folded = self._grid(query).transpose(1, 2).reshape(self._batch * shared, -1, dim)
        unfolded = (self._batch, shared, self._longest, group, -1)
        mask = self._mask(window, query.dtype, group, shared).squeeze(1)
        transposed = keys.flatten(0, 1).transpose(1, 2)
        scores = torch.baddbmm(mask, folded, transposed, beta=1 if cap is None else 0, alpha=scale)
        if self._branching:
            itself = (query * states[:, 0, :, None]).sum(-1).mul_(scale)  # [N, H_kv, G]
            scores.view(unfolded)[..., -1] = self._grid(itself).transpose(1, 2)
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap + mask
        weights = torch.softmax(scores, dim=-1)
        found = torch.bmm(weights[..., : self._width], values[:, :, : self._width].flatten(0, 1))
        result = self._flat(found.view(unfolded).transpose(1, 2))  # [N, H_kv, G, D]
        if self._branching:
            own = self._flat(weights.view(unfolded)[..., -1].transpose(1, 2))
            result = torch.addcmul(result, own[..., None], states[:, 1, :, None])
        return result.reshape(-1, heads, dim)


class Grids:
    """Passes of different sequences that run as one, with a grid each for attention; their tokens follow each other."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self._passes, self._totals = passes, [each.total for each in passes]
        self.column_N = torch.cat([each.column_N for each in passes])

    def attend(
        self, layer: int, query: Tensor, states: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """As `Pass.attend`."""
        parts = zip(self._passes, query.split(self._totals), states.split(self._totals), strict=True)
        return torch.cat([where.attend(layer, own, pairs, scale, window, cap) for where, own, pairs in parts])


def joined(passes: Sequence[Pass]) -> Pass | Grids:
    """Passes as one."""
    return passes[0] if len(passes) == 1 else Grids(passes)


def alike(tokens: np.ndarray, reach: np.ndarray, among: slice) -> list[slice]:
    """Spans of neighbours among a pass's sequences, so alike in numbers of tokens that they attend in one padded grid.

    tokens: how many each sequence has; a span without any is left out. reach: columns that each reads.
    """
    spans, start, longest, total, width = [], among.start, 0, 0, 0
    for number in range(among.start, among.stop):
        count, columns = int(tokens[number]), int(reach[number])
        longest, total, width = max(longest, count), total + count, max(width, columns)
        if (longest * (number + 1 - start) - total) * width > PADDING:
            spans.append(slice(start, number))
            start, longest, total, width = number, count, count, columns
    return [span for span in (*spans, slice(start, among.stop)) if tokens[span].any()]


def attend_grid(
    query_BTHD: Tensor, keys: Tensor, values: Tensor, mask: Callable[[int], Tensor], scale: float
) -> Tensor:
    """Attention of T tokens of each sequence: [B, T, H, D] to the same; keys and values are [B, H_kv, columns, D].

    mask: additive, [B, 1, T · group, columns], for so many query heads that share a key head.
    """
    if query_BTHD.device.type == "cpu":
        query = query_BTHD.transpose(1, 2)
        found = F.scaled_dot_product_attention(query, keys, values, mask(1), scale=scale, enable_gqa=True)
        return found.transpose(1, 2)
    # a GPU has no kernel for both a mask and shared heads: those that share one become more queries of it
    split = query_BTHD.unflatten(2, (keys.shape[1], -1)).transpose(1, 2)
    group = split.shape[3]
    found = F.scaled_dot_product_attention(split.flatten(2, 3), keys, values, mask(group), scale=scale)
    return found.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    vas_pass: Pass | Grids,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call, with query [1, H, N, D] and the runner's pass among the arguments.

    Raises VasError for an attention that does more than this one.
    """
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            raise VasError(f"the attention of a {module.config.model_type} model needs `{name}`, unknown to the engine")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    states = torch.stack((key.squeeze(0), value.squeeze(0))).permute(2, 0, 1, 3)
    query = query.squeeze(0).transpose(0, 1)
    result = vas_pass.attend(int(module.layer_idx), query, states, scale, sliding_window, softcap)
    return result[None], None


AttentionInterface.register(NAME, attend)
