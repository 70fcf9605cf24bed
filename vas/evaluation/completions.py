"""Completes half-finished responses of the base model, so that V of them can be compared with what comes of them."""

from __future__ import annotations

import logging

import numpy as np
import ray

from vas import storage
from vas.config import RunConfig
from vas.evaluation.methods import ByPrompt
from vas.evaluation.states import state_values
from vas.evaluation.trust import Trust, card_section, judge, to_json
from vas.models.server import Prefix
from vas.models.value import ValueModelConfig
from vas.placement import options, sampler
from vas.rollouts.ledger import Ledger
from vas.rollouts.pipeline import sample
from vas.rollouts.plan import Plan
from vas.rollouts.stored import by_prompt, read_rollouts
from vas.schema import Prompt
from vas.training.card import with_section

logger = logging.getLogger(__name__)


def measure(
    config: RunConfig,
    prompts: list[Prompt],
    base: ByPrompt,
    value: str,
    output: str,
    ledger: Ledger | None = None,
) -> list[Trust]:
    """Complete half-finished responses of the base model, and compare; an entry an objective.

    prompts: held-out ones; base: the base model's rollouts of them. value: location of the value model, whose
    card gets a section. ledger: of a server's calls. Completions are committed under `output`/completions, the rest
    is `output`/trust.json. Without anything to compare it returns nothing.
    """
    asked = [prompt for prompt in prompts if prompt.prompt_id in base][: config.evaluation.trust_prompts]
    if not asked:
        return []
    count, completions = config.evaluation.trust_completions, storage.join(output, "completions")
    halves = {prompt.prompt_id: _half(base[prompt.prompt_id][0]["response_token_ids"]) for prompt in asked}
    plan = Plan(asked, count, config.seed, prefixes={name: [half] * count for name, half in halves.items()})
    sample(config, [plan], completions, "completions", ledger=ledger)
    completed = by_prompt(read_rollouts(completions))
    kept = [name for name in halves if len(completed.get(name, ())) > 1]
    if not kept:
        logger.warning("no half-finished response could be completed twice: see the `error` column of %s", completions)
        return []
    finished = [row for name in halves for row in base[name] if row["finish_reason"] == "stop"]
    task = ray.remote(**options(sampler(config.resources)))(state_values)
    chats = {prompt.prompt_id: tuple(prompt.messages) for prompt in asked}
    states = [Prefix(base[name][0]["prompt_token_ids"], halves[name], chats[name]) for name in kept]
    final = [Prefix(row["prompt_token_ids"], row["response_token_ids"]) for row in finished]
    values = ray.get(task.remote(config, value, states, final, ledger))
    found = []
    for j, objective in enumerate(ValueModelConfig.load(value).objectives):
        name, mean, std = objective["name"], objective["mean"], objective["std"]
        if name not in config.rewards:  # a head of the value model that this one extends
            continue
        rewards = [np.array([(row["rewards"][name] - mean) / std for row in completed[each]]) for each in kept]
        reached = np.array([(row["rewards"][name] - mean) / std for row in finished])
        columns = values.value_NJ[:, j], rewards, values.spread_NJ[:, j], values.final_MJ[:, j], reached
        found.append(judge(name, *columns, config.evaluation.bootstrap, config.seed))
    storage.write_bytes(storage.join(output, "trust.json"), to_json(found).encode())
    card = storage.join(value, "README.md")
    storage.write_bytes(card, with_section(storage.read_bytes(card).decode(), "Trust", card_section(found)).encode())
    return found


def _half(tokens: list[int]) -> list[int]:
    return tokens[: len(tokens) // 2]
