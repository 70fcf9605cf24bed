"""Guided decoding against a naive reference that caches nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from naive import BOTH, ONE, assert_same, guided_setup, mixed_requests, naive, prompts, request, rows_in_use, scorers_of
from tiny import tiny_base, tiny_value

from vas.decoding.engine import Engine
from vas.decoding.scorer import ValueScorer
from vas.models.base import BaseModel


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral", "gemma3"])
def test_guided_decoding_is_the_naive_reference(arch):
    base, models, engine = guided_setup(arch)
    requests = mixed_requests()
    expected = [naive(base, models, asked) for asked in requests]
    for completion, reference in zip(engine.generate(requests), expected, strict=True):
        assert_same(completion, reference)
    assert rows_in_use(engine) == [0, 0, 0]
    for i in (2, 6, 12):  # the same engine, one request at a time
        assert_same(engine.generate([requests[i]])[0], expected[i])
    assert sum(sum(reference.outside) for reference in expected[2:]) > 8, "the test should sample outside"


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_guided_decoding_in_float32(arch):
    base = tiny_base(arch)
    models = [tiny_value(arch, ("positive", "concise")), tiny_value(arch, ("formal",), "scalar", seed=8)]
    requests = mixed_requests()[2:9]
    completions = Engine(base, scorers_of(models)).generate(requests)
    for asked, completion in zip(requests, completions, strict=True):
        assert_same(completion, naive(base, models, asked))


def test_a_model_without_eos_decodes():
    base, models, _ = guided_setup("llama")
    endless = dataclasses.replace(base, eos_token_ids=())
    requests = [request("guided", prompts(5)[0], ONE), request("plain", prompts(3)[0])]
    for asked, done in zip(requests, Engine(endless, scorers_of(models)).generate(requests), strict=True):
        assert done.finish_reason == "length"
        assert_same(done, naive(endless, models, asked))


@pytest.mark.parametrize("objectives", [ONE, BOTH])
def test_no_token_is_run_twice(objectives):
    base, models, engine = guided_setup("llama")
    steps = outside = 0
    for seed, prompt in enumerate(prompts(6, 1, 15, 9)):
        asked = request("r", prompt, objectives, seed=seed, candidates=3, max_tokens=20)
        (done,) = engine.generate([asked])
        reference = naive(base, models, asked)
        assert done.token_ids == reference.token_ids
        assert done.base_positions == len(prompt) - 1 + len(done.token_ids)
        scored = len(prompt) + reference.candidates + sum(reference.outside[:-1])
        used = [m for m in models if any(name in objectives for name in m.objectives)]
        assert done.value_positions == {"+".join(model.objectives): scored for model in used}
        steps, outside = steps + len(done.token_ids), outside + sum(reference.outside[:-1])
    assert 0 < outside < steps, "the test should take candidates and other tokens"


def test_steps_without_guidance_cost_no_value_pass_and_adaptive_k_narrows_it():
    base = tiny_base("llama")
    model = tiny_value("llama")
    (prompt,) = prompts(5)

    def positions(**guidance) -> tuple[int, int]:
        engine = Engine(base, scorers_of([model]))
        (done,) = engine.generate([request("r", prompt, ONE, seed=3, candidates=30, max_tokens=20, **guidance)])
        return sum(done.value_positions.values()), done.guided_steps

    every, steps = positions()
    assert steps == 20
    assert positions(schedule="entropy:99") == (0, 0)
    half, some = positions(schedule="entropy:3.2")
    assert 0 < some < steps
    assert half < every
    assert positions(candidate_mass=0.5)[0] < every


def brevity_model(base: BaseModel):
    """A value model fitted by least squares to be 1 after EOS and -1 elsewhere."""
    model = tiny_value("llama", ("brief",), "scalar", torch.float64, seed=21)
    with torch.no_grad():
        ids = torch.tensor(prompts(*[20] * 100, seed=5))
        ended = torch.cat([ids[:, :-1], torch.full((100, 1), base.tokenizer.eos_token_id)], 1)
        hidden = torch.cat([model.hidden(ended)[:, -1], model.hidden(ids)[:, -1]])
        target = torch.cat([torch.ones(100), -torch.ones(100)]).double()
        fit = torch.linalg.lstsq(torch.cat([hidden, torch.ones(200, 1)], 1), target[:, None]).solution
        model.heads[0].linear.weight.copy_(fit[:-1].T)
        model.heads[0].linear.bias.copy_(fit[-1])
    return model


def test_eos_is_always_a_candidate_and_guidance_can_end_responses():
    base = tiny_base("llama", torch.float64)
    engine = Engine(base, [ValueScorer("brief", brevity_model(base))])
    lengths = {}
    for strength in (-2.0, 0.0, 3.0, 6.0):
        requests = [
            request(f"r{i}", prompt, {"brief": strength}, candidates=1, seed=i, max_tokens=60)
            for i, prompt in enumerate(prompts(*range(2, 22)))
        ]
        completions = engine.generate(requests)
        for done in completions:
            ended = done.token_ids[-1] in base.eos_token_ids
            assert done.finish_reason == ("stop" if ended else "length")
            assert ended or len(done.token_ids) == 60
        lengths[strength] = np.mean([len(done.token_ids) for done in completions])
    assert lengths[-2.0] > lengths[0.0] > 1.3 * lengths[3.0] > 2 * lengths[6.0]
