"""A value model behind calls: the same tokens as in the engine's own process, whatever becomes of its replicas."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
from tiny import tiny_base, tiny_tokenizer, tiny_value

from vas.decoding.engine import Engine
from vas.decoding.scorer import ValueScorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.serving.calls import Question, Reply
from vas.serving.remote import RemoteScorer
from vas.serving.value import AT_ONCE, Reader

SCHEDULES = ("token", "entropy:2.5", "block:3")


def done(outcome: Reply | Exception) -> Future[Reply]:
    """A call that has come back, or not."""
    call: Future[Reply] = Future()
    if isinstance(outcome, Exception):
        call.set_exception(outcome)
    else:
        call.set_result(outcome)
    return call


class Replicas:
    """Replicas of the tiny value model in this process. faults: the share of calls that end badly. most: see Reader."""

    def __init__(self, count: int = 1, faults: float = 0.0, kv_tokens: int | None = None, most: int = AT_ONCE) -> None:
        self._count, self._faults, self._kv_tokens, self._most = count, faults, kv_tokens, most
        self._chance, self._lock = random.Random(0), threading.Lock()
        self._readers: dict[str, Reader] = {}
        self._born = 0
        self.calls = self.missed = self.parts = 0
        self.down = self.hung = False

    def ask(self, replica: str | None, question: Question) -> Future[Reply]:
        """Answer as a replica does: the one that is named if it lives, else another."""
        with self._lock:  # of several callers
            return self._answer(replica, question)

    def _answer(self, replica: str | None, question: Question) -> Future[Reply]:
        if self.down:
            return done(ConnectionError("nobody is there"))
        if self.hung:
            return done(TimeoutError())
        while len(self._readers) < self._count:
            self._born += 1
            name = f"replica {self._born}"
            self._readers[name] = Reader(ValueScorer(name, tiny_value()), name, self._kv_tokens)
        name = replica if replica in self._readers else self._chance.choice(sorted(self._readers))
        self.calls += 1
        fate = self._chance.random()
        if fate < self._faults / 2:  # it dies before it answers
            del self._readers[name]
            return done(ConnectionError("it died"))
        reply = self._readers[name].answer(question, self._most)
        if fate < self._faults:  # it answers, and the answer is lost
            return done(ConnectionError("it was lost"))
        self.missed += bool(reply.missing)
        self.parts += bool(reply.held)
        return done(reply)

    @property
    def sequences(self) -> int:
        """Sequences that they hold."""
        return sum(len(reader._read) for reader in self._readers.values())


def requests(schedule: str = "token") -> list[Request]:
    """Prompts of several lengths, some of them shared, steered and not."""
    guidance = GuidanceParams({"positive": 2.0}, candidates=4, schedule=schedule)
    made = []
    for number in range(8):
        prompt = tuple(tiny_tokenizer()("the fox rests " * (1 + number // 2)).input_ids)
        how = guidance if number != 3 else GuidanceParams()
        made.append(Request(str(number), prompt, SamplingParams(max_tokens=12, seed=number), how))
    return made


def remote(replicas: Replicas, caller: str = "base 1", **options) -> RemoteScorer:
    """The scorer that asks them."""
    return RemoteScorer("value", ("positive",), 1024, False, replicas.ask, caller, **options)


def decode(scorer, schedule: str, **options) -> list[tuple[list[int], float]]:
    done = Engine(tiny_base(), [scorer], **{"max_sequences": 6} | options).generate(requests(schedule))
    return [(each.token_ids, pytest.approx(each.kl, abs=1e-3)) for each in done]


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr("vas.serving.remote.PAUSE", 0.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("options", "replicas"),
    [
        ({}, Replicas()),
        ({"kv_tokens": 384}, Replicas(2)),  # sequences are sent back to wait
        ({}, Replicas(3, faults=0.2)),
        ({}, Replicas(1, kv_tokens=192)),  # it forgets what it has no room for
    ],
    ids=["one", "preemption", "faults", "little room"],
)
def test_tokens_are_those_of_a_scorer_in_the_process(schedule, options, replicas):
    expected = decode(ValueScorer("value", tiny_value()), schedule)
    scorer = remote(replicas)
    assert decode(scorer, schedule, **options) == expected
    assert replicas.calls
    assert not scorer._sequences
    if not replicas._faults:
        assert replicas.sequences == 0  # what ends is closed there too


@pytest.mark.parametrize("faults", [0.0, 0.2])
def test_long_prompts_are_read_in_parts(monkeypatch, faults):
    monkeypatch.setattr("vas.serving.value.LAG", 4)
    replicas = Replicas(2, faults=faults, most=8)
    assert decode(remote(replicas), "token") == decode(ValueScorer("value", tiny_value()), "token")
    assert replicas.parts


def test_callers_that_push_each_other_out_get_to_an_end(monkeypatch):
    monkeypatch.setattr("vas.serving.value.LAG", 4)
    expected = decode(ValueScorer("value", tiny_value()), "token")
    replicas = Replicas(1, kv_tokens=640, most=8)  # there is room for the sequences of one of them
    with ThreadPoolExecutor(2) as threads:
        scorers = [remote(replicas, caller=caller) for caller in ("base 1", "base 2")]
        assert list(threads.map(lambda scorer: decode(scorer, "token"), scorers)) == [expected, expected]
    assert replicas.missed


def test_a_step_without_an_answer_is_the_base_models():
    replicas = Replicas()
    replicas.down = True
    engine = Engine(tiny_base(), [remote(replicas, patience=0.0)])
    steered = requests()[0]
    [lost] = engine.generate([steered])
    [base] = engine.generate([replace(steered, guidance=GuidanceParams())])
    assert lost.token_ids == base.token_ids
    assert lost.lost_steps == len(lost.token_ids)
    replicas.down = False
    [found] = engine.generate([steered])
    [expected] = Engine(tiny_base(), [ValueScorer("value", tiny_value())]).generate([steered])
    assert (found.token_ids, found.lost_steps) == (expected.token_ids, 0)


def test_a_greeting_without_an_answer_is_sent_again(monkeypatch):
    replicas = Replicas()
    replicas.hung = True
    engine = Engine(tiny_base(), [remote(replicas, patience=0.0)])
    steered = requests()[0]
    [lost] = engine.generate([steered])
    assert lost.lost_steps == len(lost.token_ids)
    replicas.hung = False
    [waiting] = engine.generate([steered])  # for the greeting that nobody will answer
    assert waiting.lost_steps == len(waiting.token_ids)
    monkeypatch.setattr("vas.serving.remote.REST", 0.0)
    [found] = engine.generate([steered])
    assert found.lost_steps == 0


def test_a_call_a_step_for_each_replica():
    replicas = Replicas()
    engine = Engine(tiny_base(), [remote(replicas)])
    engine.generate(requests())
    assert replicas.calls <= 12 + 2  # a step each, and the farewell


def test_a_call_a_step_also_where_a_response_begins():
    replicas = Replicas()
    engine = Engine(tiny_base(), [remote(replicas)])
    for number, each in enumerate(requests()[:4], 1):
        engine.add(each)
        assert len(engine.step()) == number
        assert replicas.calls == number


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_a_response_goes_on_at_another_engine(schedule):
    """What a gateway asks for when a replica died: the rest of a response, from its tokens so far."""
    [whole] = Engine(tiny_base(), [ValueScorer("value", tiny_value())]).generate(requests(schedule)[:1])
    for length in (1, 5, len(whole.token_ids) - 1):
        rest = replace(requests(schedule)[0], begun=tuple(whole.token_ids[:length]))
        engine = Engine(tiny_base(), [ValueScorer("value", tiny_value())])
        tokens = list(engine.stream(rest))
        assert [*rest.begun, *(token.token_id for token in tokens)] == whole.token_ids
        assert whole.text.endswith("".join(token.text for token in tokens))
        assert tokens[-1].finish_reason == whole.finish_reason
