"""A base model that is reached through a real server alone (llama.cpp): next tokens, what is not told, guidance."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from naive import assert_within, drain
from openai_server import proxy
from tiny import tiny_value

from benchmarks.llama import MODEL, llama_server
from vas import http
from vas.config import Base, Prompts
from vas.decoding.engine import Engine
from vas.decoding.loop import Loop
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.errors import Rejected, VasError
from vas.models.answers import Answer
from vas.models.base import encode_prompt, load_base
from vas.models.served import ServedModel, open_base
from vas.models.server import Ask, Prefix
from vas.prompts import load_prompts
from vas.schema import Prompt

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    with llama_server() as url:
        yield open_base(Base(model=MODEL, openai=url, concurrency=2))


@pytest.fixture(scope="module")
def prompt(served: ServedModel) -> tuple[int, ...]:
    return tuple(served.tokenizer(TEXT).input_ids)


def test_what_is_told_and_what_is_not_make_one(served, prompt):
    ahead = served.ahead(Prefix(prompt)).result()
    assert len(ahead.tokens) == served.top == 200
    assert list(ahead.logprobs) == sorted(ahead.logprobs, reverse=True)
    assert served.tokenizer.decode(ahead.tokens[0]) == " Paris"
    assert math.fsum(map(math.exp, ahead.logprobs)) + math.exp(ahead.rest) == pytest.approx(1.0)


def test_what_is_not_told_can_be_drawn(served, prompt):
    ahead = served._ahead(Prefix(prompt), 5)
    banned, _ = served.draw(Prefix(prompt), ahead, 0).result()
    assert served.draw(Prefix(prompt), ahead, 0, {banned: -100.0}).result()[0] != banned
    drawn = [served.draw(Prefix(prompt), ahead, seed).result() for seed in range(8)]
    assert not {token for token, _ in drawn} & set(ahead.tokens)
    assert all(logprob <= ahead.logprobs[-1] + 1e-3 for _, logprob in drawn)
    assert len(Counter(token for token, _ in drawn)) > 1
    assert drawn[0] == served.draw(Prefix(prompt), ahead, 0).result()


def test_greedy_text_is_the_servers_own(served, prompt):
    [choice] = served.server.ask(Prefix(prompt), Ask(16, temperature=0))
    for logprobs in (0, 1):  # in one call, and in one for each token
        sampling = SamplingParams(temperature=0, max_tokens=16, logprobs=logprobs)
        (answer,) = Engine(served).generate([Request("greedy", prompt, sampling)])
        assert answer.text == choice["text"]


def test_guidance_is_what_it_is_for_local_weights(served, prompt):
    """Stronger, and the value of what is said rises; at 0 it is the base model."""
    value = tiny_value(objectives=("any",), vocab=served.vocabulary)
    engine = Engine(served, [make_scorer("value", value)])
    requests = [
        Request(str(beta), prompt, SamplingParams(max_tokens=8, seed=3), GuidanceParams({"any": beta}, 8))
        for beta in (-8.0, 0.0, 8.0)
    ]
    low, none, high = engine.generate(requests)
    assert none.kl == 0
    assert low.kl > 0 < high.kl
    (base,) = Engine(served).generate([Request("base", prompt, SamplingParams(max_tokens=8, seed=3))])
    assert base.token_ids == none.token_ids


def test_greedy_guidance_says_what_it_says_with_local_weights():
    """Fifty prompts, by a server whose log-probs agree to 1e-3."""
    local = load_base(Base(model=MODEL))
    asked = [each.messages[-1]["content"] for each in load_prompts(Prompts(source="bundled:demo"))]
    prompts = [tuple(local.tokenizer(each).input_ids) for each in asked]
    how, sampling = GuidanceParams({"any": 2.0}, 8), SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    requests = [Request(str(i), prompt, sampling, how) for i, prompt in enumerate(prompts[:50])]
    value = tiny_value(objectives=("any",), vocab=local.vocabulary)
    here = Engine(local, [make_scorer("value", value)]).generate(requests)
    with llama_server(exact=True, threads=2) as url:
        served = open_base(Base(model=MODEL, openai=url, concurrency=2))
        there = Engine(served, [make_scorer("value", value)]).generate(requests)
    told, known = ([each for one in done for each in one.logprobs] for done in (there, here))
    same = [one.text == other.text for one, other in zip(here, there, strict=True)]
    for one, other in zip(here, there, strict=True):
        places = (i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b)
        if (first := next(places, None)) is not None:  # two candidates as close as the log-probs agree
            assert one.top[first][0][2] - one.top[first][1][2] < 2e-3
    assert sum(same) >= 48
    if all(same):
        assert told == pytest.approx(known, abs=1e-3)


# --- forms of servers -------------------------------------------------------------------------------------------

CHAT = ({"role": "user", "content": "What is the capital of France?"},)


def chats_only(path: str, body: dict):
    return (404, {}, {"error": {"message": "no such path"}}) if path == "/v1/completions" else None


def begins_anew(path: str, body: dict):
    """As OpenAI's own do with a chat that ends with the assistant's words: they are a message like any other."""
    if body.get("messages", [{"role": ""}])[-1]["role"] == "assistant":
        body["messages"].append({"role": "user", "content": "Go on."})
    return chats_only(path, body)


def text_only(path: str, body: dict):
    if not isinstance(body["prompt"], str):
        return 400, {}, {"error": {"message": "prompt must be a string"}}
    return None


def in_words(answer: dict) -> None:
    """As OpenAI's completions name tokens: by their texts, in another shape."""
    for choice in answer["choices"]:
        steps = (choice.get("logprobs") or {}).get("content") or []
        choice["logprobs"] = {
            "tokens": [step["token"] for step in steps],
            "token_logprobs": [step["logprob"] for step in steps],
            "top_logprobs": [{each["token"]: each["logprob"] for each in step["top_logprobs"]} for step in steps],
        }


def in_chats_words(answer: dict) -> None:
    """As OpenAI's chats do."""
    for choice in answer["choices"]:
        for step in (choice.get("logprobs") or {}).get("content") or []:
            for each in (step, *step["top_logprobs"]):
                del each["id"]


def nothing(answer: dict) -> None:
    """As it is."""


def no_logprobs(path: str, body: dict):
    body.pop("logprobs", None)


def refuses_logprobs(path: str, body: dict):
    return (400, {}, {"error": {"message": "logprobs are not supported"}}) if body.get("logprobs") else None


@contextmanager
def served_behind(url: str, change, alter=nothing, **base) -> Iterator[ServedModel]:
    with proxy(url, change, alter) as front:
        yield open_base(Base(model=MODEL, openai=front, concurrency=2, **base))


def asked(model: ServedModel, name: str, schedule: str = "token", beta: float = 4.0, **sampling) -> Request:
    tokens = encode_prompt(model.tokenizer, Prompt("", CHAT))
    knobs = {"max_tokens": 12, "seed": 5, **sampling}
    guidance = GuidanceParams({"any": beta}, 4, schedule=schedule)
    return Request(name, tuple(tokens), SamplingParams(**knobs), guidance, messages=CHAT)


def guided_by_any(model: ServedModel) -> Engine:
    return Engine(model, [make_scorer("value", tiny_value(objectives=("any",), vocab=model.vocabulary))])


@pytest.mark.parametrize(
    ("change", "alter", "form"),
    [
        (chats_only, nothing, "chat"),
        (chats_only, in_chats_words, "chat"),
        (text_only, nothing, "text"),
        (text_only, in_words, "text"),
    ],
)
def test_every_form_of_server_is_guided_alike(served, change, alter, form):
    """Greedy, and where the texts have the same tokens, so are the answers."""
    [expected] = guided_by_any(served).generate([asked(served, "r", beta=-0.5, temperature=0.0, max_tokens=8)])
    with served_behind(served.server.client.url, change, alter) as other:
        assert other.server.form == form
        assert other.server.continues
        [found] = guided_by_any(other).generate([asked(other, "r", beta=-0.5, temperature=0.0, max_tokens=8)])
    assert found.text == expected.text
    assert found.guided_logprobs == pytest.approx(expected.guided_logprobs, abs=0.05)


def test_halves_of_characters_are_none_of_what_is_drawn(served, monkeypatch):
    """Where text is sent they cannot be, however likely: what has not been told is drawn without them."""
    half = served.tokenizer("🦊", add_special_tokens=False).input_ids[0]
    with served_behind(served.server.client.url, text_only) as model:
        monkeypatch.setattr(model, "_told", lambda *_: [(half, math.log(0.6)), (50, math.log(0.3))])
        prefix = Prefix(model.tokenizer("Hello").input_ids, (), CHAT)
        ahead = model.ahead(prefix).result()
        assert (ahead.tokens, ahead.torn) == ((50,), (half,))
        assert math.exp(ahead.rest) == pytest.approx(0.1)
        forbidden = []
        monkeypatch.setattr(model, "_ask", lambda prefix, ask: forbidden.append(ask.logit_bias) or [{}])
        monkeypatch.setattr(model, "_answer", lambda choice: Answer([60], "", "length", [-1.0]))
        assert model.draw(prefix, ahead, 0).result() == (60, -1.0)
        assert forbidden == [dict.fromkeys((50, half), -100.0)]


def test_a_server_that_begins_anew_is_guided_by_whole_responses(served):
    with served_behind(served.server.client.url, begins_anew) as model:
        assert not model.server.continues
        assert model.abilities() == (
            "takes chats only and begins every response anew, tells 200 log-probs and heeds logit_bias, "
            "gives 2 choices a call"
        )
        engine = guided_by_any(model)
        with pytest.raises(VasError, match="begins every response anew"):
            engine.check(asked(model, "token"))
        with pytest.raises(VasError, match="N of at least max_tokens"):
            engine.check(asked(model, "block", "block:4"))
        [whole] = engine.generate([asked(model, "whole", "block:12")])
        [plain] = engine.generate([asked(model, "plain", beta=0.0)])
    assert whole.text
    assert whole.guided_steps == 1
    assert plain.text


@pytest.mark.parametrize("change", [no_logprobs, refuses_logprobs])
def test_without_logprobs_there_are_blocks(served, change):
    with served_behind(served.server.client.url, change) as model:
        assert model.top == 0
        engine = guided_by_any(model)
        with pytest.raises(VasError, match="guide by blocks"):
            engine.check(asked(model, "token"))
        [found] = engine.generate([asked(model, "block", "block:4")])
    assert found.text


def test_what_is_not_told_is_drawn_while_others_go_on(served):
    """Five tokens are told, so that the server draws every third or so; every response has all its tokens."""
    few = ServedModel(served.server)
    few.top = 5
    requests = [asked(few, str(i), beta=0.5, seed=i, max_tokens=10, logprobs=2) for i in range(6)]
    found = guided_by_any(few).generate(requests)
    assert all(len(each.token_ids) == 10 or each.finish_reason == "stop" for each in found)
    assert {len(top) for each in found for top in each.top} == {2}  # not with what is not told as one of them
    assert (
        sum(
            each.token_ids[0] not in few._ahead(Prefix(r.prompt_token_ids), 5).tokens
            for each, r in zip(found, requests, strict=True)
        )
        > 0
    )
    [alone] = guided_by_any(few).generate(requests[:1])
    assert alone.token_ids[0] == found[0].token_ids[0]


def test_room_is_there_for_a_block_that_comes_whole(served):
    endless = dict.fromkeys(served.eos_token_ids, -100.0)
    requests = [asked(served, str(i), "block:40", seed=i, max_tokens=40, logit_bias=endless) for i in range(3)]
    whole = guided_by_any(served).generate(requests)
    scorers = guided_by_any(served)._scorers
    engine = Engine(served, scorers, kv_tokens=512)  # one block's continuations, no more
    for each in requests:
        engine.add(each)
    found = drain(engine, lambda: assert_within(512, [scorer._runner.cache for scorer in scorers]))
    assert {name: each.token_ids for name, each in found.items()} == {each.request_id: each.token_ids for each in whole}


def test_room_is_counted_as_the_value_models(served):
    engine = Engine(served, guided_by_any(served)._scorers, kv_tokens=256)
    with pytest.raises(VasError, match="more than the KV cache may hold"):
        engine.check(asked(served, "r", max_tokens=300))
    found = engine.generate([asked(served, str(i), seed=i, max_tokens=6) for i in range(5)])
    assert all(each.token_ids for each in found)


# --- blocks -----------------------------------------------------------------------------------------------------


def test_blocks_take_few_calls_and_draw_by_value(served):
    """Four continuations of four tokens, two a call, for that is what this server gives: 12 tokens in six calls."""
    engine, before = guided_by_any(served), served.server.cost["calls"]
    found = [engine.generate([asked(served, "r", "block:4", beta)])[0] for beta in (-8.0, 8.0)]
    calls = served.server.cost["calls"] - before
    tokens = sum(len(each.token_ids) for each in found)
    assert calls <= 2 * (tokens / 4 + 2) + 1  # the first finds out how many choices a call may have
    assert found[0].token_ids != found[1].token_ids
    assert all(0 < each.kl < each.guided_steps * math.log(4) + 1e-6 for each in found)
    assert all(len(each.token_ids) == 12 or each.finish_reason == "stop" for each in found)


def test_a_stop_string_ends_a_block_early(served):
    [whole] = guided_by_any(served).generate([asked(served, "r", "block:6")])
    stop = whole.text[4:8]
    [cut] = guided_by_any(served).generate([asked(served, "r", "block:6", stop=(stop,))])
    assert cut.finish_reason == "stop"
    assert whole.text.startswith(cut.text)
    assert stop not in cut.text


# --- faults -----------------------------------------------------------------------------------------------------


def test_a_call_that_fails_ends_its_response_alone(served, monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)
    odd = [
        (400, {}, {"error": {"message": "context length exceeded"}}),
        (200, {}, {"choices": [{"text": " a", "finish_reason": "length"}]}),
        (200, {}, {"nothing": 1}),
        (200, {}, "<html>"),
        (500, {}, "broken"),
    ]
    passing = [(429, {"Retry-After": "0.01"}, {}), (503, {}, {}), (200, {}, "{")]
    calls = {}

    def change(path: str, body: dict):
        bad = body["prompt"][-1] if isinstance(body["prompt"], list) else None
        calls[bad] = calls.get(bad, 0) + 1
        if bad in marks:
            return odd[marks[bad]]
        return passing[calls[bad]] if bad == once and calls[bad] < len(passing) else None

    marks: dict[int, int] = {}
    once = -1
    with served_behind(served.server.client.url, change, attempts=3) as model:
        words = model.tokenizer(" red green blue white black gold").input_ids
        marks |= {word: i for i, word in enumerate(words[:5])}
        once = words[5]
        base = asked(model, "")
        requests = [
            replace(base, request_id=str(i), prompt_token_ids=(*base.prompt_token_ids, w)) for i, w in enumerate(words)
        ]
        loop = Loop(lambda: guided_by_any(model))
        found = loop.generate(requests)
        [alone] = guided_by_any(model).generate([requests[5]])
    *failed, good = found
    for each, said in zip(
        failed, ["context length", "no log-probs", "not a completion", "not JSON", "500"], strict=True
    ):
        assert isinstance(each, VasError)
        assert said in str(each)
    assert good.token_ids == alone.token_ids


def test_what_no_call_would_escape_is_said_at_once(served):
    refuse = []

    def change(path: str, body: dict):
        return (401, {}, {"error": {"message": "wrong key"}}) if refuse else None

    with served_behind(served.server.client.url, change) as model:
        refuse.append(True)
        loop = Loop(lambda: guided_by_any(model))
        with pytest.raises(Rejected, match="wrong key"):
            loop.generate([asked(model, "a"), asked(model, "b")])
        engine = guided_by_any(model)
        with pytest.raises(VasError, match="wrong key"):
            engine.generate([asked(model, "a")])
        assert not engine.busy
        with pytest.raises(VasError, match="wrong key"):
            list(engine.stream(asked(model, "a")))
        assert not engine.busy
        assert not engine.failed
