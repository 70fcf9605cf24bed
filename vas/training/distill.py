"""Distils a trained value model into vocab heads, which score all next tokens from the parent state.

The student is the teacher's backbone with new heads, fitted to the teacher's values of the base model's
likeliest tokens at every place of some rollouts (see `lessons.py`). Fitting a vocab head to the tokens that
were taken would leave it without an opinion of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vas.choices import Linears
from vas.decoding import linears, llama
from vas.models.base import BaseModel
from vas.models.value import ValueModel, ValueModelConfig
from vas.progress import Tracker
from vas.training.agreement import agreement, errors
from vas.training.batches import collate
from vas.training.history import Entry, best
from vas.training.lessons import Lesson, Lessons, labels
from vas.training.objective import hidden_states

UNIFORM = 0.2  # of a candidate's weight: unlikely tokens count too, a strong guidance may pick them
ROWS = 4  # prompts in an optimizer step, each with all its responses
WEIGHT_DECAY = 0.05
WARMUP = 0.1  # share of the steps
CLIP = 1.0
EPOCHS = 6


class VocabObjective(nn.Module):
    """Loss of a value model with vocab heads on lessons; a module that DeepSpeed can wrap.

    frozen: its backbone is the teacher's still, whose states the lessons have: it need not run.
    """

    def __init__(self, student: ValueModel, frozen: bool = False) -> None:
        super().__init__()
        self.student, self.frozen = student, frozen

    def forward(self, lessons: Sequence[Lesson]) -> Tensor:
        """The share of the teacher's advantages that is not explained, the mean of the objectives."""
        tokens, logprobs, wanted = labels(lessons, self.student.device)
        error_J, variance_J = errors(self.values(lessons, tokens), wanted, logprobs, UNIFORM)
        return (error_J / variance_J).mean()

    def values(self, lessons: Sequence[Lesson], tokens_PK: Tensor) -> Tensor:
        """The student's values of the lessons' candidates [P, K, J]."""
        taught = [lesson.states_PH for lesson in lessons]
        parents_PH = torch.cat(taught).to(self.student.device) if self.frozen else self._states(lessons)
        return self.student.next_values(self.student.outputs(parents_PH), tokens_PK)

    def _states(self, lessons: Sequence[Lesson]) -> Tensor:
        """The student's hidden states of the parents: [P, H]."""
        batch = collate([lesson.row for lesson in lessons]).to(self.student.device)
        step = torch.arange(batch.state_NS.shape[1], device=self.student.device)
        return hidden_states(self.student, batch)[step < batch.last_N[:, None]]


def new_student(teacher: ValueModel) -> ValueModel:
    """A copy of the teacher with fresh vocab heads."""
    config = teacher.config.to_dict() | {"head": {"kind": "vocab"}, "dtype": "float32"}
    student = ValueModel(ValueModelConfig(**config))
    student.backbone.load_state_dict(teacher.backbone.state_dict())
    student.reset_heads()
    return student.float().to(teacher.device)


def distill(
    base: BaseModel,
    teacher: ValueModel,
    rows: Sequence[dict[str, Any]],
    candidates: int = 20,
    temperature: float = 1.0,
    **how: Any,
) -> tuple[ValueModel, list[Entry]]:
    """A value model with vocab heads, and what each epoch brought; the teacher stays as it is.

    rows: packed rollouts; a random tenth of them is not trained on. candidates, temperature: of π0, as decoding
    will ask for them. how: see `learn`.
    """
    make, lessons = Lessons(base, teacher, candidates, temperature, _linears(base.model, teacher.backbone)), []
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    with Tracker("lessons", len(rows)) as tracker:
        for i in order:
            lessons += make([rows[i]])
            tracker.advance(1)
    unseen = max(1, len(lessons) // 10)
    return learn(new_student(teacher), lessons[:-unseen], lessons[-unseen:], **how)


def _linears(*models: PreTrainedModel) -> Linears:
    """How the lessons' models compute: in bfloat16 where linear layers can be made anew, and that is faster.

    Values then differ by 1 % of their spread, and the demo's lessons take two thirds of the time.
    """
    apart = all(llama.supports(model) for model in models)
    return linears.settle(models[0], "fastest", among=("exact", "bfloat16")) if apart else "exact"


def learn(
    student: ValueModel,
    lessons: Sequence[Lesson],
    unseen: Sequence[Lesson],
    epochs: int = EPOCHS,
    lr: float = 0.0,
    head_lr: float = 1e-3,
    seed: int = 0,
) -> tuple[ValueModel, list[Entry]]:
    """Fit a student, new of the lessons' teacher; of its epochs, the one that explains most of the unseen ones stays.

    lr: of the backbone, which learns in the second half of the epochs only: fresh heads would spoil it; 0
    leaves it as it is. Heads alone take seconds, and kept the demo's reward.

    Returns it, frozen, and an entry an epoch as `history.Entry`, but that it knows nothing of rewards: `held_out`
    is empty, and `unseen` has the figures of `agreement`.
    """
    objective = VocabObjective(student, frozen=True)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(student.backbone.parameters()), "lr": lr},
            {"params": list(student.heads.parameters()), "lr": head_lr},
        ],
        weight_decay=WEIGHT_DECAY,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * -(-len(lessons) // ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    history: list[Entry] = []
    kept: dict[str, Tensor] = {}
    with Tracker("distilling", epochs * len(lessons)) as tracker:
        for epoch in range(1, epochs + 1):
            student.train()
            objective.frozen = lr == 0 or epoch <= (epochs + 1) // 2
            student.backbone.requires_grad_(not objective.frozen)
            student.get_input_embeddings().requires_grad_(False)
            losses: list[float] = []
            for some in torch.randperm(len(lessons), generator=generator).split(ROWS):
                loss = objective([lessons[i] for i in some])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(student.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                tracker.advance(len(some), f"epoch {epoch}, unexplained {losses[-1]:.2f}")
            history.append(
                {"epoch": epoch, "losses": losses, "held_out": {}, "unseen": judge(student, unseen, objective.frozen)}
            )
            if best(history) == len(history) - 1:
                kept = copy.deepcopy(student.state_dict())
    student.load_state_dict(kept)
    return student.requires_grad_(False).eval(), history


@torch.no_grad()
def judge(student: ValueModel, lessons: Sequence[Lesson], frozen: bool = False) -> dict[str, dict[str, float]]:
    """The figures of `agreement` on some lessons; frozen: see `VocabObjective`."""
    student.eval()
    objective = VocabObjective(student, frozen)
    values = []
    for start in range(0, len(lessons), ROWS):
        some = lessons[start : start + ROWS]
        values.append(objective.values(some, labels(some, student.device)[0]))
    _, logprobs, wanted = labels(lessons, student.device)
    return agreement(torch.cat(values), wanted, logprobs, student.objectives)
