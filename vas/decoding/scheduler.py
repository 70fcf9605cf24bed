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
    joint: tokens of a prompt that need no pass of their own, see `BaseRunner.joint`.
    """

    def __init__(self, fits: Callable[[int, int], bool], max_sequences: int, joint: int = 0) -> None:
        self._has_room, self.max_sequences, self.joint = fits, max_sequences, joint
        self._sharing = not switches.off("shared_prefixes")
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._refused: Sequence | None = None
        """The head of the queue, when it had no room; it has none before a running sequence leaves."""

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
        while self.waiting and places > 0 and self.waiting[0] is not self._refused:
            if not self._fits([*self.running, self.waiting[0]]):
                self._refused = self.waiting[0]
                break
            places -= 1
            sequence = self.waiting.popleft()
            if self._sharing:
                sequence.source, sequence.shared = _best_source(sequence, self.running)
            self.running.append(sequence)
        return self.running[fresh:]

    def leave(self, sequence: Sequence) -> None:
        """Take a running sequence out; the last one moves into its place, as in the cache."""
        self._refused = None
        last = self.running.pop()
        if last is not sequence:
            self.running[self.running.index(sequence)] = last
        for other in self.running:
            if other.source is sequence:
                other.source = None

    def prefill(self, budget: int) -> list[tuple[Sequence, int]]:
        """Which sequences read how much of their prompts in a pass before the others' next tokens, within a budget.

        Oldest first, as many as fit when all are padded to the longest, as attention pads them. A
        sequence that shares a prefix waits until its source holds it. Rests that `ready` takes along have their part
        of the budget by age, too.
        """
        chunks: list[tuple[Sequence, int]] = []
        longest = 0
        for sequence in _by_age(self.running):
            if not sequence.unread or sequence.source is not None:
                continue
            if self._joins(sequence):
                budget -= min(sequence.unread, budget)
                continue
            size = min(sequence.unread, budget)
            longest = max(longest, size)
            if longest * (len(chunks) + 1) > budget or size == 0:
                break
            chunks.append((sequence, size))
        return chunks

    def ready(self, budget: int, among: Many[Sequence] | None = None) -> list[Sequence]:
        """Sequences whose next token can be asked for, of all that run or of some.

        They have read all but the last token; or so little of a prompt is left that the same pass reads it. Of
        these, the oldest that a budget of tokens is enough for.
        """
        among = self.running if among is None else among
        joining = []
        for sequence in _by_age(among):
            if sequence.unread <= budget and self._joins(sequence):
                budget -= sequence.unread
                joining.append(sequence)
        return [s for s in among if s.ready or s in joining]

    def _joins(self, sequence: Sequence) -> bool:
        """Whether only a short rest of a prompt is unread, for which no other sequence waits."""
        short = 0 < sequence.unread <= self.joint and sequence.source is None and not sequence.blockwise
        return short and all(other.source is not sequence for other in self.running)

    def sharing(self) -> list[Sequence]:
        """Sequences whose source now holds the prefix they share."""
        return [s for s in self.running if s.source is not None and s.source.cached >= s.shared]

    def _fits(self, sequences: Many[Sequence]) -> bool:
        """Whether the KV cache holds these after the next step."""
        return self._has_room(sum(s.rows for s in sequences), max(s.reach for s in sequences))


def _by_age(sequences: Many[Sequence]) -> list[Sequence]:
    return sorted(sequences, key=lambda sequence: sequence.number)


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
