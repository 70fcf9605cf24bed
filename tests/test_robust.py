"""One request, one model or one caller that misbehaves must not cost the others anything."""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from naive import BOTH, ONE, drain, guided_setup, prompts, request, rows_in_use, scorers_of
from tiny import tiny_base, tiny_value
from transformers import AutoConfig, AutoModelForCausalLM

from vas.decoding.blocks import choose
from vas.decoding.cache import KVCache
from vas.decoding.engine import Engine
from vas.decoding.linears import Int8Linear, PackedLinear, make
from vas.decoding.loop import Loop
from vas.decoding.runner import ModelRunner
from vas.decoding.scorer import ValueScorer
from vas.decoding.sequence import GuidanceParams, SamplingParams
from vas.errors import VasError
from vas.models.base import context_length

FAILING = (1, 2, 4)  # attempts at which memory for more rows runs out
# keys of a model's config, for models of a few layers that `tiny.py` has not
SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 290,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 1e-40},
        {"logit_bias": {5: 1e39}},
        {"logit_bias": {"5": 1.0}},
        {"top_k": 2.5},
        {"max_tokens": 2.5},
        {"seed": 1.5},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_numbers_that_would_break_a_step_are_refused(wrong):
    with pytest.raises(VasError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_a_strength_that_would_overflow_is_refused():
    with pytest.raises(VasError, match="out of its range"):
        GuidanceParams({"positive": 1e39})


def test_whole_numbers_will_do_as_a_bias():
    _, _, engine = guided_setup("llama")
    one, other = (request(str(b), prompts(5)[0], seed=2, logit_bias={7: b}) for b in (3, 3.0))
    assert engine.generate([one])[0].token_ids == engine.generate([other])[0].token_ids


def test_after_a_model_failed_the_others_go_on_with_the_same_tokens():
    base, models, engine = guided_setup("llama")
    requests = [request(str(i), prompt, BOTH, seed=i) for i, prompt in enumerate(prompts(5, 9, 3))]
    requests.append(request("blocks", prompts(6)[0], ONE, seed=9, schedule="block:3", candidates=3))
    alone = {r.request_id: Engine(base, scorers_of(models)).generate([r])[0].token_ids for r in requests}
    for asked in requests:
        engine.add(asked)
    for _ in range(4):
        engine.step()
    score, calls = engine._scorers[1].score, []

    def fails_once(batch):
        calls.append(batch)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return score(batch)

    engine._scorers[1].score = fails_once
    with pytest.raises(RuntimeError, match="out of memory"):
        [engine.step() for _ in range(50)]
    engine.abort("1")
    done = {name: each.token_ids for name, each in drain(engine).items()}
    assert done == {name: tokens for name, tokens in alone.items() if name != "1"}
    assert rows_in_use(engine) == [0, 0, 0]


def test_memory_that_runs_out_while_a_cache_grows_costs_no_request(monkeypatch):
    base, models, engine = guided_setup("llama")
    asked = [request(str(i), prompt, BOTH, seed=i) for i, prompt in enumerate(prompts(5, 9, 3, 7, 4))]
    asked.append(request("blocks", prompts(6)[0], ONE, seed=9, schedule="block:3", candidates=3))
    alone = {r.request_id: Engine(base, scorers_of(models)).generate([r])[0].token_ids for r in asked}
    grow, calls = KVCache.grow, []

    def runs_out(cache, width):
        if len(cache) > cache._shape[0]:
            calls.append(width)
            if len(calls) in FAILING:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        grow(cache, width)

    monkeypatch.setattr(KVCache, "grow", runs_out)
    loop = Loop(lambda: engine)
    found = {each.request_id: each.token_ids for each in loop.generate(asked)}
    assert found == alone
    assert len(calls) > max(FAILING)
    assert rows_in_use(engine) == [0, 0, 0]


def test_a_part_that_fails_late_takes_in_no_token(monkeypatch):
    """Where the choice of a block fails, tokens of others were drawn already."""
    base, models, engine = guided_setup("llama")
    asked = [request("plain", prompts(5)[0], seed=1), request("last", prompts(5)[0], seed=2, max_tokens=3)]
    asked.append(request("blocks", prompts(6)[0], ONE, seed=9, schedule="block:3", candidates=3))
    alone = {r.request_id: Engine(base, scorers_of(models)).generate([r])[0].token_ids for r in asked}
    fails = iter([True, True])

    def failing(blocks, guide):
        if blocks and next(fails, False):
            raise RuntimeError("out of memory")
        return choose(blocks, guide)

    monkeypatch.setattr("vas.decoding.stepper.choose", failing)
    for each in asked:
        engine.add(each)
    streamed = {r.request_id: [] for r in asked}
    while engine.busy:
        with contextlib.suppress(RuntimeError):
            for token in itertools.chain.from_iterable(engine.parts()):
                streamed[token.request_id].append(token.token_id)
    assert next(fails, None) is None
    assert streamed == alone


def test_work_beside_the_steps_does_not_keep_them_waiting():
    _, _, engine = guided_setup("llama")
    loop = Loop(lambda: engine)
    done = loop.submit(request("r", prompts(5)[0]))

    def more(_):
        if not done.done():
            loop.call(more)

    for _ in range(2):  # so that there is always some
        loop.call(more)
    assert done.result(timeout=60).token_ids


def test_places_in_the_embeddings_that_are_no_tokens_are_refused():
    """Models of one family have different numbers of them."""
    base = tiny_base()
    model = AutoModelForCausalLM.from_config(base.model.config)
    model.resize_token_embeddings(320)
    engine = Engine(replace(base, model=model))
    for wrong in (request("r", (5, 300)), request("r", (5,), logit_bias={300: 1.0})):
        with pytest.raises(VasError, match="token id 300 is outside the vocabulary"):
            engine.add(wrong)


def test_other_factors_of_long_positions_end_the_context():
    config = AutoConfig.for_model("phi3", **SHAPE, max_position_embeddings=256, pad_token_id=0)
    assert context_length(config) == 256
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert context_length(config) == 64


def test_streams_may_be_interleaved():
    _, _, engine = guided_setup("llama")
    requests = [request(str(i), prompt, ONE, seed=i) for i, prompt in enumerate(prompts(5, 9))]
    alone = [engine.generate([asked])[0].token_ids for asked in requests]
    first, second = (engine.stream(asked) for asked in requests)
    found = [[next(first).token_id], [next(second).token_id]]
    found[1] += [token.token_id for token in second]
    found[0] += [token.token_id for token in first]
    assert found == alone


def test_who_waits_for_an_aborted_request_is_told():
    _, _, engine = guided_setup("llama")
    stream = engine.stream(request("r", prompts(5)[0], ONE))
    next(stream)
    engine.abort("r")
    with pytest.raises(VasError, match="aborted"):
        next(stream)


def test_two_scorers_of_one_name_are_refused():
    models = [tiny_value("llama", ("a",)), tiny_value("gpt2", ("b",))]
    with pytest.raises(VasError, match="name them apart"):
        Engine(tiny_base("llama"), [ValueScorer("value", model) for model in models])


@pytest.mark.parametrize("wrong", [{"max_sequences": 0}, {"prefill_tokens": 0}])
def test_an_engine_that_could_never_decode_is_refused(wrong):
    with pytest.raises(VasError, match=next(iter(wrong))):
        Engine(tiny_base("llama"), **wrong)


def test_continuations_take_no_places_of_other_requests():
    _, models, _ = guided_setup("llama")
    engine = Engine(tiny_base("llama", torch.float64), scorers_of(models), max_sequences=3)
    engine.add(request("blocks", prompts(6)[0], ONE, schedule="block:3", candidates=5, max_tokens=30))
    for i, prompt in enumerate(prompts(4, 5, 7)):
        engine.add(request(str(i), prompt, max_tokens=30))
    for _ in range(3):
        engine.step()
    assert {s.request.request_id for s in engine._scheduler.running} == {"blocks", "0", "1"}


def test_finished_blocks_share_one_value_pass():
    base, models, engine = guided_setup("llama")
    requests = [
        request(str(i), prompt, ONE, seed=i, schedule="block:4", candidates=3, max_tokens=12)
        for i, prompt in enumerate(prompts(5, 5, 5, 5))
    ]
    alone = [Engine(base, scorers_of(models)).generate([asked])[0].token_ids for asked in requests]
    scorer, passes = engine._scorers[0], []
    score = scorer.score
    scorer.score = lambda batch: (passes.append(len(batch.sequences)), score(batch))[1]
    done = engine.generate(requests)
    assert [each.token_ids for each in done] == alone
    assert max(passes) == 12, "all continuations of all blocks"


def test_a_scorer_that_missed_much_catches_up_in_chunks():
    _, _, engine = guided_setup("llama")
    runner, widths = engine._scorers[0]._runner, []
    branch = runner.branch
    runner.branch = lambda owners, tokens, *rest, **more: (
        widths.append(max(map(len, tokens))),
        branch(owners, tokens, *rest, **more),
    )[1]
    resting = request("resting", prompts(5)[0], ONE, seed=1, max_tokens=330, schedule="entropy:99")
    alone = engine.generate([resting])[0].token_ids
    engine.add(resting)
    for _ in range(min(300, len(alone) - 5)):
        engine.step()
    engine.add(request("guided", prompts(4)[0], ONE, max_tokens=2))
    assert drain(engine)["resting"].token_ids == alone
    assert max(widths) <= 128


def test_what_is_not_a_number_does_not_outlive_its_owner():
    cache = KVCache(torch.device("cpu"))
    for owner in "abc":
        cache.add(owner)
        cache.lengths[owner] = 5
    cache.grow(6)
    states = torch.full((15, 2, 2, 4), float("nan"))
    rows, columns = torch.arange(3).repeat_interleave(5), torch.arange(5).repeat(3)
    cache.write(0, rows, columns, states)
    for owner in "abc":
        cache.free(owner)
    assert cache.keys[0].isfinite().all()
    assert cache.values[0].isfinite().all()


@pytest.mark.parametrize(("width", "kind"), [(48, Int8Linear), (40, PackedLinear), (100, PackedLinear)])
def test_eight_bits_where_the_kernel_takes_them(width, kind):
    weight, x = torch.randn(64, width), torch.randn(3, width)
    layer = make(weight, None, "int8")
    assert type(layer) is kind
    torch.testing.assert_close(layer(x), x @ weight.T, atol=0.05 * width**0.5, rtol=0.05)


def test_a_layer_without_a_window_has_none():
    """Qwen2 may use a sliding window in its upper layers only."""
    config = AutoConfig.for_model(
        "qwen2",
        **SHAPE,
        num_hidden_layers=3,
        initializer_range=0.35,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    tokens = prompts(20)[0]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    runner = ModelRunner(model)
    runner.cache.add("r")
    torch.testing.assert_close(runner.extend(["r"], [tokens], logits=True), expected, atol=1e-4, rtol=0)


def test_attention_that_does_more_than_ours_is_refused():
    config = AutoConfig.for_model(
        "gpt_oss",
        **SHAPE,
        head_dim=8,
        num_hidden_layers=2,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    runner = ModelRunner(AutoModelForCausalLM.from_config(config).eval())
    runner.cache.add("r")
    with pytest.raises(VasError, match="s_aux"):
        runner.extend(["r"], [(5, 6, 7)])
