"""The training objective: TD(λ) targets and the heads' loss, in one forward pass."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from vas import guidance
from vas.models.heads import StateHead
from vas.models.value import ValueModel
from vas.training.batches import Batch


class ValueObjective(nn.Module):
    """Loss of a value model on packed rollouts; the module that DeepSpeed wraps.

    The TD targets come from the values of this very pass, without gradient; or, with an EMA, from a second
    network that follows the first: target ← ema·target + (1 − ema)·model after every step. Targets that move
    slowly keep a small λ stable, at the cost of a second forward pass.
    """

    mean_J: Tensor
    std_J: Tensor

    def __init__(self, model: ValueModel, td_lambda: float, ema: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.td_lambda, self.ema = td_lambda, ema
        self.target = copy.deepcopy(model).requires_grad_(False) if ema is not None else None
        self.frozen_backbone = not any(parameter.requires_grad for parameter in model.backbone.parameters())
        self.register_buffer("mean_J", torch.tensor([o["mean"] for o in model.config.objectives]), persistent=False)
        self.register_buffer("std_J", torch.tensor([o["std"] for o in model.config.objectives]), persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss summed over trained states, its mean over objectives; and the values [N, S, J]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_backbone):
            states_NSH = hidden_states(self.model, batch)
        outputs = self.model.outputs(states_NSH)
        values_NSJ = self.model.values(outputs).detach()
        targets_NSJ = guidance.td_lambda_targets(
            self._bootstrap(values_NSJ, batch), self.standardise(batch.rewards_NJ), batch.last_N, self.td_lambda
        )
        losses = [
            (cast(StateHead, head).loss(output, targets_NSJ[..., j]) * batch.trained_NS).sum()
            for j, (head, output) in enumerate(zip(self.model.heads, outputs, strict=True))
        ]
        return torch.stack(losses).mean(), values_NSJ

    @torch.no_grad()
    def _bootstrap(self, values_NSJ: Tensor, batch: Batch) -> Tensor:
        """The values that targets are made of: the target network's, if there is one and λ asks for any."""
        if self.target is None or self.td_lambda == 1 or not self.training:
            return values_NSJ
        return self.target.values(self.target.outputs(hidden_states(self.target, batch)))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the target network a step towards the model."""
        if self.target is not None and self.ema is not None:
            for old, new in zip(self.target.parameters(), self.model.parameters(), strict=True):
                if new.requires_grad:
                    old.lerp_(new.to(old.dtype), 1 - self.ema)

    def standardise(self, rewards_NJ: Tensor) -> Tensor:
        """Rewards in standard deviations of the training rollouts."""
        return (rewards_NJ - self.mean_J) / self.std_J


def hidden_states(model: ValueModel, batch: Batch) -> Tensor:
    """The hidden state of every state of every response: [N, S, H]."""
    hidden = model.hidden(batch.input_ids_BT, position_ids=batch.position_ids_BT, attention_mask=_masks(model, batch))
    return hidden[batch.row_N[:, None], batch.state_NS]


def _masks(model: ValueModel, batch: Batch) -> Tensor | dict[str, Tensor]:
    """The batch's mask as the backbone takes it: one, or one for each kind of layers where some have a window."""
    config, dtype = model.backbone.config, next(model.backbone.parameters()).dtype
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return batch.attention_mask(dtype, window)
    whole = batch.attention_mask(dtype)
    if "sliding_attention" not in kinds:
        return whole
    return {"full_attention": whole, "sliding_attention": batch.attention_mask(dtype, window)}
