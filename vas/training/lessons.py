"""Lessons: what a trained value model says of the tokens that could have come, at every place of some rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vas import guidance
from vas.choices import Linears
from vas.decoding.runner import ModelRunner
from vas.models.base import BaseModel
from vas.models.value import ValueModel

RESPONSES = 16  # in a pass of the teacher


@dataclass(frozen=True, slots=True)
class Lesson:
    """A packed row, and the teacher's word on P parent states in it, of K candidates each.

    The parents are the states before each token of the row's responses, in order.
    """

    row: dict[str, Any]
    """As `packing.pack` makes it."""
    tokens_PK: Tensor
    logprobs_PK: Tensor
    """log π0 of the candidates; -inf for one that doesn't count."""
    values_PKJ: Tensor
    states_PH: Tensor
    """The teacher's hidden states of the parents."""


def labels(lessons: Sequence[Lesson], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log π0 and the teacher's values of all candidates of some lessons, one after the other."""
    columns = ("tokens_PK", "logprobs_PK", "values_PKJ")
    tokens, logprobs, values = (torch.cat([getattr(each, name) for each in lessons]).to(device) for name in columns)
    return tokens, logprobs, values


class Lessons:
    """Makes lessons of packed rows; calling it changes neither model.

    candidates, temperature: of π0, as decoding will ask for them. linears: how both models compute, see
    `ModelRunner`.
    """

    def __init__(
        self,
        base: BaseModel,
        teacher: ValueModel,
        candidates: int = 20,
        temperature: float = 1.0,
        linears: Linears = "exact",
    ) -> None:
        self._teacher, self._candidates, self._temperature = teacher, candidates, temperature
        self._eos = torch.tensor(base.eos_token_ids, dtype=torch.long, device=base.model.device)
        self._policy, self._value = ModelRunner(base.model, linears), ModelRunner(teacher.backbone, linears)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[Lesson]:
        """A lesson of each row."""
        return [self._lesson(row) for row in rows]

    def _lesson(self, row: dict[str, Any]) -> Lesson:
        responses = row["responses"]
        parts = [self._part(row["prompt"], responses[i : i + RESPONSES]) for i in range(0, len(responses), RESPONSES)]
        # an inference tensor cannot be trained on; its clone can
        return Lesson(row, *(torch.cat(each).clone() for each in zip(*parts, strict=True)))

    @torch.inference_mode()
    def _part(self, prompt: list[int], responses: list[list[int]]) -> tuple[Tensor, ...]:
        """Candidates, log π0, values and states at every place of some responses to a prompt."""
        count = len(responses)
        with self._policy.sequences(count) as owners, self._value.sequences(count):
            tokens = [(*prompt, *response) for response in responses]
            logits = self._policy.extend(owners, tokens, logits=True)
            states = self._value.extend(owners, tokens)
            first = np.cumsum([0, *map(len, tokens[:-1])])
            # the state before each token of the response, as an index into the pass, and the token's place
            index = np.repeat(owners, [len(response) for response in responses])
            places = len(prompt) + np.concatenate([np.arange(len(response)) for response in responses])
            parents = torch.from_numpy(first[index] + places - 1)
            logprobs = torch.log_softmax(logits[parents].float() / self._temperature, dim=-1)
            asked, valid = guidance.select_candidates(logprobs, torch.full((len(index),), self._candidates), self._eos)
            k, flat = asked.shape[1], asked.flatten().cpu().numpy()
            nothing: list[tuple[int, ...]] = [()] * count
            branches, _ = self._value.branch(owners, nothing, index.repeat(k), flat, places=places.repeat(k))
        values = self._teacher.values(self._teacher.outputs(branches)).view(*asked.shape, -1)
        return asked, logprobs.gather(1, asked).masked_fill(~valid, guidance.NEVER), values, states[parents].cpu()
