"""Distils a trained value model into vocab heads, which score all next tokens from the parent state.

The teacher's backbone stays as it is, and so does what it says of a state; only the new heads are fitted,
to the teacher's values of the base model's likeliest tokens at every place of some rollouts. Fitting a
vocab head to the tokens that were taken would leave it without an opinion of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from vas import guidance
from vas.decoding.runner import ModelRunner
from vas.models.base import BaseModel
from vas.models.heads import VocabHead
from vas.models.value import ValueModel, ValueModelConfig

BATCH = 16  # rollouts in a pass
STATES = 512  # parent states in an optimizer step
WEIGHT_DECAY = 0.1


@dataclass(slots=True)
class Lesson:
    """What the teacher says: of N parent states, K candidates each."""

    hidden_NH: Tensor
    tokens_NK: Tensor
    logprobs_NK: Tensor
    """log π0 of the candidates; -inf for one that doesn't count."""
    values_NKJ: Tensor


def distill(
    base: BaseModel,
    teacher: ValueModel,
    rollouts: Sequence[tuple[Sequence[int], Sequence[int]]],
    candidates: int = 20,
    temperature: float = 1.0,
    epochs: int = 10,
    lr: float = 3e-4,
    seed: int = 0,
) -> tuple[ValueModel, float]:
    """A value model with vocab heads on the teacher's backbone, and the share of the advantages' variance it explains.

    rollouts: prompt and response token ids. candidates, temperature: of π0, as decoding will ask for them.
    The share is of the last tenth of the rollouts, which are not fitted; it is 1 for a perfect copy.
    """
    student = ValueModel(
        ValueModelConfig(**(teacher.config.to_dict() | {"head": {"kind": "vocab"}, "dtype": "float32"}))
    )
    student.backbone.load_state_dict(teacher.backbone.state_dict())
    student = student.float().to(teacher.device)
    for head in student.heads:
        cast(VocabHead, head).reset()
    held_out = max(1, len(rollouts) // 10)
    lesson = _join(_lessons(base, teacher, rollouts[:-held_out], candidates, temperature))
    test = _join(_lessons(base, teacher, rollouts[-held_out:], candidates, temperature))

    parameters = [parameter for head in student.heads for parameter in head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(lesson.hidden_NH) // STATES)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for some in torch.randperm(len(lesson.hidden_NH), generator=generator).split(STATES):
            error, _ = _errors(student, lesson, some)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        error, variance = _errors(student, test, torch.arange(len(test.hidden_NH)))
    return student.requires_grad_(False).eval(), 1 - float(error / variance)


def _errors(student: ValueModel, lesson: Lesson, some: Tensor) -> tuple[Tensor, Tensor]:
    """π0-weighted squared error of the student's advantages, and what it would be if they were all 0."""
    tokens, logprobs = lesson.tokens_NK[some], lesson.logprobs_NK[some]
    every = logprobs > guidance.NEVER
    outputs = [cast(VocabHead, head)(lesson.hidden_NH[some]) for head in student.heads]
    found = guidance.advantages(student.next_values(outputs, tokens), logprobs, every)
    wanted = guidance.advantages(lesson.values_NKJ[some], logprobs, every)
    weights = torch.softmax(logprobs, dim=-1)[..., None]
    return (weights * (found - wanted).square()).mean(), (weights * wanted.square()).mean()


@torch.inference_mode()
def _lessons(
    base: BaseModel,
    teacher: ValueModel,
    rollouts: Sequence[tuple[Sequence[int], Sequence[int]]],
    candidates: int,
    temperature: float,
) -> Iterator[Lesson]:
    """The teacher's values of the candidates at every place of the rollouts, a batch at a time."""
    eos = torch.tensor(base.eos_token_ids, dtype=torch.long, device=base.model.device)
    policy, value = ModelRunner(base.model), ModelRunner(teacher.backbone)
    for start in range(0, len(rollouts), BATCH):
        batch = rollouts[start : start + BATCH]
        owners = list(range(len(batch)))
        tokens = [(*prompt, *response) for prompt, response in batch]
        for runner in (policy, value):
            for owner in owners:
                runner.cache.add(owner)
        logits = policy.extend(owners, tokens, logits=True)
        hidden = value.extend(owners, tokens)
        first = np.cumsum([0, *map(len, tokens[:-1])])
        # the state before each token of the response, as an index into the pass, and the token's place
        index = np.repeat(owners, [len(response) for _, response in batch])
        places = np.concatenate([len(p) + np.arange(len(r)) for p, r in batch])
        parents = torch.from_numpy(first[index] + places - 1)
        logprobs = torch.log_softmax(logits[parents].float() / temperature, dim=-1)
        asked, valid = guidance.select_candidates(logprobs, torch.full((len(index),), candidates), eos)
        nothing: list[tuple[int, ...]] = [()] * len(batch)
        k, flat = asked.shape[1], asked.flatten().cpu().numpy()
        branches, _ = value.branch(owners, nothing, index.repeat(k), flat, places=places.repeat(k))
        values = teacher.values(teacher.outputs(branches)).view(*asked.shape, -1)
        yield Lesson(hidden[parents], asked, logprobs.gather(1, asked).masked_fill(~valid, guidance.NEVER), values)
        for runner in (policy, value):
            for owner in owners:
                runner.cache.free(owner)


def _join(lessons: Iterator[Lesson]) -> Lesson:
    """Many lessons as one, as tensors that can be trained on."""
    every = list(lessons)
    columns = ("hidden_NH", "tokens_NK", "logprobs_NK", "values_NKJ")
    return Lesson(*(torch.cat([getattr(each, name) for each in every]).clone() for name in columns))
