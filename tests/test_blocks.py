"""Blockwise guidance: a choice between continuations of b tokens, against a naive reference."""

import dataclasses
import itertools

import pytest
import torch
from naive import (
    ALL,
    BOTH,
    ONE,
    TWO,
    assert_same,
    assert_within,
    drain,
    guided_setup,
    mixed_requests,
    naive,
    naive_blocks,
    prompts,
    request,
    rows_in_use,
    scorers_of,
)
from tiny import tiny_base, tiny_value

from vas.decoding.cache import COLUMNS, ROWS
from vas.decoding.engine import Engine
from vas.errors import VasError

# so many tokens end a response that some do inside a block
ENDING = tuple(range(80, 92))


def block_requests() -> list:
    """Every kind of request with blocks; 12 tokens are a multiple of some block sizes only."""
    p = prompts(7, 1, 18, 3, 11, 2, 9, 14)
    return [
        request("one model", p[0], ONE, seed=0, schedule="block:5", candidates=3),
        request("blocks of a token", p[1], TWO, seed=1, schedule="block:1"),
        request("both models", p[2], BOTH, seed=2, schedule="block:4", candidates=5),
        request("greedy", p[3], ALL, temperature=0, seed=3, schedule="block:5", candidates=4),
        request("greedy, one model", p[4], {"formal": 3.0}, temperature=0, seed=4, schedule="block:3"),
        request("soft", p[5], ALL, seed=5, schedule="block:5", value="soft"),
        request("truncated", p[6], BOTH, seed=6, schedule="block:7", top_k=30, top_p=0.8, temperature=1.3),
        request("one continuation", p[7], ONE, seed=7, schedule="block:4", candidates=1),
        request("one long block", p[0], BOTH, seed=8, schedule="block:50", candidates=6, max_tokens=20),
        request("biased", p[2], ONE, seed=9, schedule="block:6", logit_bias={7: 5.0, 83: -100.0}),
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_blockwise_decoding_is_the_naive_reference(arch):
    base, models, engine = guided_setup(arch, ENDING)
    requests = block_requests()
    requests += [
        dataclasses.replace(asked, request_id=f"again {i}", sampling=dataclasses.replace(asked.sampling, seed=20 + i))
        for i, asked in enumerate(requests)
    ]
    expected = [naive_blocks(base, models, asked) for asked in requests]
    for asked, done, reference in zip(requests, engine.generate(requests), expected, strict=True):
        assert_same(done, reference)
        assert done.finish_reason == ("stop" if done.token_ids[-1] in base.eos_token_ids else "length")
        assert done.text == base.tokenizer.decode(done.token_ids, skip_special_tokens=True)
        assert len(done.token_ids) <= asked.sampling.max_tokens
    assert rows_in_use(engine) == [0, 0, 0]
    for i in (2, 3, 5):  # the same engine, one request at a time
        assert_same(engine.generate([requests[i]])[0], expected[i])
    inside = sum(
        reference.token_ids[-1] in base.eos_token_ids and len(reference.token_ids) % asked.guidance.block_size > 0
        for asked, reference in zip(requests, expected, strict=True)
    )
    cut = sum(
        len(reference.token_ids) == 12 and 12 % asked.guidance.block_size > 0
        for asked, reference in zip(requests, expected, strict=True)
    )
    assert inside > 1, "the test should end inside a block by EOS"
    assert cut > 1, "the test should end inside a block by max_tokens"


def test_greedy_blocks_take_the_best_of_sampled_continuations():
    base, models, engine = guided_setup("llama", ending=())
    asked = request("r", prompts(6)[0], BOTH, temperature=0, seed=3, schedule="block:4", candidates=6, max_tokens=16)
    (done,) = engine.generate([asked])
    other = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, seed=4))
    assert engine.generate([other])[0].token_ids != done.token_ids, "continuations are sampled"
    assert_same(done, naive_blocks(base, models, asked))
    policy = request("p", asked.prompt_token_ids, temperature=0, max_tokens=16)
    assert done.token_ids != engine.generate([policy])[0].token_ids


def test_strengths_of_zero_need_no_blocks():
    base, models, engine = guided_setup("llama")
    asked = request("r", prompts(6)[0], {"positive": 0.0}, seed=2, schedule="block:4")
    (done,) = engine.generate([asked])
    assert_same(done, naive(base, models, asked))
    assert done.value_positions == {}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_stop_string_inside_a_block_ends_the_response(arch):
    base, models, engine = guided_setup(arch, ending=())
    inside = 0
    for seed, prompt in enumerate(prompts(*range(2, 10))):
        asked = request("r", prompt, BOTH, seed=seed, schedule="block:6", max_tokens=24)
        (whole,) = engine.generate([asked])
        # the first two characters after some that have a text of their own
        stop = next((a + b for a, b in itertools.pairwise(whole.text[8:]) if (a + b).isascii()), None)
        if stop is None:
            continue
        stopping = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, stop=("never said", stop)))
        (done,) = engine.generate([stopping])
        assert_same(done, naive_blocks(base, models, stopping))
        assert done.finish_reason == "stop"
        assert done.text == whole.text[: whole.text.index(stop)]
        assert done.token_ids == whole.token_ids[: len(done.token_ids)]
        inside += len(done.token_ids) % 6 > 0
    assert inside > 2, "the test should stop inside a block"
    assert rows_in_use(engine) == [0, 0, 0]


def crowd() -> list:
    """Requests with blocks among all other kinds."""
    blocks = [dataclasses.replace(each, request_id=f"blocks, {each.request_id}") for each in block_requests()]
    pairs = itertools.zip_longest(mixed_requests(), blocks)
    return [each for pair in pairs for each in pair if each]


def test_a_request_alone_equals_itself_in_a_crowd_with_blocks():
    base, models, _ = guided_setup("llama", ENDING)
    requests = crowd()
    alone = [Engine(base, scorers_of(models)).generate([asked])[0] for asked in requests]
    for at_once, prefill in ((4, 2048), (64, 2048), (64, 7)):
        engine = Engine(base, scorers_of(models), max_sequences=at_once, prefill_tokens=prefill)
        for one, many in zip(alone, engine.generate(requests), strict=True):
            assert many.token_ids == one.token_ids
            assert (many.text, many.finish_reason) == (one.text, one.finish_reason)
            assert many.logprobs == pytest.approx(one.logprobs, abs=1e-5)
            assert many.guided_logprobs == pytest.approx(one.guided_logprobs, abs=1e-5)
            assert many.kl == pytest.approx(one.kl, abs=1e-5)
            assert many.guided_steps == one.guided_steps
        assert rows_in_use(engine) == [0, 0, 0]


def test_blocks_stream_b_tokens_at_a_time():
    _, _, engine = guided_setup("llama", ending=())
    asked = request("r", prompts(5)[0], BOTH, seed=1, schedule="block:5", max_tokens=12)
    (whole,) = engine.generate([asked])
    tokens = list(engine.stream(asked))
    assert [token.token_id for token in tokens] == whole.token_ids
    assert "".join(token.text for token in tokens) == whole.text
    assert [token.finish_reason for token in tokens] == [None] * 11 + ["length"]
    assert [token.guided_logprob for token in tokens] == whole.guided_logprobs
    engine.add(asked)
    counts = []
    while engine.busy:
        counts.append(len(engine.step()))
    assert counts == [0, 0, 0, 0, 5, 0, 0, 0, 0, 5, 0, 2]
    assert engine.take("r").token_ids == whole.token_ids


def test_abort_inside_a_block_frees_all_of_its_continuations():
    _, _, engine = guided_setup("llama", ending=())
    p = prompts(5, 9, 4)
    asked = request("r", p[0], BOTH, seed=1, schedule="block:5", candidates=3, max_tokens=20)
    others = [request("token", p[1], BOTH, seed=2), request("block", p[2], ONE, seed=3, schedule="block:4")]
    alone = [engine.generate([other])[0].token_ids for other in others]
    whole = engine.generate([asked])[0].token_ids
    for steps in (1, 3, 7):  # in the first block twice, in the second
        for each in (asked, *others):
            engine.add(each)
        for _ in range(steps):
            engine.step()
        assert rows_in_use(engine)[0] == 3 + 1 + 4
        engine.abort("r")
        assert rows_in_use(engine) == [5, 5, 1]  # positive is the first value model's, formal the second's
        engine.add(asked)  # the id is free again
        done = {name: each.token_ids for name, each in drain(engine).items()}
        assert done == {"r": whole, "token": alone[0], "block": alone[1]}
        assert rows_in_use(engine) == [0, 0, 0]


def test_leaving_a_stream_inside_a_block_frees_it():
    _, _, engine = guided_setup("llama", ending=())
    asked = request("r", prompts(6)[0], BOTH, schedule="block:4", candidates=3, max_tokens=30)
    (whole,) = engine.generate([asked])
    stream = engine.stream(asked)
    assert [next(stream).token_id for _ in range(6)] == whole.token_ids[:6]
    assert rows_in_use(engine) == [3, 3, 3]
    stream.close()
    assert rows_in_use(engine) == [0, 0, 0]
    assert not engine.busy
    assert engine.generate([asked])[0].token_ids == whole.token_ids


@pytest.mark.parametrize("limit", [2 * ROWS * COLUMNS, 3 * ROWS * COLUMNS])
def test_preempted_blocks_go_on_with_the_same_tokens_within_the_memory_stated(limit):
    base, models, _ = guided_setup("llama", ending=())
    lengths = [40, 3, 55, 21, 60, 8, 33, 50, 12, 47]
    requests = [
        request(str(i), prompt, [BOTH, ONE, TWO][i % 3], seed=i, max_tokens=25, **kind)
        for i, prompt in enumerate(prompts(*lengths))
        for kind in [[{"schedule": "block:7", "candidates": 3 + i % 4}, {}][i % 3 == 2]]
    ]
    free = Engine(base, scorers_of(models)).generate(requests)
    engine = Engine(base, scorers_of(models), kv_tokens=limit)
    caches = [engine._runner.cache, *(scorer._runner.cache for scorer in engine._scorers)]
    left, leave = [], engine._stepper.leave
    engine._stepper.leave = lambda sequence: (left.append(sequence), leave(sequence))
    for asked in requests:
        engine.add(asked)
    done = drain(engine, lambda: assert_within(limit, caches))
    assert len(left) > len(requests), "the test should preempt"
    for expected in free:
        found = done[expected.request_id]
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        assert found.guided_logprobs == pytest.approx(expected.guided_logprobs, abs=1e-5)
        assert found.guided_steps == expected.guided_steps
    assert rows_in_use(engine) == [0, 0, 0]


def test_a_block_reserves_a_row_for_each_continuation():
    base, models, _ = guided_setup("llama", ending=())
    engine = Engine(base, scorers_of(models), kv_tokens=ROWS * COLUMNS)
    asked = request("r", prompts(10)[0], BOTH, schedule="block:4", candidates=ROWS + 1)
    with pytest.raises(VasError, match="which take 1,024 as allocated, more than the KV cache may hold"):
        engine.add(asked)
    assert not engine.busy
    fits = [request(str(i), p, BOTH, schedule="block:4", candidates=ROWS - 1) for i, p in enumerate(prompts(10, 12))]
    for each in fits:
        engine.add(each)
    for _ in range(3):
        engine.step()
        assert rows_in_use(engine)[0] <= ROWS - 1, "the second one waits"
    done = drain(engine)
    for each in fits:
        alone = Engine(base, scorers_of(models)).generate([each])[0]
        assert done[each.request_id].token_ids == alone.token_ids


def test_blocks_need_values_of_states_and_vocab_heads_have_none():
    base = tiny_base("llama", torch.float64)
    vocab = tiny_value("llama", ("positive",), "vocab", torch.float64)
    state = tiny_value("gpt2", ("formal",), "scalar", torch.float64, seed=8)
    engine = Engine(base, scorers_of([vocab, state]))
    (prompt,) = prompts(4)
    for objectives in (ONE, BOTH):
        with pytest.raises(VasError, match="positive has vocab heads, which only compare next tokens"):
            engine.add(request("r", prompt, objectives, schedule="block:4"))
        assert not engine.busy
    for objectives in ({"formal": 2.0}, {"formal": 2.0, "positive": 0.0}):  # the vocab head has no say
        asked = request("r", prompt, objectives, schedule="block:4")
        assert_same(engine.generate([asked])[0], naive_blocks(base, [state], asked))


@pytest.mark.parametrize("schedule", ["block", "block:", "block:0", "block:-1", "block:x", "block:1.5"])
def test_a_block_has_a_size(schedule):
    with pytest.raises(VasError, match="unknown schedule"):
        request("r", (5,), ONE, schedule=schedule)
