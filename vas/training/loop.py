"""What every training worker runs: DeepSpeed over packed rollouts, an epoch at a time."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import nullcontext
from itertools import islice
from typing import Any

import deepspeed
import deepspeed.ops
import ray.train
import torch
from torch import nn

from vas.config import RunConfig
from vas.models.base import load_tokenizer, set_threads
from vas.models.value import ValueModel
from vas.training.batches import Batch, collate
from vas.training.card import model_card
from vas.training.deepspeed_config import deepspeed_config
from vas.training.metrics import Held
from vas.training.objective import ValueObjective

SHUFFLE_ROWS = 256


def train_worker(settings: dict[str, Any]) -> None:
    """Fit the value model; the last epoch writes the checkpoint contract to `settings["output"]`.

    settings: `config` (RunConfig), `objectives` (as in ValueModelConfig), `rows` (training
    rows over all workers), `threads`, `output`, `board` (an actor that takes progress).
    """
    config: RunConfig = settings["config"]
    set_threads(settings["threads"])
    torch.manual_seed(config.seed)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    on_gpu = config.resources.gpus_per_worker > 0
    tokenizer = load_tokenizer(*config.backbone())
    model = ValueModel.build(
        config.value,
        config.base,
        tokenizer,
        settings["objectives"],
        td_lambda=config.train.td_lambda,
        run_digest=config.digest(),
    )
    model.get_input_embeddings().requires_grad_(config.train.train_embeddings)
    ds_config = deepspeed_config(config.train, workers, on_gpu)
    passes = math.ceil(settings["rows"] // workers / ds_config["train_micro_batch_size_per_gpu"])
    steps = math.ceil(passes / ds_config["gradient_accumulation_steps"]) * config.train.epochs
    # Only inference uses it, and DeepSpeed would compile it first: half a minute, and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=ValueObjective(model, config.train.td_lambda),
        model_parameters=_parameter_groups(model, config),
        config=ds_config,
        lr_scheduler=lambda optimizer: _schedule(optimizer, steps, config.train.warmup),
    )
    history: list[dict[str, Any]] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder)
            history = state["history"]
    for epoch in range(len(history), config.train.epochs):
        losses = _train_epoch(engine, config, epoch, settings, rank)
        metrics = _evaluate(engine, ds_config["train_micro_batch_size_per_gpu"])
        history.append({"epoch": epoch + 1, "losses": losses, "held_out": metrics})
        if epoch + 1 == config.train.epochs:
            _export(engine, model, tokenizer, config, history, settings["output"], rank)
        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, client_state={"history": history})
            summary = {"epoch": epoch + 1, "loss": sum(losses) / max(len(losses), 1), "held_out": metrics}
            ray.train.report(summary, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _train_epoch(engine: Any, config: RunConfig, epoch: int, settings: dict[str, Any], rank: int) -> list[float]:
    """One pass over this worker's shard; the worker's own loss at every optimizer step."""
    engine.train()
    losses: list[float] = []
    tokens, started = 0, time.monotonic()
    tables = iter(
        ray.train.get_dataset_shard("train").iter_batches(
            batch_size=engine.train_micro_batch_size_per_gpu(),
            batch_format="pyarrow",
            local_shuffle_buffer_size=SHUFFLE_ROWS,
            local_shuffle_seed=config.seed + epoch,
        )
    )
    while step := list(islice(tables, engine.gradient_accumulation_steps())):
        running = []
        for number, table in enumerate(step, 1):
            batch = _on_device(collate(table.to_pylist()), engine)
            # an epoch's last step may be short of passes; shards are equal, so it is on every worker
            engine.set_gradient_accumulation_boundary(number == len(step))
            loss, _ = engine(batch)
            engine.backward(loss)
            engine.step()
            running.append(loss.detach())
            tokens += batch.tokens
        losses.append(float(torch.stack(running).mean()))
        if rank == 0:
            rate = tokens / (time.monotonic() - started)
            settings["board"].advance.remote(
                sum(table.num_rows for table in step) * ray.train.get_context().get_world_size(),
                f"epoch {epoch + 1}, loss {losses[-1]:.3f}, {rate:.0f} tokens/s a worker",
            )
    return losses


@torch.no_grad()
def _evaluate(engine: Any, batch_size: int) -> dict[str, Any]:
    """Metrics on the held-out rollouts, the same on every worker."""
    engine.eval()
    held = Held()
    objective: ValueObjective = engine.module
    for table in ray.train.get_dataset_shard("held_out").iter_batches(batch_size=batch_size, batch_format="pyarrow"):
        batch = _on_device(collate(table.to_pylist()), engine)
        _, values_NSJ = engine(batch)
        rewards_NSJ = objective.standardise(batch.rewards_NJ)[:, None].expand_as(values_NSJ)
        step = torch.arange(values_NSJ.shape[1], device=values_NSJ.device)
        progress_NS = step / batch.last_N[:, None].clamp(min=1)
        keep = batch.trained_NS
        held.add(values_NSJ[keep].cpu().numpy(), rewards_NSJ[keep].cpu().numpy(), progress_NS[keep].cpu().numpy())
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, held)
    merged = Held()
    for part in everyone:
        merged.extend(part)
    return merged.report(objective.model.objectives)


def _export(
    engine: Any,
    model: ValueModel,
    tokenizer: Any,
    config: RunConfig,
    history: list[dict[str, Any]],
    output: str,
    rank: int,
) -> None:
    """Rank 0 writes the checkpoint contract; with ZeRO-3 all ranks lend their parts of the weights."""
    sharded = engine.zero_optimization_partition_weights()
    whole = deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0) if sharded else nullcontext()
    with whole:
        if rank == 0:
            model.save(output, tokenizer, model_card(model.config, config, history), history)


def _on_device(batch: Batch, engine: Any) -> Batch:
    return batch.to(engine.device, next(engine.module.model.backbone.parameters()).dtype)


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


def _schedule(optimizer: Any, steps: int, warmup: float) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise over `warmup`·steps, then a cosine down to a tenth."""
    rise = max(1, int(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        share = min(1.0, (step - rise) / max(1, steps - rise))
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
