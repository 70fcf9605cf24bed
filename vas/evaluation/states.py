"""What a value model says of some states: one look at each, without decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vas import guidance
from vas.choices import Linears
from vas.config import RunConfig
from vas.decoding.runner import ModelRunner
from vas.decoding.sampler import policy
from vas.decoding.sequence import SamplingParams
from vas.decoding.served import logprobs
from vas.http import Meter
from vas.models.base import BaseModel, set_threads
from vas.models.served import ServedModel, open_base
from vas.models.server import Prefix
from vas.models.value import ValueModel, check_tokenizers

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
    model = ValueModel.load(location, base.device)
    check_tokenizers(model.config, base.name, base.tokenizer_digest)
    next_of = _called(base) if isinstance(base, ServedModel) else _run(base, config.base.linears)
    value_runner = ModelRunner(model.backbone, config.base.linears, free=True)
    values, spreads = [], []
    for batch in _batches(states):
        with value_runner.sequences(len(batch)) as owners:
            values.append(_last_values(model, value_runner, batch))
            spreads.append(_spread(config, base, next_of(batch), model, value_runner, owners))
    ends = []
    for batch in _batches(final):
        with value_runner.sequences(len(batch)):
            ends.append(_last_values(model, value_runner, batch))
    return StateValues(*(_join(each, len(model.objectives)) for each in (values, spreads, ends)))


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
    """The same of a model that can only be called, as far as it tells: [B, V]."""

    def told(batch: list[Prefix]) -> Tensor:
        return logprobs([call.result() for call in map(base.ahead, batch)], base.vocabulary)[:, :-1]

    return told


def _last_values(model: ValueModel, runner: ModelRunner, batch: list[Prefix]) -> Tensor:
    """Read the sequences; returns V of their last states [B, J]."""
    tokens = [_tokens(state) for state in batch]
    hidden_NH = runner.extend(range(len(batch)), tokens)
    last = np.cumsum([len(each) for each in tokens]) - 1
    return model.values(model.outputs(hidden_NH[torch.from_numpy(last).to(hidden_NH.device)]))


def _spread(
    config: RunConfig,
    base: BaseModel | ServedModel,
    logits_BV: Tensor,
    model: ValueModel,
    value_runner: ModelRunner,
    owners: range,
) -> Tensor:
    """π0-weighted standard deviation of the candidates' values [B, J], after sequences the value model has read."""
    base_BV = policy(logits_BV, [SamplingParams.of(config.rollouts.sampling, seed=0)] * len(owners))
    eos = torch.tensor(base.eos_token_ids, dtype=torch.long, device=logits_BV.device)
    k_B = torch.full((len(owners),), config.evaluation.candidates)
    tokens_BK, valid_BK = guidance.select_candidates(base_BV, k_B, eos)
    nothing: list[Sequence[int]] = [()] * len(owners)
    k = tokens_BK.shape[1]
    hidden_NH, _ = value_runner.branch(
        owners, nothing, np.repeat(np.arange(len(owners)), k), tokens_BK.flatten().cpu().numpy()
    )
    values_BKJ = model.values(model.outputs(hidden_NH)).view(*tokens_BK.shape, -1)
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
