"""What a config and a request may choose from; apart, so that the engine runs without the config's libraries."""

from typing import Literal

Stage = Literal["rollouts", "train", "evaluate", "all"]
"""What of a run a job does."""

Linears = Literal["exact", "bfloat16", "int8", "fastest"]

LEAST_TEMPERATURE = 1e-3  # but for 0, which is greedy

SCHEDULE = r"token|entropy:\d+(\.\d+)?|block:[1-9]\d*"
