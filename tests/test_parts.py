"""A step tells of its tokens in parts, as soon as they are drawn."""

import itertools
import time
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from naive import (
    BOTH,
    LAYERS,
    ONE,
    alone,
    assert_as_alone,
    before_draws,
    drain,
    guided_setup,
    prompts,
    request,
    scorers_of,
)

from vas.decoding.engine import Engine
from vas.decoding.loop import Loop


def told(engine: Engine) -> list[list[str]]:
    """Whose tokens each part of a step brings, of those that bring any."""
    return [[token.request_id for token in part] for part in engine.parts() if part]


def test_who_takes_the_parts_of_a_step_takes_no_time_of_its_clock():
    _, _, engine = guided_setup("llama", ending=())
    engine.add(request("0", prompts(9)[0], BOTH))
    engine.step()
    engine.clock.seconds.clear()
    for _ in engine.parts():
        time.sleep(0.2)
    assert sum(engine.clock.seconds.values()) < 0.2


def test_tokens_that_need_no_value_model_come_before_the_others():
    _, _, engine = guided_setup("llama", ending=())
    engine.add(request("plain", prompts(9)[0], max_tokens=3))
    assert [len(part) for part in engine.parts()] == [0] * LAYERS + [1, 0]
    engine.add(request("steered", prompts(9)[0], ONE, max_tokens=3))
    assert told(engine) == [["plain", "steered"]], "a first token, and one that needs no value model"
    assert told(engine) == [["plain"], ["steered"]]


def test_first_tokens_do_not_wait_for_the_values_of_others(monkeypatch):
    """Nor do those of requests that want no guidance; all are as they would be alone."""
    _, _, engine = guided_setup("llama", ending=())
    requests = [request(str(i), p, BOTH, seed=20 + i) for i, p in enumerate(prompts(9, 30, 12, 14))]
    requests += [request("short", prompts(10)[0], BOTH, seed=4, max_tokens=1), request("plain", prompts(5)[0], seed=5)]
    for each in requests[:2]:
        engine.add(each)
    engine.step()
    for each in requests[2:]:
        engine.add(each)
    asked = []
    scorer = engine._scorers[0]
    score = scorer.score
    monkeypatch.setattr(scorer, "score", lambda batch: asked.append(len(batch.rows)) or score(batch))
    assert [sorted(part) for part in told(engine)] == [["2", "3", "plain", "short"], ["0", "1"]]
    assert asked == [3, 2]
    done = {"short": engine.take("short")} | drain(engine)
    for each in requests:
        assert done[each.request_id].token_ids == alone(each)


def test_switched_off_first_tokens_come_with_the_others(monkeypatch):
    monkeypatch.setenv("VAS_OFF", "first_tokens")
    _, _, engine = guided_setup("llama", ending=())
    engine.add(request("0", prompts(9)[0], ONE))
    engine.step()
    engine.add(request("plain", prompts(12)[0]))
    assert told(engine) == [["0", "plain"]]


def test_a_step_that_fails_after_first_tokens_keeps_them(monkeypatch):
    _, _, engine = guided_setup("llama", ending=())
    first, second = (request(str(i), p, BOTH, seed=i) for i, p in enumerate(prompts(9, 30)))
    engine.add(first)
    engine.step()
    engine.add(second)
    parts = engine.parts()
    [begun] = next(filter(None, parts))
    monkeypatch.setattr(engine._stepper.guide, "values", lambda *_: torch.empty(-1))
    with pytest.raises(RuntimeError):
        next(parts)
    monkeypatch.undo()
    assert engine.interrupted == ("0", "1")
    assert [begun.token_id] == engine.completion("1").token_ids == alone(second)[:1]
    done = drain(engine)
    assert_as_alone(done, [first, second])


def test_a_loop_tells_each_token_once_though_steps_fail_after_first_tokens():
    base, models, _ = guided_setup("llama", ending=())
    requests = [
        request(str(i), p, BOTH, seed=i, max_tokens=1 + 3 * (i % 3)) for i, p in enumerate(prompts(*range(9, 17)))
    ]

    drawn = itertools.count(1)

    def fail_each_fifth(sequences):
        if next(drawn) % 5 == 0 and loop.engine.running > 1:  # there are others to blame
            raise RuntimeError("for once")

    counted, told = [], {each.request_id: [] for each in requests}
    loop = Loop(
        lambda: before_draws(Engine(base, scorers_of(models), max_sequences=3), fail_each_fifth),
        after=lambda tokens, _: counted.append(tokens),
    )
    futures = [loop.submit(each, lambda token, _: told[token.request_id].append(token.token_id)) for each in requests]
    found = [future.result(60).token_ids for future in futures]
    loop.call(lambda engine: None).result(60)
    assert next(drawn) > 10
    assert found == [told[each.request_id] for each in requests] == [alone(each) for each in requests]
    assert sum(counted) == sum(map(len, found))


def test_each_response_is_charged_its_share_of_the_parts_that_it_was_in(monkeypatch):
    """Each part takes a second here: a layer's is everybody's, the others are theirs whose tokens they bring."""
    base, models, _ = guided_setup("llama", ending=())
    ticks = itertools.count()
    monkeypatch.setattr("vas.decoding.loop.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    loop = Loop(lambda: Engine(base, scorers_of(models)))
    ready = Event()
    loop.call(lambda engine: ready.wait(30))
    asked = [request(str(i), p, BOTH, max_tokens=4) for i, p in enumerate(prompts(9, 12))]
    futures = [loop.submit(each) for each in (*asked, request("plain", prompts(5)[0], max_tokens=4))]
    ready.set()
    one, other, plain = (future.result(60).seconds for future in futures)
    common, first = (4 * LAYERS + 1) / 3, 1 / 3  # the first step, in which all begin, has a last part without a token
    assert (one, other) == pytest.approx((common + first + 3 / 2,) * 2, rel=0.08)
    assert plain == pytest.approx(common + first + 3, rel=0.08)
    assert one + other + plain == pytest.approx(4 * (LAYERS + 2))
