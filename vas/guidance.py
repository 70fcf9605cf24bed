"""The maths of Value Augmented Sampling (Han et al., arXiv:2405.06639), as pure functions.

Shape suffixes: B sequences, V vocabulary, K candidates, J objectives, T positions,
C histogram bins. Log-probabilities are natural; values and rewards are in reward
standard deviations. An excluded token has log-probability -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEVER = float("-inf")
NUCLEUS = 1024  # top_p looks for its tokens among so many first: a sort of the whole vocabulary costs a decoding step


def policy_logprobs(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor
) -> Tensor:
    """log π0(a|s; temperature, top_k, top_p, min_p), renormalised over what is kept. Returns [B, V].

    The settings may lie on the CPU while the logits are on a GPU; then nothing waits for the GPU.

    Truncations apply in the field's usual order: top_k (0 keeps all), then top_p, then
    min_p. Temperature 0 (greedy) counts as 1 here, for it is the arg-max of the guided
    logits of temperature 1; the sampler takes the arg-max.
    """
    cut_k, cut_p, cut_min = (bool(cut.any()) for cut in (top_k_B > 0, top_p_B < 1, min_p_B > 0))
    most, device = int(top_k_B.max()), logits_BV.device
    scaled = logits_BV.float()
    if bool(((temperature_B != 0) & (temperature_B != 1)).any()):
        scaled = scaled / torch.where(temperature_B == 0, 1.0, temperature_B).to(device, non_blocking=True)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    if not (cut_k or cut_p or cut_min):
        return logprobs
    top_k_B, top_p_B, min_p_B = (each.to(device, non_blocking=True) for each in (top_k_B, top_p_B, min_p_B))
    vocab = logprobs.shape[-1]
    if cut_k:
        k = top_k_B.clamp(max=vocab)
        kth = logprobs.topk(min(most, vocab), dim=-1).values.gather(1, (k - 1).clamp(min=0)[:, None])
        logprobs = logprobs.masked_fill((logprobs < kth) & (k > 0)[:, None], NEVER)
    if cut_p:
        normalised = torch.log_softmax(logprobs, dim=-1)
        ordered, order = normalised.topk(min(NUCLEUS, vocab), dim=-1)
        mass = ordered.exp().sum(-1)
        if bool(((mass < top_p_B) & (top_p_B < 1)).any()):  # a nucleus of more tokens than that: sort them all
            ordered, order = normalised.sort(dim=-1, descending=True)
        probs = ordered.exp()
        inside = (probs.cumsum(dim=-1) - probs) < top_p_B[:, None]
        nucleus = torch.zeros_like(normalised, dtype=torch.bool).scatter(1, order, inside)
        logprobs = logprobs.masked_fill(~nucleus & (top_p_B < 1)[:, None], NEVER)
    if cut_min:
        floor = logprobs.max(dim=-1, keepdim=True).values + min_p_B.log()[:, None]
        logprobs = logprobs.masked_fill(logprobs < floor, NEVER)
    return torch.log_softmax(logprobs, dim=-1)


def select_candidates(
    logprobs_BV: Tensor, k_B: Tensor, always: Tensor, mass_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Candidates: the top k tokens of π0 and those of `always` (EOS), less what π0 excludes.

    k_B: [B] tokens to take, may differ by row. always: [E] token ids. mass_B: [B] adaptive k: take
    no more tokens once those taken have this probability together; 1 takes all k.
    Returns token ids [B, K] and which of them count [B, K], where K = E + the most tokens
    that any row takes; a token stands once.
    """
    vocab, device = logprobs_BV.shape[-1], logprobs_BV.device
    top = logprobs_BV.topk(min(int(k_B.max()), vocab), dim=-1)
    likeliest = top.indices
    within = torch.ones_like(likeliest, dtype=torch.bool)
    if int(k_B.min()) < likeliest.shape[1]:
        within = torch.arange(likeliest.shape[1], device=device) < k_B.to(device, non_blocking=True)[:, None]
    if mass_B is not None:
        probs = top.values.exp()
        within &= (probs.cumsum(-1) - probs < mass_B[:, None]) | (mass_B >= 1)[:, None]
        widest = int(within.sum(-1).max())
        likeliest, within = likeliest[:, :widest], within[:, :widest]
    extra = always.expand(len(logprobs_BV), -1)
    tokens = torch.cat([likeliest, extra], dim=1)
    already = ((extra[:, :, None] == likeliest[:, None, :]) & within[:, None, :]).any(-1)
    valid = torch.cat([within, ~already], dim=1)
    return tokens, valid & logprobs_BV.gather(1, tokens).isfinite()


def advantages(values_BKJ: Tensor, logprobs_BK: Tensor, valid_BK: Tensor, mean_B: Tensor | None = None) -> Tensor:
    """A_j(s,a) = V_j(s·a) − Σ_b π0(b|s)·V_j(s·b) / Σ_b π0(b|s), b over the candidates. Returns [B, K, J].

    mean_B: rows whose baseline is the candidates' unweighted mean instead, as in the authors' code.
    A candidate that does not count gets 0.
    """
    invalid_BK = ~valid_BK
    least = torch.finfo(logprobs_BK.dtype).min  # not -inf, for a row may have no candidate at all
    weights = torch.softmax(logprobs_BK.masked_fill(invalid_BK, least), dim=-1)
    if mean_B is not None and bool(mean_B.any()):
        mean_B = mean_B.to(valid_BK.device, non_blocking=True)
        uniform = valid_BK / valid_BK.sum(-1, keepdim=True).clamp(min=1)
        weights = torch.where(mean_B[:, None], uniform, weights)
    known_BKJ = values_BKJ.masked_fill(invalid_BK[:, :, None], 0.0)
    baseline_B1J = (weights[:, :, None] * known_BKJ).sum(1, keepdim=True)
    return (known_BKJ - baseline_B1J).masked_fill(invalid_BK[:, :, None], 0.0)


def tilts(advantages_BKJ: Tensor, strengths_BJ: Tensor, valid_BK: Tensor) -> Tensor:
    """Σ_j β_j·A_j of each candidate, 0 for one that does not count. Returns [B, K]."""
    return (advantages_BKJ * strengths_BJ[:, None]).sum(-1).masked_fill(~valid_BK, 0.0)


def combine(
    logprobs_BV: Tensor,
    candidates_BK: Tensor,
    valid_BK: Tensor,
    advantages_BKJ: Tensor,
    strengths_BJ: Tensor,
    drop_B: Tensor | None = None,
) -> Tensor:
    """Guided log-probabilities: π(a|s) ∝ π0(a|s)·exp(Σ_j β_j·A_j(s,a)). Returns [B, V].

    Tokens outside the candidates have A = 0, or are dropped in the rows that `drop_B` marks.
    The decoding rule of arXiv:2405.06639, with a β for each objective.
    """
    tilt_BK = tilts(advantages_BKJ, strengths_BJ, valid_BK)
    if drop_B is not None and bool(drop_B.any()):
        drop_B = drop_B.to(logprobs_BV.device, non_blocking=True)
        times_BV = torch.zeros_like(logprobs_BV).scatter_add_(1, candidates_BK, valid_BK.to(logprobs_BV))
        dropped = (times_BV == 0) & (drop_B & valid_BK.any(-1))[:, None]
        logprobs_BV = logprobs_BV.masked_fill(dropped, NEVER)
    return torch.log_softmax(logprobs_BV.scatter_add(1, candidates_BK, tilt_BK), dim=-1)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention mask as models add it: 0 where `allowed`, the dtype's lowest number elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def kl_divergence(
    guided_BV: Tensor, base_BV: Tensor, candidates_BK: Tensor, valid_BK: Tensor, tilt_BK: Tensor
) -> Tensor:
    """Exact KL(π‖π0) of one step in nats: Σ_a π(a)·tilt(a) − log Z, where π(a) = π0(a)·exp(tilt(a)) / Z. Returns [B].

    guided_BV: what `combine` makes of the candidates' tilts. Outside of them the tilt is 0, or π is, so that the
    vocabulary need not be read.
    """
    guided_BK, base_BK = guided_BV.gather(1, candidates_BK), base_BV.gather(1, candidates_BK)
    guided_BK = guided_BK.masked_fill(~valid_BK, NEVER)
    log_z_BK = base_BK + tilt_BK - guided_BK  # the same for all that count; the likeliest is the most exact
    log_z_B = log_z_BK.gather(1, guided_BK.argmax(-1, keepdim=True)).squeeze(1)
    return torch.where(valid_BK.any(-1), (guided_BK.exp() * tilt_BK).sum(-1) - log_z_B, 0.0)


def entropy(logprobs_BV: Tensor) -> Tensor:
    """Entropy of each row in nats; excluded tokens count nothing. Returns [B]."""
    return -(logprobs_BV.exp() * logprobs_BV.masked_fill(logprobs_BV == NEVER, 0.0)).sum(-1)


def td_lambda_targets(values_BTJ: Tensor, rewards_BJ: Tensor, last_B: Tensor, td_lambda: float) -> Tensor:
    """TD(λ) targets with γ=1 and the reward at the end. Returns [B, T, J].

    G_t = (1−λ)·V(s_{t+1}) + λ·G_{t+1} and G_last = R, where state t follows t tokens of
    the response and `last_B` is the index of the final state. Beyond it the target is R.
    """
    targets = rewards_BJ[:, None, :].expand_as(values_BTJ).clone()
    following = rewards_BJ
    for t in range(values_BTJ.shape[1] - 2, -1, -1):
        step = (1 - td_lambda) * values_BTJ[:, t + 1] + td_lambda * following
        following = torch.where((t < last_B)[:, None], step, rewards_BJ)
        targets[:, t] = following
    return targets


def bin_centers(low: float, high: float, bins: int) -> Tensor:
    """Centres of `bins` equal bins over [low, high]: [C]."""
    return torch.linspace(low, high, bins)


def two_hot(targets: Tensor, centers_C: Tensor) -> Tensor:
    """Label that puts a target's mass on its two nearest bins, keeping its mean. Returns [..., C]."""
    width = centers_C[1] - centers_C[0]
    place = ((targets - centers_C[0]) / width).clamp(0, len(centers_C) - 1)
    return (1 - (place[..., None] - torch.arange(len(centers_C), device=targets.device)).abs()).clamp(min=0)


def hl_gauss(targets: Tensor, centers_C: Tensor, spread: float = 0.75) -> Tensor:
    """HL-Gauss label: a normal around the target, integrated over each bin. Returns [..., C].

    spread: the normal's standard deviation in bin widths (Farebrother et al., arXiv:2403.03950).
    """
    width = centers_C[1] - centers_C[0]
    edges = torch.cat([centers_C - width / 2, (centers_C[-1] + width / 2)[None]])
    targets = targets.clamp(centers_C[0], centers_C[-1])
    mass = torch.erf((edges - targets[..., None]) / (math.sqrt(2) * spread * width)).diff(dim=-1)
    return mass / mass.sum(-1, keepdim=True)


def expected_value(logits_C: Tensor, centers_C: Tensor) -> Tensor:
    """E[R] of a categorical head: [..., C] to [...]."""
    return (torch.softmax(logits_C, dim=-1) * centers_C).sum(-1)


def soft_value(logits_C: Tensor, centers_C: Tensor, strength: Tensor) -> Tensor:
    """(1/β)·log E[exp(βR)] of a categorical head, β → 0 being E[R] (Q#, arXiv:2502.20548).

    logits_C: [..., C]; strength: β, broadcastable to [...]. Returns [...].
    """
    safe = torch.where(strength.abs() < 1e-4, torch.ones_like(strength), strength)
    tilted = torch.logsumexp(torch.log_softmax(logits_C, dim=-1) + safe[..., None] * centers_C, dim=-1) / safe
    return torch.where(strength.abs() < 1e-4, expected_value(logits_C, centers_C), tilted)
