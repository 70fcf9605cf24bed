"""What every training worker runs: DeepSpeed over packed rollouts, an epoch at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import ray.train
import torch
import torch.distributed

from vas.config import RunConfig
from vas.models.base import load_tokenizer, set_threads
from vas.training import history, resume
from vas.training.build import Built, build_engine
from vas.training.data import Packed, Share
from vas.training.export import describe, export, full_state
from vas.training.metrics import Held
from vas.training.objective import ValueObjective
from vas.training.schedule import factor
from vas.training.speed import Speed
from vas.training.step import take_step
from vas.training.tracking import Tracking

WATCH = 10  # steps between looks for a machine that is about to be taken away


def train_worker(settings: dict[str, Any]) -> None:
    """Fit the value model; the best epoch's is written to `settings["output"]`, a checkpoint by the contract.

    settings: `config` (RunConfig), `objectives` (as in ValueModelConfig), `packed` (side → location of the
    packed rows), `threads`, `output`, `tracked` (where TensorBoard's files go), `board` (takes progress).
    """
    config: RunConfig = settings["config"]
    set_threads(settings["threads"])
    torch.manual_seed(config.seed)  # of all that is random only the order of the data comes later: it seeds itself
    built = build_engine(config, settings["objectives"], ray.train.get_context().get_world_size())
    _Training(built, settings).run()


class _Training:
    """One worker's part in a training."""

    def __init__(self, built: Built, settings: dict[str, Any]) -> None:
        self._engine, self._rates, self._progress, self._settings = built.engine, built.rates, built.progress, settings
        self._config: RunConfig = settings["config"]
        self._objective: ValueObjective = built.engine.module
        context = ray.train.get_context()
        self._rank, self._workers = context.get_world_rank(), context.get_world_size()
        self._passes = built.engine.gradient_accumulation_steps()
        self._train, self._held_out = (Packed(settings["packed"][side]) for side in ("train", "held_out"))
        self._epochs = [
            self._train.epoch(self._config.train.batch_size, (self._config.seed, epoch))
            for epoch in range(self._config.train.epochs)
        ]
        self._speed = Speed(self._objective.model.backbone, built.engine.device)
        self._rows = 0

    def run(self) -> None:
        """What is left of the training."""
        progress, train = self._progress, self._config.train
        with self._tracking() if self._rank == 0 else nullcontext() as tracking:
            if progress.resumed:
                begun = self._epochs[progress.epoch].steps[: progress.step] if progress.epoch < train.epochs else []
                self._rows = len(self._train) * progress.epoch + sum(len(step.rows) for step in begun)
                self._tell(f"going on after step {progress.step} of epoch {progress.epoch + 1}")
            while progress.epoch < train.epochs and not history.hopeless(progress.history, train.patience):
                self._epoch(tracking)
                metrics = self._evaluate()
                progress.finish_epoch(metrics)
                if history.best(progress.history) == progress.epoch - 1:
                    self._export()
                if tracking is not None:
                    tracking.log(self._steps_before(progress.epoch), _flat(metrics))
                self._save(tracking, {"held_out": metrics})
        if self._rank == 0:
            describe(self._settings["output"], self._config, progress.history)

    def _epoch(self, tracking: Tracking | None) -> None:
        """The steps that are left of the next epoch."""
        progress, train = self._progress, self._config.train
        order = self._epochs[progress.epoch]
        before, steps = self._steps_before(progress.epoch), self._steps_before(train.epochs)
        self._engine.train()
        self._speed.start()
        warned = False
        for share in self._train.shares(order, progress.step, self._rank, self._workers, self._passes):
            number = before + progress.step
            rate = factor(number, steps, train.warmup)
            loss = self._step(share, rate)
            progress.losses.append(loss)
            progress.step += 1
            figures = {"loss": loss, "lr": train.lr * rate} | self._speed.figures(share)
            if tracking is not None:
                tracking.log(number + 1, figures)
            self._rows += share.rows
            self._tell(
                f"epoch {progress.epoch + 1}, loss {loss:.3f}, {figures['tokens_per_s'] * self._workers:.0f} tokens/s, "
                f"MFU {figures['mfu']:.0%}",
            )
            leaving = not warned and progress.step % WATCH == 0 and ray.train.get_preemption_info() is not None
            warned = warned or leaving
            if progress.step < len(order.steps) and (leaving or progress.step % train.checkpoint_steps == 0):
                self._save(tracking, {"loss": loss})

    def _step(self, share: Share, rate: float) -> float:
        """One optimizer step at a share of the peak learning rates; returns its loss."""
        for group, peak in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = peak * rate
        return take_step(self._engine, share)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, Any]:
        """Metrics on the held-out rollouts, the same on every worker."""
        self._engine.eval()
        held = Held()
        size = self._engine.train_micro_batch_size_per_gpu()
        for batch in self._held_out.batches(size, self._rank, self._workers):
            moved = batch.to(self._engine.device)
            _, values_NSJ = self._engine(moved)
            rewards_NSJ = self._objective.standardise(moved.rewards_NJ)[:, None].expand_as(values_NSJ)
            step = torch.arange(values_NSJ.shape[1], device=values_NSJ.device)
            progress_NS = step / moved.last_N[:, None].clamp(min=1)
            keep = moved.trained_NS
            held.add(values_NSJ[keep].cpu().numpy(), rewards_NSJ[keep].cpu().numpy(), progress_NS[keep].cpu().numpy())
        everyone: list[Any] = [None] * self._workers
        torch.distributed.all_gather_object(everyone, held)
        merged = Held()
        for part in everyone:
            merged.extend(part)
        return merged.report(self._objective.model.objectives)

    def _export(self) -> None:
        """The first worker writes the checkpoint, all lend their parts of the weights."""
        model = self._objective.model
        state = full_state(self._engine, model)
        if self._rank == 0:
            tokenizer = load_tokenizer(*self._config.value_tokenizer())
            export(model, state, tokenizer, self._config, self._progress.history, self._settings["output"])

    def _save(self, tracking: Tracking | None, metrics: dict[str, Any]) -> None:
        """A checkpoint, and the learning curves up to it."""
        resume.save(
            self._engine, self._progress, {"epoch": self._progress.epoch, "step": self._progress.step} | metrics
        )
        if tracking is not None:
            tracking.flush()

    def _steps_before(self, epoch: int) -> int:
        return sum(len(order.steps) for order in self._epochs[:epoch])

    def _tracking(self) -> Tracking:
        config = self._config
        return Tracking.open(config.train.track, config.name, self._settings["tracked"], config.model_dump(mode="json"))

    def _tell(self, note: str) -> None:
        if self._rank == 0:
            self._settings["board"].put.remote(self._rows, note)


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    """The held-out figures that are one number each, named as a path."""
    return {
        f"held_out/{objective}/{name}": value
        for objective, figures in metrics.items()
        for name, value in figures.items()
        if isinstance(value, float)
    }
