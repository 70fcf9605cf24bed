"""Sampling engines: what they give, and that one bad response or one bad moment costs the others nothing."""

import importlib.util
import math
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest
import torch
from naive import ONE, prompts, request
from openai_server import MODEL, FaultyServer, llama_server
from tiny import save_tiny_base, tiny_base, tiny_tokenizer, tiny_value
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vas.config import RunConfig, parse_config
from vas.decoding.engine import Engine
from vas.decoding.faults import is_fatal, is_memory
from vas.decoding.loop import Loop
from vas.decoding.sequence import Completion, SamplingParams
from vas.errors import EngineDied, VasError
from vas.models.base import load_tokenizer
from vas.rollouts.engines import http, make_engine
from vas.rollouts.engines.answers import ForeignTokens, Reader
from vas.rollouts.engines.apart import generate_apart
from vas.rollouts.engines.openai import OpenAIEngine
from vas.rollouts.engines.transformers import TransformersEngine
from vas.rollouts.engines.vllm import completion_of, model_arguments, sampling_arguments

EOS = tiny_tokenizer().eos_token_id


def config(model: str, **sections: dict) -> RunConfig:
    content = {"name": "test", "prompts": {"source": "bundled:demo"}, "rewards": {"brief": {"use": "length"}}}
    sections["base"] = {"model": model} | sections.get("base", {})
    return parse_config(content | sections, "test")


# --- the config -------------------------------------------------------------------------------------------------


def test_the_engine_openai_needs_an_address():
    with pytest.raises(VasError, match=r"needs base\.openai"):
        config("m", rollouts={"engine": "openai"})


def test_gpus_that_share_a_model_must_be_there():
    with pytest.raises(VasError, match=r"resources\.gpus_per_actor must be"):
        config("m", rollouts={"engine": "vllm", "tensor_parallel": 2})


def test_a_run_may_go_on_at_another_address_and_with_more_patience():
    here = config("m", base={"openai": "http://a"}, rollouts={"engine": "openai"})
    there = config("m", base={"openai": "http://b", "api_key_env": "K"}, rollouts={"engine": "openai", "attempts": 9})
    assert here.digest() == there.digest()
    assert here.digest() != config("m", base={"openai": "http://a"}).digest()


# --- transformers -----------------------------------------------------------------------------------------------


def test_the_default_engine_gives_the_tokens_of_the_decoding_engine(tmp_path):
    engine = make_engine(config(save_tiny_base(tmp_path)))
    requests = [request(str(i), prompt, seed=i) for i, prompt in enumerate(prompts(5, 9))]
    requests.insert(1, request("long", prompts(5)[0], max_tokens=2000))
    first, refused, last = engine.generate(requests)
    alone = Engine(tiny_base()).generate([requests[0], requests[2]])
    assert [first.token_ids, last.token_ids] == [each.token_ids for each in alone]
    assert isinstance(refused, VasError)
    assert "room for 1024" in str(refused)
    assert engine.name == str(tmp_path)
    assert engine.tokenizer_digest == tiny_base().tokenizer_digest


def test_guidance_takes_the_default_engine_whatever_samples_the_rollouts(tmp_path):
    base, value = save_tiny_base(tmp_path / "base"), tmp_path / "value"
    tiny_value().save_pretrained(value)
    tiny_tokenizer().save_pretrained(value)
    openai = config(base, base={"openai": "http://127.0.0.1:9"}, rollouts={"engine": "openai"})
    engine = make_engine(openai, str(value))
    assert isinstance(engine, TransformersEngine)
    assert engine.generate([request("r", prompts(5)[0], ONE)])[0].guided_steps


# --- batches taken apart ----------------------------------------------------------------------------------------


class Cramped(Engine):
    """Memory runs out with more than `room` sequences; a request named "poison" breaks the step that runs it."""

    room = 3

    def _advance(self, sequences):
        if len(sequences) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if any(each.request.request_id == "poison" for each in sequences):
            raise IndexError("poisoned")
        return super()._advance(sequences)


def many(count: int) -> list:
    return [request(str(i), prompt, seed=i) for i, prompt in enumerate(prompts(*[5 + i % 3 for i in range(count)]))]


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
    def lost(_):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    loop.engine._advance = lost
    for _ in range(2):
        with pytest.raises(EngineDied, match="device-side assert"):
            loop.generate(many(2))


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


# --- a server's answers -----------------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text).input_ids


def read(choice: dict, **sampling) -> Completion:
    reader = Reader(tiny_tokenizer(), (EOS,))
    return reader(
        {"choices": [{"text": "the fox", "finish_reason": "stop"} | choice]}, request("r", (5, 6), **sampling)
    )


def content(tokens: list[int]) -> dict:
    tokenizer = tiny_tokenizer()
    return {
        "content": [
            {"id": t, "token": "" if t == EOS else tokenizer.decode([t]), "logprob": -0.5 - i}
            for i, t in enumerate(tokens)
        ]
    }


def classic(pieces: list[str]) -> dict:
    return {"tokens": pieces, "token_logprobs": [-0.5 - i for i in range(len(pieces))]}


def pieces(text: str) -> list[str]:
    return [tiny_tokenizer().decode([token]) for token in ids(text)]


FOX = ids("the fox")


@pytest.mark.parametrize(
    ("choice", "eos_told"),
    [
        ({"logprobs": content([*FOX, EOS])}, True),
        ({"logprobs": content(FOX)}, False),
        ({"logprobs": classic([*pieces("the fox"), "<|end|>"])}, True),
        ({"logprobs": classic([*pieces("the fox"), ""])}, True),
        ({"logprobs": classic(pieces("the fox"))}, False),
        ({"logprobs": classic([*pieces("the fox"), ""]), "token_ids": [*FOX, EOS], "stop_reason": None}, True),
    ],
    ids=["llama.cpp", "ids without EOS", "OpenAI", "an end without text", "no EOS", "vLLM"],
)
def test_every_shape_of_answer_gives_the_same_tokens(choice, eos_told):
    found = read(choice)
    assert found.token_ids == [*FOX, EOS]
    assert found.logprobs[:-1] == [-0.5 - i for i in range(len(FOX))]
    assert found.logprobs[-1] == -0.5 - len(FOX) if eos_told else math.isnan(found.logprobs[-1])
    assert found.text == "the fox"
    assert found.base_positions == 2 + len(FOX)


@pytest.mark.parametrize("choice", [{}, {"logprobs": None}, {"logprobs": classic(["the f", "ox"])}])
def test_without_tokens_the_text_is_encoded(choice):
    found = read(choice | {"finish_reason": "length"})
    assert found.token_ids == FOX
    assert all(map(math.isnan, found.logprobs))
    assert found.finish_reason == "length"


def test_a_response_that_a_stop_string_ended_has_no_eos():
    longer = classic(pieces("the fox and"))
    assert read({"logprobs": longer, "stop_reason": " and"}, stop=(" and",)).token_ids == ids("the fox and")
    assert read({"logprobs": classic(pieces("the fox"))}, stop=(" and",)).token_ids == FOX
    assert read({"logprobs": classic(pieces("the fox")), "stop_reason": None}, stop=("z",)).token_ids == [*FOX, EOS]


def test_ids_of_another_vocabulary_are_noticed():
    text = "the other dog jumps"
    told = content(ids(text))
    for each in told["content"]:
        each["id"] = (each["id"] + 100) % 290
    with pytest.raises(ForeignTokens):
        read({"logprobs": told, "text": text})


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"choices": []}, "not a completion"),
        ({"error": "x"}, "not a completion"),
        ("text", "not a completion"),
        ({"choices": [{"text": "a", "finish_reason": "content_filter"}]}, "another reason: content_filter"),
        ({"choices": [{"text": "", "finish_reason": "length"}]}, "empty"),
    ],
    ids=str,
)
def test_an_answer_that_is_none_is_an_error(answer, problem):
    with pytest.raises(VasError, match=problem):
        Reader(tiny_tokenizer(), (EOS,))(answer, request("r", (5, 6)))


# --- a server's faults ------------------------------------------------------------------------------------------

ANSWER = {
    "choices": [{"text": "the fox", "finish_reason": "stop", "logprobs": content([*FOX, EOS])}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 9},
}
BUSY = (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}})


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.02)


@pytest.fixture(scope="module")
def tokenizer_only(tmp_path_factory):
    """A model's folder without its weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def engine_at(url: str, model: str, **rollouts) -> OpenAIEngine:
    return make_engine(config(model, base={"openai": url}, rollouts={"engine": "openai", **rollouts}))


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
    text = engine.body(request("r", prompt), plain=True)["prompt"]
    assert tuple(tokenizer(text).input_ids) == prompt
    assert text.startswith("<|user|>") != adds_bos


def test_what_the_server_refuses_fails_alone(tokenizer_only):
    refusal = (400, {}, {"error": {"message": "the prompt is too long"}})
    server = FaultyServer(ANSWER, [refusal, refusal])
    with server.serve() as url:
        found = engine_at(url, tokenizer_only, concurrency=1).generate(many(2))
    assert "the prompt is too long" in str(found[0])
    assert isinstance(found[1], Completion)
    assert isinstance(server.asked[2]["prompt"], list), "ids were not what it minded"


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
        there = config(
            tokenizer_only, base={"openai": url, "api_key_env": "VAS_TEST_KEY"}, rollouts={"engine": "openai"}
        )
        with pytest.raises(VasError, match="key is not set"):
            make_engine(there)
        monkeypatch.setenv("VAS_TEST_KEY", "sesame")
        make_engine(there).generate(many(1))
    assert server.headers[0]["Authorization"] == "Bearer sesame"


def test_guidance_is_not_for_servers(tokenizer_only):
    with FaultyServer(ANSWER).serve() as url:
        found = engine_at(url, tokenizer_only).generate([request("r", prompts(5)[0], ONE), request("e", ())])
    assert "cannot be guided" in str(found[0])
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


# --- vLLM -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_missing_is_a_users_mistake(tokenizer_only):
    with pytest.raises(VasError, match=r"pip install 'vas\[vllm\]'"):
        make_engine(config(tokenizer_only, rollouts={"engine": "vllm"}))


def test_sampling_in_vllms_words():
    sampling = SamplingParams(0.5, 0.9, 20, 0.1, 64, ("\n",), 2**62, {5: -1.0})
    assert sampling_arguments(sampling) == {
        "n": 1,
        "seed": 2**62,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "max_tokens": 64,
        "stop": ["\n"],
        "logit_bias": {5: -1.0},
        "logprobs": 0,
    }
    assert sampling_arguments(SamplingParams())["stop"] is None


def test_the_model_in_vllms_words():
    shared = model_arguments(config("org/model", rollouts={"engine": "vllm"}, resources={"gpus_per_actor": 0.5}))
    assert shared["gpu_memory_utilization"] == 0.45
    assert shared["dtype"] == "bfloat16"
    two = config("org/model", rollouts={"engine": "vllm", "tensor_parallel": 2}, resources={"gpus_per_actor": 2})
    assert model_arguments(two)["tensor_parallel_size"] == 2
    assert "gpu_memory_utilization" not in model_arguments(two)


def test_a_completion_in_vllms_words():
    steps = [{5: SimpleNamespace(logprob=-1.0), 9: SimpleNamespace(logprob=-0.5)}, {EOS: SimpleNamespace(logprob=-2.0)}]
    output = SimpleNamespace(token_ids=(5, EOS), text="x", finish_reason="stop", logprobs=steps)
    found = completion_of(output, request("r", (6, 7)))
    assert (found.token_ids, found.logprobs, found.base_positions) == ([5, EOS], [-1.0, -2.0], 3)
    output.finish_reason = "abort"
    assert "another reason: abort" in str(completion_of(output, request("r", (6, 7))))
