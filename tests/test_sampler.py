"""Counter-based random numbers, and drawing tokens with them."""

import numpy as np
import pytest
import torch
from scipy import stats

from vas.decoding.sampler import BLOCK, sample, uniforms

NEVER = float("-inf")


def grid(seeds, positions):
    """uniforms for every (seed, position): [seeds, positions]."""
    pairs = [(seed, position) for seed in seeds for position in positions]
    return uniforms([s for s, _ in pairs], [p for _, p in pairs]).reshape(len(seeds), len(positions))


def test_a_number_is_a_function_of_seed_and_position_alone():
    together = grid(range(20), range(10))
    for seed, position in [(0, 0), (3, 9), (19, 4)]:
        assert uniforms([seed], [position])[0] == together[seed, position]
    assert len(np.unique(together)) == together.size


def test_the_numbers_stay_what_they_are():
    """Resumed and resubmitted requests need the same numbers from every release."""
    assert uniforms([0, 1, 42], [0, 5, 1000]).tolist() == [
        0.6524484863740322,
        0.7743991716672016,
        0.6952598398323256,
    ]


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [
        (range(1), range(20_000)),
        (range(20_000), range(1)),
        (range(100_000, 100_200), range(100)),
        ([seed << 32 for seed in range(2_000)], range(10)),
    ],
    ids=["one seed", "one position", "both", "seeds that differ in high bits"],
)
def test_numbers_are_uniform(seeds, positions):
    numbers = grid(seeds, positions).ravel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 0.01


def test_neighbours_are_independent():
    numbers = grid(range(300), range(300))
    pairs = {
        "next position": (numbers[:, :-1], numbers[:, 1:]),
        "next seed": (numbers[:-1], numbers[1:]),
        "diagonal": (numbers[:-1, 1:], numbers[1:, :-1]),
        "seed and position swapped": (numbers[np.triu_indices(300, 1)], numbers.T[np.triu_indices(300, 1)]),
    }
    for name, (one, other) in pairs.items():
        counts = np.histogram2d(one.ravel(), other.ravel(), bins=8, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(counts.ravel()).pvalue > 0.005, name


def test_seeds_may_be_negative_or_huge():
    seeds = [-1, -(2**63), 2**63 - 1, 2**64 - 2, 10**30]
    numbers = uniforms(seeds, [0] * len(seeds))
    assert len(set(numbers)) == len(seeds)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert uniforms([-1], [0])[0] == uniforms([2**64 - 1], [0])[0]


def inverted(logprobs_V, uniform):
    """The first token whose cumulative probability exceeds `uniform`, in plain double precision."""
    cumulative = np.cumsum(np.exp(logprobs_V.double().numpy()))
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


@pytest.mark.parametrize("vocab", [1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000, 50_257])
@pytest.mark.parametrize("excluded", [0.0, 0.6, 0.99])
def test_a_draw_is_the_inverted_cumulative_distribution(vocab, excluded):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(60, vocab, generator=generator) * 3
    keep_one = torch.randint(vocab, (60, 1), generator=generator)
    out = torch.rand(60, vocab, generator=generator) < excluded
    logprobs = torch.log_softmax(logits.masked_fill(out.scatter(1, keep_one, False), NEVER), -1)
    numbers = torch.rand(60, generator=generator, dtype=torch.float64)
    drawn = sample(logprobs, numbers, torch.zeros(60, dtype=torch.bool))
    assert drawn.tolist() == [inverted(row, u) for row, u in zip(logprobs, numbers.tolist(), strict=True)]


def test_an_excluded_token_is_never_drawn():
    """Not even at the ends of the unit interval, nor with whole blocks or all but one token excluded."""
    vocab = 3 * BLOCK + 40
    rows = []
    for kept in ([0], [vocab - 1], [BLOCK - 1, BLOCK], [5, 2 * BLOCK + 3], [BLOCK, BLOCK + 7, 3 * BLOCK]):
        row = torch.full((vocab,), NEVER)
        row[kept] = torch.linspace(-1, -30, len(kept))
        rows.append(torch.log_softmax(row, -1))
    logprobs = torch.stack(rows)
    for u in [0.0, 2.0**-53, 1e-9, 0.3, 0.5, 0.7, 1 - 1e-9, 1 - 2.0**-53]:
        numbers = torch.full((len(rows),), u, dtype=torch.float64)
        drawn = sample(logprobs, numbers, torch.zeros(len(rows), dtype=torch.bool))
        assert logprobs.gather(1, drawn[:, None]).isfinite().all(), u


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token():
    logprobs = torch.log_softmax(torch.zeros(1, 300), -1)
    sampled = torch.zeros(1, dtype=torch.bool)
    assert sample(logprobs, torch.zeros(1, dtype=torch.float64), sampled).item() == 0
    assert sample(logprobs, torch.tensor([1 - 2.0**-53], dtype=torch.float64), sampled).item() == 299


def test_draws_follow_the_distribution():
    logprobs = torch.log_softmax(torch.randn(1, 600, generator=torch.Generator().manual_seed(0)) * 2, -1)
    count = 40_000
    numbers = torch.from_numpy(uniforms([7] * count, list(range(count))))
    drawn = sample(logprobs.expand(count, -1), numbers, torch.zeros(count, dtype=torch.bool))
    expected = logprobs[0].double().exp().numpy() * count
    seen = np.bincount(drawn.numpy(), minlength=600)
    likely = expected > 20
    pooled = (
        np.append(seen[likely], seen[~likely].sum()),
        np.append(expected[likely], expected[~likely].sum()),
    )
    assert stats.chisquare(pooled[0], pooled[1] * pooled[0].sum() / pooled[1].sum()).pvalue > 0.01


def test_greedy_rows_take_the_most_likely_token_whatever_the_number():
    logprobs = torch.log_softmax(torch.randn(6, 700, generator=torch.Generator().manual_seed(1)), -1)
    numbers = torch.linspace(0, 0.999, 6, dtype=torch.float64)
    greedy = torch.tensor([True, False, True, False, True, True])
    drawn = sample(logprobs, numbers, greedy)
    assert torch.equal(drawn[greedy], logprobs.argmax(-1)[greedy])
    assert drawn[1].item() == inverted(logprobs[1], numbers[1].item())
