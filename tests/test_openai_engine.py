"""The engine `openai`: faults of a server, and a real one."""

import math
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from engines import EOS, FOX, config, content, ids, many
from naive import ONE, prompts, request
from openai_server import FaultyServer
from tiny import tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from benchmarks.llama import MODEL, llama_server
from vas import http
from vas.decoding.sequence import Completion
from vas.errors import VasError
from vas.models.base import load_tokenizer
from vas.models.server import Ask, Prefix
from vas.rollouts.engines import make_engine
from vas.rollouts.engines.openai import OpenAIEngine

# --- a server's faults ------------------------------------------------------------------------------------------

ANSWER = {
    "choices": [{"text": "the fox", "finish_reason": "stop", "logprobs": content([*FOX, EOS])}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 9},
}
BUSY = (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}})


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.02)


def engine_at(url: str, model: str, **base) -> OpenAIEngine:
    return make_engine(config(model, base={"openai": url, **base}))


@pytest.mark.parametrize(
    "fault",
    [BUSY, (500, {}, "oops"), (503, {}, {"message": "loading"}), (409, {}, {}), None, (200, {}, "<html>")],
    ids=["429", "500", "503", "409", "hung up", "no JSON"],
)
def test_what_may_pass_is_tried_again(tokenizer_only, fault):
    server = FaultyServer(ANSWER, [fault, fault])
    with server.serve() as url:
        engine = engine_at(url, tokenizer_only)
        [found] = engine.generate(many(1))
    assert found.token_ids == [*FOX, EOS]
    assert engine.cost == {"prompt_tokens": 5, "completion_tokens": 9, "calls": 3, "retries": 2}


def test_a_time_out_is_tried_again(tokenizer_only):
    server = FaultyServer(ANSWER)
    server.seconds = 0.5
    with server.serve() as url:
        [found] = engine_at(url, tokenizer_only, timeout=0.1, attempts=2).generate(many(1))
    assert len(server.asked) == 2
    assert "2 attempts; the last: ReadTimeout" in str(found)


def test_the_server_says_how_long_to_wait(tokenizer_only):
    server = FaultyServer(ANSWER, [(429, {"Retry-After": "0.4"}, {})])
    with server.serve() as url:
        started = time.monotonic()
        engine_at(url, tokenizer_only).generate(many(1))
    assert time.monotonic() - started > 0.4


def test_retry_after_is_seconds_or_a_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert http.retry_after("7") == 7
    assert 25 < http.retry_after(soon) <= 30
    assert http.retry_after(format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)) == 0
    assert http.retry_after("soon") is None
    assert http.retry_after(None) is None


def test_after_the_last_attempt_that_response_alone_failed(tokenizer_only):
    server = FaultyServer(ANSWER, [(500, {}, {"error": {"message": "broken"}})] * 3)
    with server.serve() as url:
        found = engine_at(url, tokenizer_only, attempts=3, concurrency=1).generate(many(3))
    assert [type(each) for each in found] == [VasError, Completion, Completion]
    assert "3 attempts; the last: 500 broken" in str(found[0])


def test_a_wait_that_is_too_long_is_an_error_at_once(tokenizer_only):
    server = FaultyServer(ANSWER, [(429, {"Retry-After": "100000"}, {"error": "come back tomorrow"})])
    with server.serve() as url:
        [found] = engine_at(url, tokenizer_only).generate(many(1))
    assert "1 attempts; the last: 429 come back tomorrow (try again after 100000 s)" in str(found)


@pytest.mark.parametrize(
    ("status", "body", "mend"),
    [
        (401, {"error": {"message": "Invalid key"}}, "api_key_env"),
        (403, {"error": {"message": "Invalid key"}}, "key that may"),
        (404, {"error": {"message": "Invalid key"}}, "served_name"),
        (429, {"error": {"message": "Invalid key", "code": "insufficient_quota"}}, ""),
    ],
)
def test_a_users_mistake_ends_it_at_once(tokenizer_only, status, body, mend):
    server = FaultyServer(ANSWER, [(status, {}, body)] * 4)
    with server.serve() as url, pytest.raises(VasError, match="Invalid key") as found:
        engine_at(url, tokenizer_only, concurrency=1).generate(many(20))
    assert mend in str(found.value)
    assert len(server.asked) < 4


def test_a_server_that_is_not_there_is_a_users_mistake(tokenizer_only):
    with FaultyServer(ANSWER).serve() as url:
        pass
    with pytest.raises(VasError, match="cannot be reached"):
        engine_at(url, tokenizer_only, attempts=2).generate(many(2))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://a:b"])
def test_an_address_that_is_none_is_refused(tokenizer_only, url):
    with pytest.raises(VasError, match="not a server's address"):
        engine_at(url, tokenizer_only)


def test_a_server_that_takes_text_only_gets_text(tokenizer_only):
    refusal = (400, {}, {"error": {"message": "prompt must be a string"}})
    server = FaultyServer(ANSWER, [refusal])
    with server.serve() as url:
        engine = engine_at(url, tokenizer_only, concurrency=1)
        prompt = tuple(ids("the dog thinks"))
        found = engine.generate([request("a", prompt, seed=2**62 + 5, top_k=7), request("b", prompt)])
    assert all(each.token_ids == [*FOX, EOS] for each in found)
    full, plain, later = server.asked
    assert full["prompt"] == list(prompt)
    assert full["return_token_ids"]
    assert plain["prompt"] == later["prompt"] == "the dog thinks"
    assert plain["top_k"] == 7
    assert plain["seed"] == 5
    assert not {"min_p", "return_token_ids"} & set(plain)
    assert later["model"] == tokenizer_only


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prompt_as_text_becomes_the_same_tokens_at_the_server(tmp_path, adds_bos):
    """A BOS that the tokenizer adds by itself is left out, one that is part of a chat is not."""
    inner = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    if adds_bos:
        inner.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token="<|user|>")
    tokenizer.save_pretrained(tmp_path)
    with FaultyServer(ANSWER).serve() as url:
        engine = engine_at(url, str(tmp_path))
    prompt = tuple(tokenizer("<|user|>the dog<|end|>", add_special_tokens=False).input_ids)
    text = engine._server.body(Prefix(prompt), Ask(1), "text")["prompt"]
    assert tuple(tokenizer(text).input_ids) == prompt
    assert text.startswith("<|user|>") != adds_bos


def test_what_the_server_refuses_fails_alone(tokenizer_only):
    refusal = (400, {}, {"error": {"message": "the prompt is too long"}})
    server = FaultyServer(ANSWER, [refusal] * 4)  # as ids and as text, with log-probs and without
    with server.serve() as url:
        found = engine_at(url, tokenizer_only, concurrency=1).generate(many(2))
    assert "the prompt is too long" in str(found[0])
    assert isinstance(found[1], Completion)
    assert isinstance(server.asked[4]["prompt"], list), "ids were not what it minded"


def test_another_model_at_the_server_is_noticed(tokenizer_only):
    text = "the other dog jumps"
    told = content(ids(text))
    for each in told["content"]:
        each["id"] = (each["id"] + 100) % 290
    server = FaultyServer({"choices": [{"text": text, "finish_reason": "stop", "logprobs": told}]})
    with server.serve() as url, pytest.raises(VasError, match="tokens are not those of"):
        engine_at(url, tokenizer_only).generate(many(1))


def test_so_many_requests_are_in_flight(tokenizer_only):
    server = FaultyServer(ANSWER)
    server.seconds = 0.05
    with server.serve() as url:
        engine_at(url, tokenizer_only, concurrency=3).generate(many(12))
    assert server.most_at_once == 3


def test_the_key_is_sent_and_must_be_there(tokenizer_only, monkeypatch):
    server = FaultyServer(ANSWER)
    with server.serve() as url:
        there = config(tokenizer_only, base={"openai": url, "api_key_env": "VAS_TEST_KEY"})
        with pytest.raises(VasError, match="key is not set"):
            make_engine(there)
        monkeypatch.setenv("VAS_TEST_KEY", "sesame")
        make_engine(there).generate(many(1))
    assert server.headers[0]["Authorization"] == "Bearer sesame"


def test_without_a_value_model_there_is_no_guidance(tokenizer_only):
    with FaultyServer(ANSWER).serve() as url:
        found = engine_at(url, tokenizer_only).generate([request("r", prompts(5)[0], ONE), request("e", ())])
    assert "no value model" in str(found[0])
    assert "prompt is empty" in str(found[1])


# --- a real server ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    with llama_server() as url:
        yield url


def chat(tokenizer, text: str) -> tuple[int, ...]:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return tuple(tokenizer(rendered, add_special_tokens=False).input_ids)


def test_responses_of_llama_cpp(llama):
    engine = engine_at(llama, MODEL, concurrency=2)
    tokenizer = load_tokenizer(MODEL)
    asked = [
        request("short", chat(tokenizer, "Say hello in one word."), max_tokens=60, seed=1),
        request("cut", chat(tokenizer, "Tell a long story."), max_tokens=8, seed=2),
        request("emoji", chat(tokenizer, "Answer with this only: 🙂 naïve 你好"), max_tokens=60, seed=3),
        request("stop", chat(tokenizer, "Count from one to ten, in words."), max_tokens=60, seed=4, stop=(" ",)),
    ]
    found = {each.request_id: each for each in engine.generate(asked)}
    for name, each in found.items():
        assert len(each.logprobs) == len(each.token_ids)
        assert tokenizer.decode(each.token_ids, skip_special_tokens=True).startswith(each.text), name
        assert not any(logprob > 1e-6 for logprob in each.logprobs)
        assert (each.token_ids[-1] == tokenizer.eos_token_id) == (each.finish_reason == "stop" and name != "stop")
    assert found["short"].finish_reason == "stop"
    assert not any(map(math.isnan, found["short"].logprobs))
    assert found["cut"].finish_reason == "length"
    assert len(found["cut"].token_ids) == 8
    assert found["stop"].finish_reason == "stop"
    assert engine.cost["calls"] == 4
    assert engine.cost["prompt_tokens"] == sum(len(each.prompt_token_ids) for each in asked)


def test_characters_of_several_tokens(llama):
    engine = engine_at(llama, MODEL)
    prompt = tuple(engine.tokenizer("🙂你好🙂你好🙂你好🙂你好🙂你好🙂你好").input_ids)
    tokens = engine.tokenizer("🙂＃").input_ids
    whole, cut = engine.generate([request(str(n), prompt, max_tokens=n, temperature=0.0) for n in (9, 3)])
    assert len(tokens) > 2, "else this tests nothing"
    assert whole.token_ids[: len(tokens)] == tokens
    assert math.isnan(whole.logprobs[0])
    assert whole.logprobs[1] < 0
    assert cut.text.startswith("🙂")
    assert cut.token_ids == tokens[: len(cut.token_ids)]


def test_seeds_decide_what_llama_cpp_answers(llama):
    engine = engine_at(llama, MODEL, concurrency=1)
    prompt = chat(engine.tokenizer, "Name an animal.")
    once, again, other = engine.generate(
        [request(str(i), prompt, seed=seed, max_tokens=12) for i, seed in enumerate((7, 7, 8))]
    )
    assert once.token_ids == again.token_ids
    assert once.token_ids != other.token_ids


def test_llama_cpp_samples_the_whole_distribution(llama):
    """Its own defaults are top_k 40 and min_p 0.05; a first token outside of them comes at temperature 3."""
    engine = engine_at(llama, MODEL, concurrency=2)
    prompt = chat(engine.tokenizer, "Name an animal.")
    found = engine.generate([request(str(i), prompt, seed=i, max_tokens=4, temperature=3.0) for i in range(8)])
    assert min(logprob for each in found for logprob in each.logprobs) < -9
