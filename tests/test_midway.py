"""Requests may join in the middle of a step."""

import random
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Event

import pytest
import torch
from naive import (
    BOTH,
    LAYERS,
    ONE,
    alone,
    assert_as_alone,
    counting,
    drain,
    guided_setup,
    prompts,
    request,
    rows_in_use,
    scorers_of,
    whole_alone,
)
from tiny import tiny_base

from vas.decoding.base_runner import LocalRunner
from vas.decoding.cache import COLUMNS
from vas.decoding.engine import Engine
from vas.decoding.loop import Loop


def step_and_add(engine: Engine, requests: list, after: int = LAYERS) -> list[list]:
    """A step in the middle of which requests come, after so many layers of the base model; its parts with tokens."""
    parts = engine.parts()
    assert [next(parts) for _ in range(after)] == [[]] * after
    for each in requests:
        engine.add(each)
    return [part for part in parts if part]


def test_a_request_that_comes_while_the_base_model_runs_has_its_token_in_the_same_step():
    _, _, engine = guided_setup("llama", ending=())
    requests = [request(str(i), p, BOTH, seed=20 + i) for i, p in enumerate(prompts(9, 30, 12, 140, 1))]
    requests += [request("again", requests[0].prompt_token_ids, BOTH, seed=9)]  # nothing of it is left to read
    requests += [request("blocks", prompts(1, seed=3)[0], BOTH, seed=8, schedule="block:4")]
    engine.add(requests[0])
    engine.step()
    joined = ["1", "2", "4", "again"]
    first, rest = step_and_add(engine, requests[1:])
    assert sorted(token.request_id for token in first) == joined, "a long prompt and a block wait for the next"
    assert [token.request_id for token in rest] == ["0"], "who has a token already waits for the others' first ones"
    done = drain(engine)
    for asked in requests:
        assert done[asked.request_id].token_ids == alone(asked)
    assert rows_in_use(engine) == [0, 0, 0]


@torch.inference_mode()
def test_other_passes_between_two_layers_leave_a_pass_as_it_is():
    """The cache grows under those that are on their way, and who has come after them may go before them."""
    own, others = LocalRunner(tiny_base("llama").model), LocalRunner(tiny_base("llama").model)
    texts = dict(enumerate(prompts(60, 3, 70, 1, 9)))
    begun = prompts(2, seed=3)[0]
    for runner in (own, others):
        for i in texts:
            runner.cache.add(i)
            if i < 2:
                runner.extend([i], [begun])
    alone_BV = torch.cat([own.extend([i], [texts[i]], logits=True, last=True) for i in texts])
    flight, after = others.appending([0, 1], [texts[0], texts[1]]), [2, 3]
    while flight.advance():
        late = after.pop(0)
        assert torch.allclose(others.extend([late], [texts[late]], logits=True, last=True), alone_BV[[late]], atol=1e-5)
        if late == 3:
            others.cache.free(2)
    assert not after
    assert torch.allclose(flight.logits(), alone_BV[:2], atol=1e-5)
    assert others.cache.grown > 1
    for i in (0, 1, 3):  # what they have left in the cache is as good
        both = [runner.extend([i], [(5,)], logits=True) for runner in (own, others)]
        assert torch.allclose(*both, atol=1e-5)


@pytest.mark.parametrize("after", range(1, LAYERS + 1))
def test_a_request_may_come_after_any_layer_of_the_base_model(after, monkeypatch):
    _, _, engine = guided_setup("llama", ending=())
    ran = counting(engine, monkeypatch)
    requests = [request(str(i), p, BOTH if i != 2 else {}, seed=i) for i, p in enumerate(prompts(9, 30, 12))]
    requests += [request("again", (*requests[0].prompt_token_ids[:7], 4, 2), BOTH, seed=8)]  # but for the last two
    engine.add(requests[0])
    engine.step()
    del ran[:]
    told = [sorted(token.request_id for token in part) for part in step_and_add(engine, requests[1:], after)]
    assert told == [["1", "2", "again"], ["0"]], "they do not wait for the others"
    assert ran == [1, 30 + 12 + 2], "what comes has a pass of its own"
    done = drain(engine)
    for each in requests:
        own = whole_alone(each)
        found = done[each.request_id]
        assert (found.token_ids, found.guided_steps) == (own.token_ids, own.guided_steps)
        if each.request_id != "again":  # it has run less
            assert (found.base_positions, found.value_positions) == (own.base_positions, own.value_positions)
    assert rows_in_use(engine) == [0, 0, 0]


def test_requests_come_after_one_layer_and_another_within_a_budget():
    base, models, _ = guided_setup("llama", ending=())
    engine = Engine(base, scorers_of(models), prefill_tokens=40)
    requests = [request(str(i), p, BOTH, seed=i) for i, p in enumerate(prompts(9, 30, 8, 12, 5))]
    engine.add(requests[0])
    engine.step()
    parts, begun = engine.parts(), []
    for late in requests[1:4]:
        begun += next(parts)
        engine.add(late)
    begun += [token for part in parts for token in part]
    assert sorted(token.request_id for token in begun) == ["0", "1", "2"], "the third's tokens are too many"
    engine.add(requests[4])
    assert_as_alone(drain(engine), requests)


def test_the_first_that_come_are_begun_between_two_layers_and_the_others_share_a_pass_at_the_end(monkeypatch):
    _, _, engine = guided_setup("llama", ending=())
    requests = [request(str(i), p, seed=i) for i, p in enumerate(prompts(9, 30, 12, 14))]
    engine.add(requests[0])
    ran, told = counting(engine, monkeypatch), []
    for number, part in enumerate(engine.parts(), 1):
        told.append([token.request_id for token in part])
        if number < len(requests):
            engine.add(requests[number])
    assert told == [[], ["1"], [], [], ["0", "2", "3"], []]
    assert ran == [9, 30, 12 + 14]
    assert_as_alone(drain(engine), requests)


def test_who_ends_with_a_token_between_two_layers_leaves_the_pass_alone():
    """One of two that are begun there, the first: the second moves into its row."""
    _, _, engine = guided_setup("llama", ending=())
    requests = [request(str(i), p, BOTH, seed=i) for i, p in enumerate(prompts(9, 30, 12, 14))]
    requests[2] = request("short", requests[2].prompt_token_ids, BOTH, seed=2, max_tokens=1)
    for each in requests[:2]:
        engine.add(each)
    engine.step()
    first, _ = step_and_add(engine, requests[2:], 1)
    assert [(token.request_id, token.finish_reason) for token in first] == [("short", "length"), ("3", None)]
    done = {"short": engine.take("short")} | drain(engine)
    assert_as_alone(done, requests)
    assert rows_in_use(engine) == [0, 0, 0]


@pytest.mark.parametrize("seed", [3, 4, 5, 9, 10, 11])  # those up to 11 in which sequences are begun and sent back
def test_whatever_comes_between_whichever_layers_is_as_it_would_be_alone(seed):
    """Requests of all kinds, at random parts of steps, into an engine in which they soon have too little room."""
    rng = random.Random(seed)
    base, models, _ = guided_setup("llama", ending=())
    engine = Engine(base, scorers_of(models), max_sequences=8, kv_tokens=8 * COLUMNS, prefill_tokens=90)
    kinds: list[dict] = [{}, {"objectives": ONE}, {"objectives": BOTH}]
    kinds += [
        {"objectives": BOTH, "schedule": "entropy:4"},
        {"objectives": ONE, "schedule": "block:3", "candidates": 2},
    ]
    texts = prompts(*(rng.choice([1, 9, 30, 56, 58, 60, 120]) for _ in range(16)), seed=seed)
    texts[1::4] = [(*before[:-1], 5, 6) for before in texts[::4]]  # begin as others do
    requests = [
        request(str(i), text, **rng.choice(kinds), seed=i, max_tokens=rng.choice([1, 2, 12, 20]))
        for i, text in enumerate(texts)
    ]
    to_come, begun = list(requests), 0
    done: dict[str, list[int]] = {}
    told: dict[str, list[int]] = {each.request_id: [] for each in requests}
    while to_come or engine.busy:
        if to_come and not engine.busy:
            engine.add(to_come.pop(0))
        for number, part in enumerate(engine.parts()):
            begun += len(part) if number < LAYERS else 0
            for token in part:
                told[token.request_id].append(token.token_id)
                if token.finish_reason:
                    done[token.request_id] = engine.take(token.request_id).token_ids
            if to_come and rng.random() < 0.3:
                engine.add(to_come.pop(0))
    assert done == told == {each.request_id: alone(each) for each in requests}
    assert begun
    assert engine.preempted
    assert rows_in_use(engine) == [0, 0, 0]


def begun_between_layers() -> tuple[Engine, list, Iterator[list]]:
    """An engine with a request under way and three more, which come after the first layer of a step."""
    _, _, engine = guided_setup("llama", ending=())
    requests = [request(str(i), p, BOTH, seed=i) for i, p in enumerate(prompts(9, 30, 12))]
    requests += [request("short", prompts(14)[0], BOTH, seed=7, max_tokens=1)]
    engine.add(requests[0])
    engine.step()
    parts = engine.parts()
    assert next(parts) == []
    for each in requests[1:]:
        engine.add(each)
    return engine, requests, parts


def assert_goes_on(engine: Engine, requests: list, done: dict) -> None:
    """After a step that has failed, the engine makes of these requests what would become of each alone."""
    done |= drain(engine)
    assert_as_alone(done, requests)
    assert rows_in_use(engine) == [0, 0, 0]


def test_a_step_that_fails_between_two_layers_loses_nobody():
    engine, requests, parts = begun_between_layers()
    draw = engine._stepper._draw

    def fail(drawable):
        engine._stepper._draw = draw
        raise MemoryError

    engine._stepper._draw = fail
    with pytest.raises(MemoryError):
        next(parts)
    assert engine.interrupted == ("0", "1", "2", "short")
    assert_goes_on(engine, requests, {})


@pytest.mark.parametrize("how", ["a layer fails", "the output fails", "nobody takes the rest"])
def test_what_was_told_between_two_layers_stays_when_the_pass_fails(how, monkeypatch):
    engine, requests, parts = begun_between_layers()
    first = {token.request_id: token.token_id for token in next(parts)}
    assert sorted(first) == ["1", "2", "short"]

    def fail(*_):
        raise MemoryError

    if how == "nobody takes the rest":
        parts.close()
    else:
        monkeypatch.setattr(engine._runner._forward, "run" if how == "a layer fails" else "end", fail)
        with pytest.raises(MemoryError):
            list(parts)
        monkeypatch.undo()
    assert engine.interrupted == ("0", "1", "2")
    assert {name: engine.completion(name).token_ids for name in first} == {name: [first[name]] for name in first}
    assert_goes_on(engine, requests, {"short": engine.take("short")})


def test_first_tokens_that_wait_for_others_wait_for_their_pass_too(monkeypatch):
    monkeypatch.setenv("VAS_OFF", "first_tokens")
    _, _, parts = begun_between_layers()
    assert [sorted(token.request_id for token in part) for part in parts if part] == [["0", "1", "2", "short"]]


def test_who_asks_a_value_model_elsewhere_is_not_begun_between_two_layers(monkeypatch):
    """It is asked once a step, for all of them."""
    _, _, engine = guided_setup("llama", ending=())
    monkeypatch.setattr("vas.decoding.stepper.InProcess", type(None))
    requests = [
        request(str(i), p, objectives)
        for i, (p, objectives) in enumerate(zip(prompts(9, 30, 12), (ONE, ONE, {}), strict=True))
    ]
    engine.add(requests[0])
    engine.step()
    told = [[token.request_id for token in part] for part in step_and_add(engine, requests[1:], 1)]
    assert told == [["2"], ["0", "1"]]


def test_who_has_no_room_is_not_looked_at_again_before_another_leaves(monkeypatch):
    base, _, _ = guided_setup("llama", ending=())
    engine = Engine(base, kv_tokens=2 * COLUMNS)
    asked = []
    fits = engine._scheduler._has_room
    monkeypatch.setattr(engine._scheduler, "_has_room", lambda *room: asked.append(room) or fits(*room))
    requests = [request(str(i), p, max_tokens=8, seed=i) for i, p in enumerate(prompts(9, 10, 11))]
    for each in requests:
        engine.add(each)
    for _ in range(5):
        engine.step()
    assert [room for room in asked if room[0] == 3] == [(3, 11)]
    done = drain(engine)
    assert_as_alone(done, requests)


def test_switched_off_requests_that_come_midway_wait_for_the_end_of_the_pass(monkeypatch):
    monkeypatch.setenv("VAS_OFF", "between_layers")
    _, _, engine = guided_setup("llama", ending=())
    ran = counting(engine, monkeypatch)
    requests = [request(str(i), p, seed=i) for i, p in enumerate(prompts(9, 30))]
    engine.add(requests[0])
    assert [len(part) for part in engine.parts()] == [0, 1, 0]
    assert [token.request_id for part in step_and_add(engine, requests[1:], 1) for token in part] == ["0", "1"]
    assert ran == [9, 1, 30]
    assert_as_alone(drain(engine), requests)


def test_requests_that_have_no_room_wait_although_they_come_midway():
    base, models, _ = guided_setup("llama", ending=())
    requests = [request(str(i), p, BOTH, seed=20 + i, max_tokens=50) for i, p in enumerate(prompts(20, 21, 22, 23))]
    engine = Engine(base, scorers_of(models), max_sequences=3, kv_tokens=2 * 128)
    engine.add(requests[0])
    assert sum(map(len, step_and_add(engine, requests[1:]))) == 3, (
        "there are three places, and room for three of up to 63 tokens"
    )
    done = drain(engine)
    assert engine.preempted, "but not for three that are longer"
    for asked in requests:
        assert done[asked.request_id].token_ids == alone(asked)
    assert rows_in_use(engine) == [0, 0, 0]


def test_without_guidance_too_requests_that_come_midway_begin_in_the_same_step():
    _, _, engine = guided_setup("llama", ending=())
    requests = [request(str(i), p, seed=i) for i, p in enumerate(prompts(9, 30, 12))]
    engine.add(requests[0])
    engine.step()
    assert [token.request_id for part in step_and_add(engine, requests[1:]) for token in part] == ["0", "1", "2"]
    assert_as_alone(drain(engine), requests)


def test_a_step_that_fails_after_a_request_has_joined_midway_loses_neither():
    _, _, engine = guided_setup("llama", ending=())
    first, second = (request(str(i), p, BOTH, seed=i) for i, p in enumerate(prompts(9, 30)))
    engine.add(first)
    guide = engine._stepper.guide

    def fail(*_):
        engine._stepper.guide = guide
        raise MemoryError

    scorers_of_request = guide.scorers_of
    engine._stepper.guide = type("Failing", (), {"scorers_of": staticmethod(scorers_of_request), "__call__": fail})()
    with pytest.raises(MemoryError):
        step_and_add(engine, [second])
    assert engine.interrupted == ("0", "1")
    done = drain(engine)
    assert_as_alone(done, [first, second])


def test_the_loop_takes_requests_midway_and_leaves_the_rest_for_after_the_step():
    base, models, _ = guided_setup("llama", ending=())
    late = request("late", prompts(30)[0], BOTH, seed=1, max_tokens=20)
    dropped = request("dropped", prompts(8)[0], BOTH, seed=2, max_tokens=60)
    first = request("first", prompts(9)[0], BOTH, seed=3, max_tokens=20)
    expected = [alone(first), alone(late)]
    told: list[int] = []
    asked: list[Future] = []

    class Interrupted(Engine):
        """While its third step's base model runs, a request comes, another is dropped, and somebody asks a question."""

        def parts(self):
            for tokens in super().parts():
                if len(told) == 2 and not asked:
                    asked.append(loop.submit(late))
                    loop.abort("dropped")
                    asked.append(loop.call(lambda engine: (engine.running, len(told))))
                yield tokens

    loop = Loop(lambda: Interrupted(base, scorers_of(models)), after=lambda tokens, _: told.append(tokens))
    both = Event()
    loop.call(lambda engine: both.wait(30))
    futures = [loop.submit(first), loop.submit(dropped)]
    both.set()
    assert [futures[0].result(60).token_ids, asked[0].result(60).token_ids] == expected
    assert told[told.index(3) :][:2] == [3, 0], "the late one's first token, and then what was put off"
    assert asked[1].result(60) == (2, told.index(3) + 2)
    assert not futures[1].done()
