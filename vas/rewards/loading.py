"""From a config's `rewards` section to rewards."""

from __future__ import annotations

from collections.abc import Mapping

from vas import config
from vas.rewards import builtin  # noqa: F401  (registers the built-in rewards)
from vas.rewards.interface import Reward
from vas.rewards.registry import build


def load_rewards(specs: Mapping[str, config.Reward]) -> dict[str, Reward]:
    """Objective → reward, in the order of the config.

    Everything that can be checked without scoring is checked: names, params, packages, that a
    model can be found. Raises VasError. Weights of a model are read on its first call.
    """
    return {objective: _load(objective, spec) for objective, spec in specs.items()}


def _load(objective: str, spec: config.Reward) -> Reward:
    where = f"rewards.{objective}"
    kind, separator, name = spec.use.partition(":")
    if separator and kind == "hf":
        from vas.rewards.hf import HfReward

        return HfReward(name, spec.params, where)
    if separator and kind == "python":
        from vas.rewards.python import PythonReward

        return PythonReward(name, spec.params, where)
    return build(spec.use, spec.params, where)
