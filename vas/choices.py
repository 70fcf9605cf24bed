"""What a config and a request may choose from; apart, so that the engine runs without the config's libraries."""

from typing import Literal

Linears = Literal["exact", "bfloat16", "int8", "fastest"]

SCHEDULE = r"token|entropy:\d+(\.\d+)?|block:[1-9]\d*"
