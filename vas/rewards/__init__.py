"""Rewards: scorers of a finished response, by objective.

A reward is a batched callable with a version. It is a built-in one (`builtin_rewards()` lists
them), a Hugging Face sequence classifier (`hf:MODEL`), or a function of one's own
(`python:module.function`). Importing this package loads neither torch nor transformers.
"""

from vas.rewards.interface import Reward
from vas.rewards.loading import load_rewards
from vas.rewards.registry import BuiltinInfo, builtin_rewards
from vas.rewards.scoring import Scored, score

__all__ = ["BuiltinInfo", "Reward", "Scored", "builtin_rewards", "load_rewards", "score"]
