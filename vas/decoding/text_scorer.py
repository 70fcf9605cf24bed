"""A scorer for a value model that has another tokenizer than the base model: it reads the text of each candidate.

The KV of a sequence's text is kept; of a candidate only the tokens are run that differ from it, which are those at
the end: the candidate's own, and at times the last ones before, which together with it have another spelling.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vas.choices import Linears
from vas.decoding.scorer import Answer, InProcess, ScoreBatch
from vas.errors import VasError
from vas.models.translation import Translation
from vas.models.value import ValueModel

TOGETHER = 64  # candidates in a pass; each has a copy of its sequence's KV meanwhile


@dataclass(slots=True)
class _Text:
    """A sequence, in both models' tokens."""

    prompt: int
    """How many of the base model's tokens are the prompt's."""
    tokens: list[int] = field(default_factory=list)
    """The base model's."""
    read: list[int] = field(default_factory=list)
    """The value model's, whose KV is held."""


class TextScorer(InProcess):
    """A value model in this process that reads text. linears, free: as `InProcess`."""

    def __init__(
        self, name: str, model: ValueModel, translation: Translation, linears: Linears = "exact", free: bool = False
    ) -> None:
        super().__init__(name, model, linears, free)
        self._translation = translation
        self._texts: dict[Hashable, _Text] = {}

    def limit(self, kv_tokens: int | None) -> None:
        """Its tokens are not the engine's, which counts for it; so there is no limit."""

    def open(self, sequence: Hashable, prompt: int = 0) -> None:
        """Give the sequence a row of the cache."""
        super().open(sequence, prompt)
        self._texts[sequence] = _Text(prompt)

    def share(self, source: Hashable, target: Hashable, length: int) -> None:
        """Copy the KV of a common prefix."""
        text, other = self._texts[target], self._texts[source]
        text.tokens = other.tokens[:length]
        text.read = _common(other.read, self._translated(text))
        self._runner.cache.copy(source, target, len(text.read))

    def extend(self, sequences: Sequence[Hashable], token_ids: list[tuple[int, ...]]) -> None:
        """Read more of the base model's tokens."""
        for sequence, tokens in zip(sequences, token_ids, strict=True):
            self._texts[sequence].tokens += tokens
        self._catch_up(sequences)

    def close(self, sequence: Hashable) -> None:
        """Free the sequence's KV."""
        super().close(sequence)
        del self._texts[sequence]

    @torch.inference_mode()
    def answer(self, batch: ScoreBatch) -> Answer:
        """A pass for every `TOGETHER` candidates."""
        for sequence, taken in zip(batch.sequences, batch.taken, strict=True):
            self._texts[sequence].tokens += taken
        asked = [batch.sequences[row] for row in batch.rows]
        run = self._catch_up(asked)
        valid, tokens = batch.valid_BK.cpu(), batch.candidates_BK.tolist()
        values = torch.zeros(*valid.shape, len(self.objectives), device=self._runner.device)
        places = valid.nonzero().tolist()
        for start in range(0, len(places), TOGETHER):
            part = places[start : start + TOGETHER]
            tails = [self._tail(asked[b], tokens[b][k]) for b, k in part]
            row_N = torch.tensor([b for b, _ in part])
            last_NH = self._branch([asked[b] for b, _ in part], tails)
            found_NJ = self._values(self._model.outputs(last_NH), batch.strengths_BJ[row_N], batch.soft_B[row_N])
            for (b, k), (_, tail), value_J in zip(part, tails, found_NJ, strict=True):
                values[b, k] = value_J
                run[asked[b]] += len(tail)
        return values, [run.get(sequence, 0) for sequence in batch.sequences]

    def values(self, token_ids: Sequence[int]) -> Iterator[Tensor]:
        """Raises VasError: its tokens are not the base model's."""
        raise VasError("this value model reads text in tokens of its own; it has no values after each token", self.name)

    def _ids(self, prompt: Sequence[int], response: Sequence[int]) -> list[int]:
        return self._translation(prompt, response)

    def _translated(self, text: _Text, *candidate: int) -> list[int]:
        return self._checked(self._translation(text.tokens[: text.prompt], [*text.tokens[text.prompt :], *candidate]))

    def _catch_up(self, sequences: Sequence[Hashable]) -> dict[Hashable, int]:
        """Hold the KV of what the sequences spell now; returns how many tokens each took."""
        fresh: dict[Hashable, list[int]] = {}
        for sequence in sequences:
            text = self._texts[sequence]
            spelled = self._translated(text)
            kept = _common(text.read, spelled)
            self._runner.cache.copy(sequence, sequence, len(kept))
            text.read, fresh[sequence] = spelled, spelled[len(kept) :]
        unread = {sequence: tokens for sequence, tokens in fresh.items() if tokens}
        if unread:
            self._runner.extend(list(unread), list(unread.values()))
        return {sequence: len(tokens) for sequence, tokens in fresh.items()}

    def _tail(self, sequence: Hashable, candidate: int) -> tuple[int, list[int]]:
        """How much of a sequence's KV holds for a candidate, and what comes after that; a token at least."""
        text = self._texts[sequence]
        spelled = self._translated(text, candidate)
        kept = min(len(_common(text.read, spelled)), len(spelled) - 1)
        return kept, spelled[kept:]

    def _checked(self, spelled: list[int]) -> list[int]:
        """Raise VasError for more tokens than the value model has positions for."""
        if self.context_length is not None and len(spelled) > self.context_length:
            raise VasError(
                f"the text has {len(spelled)} tokens of the value model's, which has room for {self.context_length}",
                self.name,
                "shorten the prompt or lower max_tokens",
            )
        return spelled

    def _branch(self, sequences: Sequence[Hashable], tails: Sequence[tuple[int, list[int]]]) -> Tensor:
        """Last hidden states [N, H] of sequences with other ends, which are not kept."""
        branches = [(sequence, number) for number, sequence in enumerate(sequences)]
        for branch in branches:
            self._runner.cache.add(branch)
        try:
            for branch, (kept, _) in zip(branches, tails, strict=True):
                self._runner.cache.copy(branch[0], branch, kept)
            return self._runner.extend(branches, [tail for _, tail in tails], last=True)
        finally:
            for branch in reversed(branches):
                self._runner.cache.free(branch)


def _common(one: list[int], other: list[int]) -> list[int]:
    """The tokens that both begin with."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:same]
