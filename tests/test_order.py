"""The order in which an epoch reads its rows."""

import numpy as np
import pytest

from vas.training.order import Step, epoch


def test_an_epoch_reads_every_row_once_in_steps_of_like_length():
    random = np.random.default_rng(0)
    file = np.repeat(np.arange(7), random.integers(1, 60, 7))
    lengths = random.integers(10, 500, len(file))
    order = epoch(file, lengths, 8, (0, 0))
    rows = np.concatenate([step.rows for step in order.steps])
    assert sorted(rows.tolist()) == list(range(len(file)))
    assert max(len(step.rows) for step in order.steps) <= 8
    assert sorted(np.concatenate(order.windows).tolist()) == list(range(7))
    padded = sum(len(step.rows) * int(lengths[step.rows].max()) for step in order.steps)
    assert padded < 1.15 * lengths.sum()


def test_the_order_depends_on_seed_and_epoch_alone():
    file, lengths = np.repeat(np.arange(3), 20), np.arange(60)
    orders = [epoch(file, lengths, 8, seed) for seed in ((0, 0), (0, 0), (0, 1), (1, 0))]
    flat = [np.concatenate([step.rows for step in order.steps]).tolist() for order in orders]
    assert flat[0] == flat[1]
    assert flat[0] != flat[2] != flat[3] != flat[0]


@pytest.mark.parametrize(("workers", "passes"), [(1, 4), (2, 2), (4, 1), (4, 4)])
def test_workers_share_a_step_without_gaps(workers, passes):
    step = Step(0, np.arange(11))
    shares = [step.share(rank, workers, passes) for rank in range(workers)]
    assert all(len(share) == passes for share in shares)
    assert np.concatenate([rows for share in shares for rows in share]).tolist() == list(range(11))


def test_windows_keep_few_files_open(monkeypatch):
    monkeypatch.setattr("vas.training.order.WINDOW_ROWS", 50)
    file = np.repeat(np.arange(20), 10)
    order = epoch(file, np.ones(200, int), 8, (0,))
    assert max(map(len, order.windows)) <= 6
    for step in order.steps:
        assert set(file[step.rows]) <= set(order.windows[step.window].tolist())
