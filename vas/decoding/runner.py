"""Runs tokens of many sequences through a model at given places of its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vas import guidance
from vas.decoding.cache import SlotCache

PREFILL_TOKENS = 4096  # padded tokens in one prefill pass


class ModelRunner:
    """A transformer backbone with the KV cache of its sequences.

    forward: called as a Hugging Face model is (input_ids, position_ids, attention_mask,
    past_key_values); what it returns is handed back. prefill: the same for prompts, whose
    outputs nobody needs. limit: tokens that the KV cache may hold.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        prefill: Callable[..., Any],
        config: PreTrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
        limit: int | None = None,
    ) -> None:
        self._forward, self._prefill = forward, prefill
        self.dtype, self.device = dtype, device
        self.cache = SlotCache(limit)
        self._window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            self._window = None
        self._layer_types = set(getattr(config, "layer_types", None) or ())

    @torch.inference_mode()
    def prefill(self, owners: Sequence[Hashable], token_ids: list[tuple[int, ...]]) -> dict[Hashable, int]:
        """Give new sequences a row each and run their tokens; equal token lists run once.

        Returns the positions run for each owner (0 for one that shares another's).
        """
        first: dict[tuple[int, ...], Hashable] = {}
        for owner, tokens in zip(owners, token_ids, strict=True):
            self.cache.add(owner)
            first.setdefault(tokens, owner)
        pending = sorted(((tokens, owner) for tokens, owner in first.items() if tokens), key=lambda item: len(item[0]))
        while pending:
            count = max(1, PREFILL_TOKENS // len(pending[-1][0]))
            batch, pending = pending[-count:], pending[:-count]
            self._run_prompts([owner for _, owner in batch], [tokens for tokens, _ in batch])
        for owner, tokens in zip(owners, token_ids, strict=True):
            if first[tokens] != owner:
                self.cache.copy(first[tokens], owner)
        return {o: len(t) if first[t] == o else 0 for o, t in zip(owners, token_ids, strict=True)}

    def _run_prompts(self, owners: Sequence[Hashable], token_ids: list[tuple[int, ...]]) -> None:
        longest = max(map(len, token_ids))
        ids = torch.zeros(len(owners), longest, dtype=torch.long, device=self.device)
        for b, tokens in enumerate(token_ids):
            ids[b, : len(tokens)] = torch.tensor(tokens)
        columns = torch.arange(longest, device=self.device).expand(len(owners), -1)
        # padding writes beyond a row's length, where later tokens overwrite it before anyone looks
        self._pass(self._prefill, owners, ids, columns, columns, columns)
        for owner, tokens in zip(owners, token_ids, strict=True):
            self.cache.lengths[owner] = len(tokens)

    @torch.inference_mode()
    def run(
        self,
        owners: Sequence[Hashable],
        ids_BT: Tensor,
        columns_BT: Tensor,
        seen_BT: Tensor,
        positions_BT: Tensor,
    ) -> Any:
        """Run tokens: each is written at its column, and sees the columns before `seen_BT`, and itself."""
        return self._pass(self._forward, owners, ids_BT, columns_BT, seen_BT, positions_BT)

    def lengths(self, owners: Sequence[Hashable]) -> Tensor:
        """How many tokens each sequence has in the cache: [B]."""
        return torch.tensor([self.cache.lengths[owner] for owner in owners], device=self.device)

    def _pass(
        self,
        forward: Callable[..., Any],
        owners: Sequence[Hashable],
        ids_BT: Tensor,
        columns_BT: Tensor,
        seen_BT: Tensor,
        positions_BT: Tensor,
    ) -> Any:
        width = int(columns_BT.max()) + 1
        self.cache.plan(owners, columns_BT, width)
        return forward(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=self._masks(columns_BT, seen_BT, positions_BT, width),
            past_key_values=self.cache,
            use_cache=True,
        )

    def _masks(self, columns_BT: Tensor, seen_BT: Tensor, positions_BT: Tensor, width: int) -> Any:
        """Additive attention masks [B, 1, T, width], by layer type where layers differ."""
        columns = torch.arange(width, device=self.device)
        itself = columns == columns_BT[..., None]
        full = (columns < seen_BT[..., None]) | itself
        if self._window is None:
            return self._additive(full)
        # a prefix token's column is its position
        sliding = (full & (columns > positions_BT[..., None] - self._window)) | itself
        if self._layer_types > {"sliding_attention"}:
            return {"full_attention": self._additive(full), "sliding_attention": self._additive(sliding)}
        return self._additive(full if self._layer_types == {"full_attention"} else sliding)

    def _additive(self, allowed_BTL: Tensor) -> Tensor:
        return guidance.additive_mask(allowed_BTL[:, None], self.dtype)
