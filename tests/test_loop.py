"""Batches that fail are taken apart: one bad response or one bad moment costs the others nothing."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engines import many
from naive import before_draws, request
from tiny import tiny_base

from vas.decoding.engine import Engine
from vas.decoding.faults import is_fatal, is_memory
from vas.decoding.loop import Loop
from vas.errors import EngineDied, VasError
from vas.rollouts.engines.apart import generate_apart


class Cramped(Engine):
    """Memory runs out with more than `room` sequences; a request named "poison" breaks the step that runs it."""

    room = 3

    def __init__(self, base):
        super().__init__(base)
        before_draws(self, self._fail_if_cramped)

    def _fail_if_cramped(self, sequences):
        if len(sequences) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if any(each.request.request_id == "poison" for each in sequences):
            raise IndexError("poisoned")


def tokens_of(requests: list) -> list[list[int]]:
    """The tokens of requests that are decoded each alone."""
    return [Engine(tiny_base()).generate([each])[0].token_ids for each in requests]


@pytest.fixture
def loop():
    return Loop(lambda: Cramped(tiny_base()))


def test_a_batch_that_memory_is_too_small_for_is_halved_until_it_fits(loop):
    found = loop.generate(many(11))
    assert [each.token_ids for each in found] == tokens_of(many(11))
    assert loop.engine.max_sequences <= 3
    assert [each.token_ids for each in loop.generate(many(4))] == tokens_of(many(4))


def test_one_bad_prompt_fails_alone(loop):
    loop.engine.room = 100
    requests = many(7)
    requests[3] = request("poison", requests[3].prompt_token_ids)
    found = loop.generate(requests)
    assert [each.token_ids for each in found[:3] + found[4:]] == tokens_of(requests[:3] + requests[4:])
    assert isinstance(found[3], VasError)
    assert "IndexError: poisoned" in str(found[3])


def test_a_response_that_no_memory_is_enough_for_fails_alone(loop):
    loop.engine.room = 0
    assert all("memory ran out on this response alone" in str(each) for each in loop.generate(many(2)))


def test_a_response_too_large_for_memory_does_not_slow_the_others_for_good(loop):
    loop.engine.room = 0
    loop.generate(many(8))
    loop.engine.room = 100
    loop.generate([request(f"{each.request_id}-later", each.prompt_token_ids) for each in many(8)])
    assert loop._most == loop._limit


def test_several_callers_share_the_steps(loop):
    loop.engine.room = 100
    asked = [
        [request(f"{caller}-{each.request_id}", each.prompt_token_ids, seed=caller) for each in many(3)]
        for caller in range(3)
    ]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(loop.generate, asked))
    assert [[each.token_ids for each in batch] for batch in found] == [tokens_of(batch) for batch in asked]


def test_a_lost_device_ends_the_loop_for_every_caller(loop):
    def lost(*_):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    loop.engine._stepper._draw = lost
    for _ in range(2):
        with pytest.raises(EngineDied, match="device-side assert"):
            loop.generate(many(2))


def test_a_request_that_cannot_be_added_fails_alone(loop):
    def fail(asked):
        if asked.request_id == "odd":
            raise TypeError("not an id")
        return type(loop.engine).add(loop.engine, asked)

    loop.engine.add = fail
    odd, first, *_ = loop.generate([request("odd", (5, 6)), *many(2)])
    assert isinstance(odd, VasError)
    assert "TypeError: not an id" in str(odd)
    assert first.token_ids == tokens_of(many(1))[0]


def whole_batches(engine: Engine):
    """`generate` of an engine that does not look into its batches."""

    def generate(requests):
        generate.sizes.append(len(requests))
        return engine.generate(requests)

    generate.sizes = []
    return generate


def test_an_engine_of_whole_batches_is_asked_for_half_of_them():
    generate = whole_batches(Cramped(tiny_base()))
    found = generate_apart(generate, many(9))
    assert [each.token_ids for each in found] == tokens_of(many(9))
    assert generate.sizes == [9, 5, 3, 2, 4, 2, 2]


def test_one_bad_prompt_of_a_whole_batch_fails_alone():
    engine = Cramped(tiny_base())
    engine.room = 100
    requests = many(7)
    requests[3] = request("poison", requests[3].prompt_token_ids)
    found = generate_apart(engine.generate, requests)
    assert [each.token_ids for each in found[:3] + found[4:]] == tokens_of(requests[:3] + requests[4:])
    assert "IndexError: poisoned" in str(found[3])
    assert generate_apart(engine.generate, []) == []


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), EngineDied),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (VasError("the key is wrong"), VasError),
    ],
    ids=["a lost device", "Ctrl-C", "a user's mistake"],
)
def test_what_concerns_every_batch_is_raised_at_once(error, raised):
    calls = []

    def fail(requests):
        calls.append(requests)
        raise error

    with pytest.raises(raised):
        generate_apart(fail, many(8))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "memory", "fatal"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True, False),
        (MemoryError(), True, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True, False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, True),
        (type("EngineDeadError", (Exception,), {})("EngineCore encountered an issue."), False, True),
        (ValueError("a shape"), False, False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_an_exception_means(error, memory, fatal):
    assert (is_memory(error), is_fatal(error)) == (memory, fatal)
