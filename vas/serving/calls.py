"""What travels between the deployments, and by which handles: plain data, pickled inside the cluster alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from ray.serve.handle import DeploymentHandle

from vas.decoding.sequence import Token

OVERLOADED = "overloaded"
ENGINE_DIED = 599  # in the place of a status: another replica may do the same work


@dataclass(slots=True)
class Question:
    """One step's question of a base-model replica to a replica of a value model: what are these candidates worth?

    It can be asked of any replica at any time: one that has not what `held` says of a sequence answers so, and is
    then given the sequence whole.
    """

    caller: str
    """Who asks; sequences are numbered by their caller."""
    sequences: list[int]
    held: list[int]
    """Tokens of each sequence that the replica has read; 0 begins it anew."""
    fresh: list[tuple[int, ...]]
    """The tokens after those."""
    shared: list[tuple[int, int]]
    """For a sequence that begins: another one and how many tokens they have in common; (0, 0) for none."""
    rows: list[int]
    """Sequences that have candidates, as indices."""
    candidates_BK: np.ndarray
    valid_BK: np.ndarray
    strengths_BJ: np.ndarray
    soft_B: np.ndarray
    closed: list[int]
    """Sequences to forget."""

    def part(self, part: slice) -> Question:
        """The question about some of its sequences alone; each has candidates."""
        lists = {name: getattr(self, name)[part] for name in ("sequences", "held", "fresh", "shared")}
        arrays = {name: getattr(self, name)[part] for name in ("candidates_BK", "valid_BK", "strengths_BJ", "soft_B")}
        return replace(self, **lists, **arrays, rows=list(range(len(lists["sequences"]))), closed=[])


@dataclass(slots=True)
class Reply:
    """The answer to a Question."""

    replica: str
    """Who answers; later questions about these sequences should go there."""
    missing: list[int] = field(default_factory=list)
    """Sequences, as indices, that it has not as the question says. If there are any, nothing was computed."""
    values_BKJ: np.ndarray | None = None
    positions: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    """Tokens of each sequence that it has read by now, where there was too much for one answer: ask again."""


@dataclass(slots=True)
class Event:
    """What became of one choice of a request: a token, or the reason why there are no more."""

    choice: int
    token: Token | None = None
    guided_steps: int = 0
    lost_steps: int = 0
    """Steps so far, at this replica, that value models had a say in, and that one could not be reached for."""
    error: tuple[int, str, str] | None = None
    """HTTP status, kind and text of what it failed of; the status ENGINE_DIED stays inside."""

    @property
    def last(self) -> bool:
        """Whether nothing comes of the choice after this."""
        return self.token is None or self.token.finish_reason is not None


@dataclass(slots=True)
class Objective:
    """What an endpoint says of an objective."""

    name: str
    value_model: str
    placement: str
    digest: str
    """Identity of the value model's weights and config."""
    head: str
    mean: float
    std: float
    """Of the reward over the training rollouts; a strength of 1 is worth a factor e for each std."""
    reward_version: str
    relative: bool
    """Whether its values only compare next tokens."""


def own(handle: DeploymentHandle) -> DeploymentHandle:
    """The handle as this process makes it: how it calls is settled by the environment of whoever made it."""
    return DeploymentHandle(handle.deployment_name, handle.app_name)
