"""Scorers give candidates their values. One interface, whatever stands behind it.

`ValueScorer` runs a value model in this process: all candidates of all sequences in one
pass. They share the prefix's KV cache, see the prefix and themselves but not each other,
and have the same position. The chosen candidate's KV stays as the next prefix, so no
token is ever run twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vas.decoding.runner import ModelRunner
from vas.models.value import ValueModel


@dataclass(slots=True)
class ScoreBatch:
    """One step's question to a scorer: what are these candidates worth?"""

    sequences: Sequence[Hashable]
    taken: list[list[int]]
    """Tokens each sequence has appended since it was last opened or scored."""
    candidates_BK: Tensor
    valid_BK: Tensor
    strengths_BJ: Tensor
    """β of this scorer's objectives, for soft values."""
    soft_B: Tensor
    """Rows that want soft values."""


class Scorer(Protocol):
    """open → score, score, … → close, for many sequences at once."""

    name: str
    objectives: tuple[str, ...]
    context_length: int | None
    """Longest sequence it has positions for; None if it does not say."""

    def open(self, sequences: Sequence[Hashable], token_ids: list[tuple[int, ...]]) -> dict[Hashable, int]:
        """Begin sequences at their prompts; returns positions run for each."""
        ...

    def score(self, batch: ScoreBatch) -> tuple[Tensor, int]:
        """Values [B, K, J] in reward standard deviations, and positions run per sequence."""
        ...

    def close(self, sequence: Hashable) -> None:
        """Forget a sequence."""
        ...


class ValueScorer:
    """A value model in this process."""

    def __init__(self, name: str, model: ValueModel) -> None:
        self.name = name
        self.objectives = model.objectives
        self._model = model
        backbone = model.backbone
        self.context_length = getattr(model.config.backbone_config, "max_position_embeddings", None)
        self._runner = ModelRunner(
            backbone.forward, backbone.forward, model.config.backbone_config, model.dtype, model.device
        )
        self._offered: dict[Hashable, list[int]] = {}
        """Last step's candidates; candidate i lies at column length + i."""

    def open(self, sequences: Sequence[Hashable], token_ids: list[tuple[int, ...]]) -> dict[Hashable, int]:
        """Run the prompts; equal ones share the work."""
        self._offered.update((sequence, []) for sequence in sequences)
        return self._runner.prefill(sequences, token_ids)

    @torch.inference_mode()
    def score(self, batch: ScoreBatch) -> tuple[Tensor, int]:
        """One tree-masked pass; see the module's text."""
        device = self._runner.device
        missed = self._keep_taken(batch)
        candidates = batch.candidates_BK.to(device)
        rows, k = candidates.shape
        before = max(map(len, missed))
        length = self._runner.lengths(batch.sequences)
        missed_count = torch.tensor([len(tokens) for tokens in missed], device=device)
        start = length + missed_count

        # Each row: the tokens it missed (sampled from outside the candidates), then its candidates.
        # A row that missed fewer fills up with padding written behind its candidates.
        ids = torch.zeros(rows, before, dtype=torch.long, device=device)
        for b, tokens in enumerate(missed):
            ids[b, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        place = torch.arange(before, device=device).expand(rows, -1)
        behind = (start + k)[:, None] + place
        missed_columns = torch.where(place < missed_count[:, None], length[:, None] + place, behind)
        columns = torch.cat([missed_columns, start[:, None] + torch.arange(k, device=device)], dim=1)
        seen = torch.cat([missed_columns.clamp(max=start[:, None]), start[:, None].expand(-1, k)], dim=1)
        output = self._runner.run(batch.sequences, torch.cat([ids, candidates], dim=1), columns, seen, seen)

        for b, sequence in enumerate(batch.sequences):
            self._runner.cache.lengths[sequence] += len(missed[b])
            self._offered[sequence] = batch.candidates_BK[b].tolist()
        values = self._values(output.last_hidden_state[:, before:], batch)
        return values, before + k

    def _keep_taken(self, batch: ScoreBatch) -> list[list[int]]:
        """Move each taken candidate's KV behind its prefix; return the tokens that were not candidates."""
        movers, sources, targets, missed = [], [], [], []
        cache = self._runner.cache
        for sequence, taken in zip(batch.sequences, batch.taken, strict=True):
            offered = self._offered[sequence]
            if taken and taken[0] in offered:
                length = cache.lengths[sequence]
                movers.append(sequence)
                sources.append(length + offered.index(taken[0]))
                targets.append(length)
                cache.lengths[sequence] = length + 1
                taken = taken[1:]
            missed.append(taken)
        cache.move_columns(movers, sources, targets)
        return missed

    def _values(self, hidden_BKH: Tensor, batch: ScoreBatch) -> Tensor:
        outputs = self._model.outputs(hidden_BKH)
        values = self._model.values(outputs)
        if bool(batch.soft_B.any()):
            strengths = batch.strengths_BJ.to(values.device)[:, None, :].expand_as(values)
            soft = self._model.values(outputs, strengths)
            values = torch.where(batch.soft_B.to(values.device)[:, None, None], soft, values)
        return values

    def close(self, sequence: Hashable) -> None:
        """Free the sequence's KV."""
        self._runner.cache.free(sequence)
        del self._offered[sequence]
