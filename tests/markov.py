"""A language model whose values are known: a Markov chain, with a reward on the last state before it ends.

The chain is a real causal LM: its layers add nothing, and its output weights are the log-probabilities of the next
token given the last one.
"""

from __future__ import annotations

import numpy as np
import torch
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from vas.models.base import BaseModel, tokenizer_digest

STATES = (4, 5, 6, 7, 8, 9)  # token ids
REWARDS = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])
END = 0.3  # probability of ending, in every state
STAY = 0.5
WIDTH = 32


def transitions() -> np.ndarray:
    """P(next state | state), less the probability of ending: [states, states]; neighbours are likelier."""
    distance = np.abs(np.subtract.outer(np.arange(len(STATES)), np.arange(len(STATES)))).astype(float)
    moves = np.where(distance > 0, np.exp(-distance), 0.0)
    moves *= (1 - END - STAY) / moves.sum(1, keepdims=True)
    return moves + STAY * np.eye(len(STATES))


def values() -> np.ndarray:
    """V(s) = Σ P(s'|s)·V(s') + P(end|s)·r(s), solved: [states]."""
    return np.linalg.solve(np.eye(len(STATES)) - transitions(), END * REWARDS)


def exact(tokens: list[int]) -> float:
    """The value of a prefix: its last state's, or once it has ended the reward of the state before."""
    if tokens[-1] == tiny_tokenizer().eos_token_id:
        return float(REWARDS[STATES.index(tokens[-2])])
    return float(values()[STATES.index(tokens[-1])])


def markov_base() -> BaseModel:
    """The chain as a base model."""
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        "llama",
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()
    layer = model.model.layers[0]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.model.embed_tokens.weight):
        weight.zero_()
    model.lm_head.weight.fill_(-30.0 / WIDTH**0.5)  # of a normed one-hot state: log-probability -30
    for row, state in enumerate(STATES):
        model.model.embed_tokens.weight[state, row] = 1.0
        chances = torch.from_numpy(transitions()[row]).log() / WIDTH**0.5
        model.lm_head.weight[list(STATES), row] = chances.float()
        model.lm_head.weight[tokenizer.eos_token_id, row] = float(np.log(END)) / WIDTH**0.5
    return BaseModel("markov", model, tokenizer, (tokenizer.eos_token_id,), tokenizer_digest(tokenizer))
