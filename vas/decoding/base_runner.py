"""What the engine asks of the base model, the same whether its weights are here or a server has it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Protocol

import torch
from torch import Tensor

from vas.decoding import switches
from vas.decoding.blocks import Block
from vas.decoding.flight import Flight
from vas.decoding.runner import ModelRunner
from vas.decoding.scorer import LAG
from vas.decoding.sequence import Drawn, SamplingParams
from vas.decoding.sequence import Sequence as Running


@dataclass(slots=True)
class Arrival:
    """What there is to go on with at a step; sequences that are in none of these wait."""

    ahead: list[Running] = field(default_factory=list)
    """Sequences whose next token's log-probs can be asked for."""
    drawn: list[tuple[Running, list[Drawn], str | None]] = field(default_factory=list)
    """Sequences with tokens that have been drawn elsewhere, and why they end with them, if they do."""
    blocks: list[Block] = field(default_factory=list)
    """Blocks that have got all of their continuations' tokens at once."""
    failed: list[tuple[Running, Exception]] = field(default_factory=list)
    """Sequences that cannot go on: VasError, or Rejected."""


@dataclass(slots=True)
class Drawable:
    """Sequences whose next token can be drawn, one or more, and the base model's logits of it."""

    sequences: list[Running]
    logits_BV: Tensor

    def joined_by(self, others: Drawable) -> Drawable:
        """These and others."""
        return Drawable([*self.sequences, *others.sequences], torch.cat([self.logits_BV, others.logits_BV]))

    def split(self, first: Callable[[Running], bool]) -> tuple[Drawable | None, Drawable | None]:
        """Those that are to be first, and the others; None for no sequences."""
        chosen = [first(sequence) for sequence in self.sequences]
        if all(chosen):
            return self, None
        if not any(chosen):
            return None, self
        return self._some(chosen), self._some([not each for each in chosen])

    def _some(self, chosen: list[bool]) -> Drawable:
        return Drawable(list(compress(self.sequences, chosen)), self.logits_BV[torch.tensor(chosen)])


class Room(Protocol):
    """The rows of the sequences, as `KVCache` has them."""

    limit: int | None

    def fits(self, rows: int, width: int) -> bool: ...
    def allocated(self, rows: int, width: int) -> int: ...
    def add(self, owner: Hashable) -> None: ...
    def copy(self, source: Hashable, target: Hashable, length: int) -> None: ...
    def free(self, owner: Hashable) -> None: ...
    def memory(self) -> int: ...


class BaseRunner(Protocol):
    """A base model that can run sequences."""

    @property
    def vocabulary(self) -> int | None:
        """Columns of its logits that are tokens, the first ones; None if all are."""
        ...

    @property
    def cache(self) -> Room:
        """Where its sequences are."""
        ...

    def spare(self) -> None:
        """Let go of memory that only makes steps faster."""
        ...

    @property
    def joint(self) -> int:
        """Tokens of a prompt that `logits` may read in passing: prompts with more of them left are `read` before."""
        ...

    def read(self, owners: Sequence[Hashable], tokens: Sequence[Sequence[int]]) -> None:
        """Append tokens of prompts to sequences."""
        ...

    def arrived(self, sequences: Sequence[Running]) -> Arrival:
        """What there is of these sequences, which are all ready for a token."""
        ...

    def logits(self, sequences: Sequence[Running]) -> Tensor:
        """Of each one's next token, after all that it has: [B, V], with a column more for tokens not told apart."""
        ...

    def flight(self, sequences: Sequence[Running]) -> Flight | None:
        """The pass that gives their `logits`, a layer at a time; None where it cannot be taken apart."""
        ...

    def certain(self, guided_BV: Tensor, knobs: Sequence[SamplingParams]) -> Tensor:
        """log π in which greedy requests find only tokens that are told apart."""
        ...

    def settle(self, sequences: Sequence[Running], drawn: Sequence[Drawn]) -> Sequence[Drawn | None]:
        """What was drawn; None where that is yet to be told, as a token that arrives `drawn` at a later step."""
        ...


class LocalRunner(ModelRunner):
    """A base model with its weights here: whatever is ready can go on at once."""

    vocabulary: int | None = None

    @property
    def joint(self) -> int:
        """A short prompt costs less in a pass that reads the weights anyway, and value models read as much in passing.

        With more tokens the products take so long that the weights matter little.

        Not so on a GPU, where it would change a step's shape; nor with Hugging Face's own code, which would make logits
        of all its tokens.
        """
        return LAG if self.ragged and not switches.off("joint_prefill") else 0

    def read(self, owners: Sequence[Hashable], tokens: Sequence[Sequence[int]]) -> None:
        """Run tokens of prompts for their KV."""
        self.extend(owners, tokens)

    def arrived(self, sequences: Sequence[Running]) -> Arrival:
        """All of them."""
        return Arrival(list(sequences))

    def logits(self, sequences: Sequence[Running]) -> Tensor:
        """One pass over each one's last token, and all that comes before it and was not read: [B, V]."""
        return self.extend(*to_run(sequences), logits=True, last=True)

    def flight(self, sequences: Sequence[Running]) -> Flight | None:
        """The same pass, in layers; None where threads share it out, or it is not the engine's own code."""
        return self.appending(*to_run(sequences))

    def certain(self, guided_BV: Tensor, knobs: Sequence[SamplingParams]) -> Tensor:
        """All tokens are told apart."""
        return guided_BV

    def settle(self, sequences: Sequence[Running], drawn: Sequence[Drawn]) -> Sequence[Drawn | None]:
        """What was drawn."""
        return drawn


def to_run(sequences: Sequence[Running]) -> tuple[list[Hashable], list[tuple[int, ...]]]:
    """Whose tokens the base model has yet to run, and which: each one's last, and what comes before it unread."""
    return [s.owner for s in sequences], [s.tokens(s.cached, len(s)) for s in sequences]
