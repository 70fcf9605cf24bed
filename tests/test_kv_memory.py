"""The KV caches: they stay small, and when they are full, sequences wait."""

import numpy as np
import pytest
from naive import ALL, BOTH, ONE, assert_within, drain, guided_setup, prompts, request, rows_in_use, scorers_of
from tiny import tiny_base

from vas.decoding.cache import COLUMNS, ROWS
from vas.decoding.engine import Engine
from vas.errors import VasError


def test_samples_of_one_prompt_share_its_prefill():
    base, models, engine = guided_setup("llama")
    (prompt,) = prompts(13)
    other = prompts(13, seed=1)[0]
    requests = [request(f"s{i}", prompt, ONE, seed=i) for i in range(4)]
    requests.insert(2, request("other", other, ONE, seed=9))
    completions = engine.generate(requests)
    prefilled = [done.base_positions - len(done.token_ids) for done in completions]
    assert prefilled == [12, 0, 12, 0, 0]
    for asked, done in zip(requests, completions, strict=True):
        assert done.token_ids == Engine(base, scorers_of(models)).generate([asked])[0].token_ids


def test_caches_do_not_grow_with_the_number_of_requests():
    base, models, _ = guided_setup("llama")
    engine = Engine(base, scorers_of(models), max_sequences=5)
    caches = [engine._runner.cache, *(scorer._runner.cache for scorer in engine._scorers)]
    lengths = np.random.default_rng(0).integers(1, 40, 60).tolist()
    requests = [
        request(str(i), prompt, BOTH, seed=i, max_tokens=1 + i % 6) for i, prompt in enumerate(prompts(*lengths))
    ]
    engine.generate(requests[:20])
    for cache in caches:
        rows, _, columns, _ = cache.keys[0].shape
        assert (rows, columns) == (ROWS, COLUMNS)
    held = [cache.memory() for cache in caches]
    engine.generate(requests[20:])
    assert [cache.memory() for cache in caches] == held


@pytest.mark.parametrize("limit", [2 * ROWS * COLUMNS, 3 * ROWS * COLUMNS])
def test_preempted_sequences_go_on_with_the_same_tokens_within_the_memory_stated(limit):
    base, models, _ = guided_setup("llama")
    lengths = np.random.default_rng(1).integers(1, 50, 24).tolist()
    requests = [
        request(
            str(i),
            prompt,
            [BOTH, ALL, {}][i % 3],
            seed=i,
            max_tokens=20 + 10 * (i % 4),
            schedule=["token", "entropy:3"][i % 2],
        )
        for i, prompt in enumerate(prompts(*lengths))
    ]
    free = Engine(base, scorers_of(models)).generate(requests)
    engine = Engine(base, scorers_of(models), max_sequences=24, kv_tokens=limit)
    left, leave = [], engine._stepper.leave
    engine._stepper.leave = lambda sequence: (left.append(sequence), leave(sequence))
    for asked in requests:
        engine.add(asked)
    done = drain(engine, lambda: assert_within(limit, [engine._runner.cache]))
    assert len(left) > len(requests), "the test should preempt"
    for expected in free:
        found = done[expected.request_id]
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        assert found.guided_steps == expected.guided_steps
    assert rows_in_use(engine) == [0, 0, 0]


def test_a_request_larger_than_the_memory_is_refused():
    engine = Engine(tiny_base("llama"), kv_tokens=ROWS * COLUMNS)
    with pytest.raises(VasError, match="more than the KV cache may hold"):
        engine.add(request("r", prompts(10)[0], max_tokens=ROWS * COLUMNS - 10))  # and a spare column
    engine.add(request("r", prompts(10)[0], max_tokens=ROWS * COLUMNS - 11))
