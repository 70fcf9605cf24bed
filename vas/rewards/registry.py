"""Built-in rewards by name, and the optional packages they need."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from vas.errors import VasError, nearest
from vas.rewards.params import Params, params_digest
from vas.schema import Prompt


@dataclass(frozen=True, slots=True)
class Entry:
    """How a built-in reward is registered."""

    name: str
    revision: int
    """Of the code here; raised when it starts to score differently."""
    packages: tuple[str, ...]
    """Distributions whose version decides scores; the first is the one to install."""
    module: str | None
    """What that first one is imported as."""


class BuiltinReward(Params):
    """Base of the built-in rewards: their fields are the config's `params`."""

    entry: ClassVar[Entry]

    @property
    def version(self) -> str:
        """Name and revision, versions of the packages that decide, digest of the params."""
        parts = [f"{self.entry.name}/{self.entry.revision}"]
        parts += [f"{package}=={importlib.metadata.version(package)}" for package in self.entry.packages]
        if type(self).model_fields:
            parts.append(f"params={params_digest(self.model_dump(mode='json'))}")
        return " ".join(parts)

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]: ...


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


_REWARDS: dict[str, type[BuiltinReward]] = {}
_R = TypeVar("_R", bound=type[BuiltinReward])


def register(
    name: str,
    needs: str | None = None,
    module: str | None = None,
    also: tuple[str, ...] = (),
    revision: int = 1,
) -> Callable[[_R], _R]:
    """Class decorator that makes a BuiltinReward known as `name`.

    needs: the distribution it imports on use, and `module` what that is imported as if not the same.
    also: further distributions that decide its scores.
    """

    def add(reward: _R) -> _R:
        assert name not in _REWARDS, f"reward '{name}' is registered twice"
        packages = (needs, *also) if needs else also
        reward.entry = Entry(name, revision, packages, (module or needs) if needs else None)
        _REWARDS[name] = reward
        return reward

    return add


def build(name: str, params: Mapping[str, Any], where: str) -> BuiltinReward:
    """The built-in reward `name`, its params checked and its package importable; else VasError."""
    if name not in _REWARDS:
        raise VasError(
            f"unknown reward '{name}'",
            f"{where}.use",
            f"{nearest(name, list(_REWARDS))} Besides the built-in ones there are hf:MODEL and python:module.function",
        )
    reward = _REWARDS[name].parse(params, where)
    if reward.entry.module:
        _require(reward.entry.module, reward.entry.packages[0], f"{where}.use")
    return reward


def builtin_rewards() -> list[BuiltinInfo]:
    """All built-in rewards, by name."""
    return [_describe(_REWARDS[name]) for name in sorted(_REWARDS)]


def _describe(reward: type[BuiltinReward]) -> BuiltinInfo:
    entry = reward.entry
    return BuiltinInfo(
        name=entry.name,
        doc=(reward.__doc__ or "").strip().partition("\n")[0],
        params={
            name: "required" if field.is_required() else str(field.default)
            for name, field in reward.model_fields.items()
        },
        package=entry.packages[0] if entry.module else None,
        installed=entry.module is None or importlib.util.find_spec(entry.module) is not None,
    )


def _require(module: str, package: str, where: str) -> None:
    """Import an optional package, quietly; VasError when it or something below it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except ImportError as error:
        raise VasError(
            f"this reward needs the package '{module}', which cannot be imported: {error}",
            where,
            f"pip install {package}",
        ) from None
