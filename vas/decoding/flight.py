"""A pass of the base model under way, which may rest between two of its layers for something more urgent."""

from __future__ import annotations

from torch import Tensor

from vas.decoding.attention import Grids, Pass
from vas.decoding.llama import FusedLlama


class Flight:
    """Runs tokens through a model, a layer at a time: `advance` until it has run the last one, then `logits`.

    ids_N, where: the tokens [N], and where they lie. wanted_B: those whose logits are asked for; None for all.

    Other passes over the same cache may run meanwhile, and it may grow; but none of the rows in it may move.
    """

    def __init__(self, forward: FusedLlama, ids_N: Tensor, where: Pass | Grids, wanted_B: Tensor | None) -> None:
        self._forward, self._where, self._wanted_B, self._passed = forward, where, wanted_B, 0
        self._underway = forward.start(ids_N, where.column_N)

    def advance(self) -> bool:
        """Run a layer; whether there are more of them."""
        self._forward.run(self._passed, self._underway, self._where)
        self._passed += 1
        return self._passed < self._forward.depth

    def logits(self) -> Tensor:
        """Those that are asked for: [B, V]."""
        return self._forward.end(self._underway, True, self._wanted_B)
