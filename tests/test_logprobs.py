"""The likeliest tokens that a request may ask for beside each sampled one, against the naive reference."""

import dataclasses

import pytest
from naive import NEVER, guided_setup, mixed_requests, naive, prompts, request

from vas.decoding.sequence import MOST_LOGPROBS, SamplingParams
from vas.errors import VasError


def asking(asked, count: int):
    return dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, logprobs=count))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_likeliest_tokens_under_the_guided_policy_are_reported(arch):
    base, models, engine = guided_setup(arch)
    # truncation may leave fewer tokens than are asked for, whose order is then anybody's
    requests = [asked for asked in mixed_requests() if asked.sampling.top_p == 1 and asked.guidance.outside == "keep"]
    requests = [asking(asked, [3, 0, 7, 1, 20][i % 5]) for i, asked in enumerate(requests)]
    completions = engine.generate(requests)
    plain = engine.generate([asking(asked, 0) for asked in requests])
    for asked, done, unasked in zip(requests, completions, plain, strict=True):
        assert done.token_ids == unasked.token_ids
        assert unasked.top == []
        count = asked.sampling.logprobs
        if not count:
            assert done.top == []
            continue
        reference = naive(base, models, asked)
        assert len(done.top) == len(reference.policies) == len(done.token_ids)
        for top, (policy, guided) in zip(done.top, reference.policies, strict=True):
            order = sorted((t for t in range(len(guided)) if guided[t] > NEVER), key=lambda t: -guided[t])[:count]
            assert [token for token, _, _ in top][: len(order)] == order
            for (token, logprob, guided_logprob), _ in zip(top, order, strict=False):
                assert logprob == pytest.approx(policy[token], abs=1e-4)
                assert guided_logprob == pytest.approx(guided[token], abs=1e-4)


def test_streamed_tokens_bring_them_too():
    _, _, engine = guided_setup("llama")
    asked = asking(request("r", prompts(6)[0], {"positive": 2.0}, temperature=0), 4)
    (whole,) = engine.generate([asked])
    tokens = list(engine.stream(asked))
    assert [token.top for token in tokens] == whole.top
    for token in tokens:
        assert token.top[0] == (token.token_id, token.logprob, token.guided_logprob), "the likeliest is taken"


def test_blocks_report_the_policy_that_continuations_are_sampled_from():
    _, _, engine = guided_setup("llama", ending=())
    asked = asking(request("r", prompts(6)[0], {"positive": 2.0}, schedule="block:5"), 3)
    (done,) = engine.generate([asked])
    assert [len(top) for top in done.top] == [3] * len(done.token_ids)
    assert all(logprob == guided for top in done.top for _, logprob, guided in top)
    plain = engine.generate([asking(request("p", (*prompts(6)[0], *done.token_ids[:7]), temperature=0), 3)])[0]
    assert [token for token, _, _ in plain.top[0]] == [token for token, _, _ in done.top[7]]


def test_there_is_a_limit_to_how_many():
    assert SamplingParams(logprobs=MOST_LOGPROBS).logprobs == MOST_LOGPROBS
    for wrong in (-1, MOST_LOGPROBS + 1):
        with pytest.raises(VasError, match="logprobs is out of its range"):
            SamplingParams(logprobs=wrong)
