"""A base model that is reached through a real server alone (llama.cpp): next tokens, what is not told, guidance."""

import math
from collections import Counter
from collections.abc import Iterator

import pytest
from openai_server import MODEL, llama_server
from tiny import tiny_value

from vas.decoding.engine import Engine
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.http import Client
from vas.models.base import load_tokenizer, tokenizer_digest
from vas.models.served import ServedModel
from vas.rollouts.engines.openai import eos_token_ids

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    tokenizer = load_tokenizer(MODEL, None)
    with llama_server() as url:
        client = Client(url, None, 60, 3, 2)
        digest = tokenizer_digest(tokenizer)
        yield ServedModel(MODEL, tokenizer, eos_token_ids(MODEL, None, tokenizer), digest, client, MODEL, 2)


@pytest.fixture(scope="module")
def prompt(served: ServedModel) -> tuple[int, ...]:
    return tuple(served.tokenizer(TEXT).input_ids)


def test_what_is_told_and_what_is_not_make_one(served, prompt):
    (ahead,) = served.ahead([prompt])
    assert len(ahead.tokens) == served.top == 200
    assert list(ahead.logprobs) == sorted(ahead.logprobs, reverse=True)
    assert served.tokenizer.decode(ahead.tokens[0]) == " Paris"
    assert math.fsum(map(math.exp, ahead.logprobs)) + math.exp(ahead.rest) == pytest.approx(1.0)


def test_what_is_not_told_can_be_drawn(served, prompt):
    ahead = served._ask(prompt, 5)
    drawn = [served.draw(prompt, ahead, seed) for seed in range(8)]
    assert not {token for token, _ in drawn} & set(ahead.tokens)
    assert all(logprob <= ahead.logprobs[-1] + 1e-3 for _, logprob in drawn)
    assert len(Counter(token for token, _ in drawn)) > 1
    assert drawn[0] == served.draw(prompt, ahead, 0)


def test_greedy_text_is_the_servers_own(served, prompt):
    body = {"model": MODEL, "prompt": list(prompt), "max_tokens": 16, "temperature": 0}
    expected = served._client.post("completions", body)["choices"][0]["text"]
    sampling = SamplingParams(temperature=0, max_tokens=16)
    (answer,) = Engine(served).generate([Request("greedy", prompt, sampling)])
    assert answer.text == expected


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
