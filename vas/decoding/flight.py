"""A pass of the base model under way. Between two of its layers more sequences may come aboard.

They run the layers behind the others first, and the rest of them together: so a request that comes in the middle of a
pass costs less than with a pass of its own, and need not wait for the end of this one. Each boarding reads the weights
of the layers that have been passed once more: several in one pass would cost more than one pass for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from vas.decoding.attention import Pass, joined
from vas.decoding.llama import FusedLlama

Owners = Sequence[Hashable]
Tokens = Sequence[Sequence[int]]


class Flight:
    """Appends tokens to sequences, a layer at a time: `advance` until it has run the last one, then `logits`.

    lay_out: ids [N] of tokens to append to some sequences, and where they lie, with a `Pass` for each grid of them.
    """

    def __init__(
        self,
        forward: FusedLlama,
        lay_out: Callable[[Owners, Tokens], tuple[Tensor, list[Pass]]],
        owners: Owners,
        tokens: Tokens,
    ) -> None:
        self._forward, self._lay_out, self._passed = forward, lay_out, 0
        ids_N, self._passes = lay_out(owners, tokens)
        self._counts, self._where = [len(each) for each in tokens], joined(self._passes)
        self._underway = forward.start(ids_N, self._where.column_N)

    def advance(self) -> bool:
        """Run a layer; whether there are more of them, before which others may board."""
        self._forward.run(self._passed, self._underway, self._where)
        self._passed += 1
        return self._passed < self._forward.depth

    def board(self, owners: Owners, tokens: Tokens) -> None:
        """Let more sequences catch up with these, and go on with them, as the last of them."""
        ids_N, passes = self._lay_out(owners, tokens)
        where = joined(passes)
        underway = self._forward.start(ids_N, where.column_N)
        for number in range(self._passed):
            self._forward.run(number, underway, where)
        self._underway.joined_by(underway)
        self._passes += passes
        self._counts += [len(each) for each in tokens]
        self._where = joined(self._passes)

    def logits(self) -> Tensor:
        """Those of each sequence's last token, in the order in which they boarded: [B, V]."""
        ends_B = torch.tensor(self._counts).cumsum(0) - 1
        return self._forward.end(self._underway, True, ends_B)
