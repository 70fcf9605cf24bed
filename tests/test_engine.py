"""The engine without guidance is `generate`; requests come, go and fail without touching each other."""

import dataclasses
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from naive import (
    BOTH,
    ONE,
    VOCAB,
    also_ending_with,
    drain,
    guided_setup,
    mixed_requests,
    prompts,
    request,
    rows_in_use,
    scorers_of,
)
from scipy import stats
from tiny import CONTEXT, tiny_base, tiny_value

from vas.decoding.engine import Engine
from vas.errors import VasError
from vas.models.base import BaseModel

# --- without guidance: what `generate` gives ---------------------------------------------------


def hugging_face_greedy(base: BaseModel, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(base.eos_token_ids),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mistral", "gemma2", "gemma3"])
def test_greedy_without_guidance_is_generate(arch):
    base = tiny_base(arch)
    several = prompts(9, 1, 23, 4, 15, 2)
    limits = [20, 25, 3, 40, 1, 30]
    # a token that the third response would hold ends some responses early
    eos = hugging_face_greedy(base, several[3], 40)[10]
    base = also_ending_with(base, eos)
    expected = [hugging_face_greedy(base, prompt, limit) for prompt, limit in zip(several, limits, strict=True)]

    def check(completions, expected):
        for completion, tokens in zip(completions, expected, strict=True):
            assert completion.token_ids == tokens
            assert completion.finish_reason == ("stop" if tokens[-1] in base.eos_token_ids else "length")
            assert completion.text == base.tokenizer.decode(tokens, skip_special_tokens=True)
            assert completion.kl == 0
            assert completion.guided_logprobs == completion.logprobs

    requests = [
        request(f"r{i}", prompt, temperature=0, max_tokens=limit)
        for i, (prompt, limit) in enumerate(zip(several, limits, strict=True))
    ]
    ragged = Engine(base).generate(requests)
    check(ragged, expected)
    assert {completion.finish_reason for completion in ragged} == {"stop", "length"}
    check(Engine(base).generate(requests[3:4]), expected[3:4])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_logprobs_are_the_models(arch):
    base = tiny_base(arch)
    requests = [request(f"r{i}", prompt, seed=i) for i, prompt in enumerate(prompts(8, 1, 17))]
    for asked, completion in zip(requests, Engine(base).generate(requests), strict=True):
        ids = [*asked.prompt_token_ids, *completion.token_ids]
        logprobs = torch.log_softmax(base.model(torch.tensor([ids])).logits[0].double(), -1)
        start = len(asked.prompt_token_ids) - 1
        expected = [logprobs[start + t, token].item() for t, token in enumerate(completion.token_ids)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    ],
    ids=str,
)
def test_sampled_tokens_follow_the_probabilities_of_generate(knobs):
    base, count = tiny_base("llama"), 1500
    (prompt,) = prompts(6, seed=3)

    def probabilities(tokens):
        """Of the next token, from the scores that `generate` samples from."""
        ids = torch.tensor([tokens])
        settings = {"top_k": 0, "top_p": 1.0, "max_new_tokens": 1, "pad_token_id": 0, **knobs}
        out = base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
        return torch.softmax(out.scores[0][0].double(), -1)

    first = probabilities(prompt)
    expected = {}
    for one in first.nonzero().flatten().tolist():
        if one in base.eos_token_ids:
            expected[one,] = first[one].item()
            continue
        second = probabilities((*prompt, one))
        for two in second.nonzero().flatten().tolist():
            expected[one, two] = (first[one] * second[two]).item()
    assert sum(expected.values()) == pytest.approx(1)

    requests = [request(str(seed), prompt, seed=seed, max_tokens=2, **knobs) for seed in range(count)]
    completions = Engine(base, max_sequences=count).generate(requests)
    seen = dict.fromkeys(expected, 0)
    for completion in completions:
        pair = tuple(completion.token_ids)
        seen[pair] += 1  # an excluded token would be a KeyError
        assert sum(completion.logprobs) == pytest.approx(math.log(expected[pair]), abs=1e-4)
    likely = [pair for pair, p in expected.items() if p * count >= 8]
    assert len(likely) > 20
    counts = [seen[pair] for pair in likely] + [count - sum(seen[pair] for pair in likely)]
    chances = [expected[pair] for pair in likely]
    assert stats.chisquare(counts, np.array([*chances, 1 - sum(chances)]) * count).pvalue > 0.01


# --- continuous batching -----------------------------------------------------------------------


def test_a_request_alone_equals_itself_in_a_crowd():
    base, models, _ = guided_setup("llama")
    requests = mixed_requests()
    alone = [Engine(base, scorers_of(models)).generate([asked])[0] for asked in requests]
    for at_once in (1, 3, 7):
        crowd = Engine(base, scorers_of(models), max_sequences=at_once)
        for one, many in zip(alone, crowd.generate(requests), strict=True):
            assert many.token_ids == one.token_ids
            assert (many.text, many.finish_reason) == (one.text, one.finish_reason)
            assert many.guided_logprobs == pytest.approx(one.guided_logprobs, abs=1e-5)
            assert many.kl == pytest.approx(one.kl, abs=1e-5)


def test_requests_may_join_at_any_step():
    _, _, engine = guided_setup("gpt2")
    requests = mixed_requests()
    alone = {asked.request_id: engine.generate([asked])[0].token_ids for asked in requests}
    arrivals, tokens = list(requests), {asked.request_id: [] for asked in requests}
    while arrivals or engine.busy:
        for asked in arrivals[:2]:
            engine.add(asked)
        arrivals = arrivals[2:]
        for token in engine.step():
            tokens[token.request_id].append(token.token_id)
            if token.finish_reason:
                assert engine.take(token.request_id).token_ids == tokens[token.request_id]
    assert tokens == alone
    assert rows_in_use(engine) == [0, 0, 0]


# --- leaving early -----------------------------------------------------------------------------


def test_abort_frees_a_request_wherever_it_is():
    base, models, _ = guided_setup("llama")
    engine = Engine(base, scorers_of(models), max_sequences=3)
    requests = [
        request(str(i), prompt, BOTH, seed=i, max_tokens=30) for i, prompt in enumerate(prompts(5, 9, 3, 12, 7))
    ]
    alone = [Engine(base, scorers_of(models)).generate([asked])[0] for asked in requests]
    for asked in requests:
        engine.add(asked)
    for _ in range(4):
        engine.step()
    assert rows_in_use(engine) == [3, 3, 3]
    engine.abort("0")  # running
    engine.abort("3")  # waiting
    engine.abort("nobody")
    assert rows_in_use(engine) == [2, 2, 2]
    engine.add(dataclasses.replace(requests[0], request_id="0"))  # the id is free again
    done = {name: each.token_ids for name, each in drain(engine).items()}
    assert done == {i: alone[int(i)].token_ids for i in ("0", "1", "2", "4")}
    assert rows_in_use(engine) == [0, 0, 0]


def test_leaving_a_stream_early_frees_it():
    _, _, engine = guided_setup("llama")
    asked = request("r", prompts(6)[0], BOTH, max_tokens=30)
    whole = [token.token_id for token in engine.stream(asked)]
    stream = engine.stream(asked)
    assert [next(stream).token_id for _ in range(3)] == whole[:3]
    assert rows_in_use(engine) == [1, 1, 1]
    stream.close()
    assert rows_in_use(engine) == [0, 0, 0]
    assert not engine.busy
    assert engine.generate([asked])[0].token_ids == whole


# --- errors ------------------------------------------------------------------------------------


def test_what_cannot_be_decoded_is_refused():
    base, _, engine = guided_setup("llama")
    (prompt,) = prompts(4)
    for wrong, says in [
        (request("r", ()), "prompt is empty"),
        (request("r", (*prompt, VOCAB)), f"token id {VOCAB} is outside the vocabulary"),
        (request("r", (-1, *prompt)), "token id -1 is outside the vocabulary"),
        (request("r", prompt, logit_bias={VOCAB: 1.0}), f"token id {VOCAB} is outside the vocabulary"),
        (request("r", prompt, {"positiv": 1.0}), "did you mean 'positive'"),
        (request("r", prompt, {"zzz": 1.0}), "known: concise, formal, positive"),
        (request("r", prompt, max_tokens=CONTEXT - 3), f"room for {CONTEXT}"),
    ]:
        with pytest.raises(VasError, match=says):
            engine.add(wrong)
        assert not engine.busy
    engine.add(request("r", prompt, max_tokens=CONTEXT - 4))
    with pytest.raises(VasError, match="'r' is in use"):
        engine.add(request("r", prompt))
    with pytest.raises(VasError, match="none is known"):
        Engine(base).add(request("r", prompt, ONE))


def test_a_request_that_is_refused_leaves_none_of_its_batch_behind():
    _, _, engine = guided_setup("llama")
    good = request("good", prompts(4)[0], ONE)
    with pytest.raises(VasError, match="empty"):
        engine.generate([good, request("bad", ())])
    assert not engine.busy
    assert engine.generate([good])[0].finish_reason


def test_generate_minds_its_own_requests():
    _, _, engine = guided_setup("llama")
    first, short, long = (
        request(name, prompt, ONE, temperature=0, max_tokens=limit)
        for name, prompt, limit in zip(("first", "short", "long"), prompts(4, 5, 6), (2, 1, 9), strict=True)
    )
    alone = [done.token_ids for done in (engine.generate([asked])[0] for asked in (first, short, long))]
    engine.add(first)
    assert [done.token_ids for done in engine.generate([short, long])] == alone[1:]
    assert engine.take("first").token_ids == alone[0]


def test_two_value_models_may_not_bring_the_same_objective():
    models = [tiny_value("llama", ("a", "b")), tiny_value("gpt2", ("b",))]
    with pytest.raises(VasError, match="'b'"):
        Engine(tiny_base("llama"), scorers_of(models))


def test_an_engine_that_is_gone_frees_its_memory_at_once():
    _, _, engine = guided_setup("llama")
    engine.generate([request("0", prompts(9)[0], ONE)])
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(each) for each in (engine, engine._runner.cache, engine._scorers[0]._runner.cache)]
        del engine
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()
