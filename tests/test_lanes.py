"""Lanes: which sequences each thread runs, and that nothing else changes by it."""

import threading

import numpy as np
import pytest
import torch
from naive import BOTH, guided_setup, prompts, request, scorers_of
from tiny import tiny_value

from vas.decoding import attention, lanes
from vas.decoding.engine import Engine
from vas.decoding.runner import ModelRunner


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("tokens", "cuts"),
    [
        ([21] * 16, [(0, 8), (8, 16)]),
        ([100, 20, 20, 20, 20, 20], [(0, 1), (1, 6)]),
        ([21] * 15, [(0, 7), (7, 15)]),  # 168 tokens, 157 would be the half
        ([21] * 3, [(0, 3)]),  # one lane would wait for the other's 42
        ([400, 21], [(0, 2)]),
        ([1] * 31, [(0, 31)]),  # the weights cost more than the products
        ([300], [(0, 1)]),
    ],
)
def test_sequences_are_shared_out_evenly_or_not_at_all(tokens, cuts):
    assert lanes.spans(np.array(tokens)) == [slice(*cut) for cut in cuts]


def test_one_thread_has_no_lanes():
    torch.set_num_threads(1)
    assert lanes.spans(np.array([100, 100])) == [slice(0, 2)]


def test_lanes_run_at_once_and_with_a_thread_each():
    meet = threading.Barrier(2, timeout=30)

    def work():
        meet.wait()
        return torch.get_num_threads(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        assert lanes.run([work, work]) == [(1, True), (1, True)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("fails", [0, 1])
def test_what_fails_in_a_lane_is_raised_when_the_others_are_done(fails):
    done = threading.Event()

    def work(number):
        if number == fails:
            raise MemoryError(f"lane {number}")
        assert not done.wait(0.1)
        done.set()

    with pytest.raises(MemoryError, match=f"lane {fails}"):
        lanes.run([lambda: work(0), lambda: work(1)])
    assert done.is_set()
    assert torch.get_num_threads() == 2


@torch.inference_mode()
def passes(monkeypatch, off=""):
    """Outputs and branches of a prompt, of candidates after it beside tokens that are kept, and of what follows."""
    monkeypatch.setenv("VAS_OFF", off)
    runner = ModelRunner(tiny_value(layers=3).backbone)
    texts = prompts(*range(20, 28), seed=1)
    for owner in range(8):
        runner.cache.add(owner)
    found = [runner.extend(range(8), texts), runner.extend(range(8), [text[:5] for text in texts])]
    index, candidates = np.arange(2, 8).repeat(10), np.arange(60)
    taken = [[7], [], [8], [], [], [9, 10], [], []]
    output, where = runner.branch(range(8), taken, index, candidates)
    runner.keep({owner: 10 * (owner - 2) + 3 for owner in range(2, 8)}, where)
    found += [output, *where.branches, runner.extend(range(8), [[owner] for owner in range(8)])]
    counts = (20, 0, 3, 5, 4, 3, 0, 19)
    return [*found, runner.extend(range(8), [range(5, 5 + count) for count in counts], last=True)[[0, 2, 3, 4, 5, 7]]]


@pytest.mark.parametrize("padding", [attention.PADDING, 0])
def test_a_pass_in_lanes_is_the_same_pass(monkeypatch, padding):
    monkeypatch.setattr(attention, "PADDING", padding)  # with 0, sequences with other numbers of tokens have own grids
    ran = []
    run = lanes.run
    monkeypatch.setattr(lanes, "run", lambda works: ran.append(len(works)) or run(works))
    found = passes(monkeypatch)
    assert ran == [1, 2, 2, 1, 2]  # the first gives the cache its memory, the last but one has too few tokens
    monkeypatch.setattr(attention, "PADDING", 10**9)
    for ours, whole in zip(found, passes(monkeypatch, off="lanes"), strict=True):
        assert ours.shape == whole.shape
        assert torch.allclose(ours, whole, atol=1e-5)


def test_guided_responses_are_the_same_in_lanes(monkeypatch):
    base, models, engine = guided_setup("llama")
    requests = [request(str(i), prompt, BOTH, seed=i) for i, prompt in enumerate(prompts(*[9] * 8))]
    expected = engine.generate(requests)
    monkeypatch.setenv("VAS_OFF", "lanes")
    for done, reference in zip(Engine(base, scorers_of(models)).generate(requests), expected, strict=True):
        assert done.token_ids == reference.token_ids
        assert done.guided_logprobs == pytest.approx(reference.guided_logprobs, abs=1e-5)


def test_a_pass_that_stops_half_way_leaves_a_cache_that_lanes_wait_for(monkeypatch):
    runner = ModelRunner(tiny_value(layers=3).backbone)
    texts = prompts(*[20] * 4)
    ran = []
    monkeypatch.setattr(lanes, "run", lambda works: ran.append(len(works)) or [work() for work in works])
    for owner in range(4):
        runner.cache.add(owner)
    write = runner.cache.write
    monkeypatch.setattr(runner.cache, "write", lambda layer, *rest: write(layer, *rest) if layer < 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.extend(range(4), texts)
    monkeypatch.setattr(runner.cache, "write", write)
    for _ in range(2):
        runner.extend(range(4), texts)
    assert ran == [1, 1, 2]
    assert runner.cache.depth == 3
