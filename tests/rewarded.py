"""A reward by its name, and what it gives to responses, for the tests of rewards."""

from vas.config import Reward as Spec
from vas.rewards import Reward, load_rewards
from vas.schema import Prompt

ASK = Prompt("p", messages=({"role": "user", "content": "tell me"},))


def load(use: str, **params) -> Reward:
    return load_rewards({"it": Spec(use=use, params=params)})["it"]


def scores(use: str, *responses: str, **params) -> list[float]:
    return list(load(use, **params)([ASK] * len(responses), list(responses)))
