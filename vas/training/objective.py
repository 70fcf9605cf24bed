"""The training objective: TD(λ) targets and the heads' loss, in one forward pass."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from vas import guidance
from vas.models.heads import StateHead
from vas.models.value import ValueModel
from vas.training.batches import Batch


class ValueObjective(nn.Module):
    """Loss of a value model on packed rollouts; the module that DeepSpeed wraps.

    The TD targets come from the values of this very pass, without gradient.
    """

    mean_J: Tensor
    std_J: Tensor

    def __init__(self, model: ValueModel, td_lambda: float) -> None:
        super().__init__()
        self.model = model
        self.td_lambda = td_lambda
        self.register_buffer("mean_J", torch.tensor([o["mean"] for o in model.config.objectives]), persistent=False)
        self.register_buffer("std_J", torch.tensor([o["std"] for o in model.config.objectives]), persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss over trained states and objectives, and the values [N, S, J]."""
        hidden = self.model.hidden(
            batch.input_ids_BT, position_ids=batch.position_ids_BT, attention_mask=batch.attention_mask_B1TT
        )
        outputs = self.model.outputs(hidden[batch.row_N[:, None], batch.state_NS])
        values_NSJ = self.model.values(outputs).detach()
        rewards_NJ = self.standardise(batch.rewards_NJ)
        targets_NSJ = guidance.td_lambda_targets(values_NSJ, rewards_NJ, batch.last_N, self.td_lambda)
        losses = [
            cast(StateHead, head).loss(output, targets_NSJ[..., j])[batch.trained_NS].mean()
            for j, (head, output) in enumerate(zip(self.model.heads, outputs, strict=True))
        ]
        return torch.stack(losses).mean(), values_NSJ

    def standardise(self, rewards_NJ: Tensor) -> Tensor:
        """Rewards in standard deviations of the training rollouts."""
        return (rewards_NJ - self.mean_J) / self.std_J
