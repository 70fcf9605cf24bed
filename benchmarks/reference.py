"""The authors' recipe, as the reference to beat: a forward pass a candidate, a sequence at a time.

Same formulas and the same random numbers as the engine, so the same tokens.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from vas import guidance
from vas.decoding.sampler import sample, uniforms
from vas.decoding.sequence import Request
from vas.models.base import BaseModel
from vas.models.value import ValueModel


@torch.inference_mode()
def generate_one(base: BaseModel, value: ValueModel, request: Request) -> list[int]:
    """Decode one request with one objective; both models keep a KV cache of the prefix."""
    (strength,) = request.guidance.objectives.values()
    strengths = torch.tensor([[strength]])
    base_cache, value_cache = DynamicCache(), DynamicCache()
    response: list[int] = []
    ids = torch.tensor([request.prompt_token_ids])
    while True:
        logits = base.model(input_ids=ids, past_key_values=base_cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        value.hidden(ids, past_key_values=value_cache, use_cache=True)
        one = torch.ones(1)
        policy = guidance.policy_logprobs(
            logits, one * request.sampling.temperature, torch.zeros(1, dtype=torch.long), one, one * 0
        )
        tokens, valid = guidance.select_candidates(
            policy, torch.tensor([request.guidance.candidates]), torch.tensor(base.eos_token_ids, dtype=torch.long)
        )
        values = torch.zeros(*tokens.shape, 1)
        for i, token in enumerate(tokens[0]):
            hidden = value.hidden(token.view(1, 1), past_key_values=value_cache, use_cache=True)
            values[0, i] = value.values(value.outputs(hidden[:, -1]))[0]
            value_cache.crop(-1)
        advantage = guidance.advantages(values, policy.gather(1, tokens), valid)
        guided = guidance.combine(policy, tokens, valid, advantage, strengths)
        number = torch.from_numpy(uniforms([request.sampling.seed], [len(response)]))
        chosen = int(sample(guided, number, torch.tensor([False])))
        response.append(chosen)
        if chosen in base.eos_token_ids or len(response) == request.sampling.max_tokens:
            return response
        ids = torch.tensor([[chosen]])
