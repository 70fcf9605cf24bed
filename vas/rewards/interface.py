"""What every reward is: a batched scorer of finished responses, with a version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from vas.schema import Prompt


@runtime_checkable
class Reward(Protocol):
    """Scores responses: `reward(prompts, responses)` gives one number for each of the N pairs."""

    @property
    def version(self) -> str:
        """Text that changes whenever the scores could."""
        ...

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float]: ...
