"""Which sequences run: who joins, who has to wait, whose prompt is read next.

`running` is in the order of the KV cache's rows, so that a step over all of them reads plain slices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many

from vas.decoding import switches
from vas.decoding.sequence import Sequence


class Scheduler:
    """The waiting and the running sequences.

    fits: whether so many sequences of up to so many tokens have room. max_sequences: how many run at once.
    joint: tokens of a prompt that are not worth a pass of their own, see `BaseRunner.joint`.
    """

    def __init__(self, fits: Callable[[int, int], bool], max_sequences: int, joint: int = 0) -> None:
        self._has_room, self.max_sequences, self._joint = fits, max_sequences, joint
        self._sharing = not switches.off("shared_prefixes")
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """True while any sequence is waiting or running."""
        return bool(self.waiting or self.running)

    def find(self, request_id: str) -> Sequence | None:
        """The sequence of a request, waiting or running; of several continuations the first."""
        every = (*self.waiting, *self.running)
        return next((s for s in every if s.request.request_id == request_id and s.fork == 0), None)

    def overflowing(self) -> Sequence | None:
        """The youngest sequence, if the running ones have no room for a step more."""
        if self.running and not self._fits(self.running):
            return max((s for s in self.running if s.fork == 0), key=lambda sequence: sequence.number)
        return None

    def admit(self) -> list[Sequence]:
        """Let in waiting sequences for which there are places and room; returns them."""
        fresh = len(self.running)
        places = self.max_sequences - sum(s.fork == 0 for s in self.running)
        while self.waiting and places > 0 and self._fits([*self.running, self.waiting[0]]):
            places -= 1
            sequence = self.waiting.popleft()
            if self._sharing:
                sequence.source, sequence.shared = _best_source(sequence, self.running)
            self.running.append(sequence)
        return self.running[fresh:]

    def leave(self, sequence: Sequence) -> None:
        """Take a running sequence out; the last one moves into its place, as in the cache."""
        last = self.running.pop()
        if last is not sequence:
            self.running[self.running.index(sequence)] = last
        for other in self.running:
            if other.source is sequence:
                other.source = None

    def prefill(self, budget: int) -> list[tuple[Sequence, int]]:
        """Which sequences read how much of their prompts in one pass of their own, within a budget of tokens.

        Oldest first, as many as fit when all are padded to the longest, as attention pads them. A
        sequence that shares a prefix waits until its source holds it. For those that `ready` takes along, what they
        need is left over.
        """
        chunks: list[tuple[Sequence, int]] = []
        longest = 0
        joining = self.joining(budget)
        budget -= sum(sequence.unread for sequence in joining)
        for sequence in self._by_age():
            if not sequence.unread or sequence.source is not None or sequence in joining:
                continue
            size = min(sequence.unread, budget)
            longest = max(longest, size)
            if longest * (len(chunks) + 1) > budget or size == 0:
                break
            chunks.append((sequence, size))
        return chunks

    def ready(self, budget: int) -> list[Sequence]:
        """Sequences whose next token can be asked for: all is read but the last, or so little is missing of a prompt
        that it is read in the same pass, within a budget of tokens."""
        joining = self.joining(budget)
        return [s for s in self.running if s.ready or s in joining]

    def joining(self, budget: int) -> list[Sequence]:
        """Sequences with a short rest of a prompt, oldest first, but for those that others wait for."""
        found = []
        sources = [s.source for s in self.running]
        for sequence in self._by_age():
            short = 0 < sequence.unread <= min(self._joint, budget)
            if short and sequence.source is None and not sequence.blockwise and sequence not in sources:
                budget -= sequence.unread
                found.append(sequence)
        return found

    def _by_age(self) -> list[Sequence]:
        return sorted(self.running, key=lambda s: s.number)

    def sharing(self) -> list[Sequence]:
        """Sequences whose source now holds the prefix they share."""
        return [s for s in self.running if s.source is not None and s.source.cached >= s.shared]

    def _fits(self, sequences: Many[Sequence]) -> bool:
        """Whether the KV cache holds these after the next step."""
        return self._has_room(sum(s.rows for s in sequences), max(s.reach for s in sequences))


def _best_source(sequence: Sequence, running: Many[Sequence]) -> tuple[Sequence | None, int]:
    """The running sequence whose prompt begins as `sequence` does for longest, and how long."""
    tokens = sequence.token_ids[:-1]  # the last one always runs: its output is wanted
    best, most = None, 0
    for other in running:
        if (
            sequence.request.guidance.active <= other.request.guidance.active
        ):  # every value model that one needs has read the other
            shared = _common_prefix(tokens, other.request.prompt_token_ids[:-1])
            if shared > most:
                best, most = other, shared
    return best, most


def _common_prefix(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
