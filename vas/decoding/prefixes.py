"""What the models have read of each sequence: its prefix, in the KV caches of base model and value models."""

from __future__ import annotations

from collections.abc import Sequence as Many

from vas.decoding.base_runner import BaseRunner
from vas.decoding.guide import Guide
from vas.decoding.scorer import Scorer
from vas.decoding.sequence import Sequence


class Prefixes:
    """Keeps the caches of all models in step; a sequence has a row with the base model and the scorers it needs."""

    def __init__(self, runner: BaseRunner, scorers: Many[Scorer], guide: Guide) -> None:
        self._runner, self._scorers, self._guide = runner, scorers, guide

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV caches of base and value models hold."""
        return self._runner.cache.memory() + sum(scorer.kv_bytes for scorer in self._scorers)

    def open(self, sequence: Sequence) -> None:
        """Begin a sequence that nothing has been read of."""
        self._runner.cache.add(sequence.owner)
        for scorer in self._guide.scorers_of(sequence.request):
            scorer.open(sequence.owner, len(sequence.request.prompt_token_ids))

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._runner.cache.free(sequence.owner)
        for scorer in self._guide.scorers_of(sequence.request):
            scorer.close(sequence.owner)

    def read(self, chunks: Many[tuple[Sequence, int]]) -> None:
        """Read so many more tokens of each of these sequences, a pass for each model that needs them."""
        tokens = {s: s.tokens(s.cached, s.cached + size) for s, size in chunks}
        self._runner.read([s.owner for s in tokens], list(tokens.values()))
        for scorer in self._scorers:
            wanted = {s: some for s, some in tokens.items() if scorer in self._guide.scorers_of(s.request)}
            if wanted:
                self._guide.extend(scorer, wanted)
        for sequence, size in chunks:
            sequence.cached += size
            sequence.completion.base_positions += size

    def inherit(self, sequences: Many[Sequence]) -> None:
        """Give sequences what they share with their sources, which the base model has read by now."""
        for sequence in sequences:
            source, length = sequence.source, sequence.shared
            assert source is not None
            for scorer in self._guide.scorers_of(sequence.request):
                read = source.read.get(scorer.name, 0)
                if read < length:  # its own steps have not been guided yet
                    self._guide.extend(scorer, {source: source.tokens(read, length)})
            self.share(source, sequence, length)
            sequence.source = None

    def share(self, source: Sequence, target: Sequence, length: int) -> None:
        """Let `target` hold the first `length` tokens of `source` in every cache."""
        self._runner.cache.copy(source.owner, target.owner, length)
        target.cached = length
        for scorer in self._guide.scorers_of(target.request):
            scorer.share(source.owner, target.owner, length)
            target.read[scorer.name] = length
