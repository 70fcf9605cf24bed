"""What a response costs, in model FLOPs: 2 × parameters × token positions.

Embedding look-ups cost nothing; attention's own products (under 2 % at a demo's lengths) are
left out, for every method alike. Scoring by a reward is left out too, which favours best-of-N.
"""

from __future__ import annotations

from transformers import PreTrainedConfig


def parameters_per_position(config: PreTrainedConfig, head: bool) -> int:
    """Weights that one token position is multiplied with: the layers', and the output layer's if `head`."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embeddings = model.get_input_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.base_model.parameters()) - embeddings
    return layers + (config.vocab_size * config.hidden_size if head else 0)


def best_of_n(base: float, prompt: float, response: float, n: int) -> float:
    """FLOPs of n responses of mean length `response` to one prompt that is run once."""
    return 2.0 * base * (prompt + n * response)
