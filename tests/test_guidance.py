"""The maths against brute force."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vas import guidance as g


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (0.9, 12, 0.9, 0.05),
        (1.0, 0, 1.0, 0.2),
    ],
)
@pytest.mark.parametrize("looked_at", [1024, 20, 3])
def test_policy_is_what_the_hugging_face_warpers_give(temperature, top_k, top_p, min_p, looked_at, monkeypatch):
    monkeypatch.setattr(g, "NUCLEUS", looked_at)  # the nucleus lies within, partly within, or beyond
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 2
    ours = g.policy_logprobs(
        logits,
        torch.full((4,), temperature),
        torch.full((4,), top_k),
        torch.full((4,), top_p),
        torch.full((4,), min_p),
    )
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
    theirs = MinPLogitsWarper(min_p)(None, theirs) if min_p else theirs
    torch.testing.assert_close(ours, theirs.log_softmax(-1))


def test_policy_of_mixed_rows_equals_each_row_alone():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    knobs = rows(1.0, 0.5, 0.0), torch.tensor([0, 3, 7]), rows(0.9, 1.0, 1.0), rows(0.0, 0.0, 0.1)
    together = g.policy_logprobs(logits, *knobs)
    for b in range(3):
        alone = g.policy_logprobs(logits[b : b + 1], *(knob[b : b + 1] for knob in knobs))
        torch.testing.assert_close(together[b], alone[0])


def test_candidates_are_top_k_and_eos_once_without_excluded_tokens():
    logprobs = rows([0.4, 0.3, 0.2, 0.1, 0.0], [0.1, 0.2, 0.3, 0.0, 0.4]).log()
    tokens, valid = g.select_candidates(logprobs, torch.tensor([3, 2]), torch.tensor([4]))
    chosen = [set(row[keep].tolist()) for row, keep in zip(tokens, valid, strict=True)]
    assert chosen == [{0, 1, 2}, {4, 2}]  # EOS is excluded by π0 in the first row, in the top k of the second
    assert valid[1].sum() == 2


def test_adaptive_k_stops_at_the_mass():
    logprobs = rows([0.4, 0.3, 0.2, 0.1, 0.0], [0.9, 0.05, 0.03, 0.01, 0.01]).log()
    for masses, taken in [([0.65, 0.5], [2, 1]), ([0.95, 0.001], [4, 1]), ([1.0, 0.9], [4, 1]), ([0.2, 0.97], [1, 3])]:
        tokens, valid = g.select_candidates(logprobs, torch.tensor([4, 4]), torch.tensor([4]), torch.tensor(masses))
        assert tokens.shape[1] == max(taken) + 1  # EOS
        assert valid[:, :-1].sum(-1).tolist() == taken


def test_entropy_of_a_truncated_policy():
    uniform, certain = rows([0.25, 0.25, 0.25, 0.25, 0.0]).log(), rows([0.0, 1.0]).log()
    assert g.entropy(uniform).item() == pytest.approx(math.log(4))
    assert g.entropy(certain).item() == 0


def test_guided_policy_against_its_definition():
    generator = torch.Generator().manual_seed(2)
    logprobs = torch.randn(2, 9, generator=generator).log_softmax(-1)
    tokens, valid = g.select_candidates(logprobs, torch.tensor([4, 2]), torch.tensor([8]))
    values = torch.randn(*tokens.shape, 2, generator=generator)
    strengths = rows([1.5, -0.5], [0.0, 2.0])
    at = logprobs.gather(1, tokens)
    advantages = g.advantages(values, at, valid)
    guided = g.combine(logprobs, tokens, valid, advantages, strengths)
    dropped = g.combine(logprobs, tokens, valid, advantages, strengths, torch.tensor([True, False]))
    tilts = g.tilts(advantages, strengths, valid)
    kls = {policy: g.kl_divergence(policy, logprobs, tokens, valid, tilts) for policy in (guided, dropped)}
    for b in range(2):
        weights = {}
        kept = [i for i in range(tokens.shape[1]) if valid[b, i]]
        mass = sum(math.exp(at[b, i]) for i in kept)
        for token in range(9):
            weights[token] = math.exp(logprobs[b, token])
        for i in kept:
            for j in range(2):
                baseline = sum(math.exp(at[b, m]) * float(values[b, m, j]) for m in kept) / mass
                weights[int(tokens[b, i])] *= math.exp(strengths[b, j] * (float(values[b, i, j]) - baseline))
        total = sum(weights.values())
        expected = rows([weights[t] / total for t in range(9)])[0]
        torch.testing.assert_close(guided[b].exp(), expected, rtol=1e-4, atol=1e-6)
        if b == 0:
            only = {int(tokens[b, i]) for i in kept}
            total = sum(weights[t] for t in only)
            expected = rows([weights[t] / total if t in only else 0.0 for t in range(9)])[0]
        torch.testing.assert_close(dropped[b].exp(), expected, rtol=1e-4, atol=1e-6)
        for policy, kl_B in kls.items():
            kept_V = policy[b].isfinite()
            ratio = policy[b].double().exp() * (policy[b] - logprobs[b]).double()
            assert kl_B[b].item() == pytest.approx(ratio[kept_V].sum().item(), abs=1e-5)


def test_without_candidates_there_is_no_divergence():
    logprobs = torch.full((1, 4), math.log(0.25))
    tokens, valid = torch.tensor([[1, 2]]), torch.zeros(1, 2, dtype=torch.bool)
    assert g.kl_divergence(logprobs, logprobs, tokens, valid, torch.zeros(1, 2)).tolist() == [0.0]


def test_zero_strength_is_the_base_policy_and_a_negative_one_inverts():
    logprobs = torch.randn(1, 6, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    tokens, valid = g.select_candidates(logprobs, torch.tensor([6]), torch.tensor([0]))
    values = torch.arange(tokens.shape[1], dtype=torch.float32)[None, :, None]
    advantage = g.advantages(values, logprobs.gather(1, tokens), valid)
    torch.testing.assert_close(g.combine(logprobs, tokens, valid, advantage, rows([0.0])), logprobs)
    up, down = (g.combine(logprobs, tokens, valid, advantage, rows([beta])) for beta in (1.0, -1.0))
    tilt = (up - logprobs) + (down - logprobs)  # the two tilts cancel up to the normalisers
    assert (tilt - tilt.mean()).abs().max() < 1e-5


def test_mean_baseline_is_unweighted():
    values = torch.tensor([[[1.0], [2.0], [6.0]]])
    valid = torch.tensor([[True, True, False]])
    advantage = g.advantages(values, rows([0.9, 0.1, 0.0]).log(), valid, torch.tensor([True]))
    assert advantage[0, :, 0].tolist() == [-0.5, 0.5, 0.0]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    td_lambda=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_td_lambda_is_the_mixture_of_n_step_returns(lengths, td_lambda, seed):
    """Against the forward view: (1−λ)·Σ λ^(n−1)·V(s_{t+n}) + λ^(T−t−1+1)·R."""
    values = torch.randn(len(lengths), 7, 1, generator=torch.Generator().manual_seed(seed)).double()
    rewards = torch.randn(len(lengths), 1, generator=torch.Generator().manual_seed(seed + 1)).double()
    targets = g.td_lambda_targets(values, rewards, torch.tensor(lengths), td_lambda)
    for b, last in enumerate(lengths):
        for t in range(last + 1):
            naive = td_lambda ** (last - t) * rewards[b, 0].item()
            naive += sum(
                (1 - td_lambda) * td_lambda ** (n - 1) * values[b, t + n, 0].item() for n in range(1, last - t + 1)
            )
            assert targets[b, t, 0].item() == pytest.approx(naive, abs=1e-9)


def test_monte_carlo_is_the_reward_everywhere():
    targets = g.td_lambda_targets(torch.randn(2, 5, 1), rows([3.0], [-1.0]), torch.tensor([4, 2]), 1.0)
    assert targets[0].unique().tolist() == [3.0]
    assert targets[1].unique().tolist() == [-1.0]


@pytest.mark.parametrize("label", [g.two_hot, g.hl_gauss])
def test_labels_are_distributions_with_the_target_as_mean(label):
    centers = g.bin_centers(-3, 3, 25)
    targets = torch.linspace(-2, 2, 33)
    labels = label(targets, centers)
    torch.testing.assert_close(labels.sum(-1), torch.ones(33))
    torch.testing.assert_close((labels * centers).sum(-1), targets, atol=0.01, rtol=0)
    beyond = label(torch.tensor([99.0]), centers)
    assert beyond.argmax().item() == 24


def test_soft_value_against_its_definition():
    logits, centers = torch.randn(5, 11, generator=torch.Generator().manual_seed(4)), g.bin_centers(-2, 2, 11)
    expected = g.expected_value(logits, centers)
    for beta in (-3.0, -0.5, 0.0, 0.7, 4.0):
        soft = g.soft_value(logits, centers, torch.full((5,), beta))
        if beta == 0:
            torch.testing.assert_close(soft, expected)
            continue
        naive = (logits.softmax(-1) * torch.exp(beta * centers)).sum(-1).log() / beta
        torch.testing.assert_close(soft, naive)
        assert ((soft - expected) * beta > 0).all()  # Jensen
    torch.testing.assert_close(g.soft_value(logits, centers, torch.full((5,), 2e-4)), expected, atol=1e-3, rtol=0)


def test_value_tilted_steps_compose_to_the_tilted_sequence_distribution():
    """On a small Markov chain, decoding with the exact soft value gives π ∝ π0·exp(β·R) over whole sequences.

    V(s) = (1/β)·log E[exp(βR)|s] by enumeration; each step re-weighs by exp(β·V(s·a)). The
    product over steps must equal the enumeration of all sequences, weighed by exp(βR).
    """
    length, vocab, beta = 4, 3, 1.7
    generator = torch.Generator().manual_seed(5)
    transition = torch.randn(vocab, vocab, generator=generator).log_softmax(-1)
    reward = torch.randn(vocab, generator=generator)

    def soft(state, steps_left):
        if steps_left == 0:
            return reward[state]
        ahead = torch.stack([transition[state, a] + beta * soft(a, steps_left - 1) for a in range(vocab)])
        return ahead.logsumexp(0) / beta

    sequences = list(itertools.product(range(vocab), repeat=length))
    exact = []
    ours = []
    for sequence in sequences:
        state, base, guided = 0, 0.0, 0.0
        for step, token in enumerate(sequence):
            logprobs = transition[state][None]
            tokens, valid = g.select_candidates(logprobs, torch.tensor([vocab]), torch.tensor([0]))
            values = torch.stack([soft(int(a), length - step - 1) for a in tokens[0]])[None, :, None]
            advantage = g.advantages(values, logprobs.gather(1, tokens), valid)
            guided += g.combine(logprobs, tokens, valid, advantage, rows([beta]))[0, token].item()
            base += transition[state, token].item()
            state = token
        ours.append(guided)
        exact.append(base + beta * reward[state].item())
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(exact).log_softmax(0), atol=1e-4, rtol=1e-4)
