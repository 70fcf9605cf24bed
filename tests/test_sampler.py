"""Counter-based random numbers, and drawing tokens with them."""

import numpy as np
import pytest
import torch
from scipy import stats

from vas.decoding.sampler import BLOCK, entrants, gumbels, sample

NEVER = float("-inf")


def uniforms(seeds, positions):
    """The first Gumbel number of each (seed, position) as a uniform one."""
    return np.exp(-np.exp(-gumbels(seeds, positions, 1)))[:, 0]


def grid(seeds, positions):
    """uniforms for every (seed, position): [seeds, positions]."""
    pairs = [(seed, position) for seed in seeds for position in positions]
    return uniforms([s for s, _ in pairs], [p for _, p in pairs]).reshape(len(seeds), len(positions))


def test_numbers_are_a_function_of_seed_and_position_alone():
    together = grid(range(20), range(10))
    for seed, position in [(0, 0), (3, 9), (19, 4)]:
        assert uniforms([seed], [position])[0] == together[seed, position]
        assert gumbels([seed], [position], 9)[0, :4].tolist() == gumbels([1, seed], [5, position], 4)[1].tolist()
    assert len(np.unique(together)) == together.size


def test_the_numbers_stay_what_they_are():
    """Resumed and resubmitted requests need the same numbers from every release."""
    expected = [
        *(-0.6807578025137784, 3.529359741423534, 4.71991893208755),
        *(0.9748183357597286, 1.2029700576268472, 1.6188008171407866),
    ]
    assert gumbels([0, 1, 42], [0, 5, 1000], 2).ravel().tolist() == pytest.approx(expected, rel=1e-12)


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


def test_gumbel_noise_is_gumbel_and_independent():
    noise = gumbels([7, 8], [0, 3], 20_000)
    for row in noise:
        assert stats.kstest(row, "gumbel_r").pvalue > 0.01
    numbers = np.exp(-np.exp(-gumbels([1] * 300, list(range(300)), 300)))
    for one, other in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1, 1:], numbers[1:, :-1])):
        counts = np.histogram2d(one.ravel(), other.ravel(), bins=8, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(counts.ravel()).pvalue > 0.005


def noise(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """What draws from so many rows take: [rows, entrants]."""
    return torch.from_numpy(gumbels([seed] * rows, list(range(rows)), entrants(vocab)))


def raced(logprobs: torch.Tensor, gumbels: torch.Tensor) -> int:
    """The token that wins both races, in plain double precision."""
    blocks = torch.split(logprobs.double(), BLOCK)
    block = int((torch.stack([each.logsumexp(0) for each in blocks]) + gumbels[: len(blocks)]).argmax())
    place = int((blocks[block] + gumbels[len(blocks) :][: len(blocks[block])]).argmax())
    return block * BLOCK + place


@pytest.mark.parametrize("vocab", [1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000, 50_257])
@pytest.mark.parametrize("excluded", [0.0, 0.6, 0.99])
def test_a_draw_is_the_winner_of_two_races(vocab, excluded):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(60, vocab, generator=generator) * 3
    keep_one = torch.randint(vocab, (60, 1), generator=generator)
    out = torch.rand(60, vocab, generator=generator) < excluded
    logprobs = torch.log_softmax(logits.masked_fill(out.scatter(1, keep_one, False), NEVER), -1)
    numbers = noise(60, vocab)
    drawn = sample(logprobs, numbers, torch.zeros(60, dtype=torch.bool))
    assert drawn.tolist() == [raced(*row) for row in zip(logprobs, numbers, strict=True)]


def test_an_excluded_token_is_never_drawn():
    """Not even with whole blocks or all but one token excluded."""
    vocab = 3 * BLOCK + 40
    for kept in ([0], [vocab - 1], [BLOCK - 1, BLOCK], [5, 2 * BLOCK + 3], [BLOCK, BLOCK + 7, 3 * BLOCK]):
        row = torch.full((vocab,), NEVER)
        row[kept] = torch.linspace(-1, -30, len(kept))
        drawn = sample(
            torch.log_softmax(row, -1).expand(500, -1), noise(500, vocab), torch.zeros(500, dtype=torch.bool)
        )
        assert set(drawn.tolist()) <= set(kept)


def test_draws_follow_the_distribution():
    logprobs = torch.log_softmax(torch.randn(1, 600, generator=torch.Generator().manual_seed(0)) * 2, -1)
    count = 40_000
    drawn = sample(logprobs.expand(count, -1), noise(count, 600, seed=7), torch.zeros(count, dtype=torch.bool))
    expected = logprobs[0].double().exp().numpy() * count
    seen = np.bincount(drawn.numpy(), minlength=600)
    likely = expected > 20
    pooled = (
        np.append(seen[likely], seen[~likely].sum()),
        np.append(expected[likely], expected[~likely].sum()),
    )
    assert stats.chisquare(pooled[0], pooled[1] * pooled[0].sum() / pooled[1].sum()).pvalue > 0.01


def test_rounding_hardly_ever_changes_a_draw():
    """Errors like those of sums taken in another order; looked up in the cumulative distribution, ten would change."""
    count, vocab, generator = 20_000, 2000, torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(torch.randn(1, vocab, generator=generator) * 2, -1).expand(count, -1)
    rounded = logprobs + 1e-5 * torch.randn(count, vocab, generator=generator)
    never = torch.zeros(count, dtype=torch.bool)
    changed = sample(logprobs, noise(count, vocab), never) != sample(rounded, noise(count, vocab), never)
    assert int(changed.sum()) <= 2


def test_greedy_rows_take_the_most_likely_token_whatever_the_noise():
    logprobs = torch.log_softmax(torch.randn(6, 700, generator=torch.Generator().manual_seed(1)), -1)
    greedy = torch.tensor([True, False, True, False, True, True])
    numbers = noise(6, 700)
    drawn = sample(logprobs, numbers, greedy)
    assert torch.equal(drawn[greedy], logprobs.argmax(-1)[greedy])
    assert drawn[1].item() == raced(logprobs[1], numbers[1])
