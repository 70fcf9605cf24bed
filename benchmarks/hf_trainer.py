"""The reference for training: Hugging Face `Trainer` on one rollout a row, padded to the longest of its batch.

The model, its first weights, the rollouts and the loss are those of our own training with λ = 1; batching, optimizer
and loop are Trainer's, with its defaults but for what is only output.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.fitting import Fitted, fresh_model
from vas import storage
from vas.config import RunConfig
from vas.models.base import quieten, set_threads
from vas.training.packing import packed_file

Example = dict[str, Any]


class Reference:
    """A value model and the Trainer that fits it."""

    def __init__(self, config: RunConfig, objectives: list[dict[str, Any]], threads: int) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        quieten()
        set_threads(threads)
        self._model = fresh_model(config, objectives)
        self._objectives, self._train = objectives, config.train

    def fit(self, location: str, batch_size: int, by_length: bool = False) -> Fitted:
        """A pass over packed rows, so many rollouts a step; by_length: with Trainer's own sampler for that."""
        rows = storage.read_table([packed_file(location, 0)]).to_pylist()
        counter = _Counter()
        with tempfile.TemporaryDirectory() as folder:
            trainer = _Trainer(
                self._model,
                TrainingArguments(
                    folder,
                    use_cpu=True,
                    num_train_epochs=1,
                    per_device_train_batch_size=batch_size,
                    train_sampling_strategy="group_by_length" if by_length else "random",
                    learning_rate=self._train.lr,
                    lr_scheduler_type="constant",
                    weight_decay=self._train.weight_decay,
                    max_grad_norm=self._train.gradient_clipping,
                    remove_unused_columns=False,
                    dataloader_pin_memory=False,
                    eval_strategy="no",
                    logging_strategy="no",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                ),
                data_collator=collate,
                train_dataset=examples(rows, self._objectives),
                callbacks=[counter],
            )
            trainer.counter = counter
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        losses = [float(loss) for loss in counter.losses]
        return Fitted(counter.seconds, counter.processor, counter.tokens, counter.places, losses)


def examples(rows: list[dict[str, Any]], objectives: list[dict[str, Any]]) -> list[Example]:
    """One a rollout: tokens, the standardised rewards, and the states from the prompt's end that have a target."""
    made = []
    for row in rows:
        for response, rewards, ended in zip(row["responses"], row["rewards"], row["ended"], strict=True):
            tokens, first = row["prompt"] + response, len(row["prompt"]) - 1
            targets = [(r - about["mean"]) / about["std"] for r, about in zip(rewards, objectives, strict=True)]
            last = len(tokens) if ended else len(tokens) - 1
            made.append({"input_ids": tokens, "targets": targets, "states": (first, last)})
    return made


def collate(batch: list[Example]) -> dict[str, Tensor]:
    """Examples to tensors [B, T], padded on the right to the longest; targets are [B, J]."""
    longest = max(len(example["input_ids"]) for example in batch)
    input_ids, attention_mask = torch.zeros(2, len(batch), longest, dtype=torch.long)
    trained = torch.zeros(len(batch), longest, dtype=torch.bool)
    for b, example in enumerate(batch):
        size = len(example["input_ids"])
        input_ids[b, :size] = torch.tensor(example["input_ids"])
        attention_mask[b, :size] = 1
        trained[b, slice(*example["states"])] = True
    targets = torch.tensor([example["targets"] for example in batch])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "trained": trained, "targets": targets}


class _Trainer(Trainer):
    counter: _Counter

    def compute_loss(self, model: Any, inputs: Mapping[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """The heads' loss, its mean over states and objectives."""
        hidden = model.hidden(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        trained, targets = inputs["trained"], inputs["targets"]
        losses = [
            (head.loss(output, targets[:, j, None]) * trained).sum() / trained.sum()
            for j, (head, output) in enumerate(zip(model.heads, model.outputs(hidden), strict=True))
        ]
        loss = torch.stack(losses).mean()
        self.counter.count(inputs["attention_mask"], loss)
        return loss


class _Counter(TrainerCallback):
    """The clock from the first step to the last, and what was run."""

    def __init__(self) -> None:
        self.tokens = self.places = 0
        self.losses: list[Tensor] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter(), time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self._started[0]
        self.processor = time.process_time() - self._started[1]

    def count(self, attention_mask: Tensor, loss: Tensor) -> None:
        self.tokens += int(attention_mask.sum())
        self.places += attention_mask.numel()
        self.losses.append(loss.detach())
