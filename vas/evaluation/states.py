"""What a value model says of some states: one look at each, without decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vas import guidance
from vas.choices import Linears
from vas.config import RunConfig
from vas.decoding.loading import load_scorer
from vas.decoding.runner import ModelRunner
from vas.decoding.sampler import policy
from vas.decoding.scorer import InProcess, ScoreBatch
from vas.decoding.sequence import SamplingParams
from vas.decoding.served import logprobs
from vas.errors import Rejected
from vas.http import Meter
from vas.models.base import BaseModel, set_threads
from vas.models.served import ServedModel, open_base
from vas.models.server import Prefix

BATCH = 16  # states in a pass


@dataclass(frozen=True, slots=True)
class StateValues:
    """Values of N states that go on and M that are final, in standard deviations of the J rewards."""

    value_NJ: np.ndarray
    spread_NJ: np.ndarray
    """Standard deviation of the values of a state's candidates, weighted by π0."""
    final_MJ: np.ndarray


def state_values(
    config: RunConfig, location: str, states: list[Prefix], final: list[Prefix], meter: Meter | None = None
) -> StateValues:
    """Load base and value model, and let V look at states (the beginnings of responses, and finished ones).

    Candidates are those of the run's guidance: the likeliest under its sampling, and EOS.
    meter: of a server's calls.
    Runs as a Ray task. Raises VasError if a model cannot be loaded, or their tokenizers differ.
    """
    set_threads(config.resources.cpus_per_actor)
    base = open_base(config.base, "cuda" if config.resources.gpus_per_actor else "cpu", meter)
    scorer = load_scorer(config.value.name, location, base, config.base.linears)
    next_of = _called(base) if isinstance(base, ServedModel) else _run(base, config.base.linears)
    values, spreads = [], []
    for batch in _batches(states):
        values.append(_ends(scorer, batch))
        logits_BV = next_of(batch)
        unknown = torch.full((len(batch), len(scorer.objectives)), math.nan)
        spreads.append(unknown if logits_BV.isnan().any() else _spread(config, base, logits_BV, scorer, batch))
    ends = [_ends(scorer, batch) for batch in _batches(final)]
    return StateValues(*(_join(each, len(scorer.objectives)) for each in (values, spreads, ends)))


def _run(base: BaseModel, linears: Linears) -> Callable[[list[Prefix]], Tensor]:
    """The base model's logits [B, V] of what follows states."""
    runner = ModelRunner(base.model, linears, free=True)

    def logits(batch: list[Prefix]) -> Tensor:
        tokens = [_tokens(state) for state in batch]
        with runner.sequences(len(batch)) as owners:
            if any(len(each) > 1 for each in tokens):
                runner.extend(owners, [each[:-1] for each in tokens])
            return runner.extend(owners, [each[-1:] for each in tokens], logits=True)

    return logits


def _called(base: ServedModel) -> Callable[[list[Prefix]], Tensor]:
    """The same of a model that can only be called, as far as it tells: [B, V]; NaN if it tells nothing."""

    def told(batch: list[Prefix]) -> Tensor:
        if not base.top:
            return torch.full((len(batch), base.vocabulary), math.nan)
        try:
            return logprobs([call.result() for call in map(base.ahead, batch)], base.vocabulary)[:, :-1]
        except Rejected as rejected:
            raise rejected.error from None

    return told


def _ends(scorer: InProcess, batch: list[Prefix]) -> Tensor:
    """V of the last states of sequences [B, J]."""
    return scorer.ends([(state.prompt, state.response) for state in batch])


def _spread(
    config: RunConfig, base: BaseModel | ServedModel, logits_BV: Tensor, scorer: InProcess, batch: list[Prefix]
) -> Tensor:
    """π0-weighted standard deviation of the values of states' candidates [B, J]."""
    count = len(batch)
    base_BV = policy(logits_BV, [SamplingParams.of(config.rollouts.sampling, seed=0)] * count)
    eos = torch.tensor(base.eos_token_ids, dtype=torch.long, device=logits_BV.device)
    tokens_BK, valid_BK = guidance.select_candidates(base_BV, torch.full((count,), config.evaluation.candidates), eos)
    tokens = [tuple(_tokens(state)) for state in batch]
    for number, state in enumerate(batch):
        scorer.open(number, len(state.prompt))
    longer = [number for number, each in enumerate(tokens) if len(each) > 1]
    if longer:
        scorer.extend(longer, [tokens[number][:-1] for number in longer])
    none = torch.zeros(count, len(scorer.objectives))
    last = [each[-1:] for each in tokens]
    question = ScoreBatch(range(count), last, list(range(count)), tokens_BK, valid_BK, none, torch.zeros(count) > 0)
    values_BKJ, _ = scorer.answer(question)
    for number in range(count):
        scorer.close(number)
    logprobs_BK = base_BV.gather(1, tokens_BK).masked_fill(~valid_BK, guidance.NEVER)
    advantages_BKJ = guidance.advantages(values_BKJ, logprobs_BK, valid_BK)
    return (torch.softmax(logprobs_BK, dim=-1)[..., None] * advantages_BKJ.square()).sum(1).sqrt()


def _tokens(state: Prefix) -> list[int]:
    return [*state.prompt, *state.response]


def _batches(states: list[Prefix]) -> Iterator[list[Prefix]]:
    for start in range(0, len(states), BATCH):
        yield states[start : start + BATCH]


def _join(batches: list[Tensor], objectives: int) -> np.ndarray:
    if not batches:
        return np.empty((0, objectives))
    return torch.cat(batches).double().cpu().numpy()
