"""The endpoint as OpenAI's own client sees it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import schemathesis
from command import ROOT, blocks
from hypothesis import HealthCheck, given, settings
from ray.serve.handle import DeploymentHandle
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import CHAT, PORT, URL, client, cluster, get, idle, keys_of, post, run, states

from vas.decoding.engine import Engine
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.models.base import encode_prompt, load_base
from vas.models.value import ValueModel
from vas.run.cluster import LOCAL_ENVIRONMENT
from vas.run.directory import RunDirectory
from vas.schema import Prompt
from vas.serving.keys import new_key

STEERED = {"guidance": {"objectives": {"positive": 2.0, "short": -1.0}}}
BOTH = pytest.mark.parametrize("guidance", [{}, STEERED], ids=["base", "steered"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module", autouse=True)
def keys(folder):
    """The endpoint, and the keys it was made of."""
    presets = {"cheerful": {"objectives": {"positive": 2.0, "short": -1.0}}}
    limits = {"body_bytes": 200_000, "max_tokens": 800, "n": 8, "strengths": {"short": [-3, 3]}}
    content = keys_of(folder, gate={"presets": presets, "limits": limits})
    with cluster():
        run(content)
        yield content


def chat(**more):
    """A chat of the same prompt."""
    return client().chat.completions.create(**{"model": "tiny", "messages": CHAT, "max_tokens": 16, "seed": 7} | more)


@BOTH
def test_a_chat_is_what_the_engine_decodes(keys, guidance):
    base = load_base(RunDirectory.open(keys["run"]).config.base)
    scorers = [make_scorer(str(n), ValueModel.load(model["path"])) for n, model in enumerate(keys["value_models"])]
    prompt = encode_prompt(base.tokenizer, Prompt("", tuple(CHAT)))
    objectives = guidance["guidance"]["objectives"] if guidance else {}
    requests = [
        Request(str(i), tuple(prompt), SamplingParams(max_tokens=16, seed=7 + i), GuidanceParams(objectives))
        for i in range(3)
    ]
    expected = Engine(base, scorers).generate(requests)
    found = chat(n=3, logprobs=True, top_logprobs=2, extra_body=guidance)
    assert [choice.message.content for choice in found.choices] == [each.text for each in expected]
    assert [choice.finish_reason for choice in found.choices] == [each.finish_reason for each in expected]
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.completion_tokens == sum(len(each.token_ids) for each in expected)
    for choice, each in zip(found.choices, expected, strict=True):
        entries = choice.logprobs.content
        assert [entry.logprob for entry in entries] == pytest.approx(each.guided_logprobs, abs=1e-4)
        assert [entry.base_logprob for entry in entries] == pytest.approx(each.logprobs, abs=1e-4)
        assert all(len(entry.top_logprobs) == 2 for entry in entries)
        if guidance:
            assert choice.guidance["kl"] == pytest.approx(each.kl, abs=1e-3)
            assert choice.guidance["guided_steps"] == each.guided_steps
            assert choice.guidance["mean_value"] == pytest.approx(each.mean_values, abs=1e-4)
            assert set(entries[0].advantages) == set(objectives)
        else:
            assert not hasattr(choice, "guidance")


@BOTH
def test_a_stream_has_the_same_text_and_its_usage(guidance):
    whole = chat(n=2, extra_body=guidance)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in chat(n=2, stream=True, stream_options={"include_usage": True}, extra_body=guidance):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_completions_take_texts_and_token_ids(keys):
    tokenizer = load_base(RunDirectory.open(keys["run"]).config.base).tokenizer
    asked = {"model": "tiny", "max_tokens": 8, "seed": 3, "logprobs": 2, "n": 2}
    texts = client().completions.create(prompt=["the fox", "a dog"], **asked)
    ids = client().completions.create(prompt=[tokenizer("the fox").input_ids, tokenizer("a dog").input_ids], **asked)
    assert [c.text for c in texts.choices] == [c.text for c in ids.choices]
    assert [c.index for c in texts.choices] == [0, 1, 2, 3]
    assert len({c.text for c in texts.choices}) == 4
    assert len(texts.choices[0].logprobs.token_logprobs) == len(texts.choices[0].logprobs.top_logprobs) == 8
    chunks = [c.choices[0] for c in client().completions.create(prompt="the fox", stream=True, **asked | {"n": 1})]
    assert "".join(chunk.text for chunk in chunks) == texts.choices[0].text
    offsets = [offset for chunk in chunks for offset in chunk.logprobs.text_offset]
    assert offsets == texts.choices[0].logprobs.text_offset


def test_a_preset_is_a_model():
    names = [model.id for model in client().models.list()]
    assert names == ["tiny", "tiny:cheerful"]
    assert client().models.retrieve("tiny:cheerful").id == "tiny:cheerful"
    preset, spelled = chat(model="tiny:cheerful"), chat(extra_body=STEERED)
    assert preset.choices[0].message == spelled.choices[0].message
    assert preset.choices[0].message != chat().choices[0].message


def test_stop_bias_and_greed():
    plain = chat(temperature=0).choices[0].message.content
    assert chat(temperature=0, seed=99).choices[0].message.content == plain
    letter = plain[3]
    stopped = chat(temperature=0, stop=letter).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (plain[: plain.index(letter)], "stop")
    one = chat(max_tokens=4, logit_bias={"40": 100}).choices[0].message.content
    assert one == one[0] * 4
    assert chat(seed=None).choices[0].message.content != chat(seed=None).choices[0].message.content


@pytest.mark.parametrize(
    ("error", "asked", "says"),
    [
        (openai.NotFoundError, {"model": "gpt-9"}, "does not exist"),
        (openai.NotFoundError, {"model": "tiny:gloomy"}, "does not exist"),
        (openai.BadRequestError, {"temperature": 3}, "less than or equal to 2"),
        (openai.BadRequestError, {"n": 9}, "more than 8"),
        (openai.BadRequestError, {"max_tokens": 801}, "800 at most"),
        (openai.BadRequestError, {"messages": []}, "messages"),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "word " * 2000}]}, "tokens, more than"),
        (openai.BadRequestError, {"stop": ["x"] * 17}, "more than 16"),
        (openai.BadRequestError, {"frequency_penalty": 1.0}, "frequency_penalty"),
        (
            openai.BadRequestError,
            {"extra_body": {"guidance": {"objectives": {"positiv": 1}}}},
            "did you mean 'positive'",
        ),
        (openai.BadRequestError, {"extra_body": {"guidance": {"objectives": {"short": 4}}}}, r"in \[-3, 3\]"),
        (openai.BadRequestError, {"extra_body": {"guidance": {"schedule": "never"}}}, "schedule"),
        (openai.BadRequestError, {"extra_body": {"guidance": {"strengths": {}}}}, "unknown"),
        (openai.APIStatusError, {"messages": [{"role": "user", "content": "x" * 300_000}]}, "larger than"),
    ],
)
def test_each_mistake_has_its_error(error, asked, says):
    with pytest.raises(error, match=says) as raised:
        chat(**asked)
    assert set(raised.value.response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": "x"}',
        b'{"model": 7, "messages": {}}',
        b'{"a":' * 50_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"model": "tiny", "n": -1, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "tiny", "max_tokens": 1e400, "messages": [{"role": "user", "content": "x"}]}',
        json.dumps({"model": "tiny", "messages": CHAT, "guidance": {"objectives": {"positive": 1e308}}}).encode(),
        json.dumps({"model": "tiny", "messages": CHAT, "stop": ["a"] * 40_000}).encode(),
        json.dumps({"model": "tiny", "messages": CHAT, "stop": ["a"] * 1_000_000}).encode(),
        json.dumps({"model": "tiny", "messages": CHAT, "logit_bias": {"99999999": 1}}).encode(),
        json.dumps({"model": "tiny", "messages": CHAT, "logit_bias": {"-1": 1}}).encode(),
        json.dumps({"model": "tiny", "messages": CHAT, "seed": 10**40}).encode(),
        json.dumps({"model": "tiny", "messages": CHAT, "guidance": {"candidates": 10**9}}).encode(),
        json.dumps({"model": "tiny", "messages": CHAT, "guidance": {"objectives": {"a" * 100_000: 1}}}).encode(),
        json.dumps({"model": "x" * 100_000, "messages": CHAT}).encode(),
        b"1" * 100_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_hostile_bodies_are_refused(body):
    response = post("/v1/chat/completions", content=body)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["message"]
    assert len(response.content) < 2000
    assert chat(max_tokens=2).choices  # it lives


def test_halves_of_characters_are_refused():
    body = (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "guidance": {"objectives": {"\\ud800": 1}}}'
    )
    assert post("/v1/chat/completions", content=body).status_code == 400
    assert post("/v1/score", content=b'{"text": "x", "objectives": ["\\ud800"]}').status_code == 400


def test_too_many_at_once_are_told_to_come_again(keys):
    """Two replies' worth of choices more than a replica takes."""
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 200, "n": 8}  # long enough that all are there at once
    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(lambda _: post("/v1/chat/completions", json=asked), range(24)))
    statuses = {response.status_code for response in found}
    assert statuses == {200, 503}
    full = next(response for response in found if response.status_code == 503)
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["code"] == "overloaded"


def test_completions_refuse_hostile_prompts():
    for prompt in ([], [""], "", [[]], [-1], [10**9], [[1], [10**9]], [1, "a"], ["x"] * 9, [None], {"a": 1}):
        response = post("/v1/completions", json={"model": "tiny", "prompt": prompt})
        assert 400 <= response.status_code < 500, (prompt, response.text)
        assert response.json()["error"]["message"]


def test_a_text_is_scored():
    text = "the quick brown fox"
    found = post("/v1/score", json={"text": text, "messages": CHAT}).json()
    assert "".join(token["text"] for token in found["tokens"]) == text
    assert set(found["objectives"]) == {"positive", "concise", "short"}
    assert all(len(values) == len(found["tokens"]) for values in found["objectives"].values())
    one = post("/v1/score", json={"text": text, "messages": CHAT, "objectives": ["short"]}).json()
    assert one["objectives"]["short"] == pytest.approx(found["objectives"]["short"], abs=1e-5)
    assert post("/v1/score", json={"text": text, "objectives": ["no"]}).status_code == 400


def test_objectives_say_what_they_are():
    found = {each["id"]: each for each in get("/v1/objectives").json()["data"]}
    assert set(found) == {"positive", "concise", "short"}
    assert found["short"]["placement"] == "deployment"
    assert found["short"]["strength"] == [-3, 3]
    assert found["positive"]["digest"] != found["short"]["digest"]


def test_paths_and_methods_that_are_not_there():
    for response, status in (
        (get("/v1/nothing"), 404),
        (get("/v1/chat/completions"), 405),
        (get("/v1/models/no"), 404),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert get("/health").json() == {"status": "ok"}
    assert get("/docs").status_code == get("/openapi.json").status_code == 200
    assert get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_a_client_that_leaves_frees_its_sequence():
    endless = {"max_tokens": 800, "n": 4, "extra_body": STEERED, "logit_bias": {"0": -100}}  # 0 ends a response
    stream = chat(stream=True, **endless)
    next(iter(stream))
    busy = states()[0]
    assert busy["running"] == 4
    stream.response.close()
    assert idle(seconds=3)["kv_bytes"] < busy["kv_bytes"]
    with pytest.raises(openai.APITimeoutError):
        client(timeout=0.5).chat.completions.create(model="tiny", messages=CHAT, **endless)
    assert idle(seconds=3)["streams"] == 0


def test_the_example_of_the_readme_runs(keys):
    [code] = [each for each in blocks(ROOT / "README.md", "python") if "OpenAI(" in each]
    for shown, here in (
        ("127.0.0.1:8000", f"127.0.0.1:{PORT}"),
        ("smollm2-135m-instruct", "tiny"),
        ("brief", "concise"),
    ):
        assert shown in code
        code = code.replace(shown, here)
    exec(code, space := {})
    assert space["chat"].choices[0].message.content


def test_how_a_replica_calls_is_settled_where_it_runs():
    bound = pickle.dumps(DeploymentHandle("BaseModel", "vas"))  # by a process that Serve's variables came too late for
    code = "import pickle, sys; from vas.serving.calls import own; handle = own(pickle.load(sys.stdin.buffer)); "
    code += "print(handle.app_name, handle.deployment_name, handle.handle_options._by_reference)"
    there = os.environ | LOCAL_ENVIRONMENT
    done = subprocess.run([sys.executable, "-c", code], input=bound, env=there, capture_output=True, check=True)
    assert done.stdout.split() == [b"vas", b"BaseModel", b"False"]


def test_metrics_count_what_was_done():
    before = _metric("vas_completion_tokens")
    found = chat(n=3, extra_body=STEERED)
    deadline = time.monotonic() + 40  # Ray's agents gather every few seconds
    while _metric("vas_completion_tokens") < before + found.usage.completion_tokens:
        assert time.monotonic() < deadline
        time.sleep(1)
    text = get("/metrics").text
    for name in ("vas_requests", "vas_time_to_first_token_seconds", "vas_engine_batch_size", "vas_value_call_seconds"):
        assert f"# TYPE {name}" in text
    assert "vas_guidance_kl_nats" in text


def _metric(name: str) -> float:
    """The sum of a counter's lines."""
    lines = [line for line in get("/metrics").text.splitlines() if line.startswith(name) and not line.startswith("#")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_whatever_is_sent_the_answer_is_a_documented_one():
    """Requests made up from `/openapi.json`, right ones and wrong ones."""
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    operations = [found.ok() for found in schemathesis.openapi.from_url(f"{URL}/openapi.json").get_all_operations()]
    assert len(operations) == 8
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def check(case):
            case.call_and_validate(checks=checks)

        check()


def test_keys_guard_every_route_but_health(keys, folder):
    """Last, for it changes the gateway's settings, with no restart."""
    secret, digest = new_key()
    frugal, other = new_key()
    entries = [
        {"name": "alice", "sha256": digest, "objectives": {"positive": [0, 3]}},
        {"name": "bob", "sha256": other, "requests_per_minute": 2},
    ]
    file = folder / "keys.yaml"
    file.write_text(json.dumps({"keys": entries}))

    keys["gate"]["keys"] = str(file)
    run(keys)
    for path in ("/", "/v1/models", "/v1/objectives", "/metrics", "/docs", "/openapi.json", "/v1/nothing"):
        assert get(path).status_code == 401, path
        assert get(path, headers={"Authorization": "Bearer vas-wrong"}).status_code == 401
    assert get("/health").status_code == 200
    assert get("/").headers["www-authenticate"].startswith("Basic ")  # a browser then asks for a password
    assert get("/", auth=("", secret)).status_code == get("/v1/models", auth=("", secret)).status_code == 200
    body = json.dumps({"model": "tiny", "messages": CHAT, "max_tokens": 1})
    for kind, status in (("application/json", 200), ("text/plain", 401)):  # a form of another site can send the latter
        sent = post("/v1/chat/completions", content=body, headers={"Content-Type": kind}, auth=("", frugal))
        assert sent.status_code == status
    with pytest.raises(openai.AuthenticationError):
        chat()
    alice, bob = client(secret).chat.completions, client(frugal).chat.completions
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 2}
    assert alice.create(**asked, extra_body={"guidance": {"objectives": {"positive": 3}}}).choices
    for objectives in ({"positive": 4}, {"short": 1}):
        with pytest.raises(openai.PermissionDeniedError):
            alice.create(**asked, extra_body={"guidance": {"objectives": objectives}})
    assert bob.create(**asked).choices  # his second request
    with pytest.raises(openai.RateLimitError) as raised:
        bob.create(**asked)
    assert int(raised.value.response.headers["retry-after"]) >= 1
