"""What is to be sampled, cut into batches whose place alone says what is in them.

A batch is what one call of an actor samples and one file commits. Which responses are in batch 17 follows
from the plan, not from what happened before: so a batch that two processes sample, one of them long given
up for dead, is one file with the same rows, and what is left to do is a matter of file names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from vas import schema
from vas.digests import digest
from vas.schema import Prompt

BASE_SETTING = "{}"
WINDOW = 1024  # prompts that are sorted by length together


def setting_key(strengths: dict[str, float]) -> str:
    """The JSON that names a setting of β, the same for the same strengths."""
    return json.dumps({name: float(beta) for name, beta in sorted(strengths.items()) if beta})


@dataclass(frozen=True, slots=True)
class Job:
    """One response to sample."""

    rollout_id: str
    prompt: Prompt
    sample_index: int
    round: int
    setting: str
    """JSON: objective → strength; "{}" samples from π0."""
    seed: int
    prefix: tuple[int, ...] = ()
    """Token ids that the response begins with already."""
    roll_in: RollIn | None = None


@dataclass(frozen=True, slots=True)
class RollIn:
    """The beginning of a response that the guided policy writes, before π0 goes on."""

    setting: str
    share: float
    """Its length as a share of the longest response, in [0, 1)."""
    seed: int


@dataclass(frozen=True)
class Plan:
    """Responses to sample: `samples` a prompt, under one setting of β.

    The random numbers of a sample are a function of (seed, prompt, sample_index) and its prefix alone,
    so settings are compared under the same ones.
    """

    prompts: Sequence[Prompt]
    """In memory, or a `StoredPrompts` that reads what a batch needs."""
    samples: int
    run_seed: int
    round: int = 0
    setting: str = BASE_SETTING
    prefixes: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    """Prompt id → the tokens that each of its samples begins with; none for a prompt that is not named."""
    roll_in: Sequence[str] = ()
    """Settings of β under which responses begin, one drawn for each, for a length that is drawn too."""

    def rollout_id(self, prompt: Prompt, sample_index: int) -> str:
        """The identity of one response."""
        base = self._draw_id(prompt, sample_index)
        return base if self.setting == BASE_SETTING else digest(base, self.setting)

    def batches(self, sequences: int) -> int:
        """How many batches of about `sequences` responses the plan has."""
        return -(-len(self.prompts) // self._prompts_each(sequences))

    def batch(self, number: int, sequences: int) -> list[Job]:
        """The responses of one batch; the prompts of a window are sorted by length, shortest first."""
        size = self._prompts_each(sequences)
        each = max(1, WINDOW // size)  # batches a window
        window, place = divmod(number, each)
        prompts = sorted(self.prompts[window * each * size : (window + 1) * each * size], key=_length)
        return [self._job(p, i) for p in prompts[place * size : (place + 1) * size] for i in range(self.samples)]

    def size(self, number: int, sequences: int) -> int:
        """Responses of one batch."""
        size = self._prompts_each(sequences)
        return min(size, len(self.prompts) - number * size) * self.samples

    @cached_property
    def key(self) -> str:
        """What the names of its files begin with: plans that differ don't share a file."""
        first = self.prompts[0].prompt_id if len(self.prompts) else ""
        prefixes = [(name, *map(tuple, tokens)) for name, tokens in sorted(self.prefixes.items())]
        about = len(self.prompts), first, self.samples, self.run_seed, self.round, self.setting, *self.roll_in
        return digest("plan", *about, *prefixes)[:8]

    def _prompts_each(self, sequences: int) -> int:
        return max(1, sequences // self.samples)

    def _job(self, prompt: Prompt, i: int) -> Job:
        draw = self._draw_id(prompt, i)
        prefix = tuple(self.prefixes[prompt.prompt_id][i]) if prompt.prompt_id in self.prefixes else ()
        return Job(
            rollout_id=self.rollout_id(prompt, i),
            prompt=prompt,
            sample_index=i,
            round=self.round,
            setting=self.setting,
            seed=schema.rollout_seed(draw),
            prefix=prefix,
            roll_in=self._roll_in(draw) if self.roll_in else None,
        )

    def _roll_in(self, draw: str) -> RollIn:
        setting, share, seed = (int(digest(draw, "roll-in", what), 16) for what in ("setting", "share", "seed"))
        return RollIn(self.roll_in[setting % len(self.roll_in)], share / 16**16, seed % (1 << 63))

    def _draw_id(self, prompt: Prompt, sample_index: int) -> str:
        """What the random numbers of a response hang on: not those again that its prefix was drawn with."""
        base = schema.rollout_id(self.run_seed, self.round, prompt.prompt_id, sample_index)
        if prompt.prompt_id not in self.prefixes:
            return base
        return digest(base, "roll-in", *self.prefixes[prompt.prompt_id][sample_index])


def _length(prompt: Prompt) -> int:
    """Characters: near enough to tokens to sort by."""
    return len(prompt.text) + sum(len(message["content"]) for message in prompt.messages)
