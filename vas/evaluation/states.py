"""What a value model says of some states: one look at each, without decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vas import guidance
from vas.config import RunConfig
from vas.decoding.runner import ModelRunner
from vas.decoding.sampler import policy
from vas.decoding.sequence import SamplingParams
from vas.models.base import BaseModel, load_base, set_threads
from vas.models.value import ValueModel, check_tokenizers

BATCH = 16  # states in a pass

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class StateValues:
    """Values of N states that go on and M that are final, in standard deviations of the J rewards."""

    value_NJ: np.ndarray
    spread_NJ: np.ndarray
    """Standard deviation of the values of a state's candidates, weighted by π0."""
    final_MJ: np.ndarray


def state_values(config: RunConfig, location: str, states: list[Tokens], final: list[Tokens]) -> StateValues:
    """Load base and value model, and let V look at states (token prefixes, the prompts included).

    Candidates are those of the run's guidance: the likeliest under its sampling, and EOS.
    Runs as a Ray task. Raises VasError if a model cannot be loaded, or their tokenizers differ.
    """
    set_threads(config.resources.cpus_per_actor)
    base = load_base(config.base, "cuda" if config.resources.gpus_per_actor else "cpu")
    model = ValueModel.load(location, base.model.device)
    check_tokenizers(model.config, base.name, base.tokenizer_digest)
    base_runner = ModelRunner(base.model, config.base.linears, free=True)
    value_runner = ModelRunner(model.backbone, config.base.linears, free=True)
    values, spreads = [], []
    for batch in _batches(states):
        with value_runner.sequences(len(batch)) as owners, base_runner.sequences(len(batch)):
            values.append(_last_values(model, value_runner, batch))
            spreads.append(_spread(config, base, base_runner, model, value_runner, batch, owners))
    ends = []
    for batch in _batches(final):
        with value_runner.sequences(len(batch)):
            ends.append(_last_values(model, value_runner, batch))
    return StateValues(*(_join(each, len(model.objectives)) for each in (values, spreads, ends)))


def _last_values(model: ValueModel, runner: ModelRunner, batch: list[Tokens]) -> Tensor:
    """Read the sequences; returns V of their last states [B, J]."""
    hidden_NH = runner.extend(range(len(batch)), batch)
    last = np.cumsum([len(tokens) for tokens in batch]) - 1
    return model.values(model.outputs(hidden_NH[torch.from_numpy(last).to(hidden_NH.device)]))


def _spread(
    config: RunConfig,
    base: BaseModel,
    base_runner: ModelRunner,
    model: ValueModel,
    value_runner: ModelRunner,
    batch: list[Tokens],
    owners: range,
) -> Tensor:
    """π0-weighted standard deviation of the candidates' values [B, J], after sequences the value model has read."""
    if any(len(tokens) > 1 for tokens in batch):
        base_runner.extend(owners, [tokens[:-1] for tokens in batch])
    logits_BV = base_runner.extend(owners, [tokens[-1:] for tokens in batch], logits=True)
    base_BV = policy(logits_BV, [SamplingParams.of(config.rollouts.sampling, seed=0)] * len(batch))
    eos = torch.tensor(base.eos_token_ids, dtype=torch.long, device=logits_BV.device)
    k_B = torch.full((len(batch),), config.evaluation.candidates)
    tokens_BK, valid_BK = guidance.select_candidates(base_BV, k_B, eos)
    nothing: list[Tokens] = [()] * len(batch)
    k = tokens_BK.shape[1]
    hidden_NH, _ = value_runner.branch(
        owners, nothing, np.repeat(np.arange(len(batch)), k), tokens_BK.flatten().cpu().numpy()
    )
    values_BKJ = model.values(model.outputs(hidden_NH)).view(*tokens_BK.shape, -1)
    logprobs_BK = base_BV.gather(1, tokens_BK).masked_fill(~valid_BK, guidance.NEVER)
    advantages_BKJ = guidance.advantages(values_BKJ, logprobs_BK, valid_BK)
    return (torch.softmax(logprobs_BK, dim=-1)[..., None] * advantages_BKJ.square()).sum(1).sqrt()


def _batches(sequences: list[Tokens]) -> Iterator[list[Tokens]]:
    for start in range(0, len(sequences), BATCH):
        yield sequences[start : start + BATCH]


def _join(batches: list[Tensor], objectives: int) -> np.ndarray:
    if not batches:
        return np.empty((0, objectives))
    return torch.cat(batches).double().cpu().numpy()
