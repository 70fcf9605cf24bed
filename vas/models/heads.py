"""Heads: what turns a hidden state into a value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vas import guidance

DROPOUT = 0.3  # of a vocab head's state, in training: there are fewer states than it has weights


class ScalarHead(nn.Module):
    """A linear value, zero at the start, fitted by ½·MSE (as in VAS, arXiv:2405.06639)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)

    def reset(self) -> None:
        """Start at value 0 everywhere."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] to the head's raw output [..., 1]."""
        return self.linear(hidden.to(self.linear.weight.dtype)).float()

    def value(self, output: Tensor) -> Tensor:
        """The expected standardised reward: [..., 1] to [...]."""
        return output.squeeze(-1)

    def soft_value(self, output: Tensor, strength: Tensor) -> Tensor:
        """A scalar head knows no distribution: its soft value is its value."""
        return self.value(output)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """½·(V − target)² for each state: [...]."""
        return 0.5 * (self.value(output) - target).square()


class CategoricalHead(nn.Module):
    """A histogram over standardised reward, fitted by cross-entropy to a smoothed label.

    low, high: range of the standardised reward that the bin centres span.
    """

    centers: Tensor

    def __init__(self, hidden_size: int, bins: int, low: float, high: float, label: str) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, bins)
        self.bins, self.low, self.high = bins, low, high
        self.label = {"hl_gauss": guidance.hl_gauss, "two_hot": guidance.two_hot}[label]
        self.register_buffer("centers", guidance.bin_centers(low, high, bins))

    def reset(self) -> None:
        """Start at a flat histogram."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] to logits [..., C]."""
        return self.linear(hidden.to(self.linear.weight.dtype)).float()

    def value(self, output: Tensor) -> Tensor:
        """E[R]: [..., C] to [...]."""
        return guidance.expected_value(output, self.centers.float())

    def soft_value(self, output: Tensor, strength: Tensor) -> Tensor:
        """(1/β)·log E[exp(βR)]: [..., C] to [...]."""
        return guidance.soft_value(output, self.centers.float(), strength)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy against the target's label, less the label's entropy (so 0 is perfect): [...]."""
        label = self.label(target, self.centers.float())
        cross = -(label * F.log_softmax(output, dim=-1)).sum(-1)
        return cross - torch.special.entr(label).sum(-1)


class VocabHead(nn.Module):
    """Values of every next token from the parent state: Q(s,a) = u(s)·e_a, e_a the embedding of token a.

    u is a hidden layer and a linear one; it runs once a state, whatever the number of candidates. State and
    embeddings are brought to one length, so that one learning rate suits every backbone.

    So a step needs no pass over its candidates. Distilled from a trained V over candidates
    (see `vas/training/distill.py`), up to a constant of each state: advantages are what it knows. Like
    the vocabulary heads of FaRMA (arXiv:2502.04517), but through the embeddings, so that tokens which were
    seldom seen get the value of their neighbours.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(2 * hidden_size, hidden_size)

    def reset(self) -> None:
        """Start at value 0 everywhere."""
        self.hidden.reset_parameters()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] to u(s) [..., H]."""
        state = F.rms_norm(hidden, hidden.shape[-1:]).to(self.hidden.weight.dtype)
        return self.linear(F.silu(self.hidden(F.dropout(state, DROPOUT, self.training)))).float()

    def values(self, output: Tensor, embedded: Tensor) -> Tensor:
        """u(s) [..., H] and the embeddings of candidates [..., K, H] to their values [..., K]."""
        return (F.normalize(embedded.float(), dim=-1) @ output[..., None]).squeeze(-1)


StateHead = ScalarHead | CategoricalHead
Head = StateHead | VocabHead
