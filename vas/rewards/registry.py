"""Built-in rewards by name, and the optional packages they need."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vas.errors import VasError, nearest
from vas.rewards.params import Params, params_digest
from vas.schema import Prompt


class BuiltinReward(Params):
    """Base of the built-in rewards: their fields are the config's `params`."""

    @property
    def version(self) -> str:
        """Name, revision of the code here, versions of the packages that decide, digest of the params."""
        entry = next(entry for entry in _ENTRIES.values() if entry.reward is type(self))
        parts = [f"{entry.name}/{entry.revision}"]
        parts += [f"{package}=={importlib.metadata.version(package)}" for package in entry.packages]
        if type(self).model_fields:
            parts.append(f"params={params_digest(self.model_dump(mode='json'))}")
        return " ".join(parts)

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered reward."""

    name: str
    reward: type[BuiltinReward]
    revision: int
    packages: tuple[str, ...]
    """Distributions whose version decides scores; the first is the one to install."""
    module: str | None
    """What the first package is imported as."""


@dataclass(frozen=True, slots=True)
class BuiltinInfo:
    """A built-in reward as the command line lists it."""

    name: str
    doc: str
    """One line."""
    params: dict[str, str]
    """Parameter → its default as text, or `required`."""
    package: str | None
    """Package beyond the library that it needs."""
    installed: bool
    """Whether that package is there (true when none is needed)."""


_ENTRIES: dict[str, Entry] = {}


def register[T: type[BuiltinReward]](x: T) -> T: ...
