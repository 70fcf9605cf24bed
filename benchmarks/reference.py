"""References for guided decoding that give the engine's tokens: the authors' recipe, and k full rows a sequence.

Both use the same formulas and random numbers as the engine, and Hugging Face models as they come, with
one objective and without truncation of π0.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import DynamicCache

from vas import guidance
from vas.decoding.sampler import entrants, gumbels, sample
from vas.decoding.sequence import Request
from vas.models.base import BaseModel
from vas.models.value import ValueModel


@torch.inference_mode()
def one_at_a_time(base: BaseModel, value: ValueModel, request: Request) -> list[int]:
    """The authors' recipe: one sequence, a forward pass for every candidate, a KV cache for each model."""
    with base.model.device:
        return _one_at_a_time(base, value, request)


def _one_at_a_time(base: BaseModel, value: ValueModel, request: Request) -> list[int]:
    base_cache, value_cache = DynamicCache(), DynamicCache()
    response: list[int] = []
    ids = torch.tensor([request.prompt_token_ids])
    while True:
        logits = base.model(input_ids=ids, past_key_values=base_cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        value.hidden(ids, past_key_values=value_cache, use_cache=True)
        policy, tokens, valid = _candidates(base, [request], logits)
        values = torch.zeros(*tokens.shape, 1)
        for i, token in enumerate(tokens[0]):
            hidden = value.hidden(token.view(1, 1), past_key_values=value_cache, use_cache=True)
            values[0, i] = value.values(value.outputs(hidden[:, -1]))[0]
            value_cache.crop(-1)
        chosen = int(_draw([request], [len(response)], policy, tokens, valid, values))
        response.append(chosen)
        if chosen in base.eos_token_ids or len(response) == request.sampling.max_tokens:
            return response
        ids = torch.tensor([[chosen]])


class FullRows:
    """All sequences at once, each with k rows in the value model's cache, so k copies of its prefix.

    The candidates of a step are one more token in each row. The taken one's column is copied to the
    others; a token that was no candidate runs by itself first. All requests make the same number of tokens.
    """

    def __init__(self, base: BaseModel, value: ValueModel, requests: list[Request]) -> None:
        self._base, self._value, self._requests, self._device = base, value, requests, base.model.device
        self._base_cache, self._value_cache = DynamicCache(), DynamicCache()
        longest = max(len(r.prompt_token_ids) for r in requests)
        rows = [[0] * (longest - len(r.prompt_token_ids)) + [1] * len(r.prompt_token_ids) for r in requests]
        self._mask = torch.tensor(rows, device=self._device)  # prompts are padded on the left
        padded = [[0] * (longest - len(r.prompt_token_ids)) + list(r.prompt_token_ids) for r in requests]
        self._prompts = torch.tensor(padded, device=self._device)
        self.memory = 0
        """Bytes of the value model's cache at its largest."""
        self.seconds = 0.0
        """Spent after the first token."""

    @torch.inference_mode()
    def generate(self) -> list[list[int]]:
        """The responses' tokens."""
        with self._device:
            return self._generate()

    def _generate(self) -> list[list[int]]:
        responses: list[list[int]] = [[] for _ in self._requests]
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._run_base(self._prompts, positions)
        self._value.hidden(
            self._prompts,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._value_cache,
            use_cache=True,
        )
        copied = False
        while True:
            policy, tokens, valid = _candidates(self._base, self._requests, logits)
            k = tokens.shape[1]
            if not copied:
                self._value_cache.batch_repeat_interleave(k)
                copied = True
            step = torch.full((len(tokens),), len(responses[0]))
            values = self._score(tokens)
            chosen = _draw(self._requests, step.tolist(), policy, tokens, valid, values)
            for response, token in zip(responses, chosen.tolist(), strict=True):
                response.append(token)
            if len(responses[0]) == 1:
                started = time.perf_counter()
            if len(responses[0]) == self._requests[0].sampling.max_tokens:
                self.seconds = time.perf_counter() - started
                return responses
            self._take(chosen, tokens)
            self._mask = torch.cat([self._mask, torch.ones(len(tokens), 1, dtype=torch.long)], dim=1)
            logits = self._run_base(chosen[:, None], self._mask.sum(-1, keepdim=True) - 1)

    def _run_base(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._base.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._base_cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _run_value(self, ids: Tensor, rows: Tensor, cache: DynamicCache) -> Tensor:
        """The last hidden state of a token in each of `rows` of the batch."""
        mask = torch.cat([self._mask, torch.ones(len(self._mask), 1, dtype=torch.long)], dim=1)[rows]
        hidden = self._value.hidden(
            ids,
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        return hidden[:, -1]

    def _score(self, tokens_BK: Tensor) -> Tensor:
        """Values of the candidates, each in a row of its own: [B, K, 1]."""
        rows = torch.arange(len(tokens_BK)).repeat_interleave(tokens_BK.shape[1])
        hidden = self._run_value(tokens_BK.reshape(-1, 1), rows, self._value_cache)
        self.memory = max(
            self.memory, sum(layer.keys.nbytes + layer.values.nbytes for layer in self._value_cache.layers)
        )
        return self._value.values(self._value.outputs(hidden)).view(*tokens_BK.shape, 1)

    def _take(self, chosen_B: Tensor, tokens_BK: Tensor) -> None:
        """Let every row's last column be that of the token taken."""
        rows, k = tokens_BK.shape
        match = tokens_BK == chosen_B[:, None]
        source = torch.arange(rows) * k + match.int().argmax(-1)
        outside = (~match.any(-1)).nonzero().flatten()
        alone = DynamicCache()
        if len(outside):
            for number, layer in enumerate(self._value_cache.layers):
                prefix = outside * k
                alone.update(layer.keys[prefix, :, :-1], layer.values[prefix, :, :-1], number)
            self._run_value(chosen_B[outside, None], outside, alone)
        for number, layer in enumerate(self._value_cache.layers):
            for states, own in (("keys", layer.keys), ("values", layer.values)):
                column = own[source, :, -1]
                if len(outside):
                    column[outside] = getattr(alone.layers[number], states)[:, :, -1]
                own[:, :, -1] = column.repeat_interleave(k, dim=0)


def _candidates(base: BaseModel, requests: list[Request], logits_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log π0, the candidates and which of them count."""
    one = torch.ones(len(requests))
    temperature = torch.tensor([float(r.sampling.temperature) for r in requests])
    policy = guidance.policy_logprobs(
        logits_BV, temperature, torch.zeros(len(requests), dtype=torch.long), one, one * 0
    )
    k = torch.tensor([r.guidance.candidates for r in requests])
    return policy, *guidance.select_candidates(policy, k, torch.tensor(base.eos_token_ids, dtype=torch.long))


def _draw(
    requests: list[Request], steps: list[int], policy_BV: Tensor, tokens_BK: Tensor, valid_BK: Tensor, values: Tensor
) -> Tensor:
    """The next tokens [B], from the guided policy."""
    advantage = guidance.advantages(values, policy_BV.gather(1, tokens_BK), valid_BK)
    strengths = torch.tensor([list(r.guidance.objectives.values()) for r in requests])
    guided = guidance.combine(policy_BV, tokens_BK, valid_BK, advantage, strengths)
    noise = gumbels([r.sampling.seed for r in requests], steps, entrants(policy_BV.shape[1]))
    return sample(guided, torch.from_numpy(noise).to(policy_BV.device), torch.zeros(len(requests), dtype=torch.bool))
