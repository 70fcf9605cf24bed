"""Switches that turn one optimisation off, to see what it brings: VAS_OFF=name,name."""

from __future__ import annotations

import os

from vas.errors import VasError, nearest

NAMES = {
    "packed_linears": "linear layers in the layout of this CPU's kernels (else torch's own)",
    "fused_llama": "a leaner forward pass for models of the Llama family (else Hugging Face's)",
    "cuda_graphs": "decoding steps of one shape are recorded once and replayed on a GPU",
    "lanes": "a pass of many tokens is shared out among a CPU's threads by sequences (else each product is)",
    "joint_prefill": "short prompts are read in the pass that decodes other sequences (else in one of their own)",
    "between_layers": "a request that comes during the base model's pass is begun between two layers (else after it)",
    "first_tokens": "first tokens, and those without guidance, do not wait for others' value models (else for all)",
    "shared_prefixes": "prompts that begin alike are read once",
}


def off(name: str) -> bool:
    """Whether an optimisation is switched off. Raises VasError if the variable names one that is not there."""
    assert name in NAMES
    chosen = [each.strip() for each in os.environ.get("VAS_OFF", "").split(",") if each.strip()]
    for each in chosen:
        if each not in NAMES:
            raise VasError(f"no optimisation is called '{each}'", "VAS_OFF", nearest(each, list(NAMES)))
    return name in chosen
