"""The DeepSpeed engine of a worker: the value model, what of it is trained, and where it had come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
from torch import nn

from vas.config import RunConfig
from vas.models.base import load_tokenizer
from vas.models.value import ValueModel
from vas.training import resume
from vas.training.deepspeed_config import deepspeed_config
from vas.training.objective import ValueObjective
from vas.training.products import hasten
from vas.training.resume import Progress
from vas.training.spelling import Spelling


def build_model(config: RunConfig, objectives: list[dict[str, Any]]) -> ValueModel:
    """A fresh value model with `requires_grad` on what the run trains."""
    model = ValueModel.build(
        config.value,
        config.base,
        load_tokenizer(*config.value_tokenizer()),
        objectives,
        reads="text" if Spelling.of(config) else "ids",
        td_lambda=config.train.td_lambda,
        run_digest=config.digest(),
    )
    if config.value.extends is not None:
        model.backbone.requires_grad_(False)
    elif config.value.lora is None:
        model.get_input_embeddings().requires_grad_(config.train.train_embeddings)
    if config.train.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@dataclass(frozen=True, slots=True)
class Built:
    """What a worker trains with."""

    engine: Any
    rates: list[float]
    """Peak learning rate of each of the optimizer's parameter groups."""
    progress: Progress


def build_engine(config: RunConfig, objectives: list[dict[str, Any]], workers: int) -> Built:
    """The engine as the last checkpoint left it, and how far that had come."""
    model = build_model(config, objectives)
    made = deepspeed_config(config.train, workers, config.resources.gpus_per_worker > 0)
    with resume.opened(made, workers) as folder:
        engine = initialize(model, config, made)
        rates = [group["lr"] for group in engine.optimizer.param_groups]  # a checkpoint has those of its step
        progress = Progress() if folder is None else resume.restore(engine, folder)
    return Built(engine, rates, progress)


def initialize(model: ValueModel, config: RunConfig, made: dict[str, Any]) -> Any:
    """DeepSpeed's engine over the objective, at its start; `made` is DeepSpeed's JSON."""
    # Only inference uses it, and DeepSpeed would compile it first: half a minute, and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    hasten(model)
    engine, *_ = deepspeed.initialize(
        model=ValueObjective(model, config.train.td_lambda, config.train.target_ema),
        model_parameters=_parameter_groups(model, config),
        config=made,
    )
    if engine.module.target is not None:
        engine.module.target.float()  # in bfloat16 it could not take steps as small as an average's
    return engine


def _parameter_groups(model: ValueModel, config: RunConfig) -> list[dict[str, Any]]:
    """The heads learn at a rate of their own; biases, norms and heads don't decay."""
    train = config.train
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head: list[nn.Parameter] = [p for name, p in named if name.startswith("heads.")]
    decay = [p for name, p in named if not name.startswith("heads.") and p.ndim > 1]
    plain = [p for name, p in named if not name.startswith("heads.") and p.ndim <= 1]
    groups = [
        {"params": decay, "lr": train.lr, "weight_decay": train.weight_decay},
        {"params": plain, "lr": train.lr, "weight_decay": 0.0},
        {"params": head, "lr": train.head_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
