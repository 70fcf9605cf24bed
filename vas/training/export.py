"""From the engine's weights, wherever DeepSpeed keeps them, to a value-model checkpoint."""

from __future__ import annotations

import json
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vas import storage
from vas.config import RunConfig
from vas.models.value import ValueModel, ValueModelConfig
from vas.training.card import model_card


def full_state(engine: Any, model: ValueModel) -> dict[str, Tensor]:
    """All weights in float32 on the CPU; every worker takes part, one tensor at a time, and the first has them."""
    keep = torch.distributed.get_rank() == 0
    sharded = engine.zero_optimization_partition_weights()
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded and master is None):
            if keep:
                state[name] = (parameter if master is None else master).detach().float().cpu().clone()
    if keep:
        kept = model.state_dict().keys()  # not every buffer is
        state |= {name: buffer.cpu().clone() for name, buffer in model.named_buffers() if name in kept}
    return state


def export(
    model: ValueModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    history: list[dict[str, Any]],
    output: str,
) -> None:
    """Write the checkpoint contract: adapters merged in, heads added to the value model that was extended."""
    model = model.finished(config.value, state)
    model.save(output, tokenizer, model_card(model.config, config, history), history)


def describe(output: str, config: RunConfig, history: list[dict[str, Any]]) -> None:
    """Write a checkpoint's model card and training.json anew, when later epochs have brought nothing better."""
    card = model_card(ValueModelConfig.load(output), config, history)
    storage.write_bytes(storage.join(output, "README.md"), card.encode())
    storage.write_bytes(storage.join(output, "training.json"), json.dumps(history).encode())
