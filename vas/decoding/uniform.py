"""Uniform passes: all rows of a cache take part, and each appends up to T tokens and tries K candidates.

So a step's shape seldom changes, and on a GPU it is replayed as a CUDA graph. What is not needed, such as tokens of
rows that have nothing to append, is computed all the same, for there a few tokens more cost hardly anything; its keys
and values go to the places that a cache has aside. So do the candidates': none is kept, and the one that was taken is
run again as the next pass's first token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vas.decoding import llama
from vas.decoding.attention import attend_grid
from vas.decoding.cache import KVCache, leading, power
from vas.decoding.graphs import Graphs, upload
from vas.decoding.llama import FusedLlama
from vas.guidance import additive_mask

ASIDE = 64  # places that a row has aside: the most tokens and candidates it may run
APPENDED = 8  # tokens that a row may append; more are read in a ragged pass


def pays(model: PreTrainedModel) -> bool:
    """Whether to run a model's steps so: on a GPU, unless its positions' frequencies depend on how long a text is."""
    return model.device.type == "cuda" and not llama.stretches(model)


class UniformPass:
    """Where a uniform pass's tokens lie and what they see; the part of `Pass` for `FusedLlama`.

    Rows are the cache's first B. length_B: tokens they hold. count_B: how many of the T they append. width: columns to
    read. Tokens run row by row, first T to append, then K candidates.
    """

    def __init__(self, cache: KVCache, length_B: Tensor, count_B: Tensor, kept: int, tried: int, width: int) -> None:
        self._cache, self._rows, self._each, self._width = cache, len(length_B), kept + tried, width
        slot_S = torch.arange(self._each, device=length_B.device)
        appended_BS = slot_S < count_B[:, None]
        column_BS = length_B[:, None] + torch.minimum(slot_S, count_B[:, None])
        place_BS = torch.where(appended_BS, cache.aside + column_BS, slot_S)
        self.column_N = column_BS.flatten()
        self._row_N = torch.arange(self._rows, device=length_B.device).repeat_interleave(self._each)
        self._place_N = place_BS.flatten()
        self._column_BS1, self._place_BS1 = column_BS[..., None], place_BS[..., None]
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def _mask(self, window: int | None, dtype: torch.dtype, group: int) -> Tensor:
        """Additive mask over all places that are read: [B, 1, S · group, places]."""
        key = window, group
        if key not in self._masks:
            place = torch.arange(self._cache.aside + self._width, device=self._place_BS1.device)
            column = place - self._cache.aside
            seen = (column >= 0) & (column < self._column_BS1)
            if window is not None:
                seen &= column > self._column_BS1 - window
            mask = additive_mask(seen | (place == self._place_BS1), dtype)
            self._masks[key] = mask.repeat_interleave(group, 1)[:, None]
        return self._masks[key]

    def attend(
        self, layer: int, query: Tensor, states: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """One layer's attention: query [N, H, D], keys and values in one [N, 2, H_kv, D], to [N, H, D]."""
        assert cap is None, "no model of the Llama family has one"
        self._cache.write(layer, self._row_N, self._place_N, states)
        keys, values = self._cache.read(layer, slice(0, self._rows), self._width, aside=True)
        mask = partial(self._mask, window, query.dtype)
        found = attend_grid(query.unflatten(0, (self._rows, self._each)), keys, values, mask, scale)
        return found.flatten(0, 1)


class Uniform:
    """Runs uniform passes of a model over a cache that has places aside."""

    def __init__(self, forward: FusedLlama, cache: KVCache) -> None:
        self._forward, self.cache = forward, cache
        self._graphs, self._grown = Graphs(cache.device), cache.grown

    def forget(self) -> None:
        """Let go of recordings, where memory is short."""
        self._graphs.forget()

    def fits(self, tokens: Sequence[Sequence[int]], tried: int = 0) -> bool:
        """Whether sequences may append these tokens, and try so many candidates, in one pass."""
        most = max(map(len, tokens))
        return 0 < most <= APPENDED and power(most) + _padded(tried) <= self.cache.aside

    def append(self, owners: Sequence[Hashable], tokens: Sequence[Sequence[int]], logits: bool) -> Tensor:
        """Append tokens to sequences; returns every token's output [N, ...], in the sequences' order."""
        output_BTX = self._run(owners, tokens, None, logits)
        most = output_BTX.shape[1]
        counts, rows = np.array([len(each) for each in tokens]), self.cache.rows(owners)
        if (counts == most).all() and leading(rows):
            return output_BTX[: len(rows)].flatten(0, 1)
        place_N = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        return output_BTX.flatten(0, 1)[upload(rows.repeat(counts) * most + place_N, output_BTX.device)]

    def tries(
        self,
        owners: Sequence[Hashable],
        tokens: Sequence[Sequence[int]],
        askers: Sequence[Hashable],
        candidates_RK: Tensor,
    ) -> Tensor:
        """Append tokens to sequences, and try candidates after them in those that ask; their outputs [R, K, ...]."""
        asked, tried = candidates_RK.shape
        rows = self.cache.rows(askers)
        where = slice(0, asked) if leading(rows) else upload(rows, candidates_RK.device)
        grid_BK = candidates_RK.new_zeros(self.cache.batch, _padded(tried))
        grid_BK[where, :tried] = candidates_RK
        output_BSX = self._run(owners, tokens, grid_BK, False)
        first = output_BSX.shape[1] - grid_BK.shape[1]
        return output_BSX[where, first : first + tried]

    def _run(
        self, owners: Sequence[Hashable], tokens: Sequence[Sequence[int]], candidates_BK: Tensor | None, logits: bool
    ) -> Tensor:
        """Outputs of all rows [B, T + K, ...]."""
        cache = self.cache
        kept = power(max(map(len, tokens)))
        about = np.zeros((cache.batch, 2 + kept), dtype=np.int64)
        for owner, length in cache.lengths.items():
            about[cache.row_of[owner], 0] = length
        for owner, fresh in zip(owners, tokens, strict=True):
            about[cache.row_of[owner], 1 : 2 + len(fresh)] = len(fresh), *fresh
            cache.lengths[owner] += len(fresh)
        longest = max(cache.lengths[owner] for owner in owners)
        cache.grow(longest)
        if cache.grown != self._grown:
            self._graphs.forget()
            self._grown = cache.grown
        width = cache.columns(longest)

        def work(about_BX: Tensor, *candidates: Tensor) -> Tensor:
            ids = torch.cat([about_BX[:, 2:], *candidates], dim=1)
            where = UniformPass(cache, about_BX[:, 0], about_BX[:, 1], kept, ids.shape[1] - kept, width)
            return self._forward(ids.flatten(), where, logits).unflatten(0, ids.shape)

        inputs = [torch.from_numpy(about), *([] if candidates_BK is None else [candidates_BK])]
        return self._graphs((width, logits, *(each.shape for each in inputs)), work, *inputs)


def _padded(tried: int) -> int:
    """Candidates of a pass: few different numbers of them, where k adapts."""
    return -(-tried // 4) * 4
