"""Linear layers for decoding: exact ones, nearly exact ones, and models that give up their own weights."""

import copy

import numpy as np
import pytest
import torch
from naive import ALL, BOTH, mixed_requests, prompts, request, scorers_of
from tiny import tiny_base, tiny_value
from torch import nn

from vas.decoding import linears
from vas.decoding.engine import Engine
from vas.decoding.scorer import make_scorer
from vas.errors import VasError

KINDS = linears.kinds()  # not every processor computes in bfloat16
ROUNDED = KINDS[1:]
SHAPES = [(1, 32), (2, 32), (7, 32), (33, 32), (200, 32), (1, 1, 32), (3, 5, 32)]


def layer(bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 48, bias=bias).requires_grad_(False).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


# --- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_layers_are_torchs_own(dtype, bias):
    own = layer(bias, dtype)
    made = linears.make(own.weight, own.bias, "exact")
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-2}
    for x in inputs(dtype):
        found = made(x)
        assert found.dtype == dtype
        assert found.shape == (*x.shape[:-1], 48)
        torch.testing.assert_close(found, own(x), **close)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_layers_are_near_torchs_own(dtype, kind, bias):
    own = layer(bias, dtype)
    made = linears.make(own.weight, own.bias, kind)
    for x in inputs(dtype):
        found, expected = made(x), own(x)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        off = (found - expected).float().norm() / expected.float().norm()
        assert off < 0.015, "weights of 8 bits are off by less than a percent of their largest"


def test_int8_rounds_each_output_by_a_scale_of_its_own():
    own = layer(bias=False)
    own.weight[3] *= 1000  # would swallow the others under a common scale
    own.weight[5] = 0
    x = torch.randn(4, 32)
    found, expected = linears.make(own.weight, None, "int8")(x), own(x)
    others = [i for i in range(48) if i not in (3, 5)]
    assert (found - expected)[:, others].norm() < 0.015 * expected[:, others].norm()
    assert found[:, 5].abs().max() == 0


@pytest.mark.parametrize("kind", ["exact", "bfloat16", "int8"])
def test_float64_has_no_kernels_and_stays_torchs_own(kind):
    own = layer(bias=True, dtype=torch.float64)
    made = linears.make(own.weight, own.bias, kind)
    assert isinstance(made, linears.PlainLinear)
    for x in inputs(torch.float64):
        assert torch.equal(made(x), own(x))


def test_packed_layers_can_be_switched_off(monkeypatch):
    own = layer(bias=True)
    assert isinstance(linears.make(own.weight, own.bias, "exact"), linears.PackedLinear)
    monkeypatch.setenv("VAS_OFF", "fused_llama, packed_linears")
    made = linears.make(own.weight, own.bias, "exact")
    assert isinstance(made, linears.PlainLinear)
    assert torch.equal(made(inputs()[0]), own(inputs()[0]))


def test_fastest_settles_on_one_kind_and_other_kinds_stay():
    model = tiny_base("llama").model
    assert linears.settle(model, "fastest") in KINDS
    for kind in ("exact", "bfloat16", "int8"):
        assert linears.settle(model, kind) == kind
    assert linears.settle(tiny_base("llama", torch.float64).model, "fastest") == "exact", "there is nothing to measure"


@pytest.mark.parametrize("arch", ["gpt2", "gemma3", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_gives_the_same_logits_or_near_ones(arch, kind):
    model = copy.deepcopy(tiny_base(arch).model)
    ids = torch.tensor(prompts(12, 12))
    before = model(ids).logits
    linears.pack(model, kind)
    after = model(ids).logits
    assert not any(type(module) is nn.Linear for module in model.modules())
    if kind == "exact":
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    else:
        assert (after - before).norm() < 0.1 * before.norm()


def test_a_processor_without_bfloat16_says_so_and_fastest_does_without(monkeypatch):
    monkeypatch.setattr(linears, "_computes", lambda dtype: False)
    linears.kinds.cache_clear()
    try:
        assert linears.kinds() == ("exact", "int8")
        own = layer(bias=True)
        with pytest.raises(VasError, match=r"no instructions for bfloat16(.|\n)*exact, int8, fastest"):
            linears.make(own.weight, own.bias, "bfloat16")
        halved = layer(bias=True, dtype=torch.bfloat16)
        made, x = linears.make(halved.weight, halved.bias, "exact"), inputs(torch.bfloat16)[0]
        assert torch.equal(made(x), halved(x)), "torch computes what oneDNN does not"
        assert linears.settle(tiny_base("llama").model, "fastest") in ("exact", "int8")
    finally:
        linears.kinds.cache_clear()


# --- engines -----------------------------------------------------------------------------------


def value_models(arch: str) -> list:
    return [
        tiny_value(arch, ("positive", "concise")),
        tiny_value("gpt2" if arch != "gpt2" else "llama", ("formal",), "scalar", seed=8),
    ]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_models_that_give_up_their_weights_decode_the_same(arch):
    base, models = tiny_base(arch), value_models(arch)
    requests = mixed_requests()
    expected = Engine(base, scorers_of(models)).generate(requests)
    own, others = copy.deepcopy(base), copy.deepcopy(models)
    scorers = [make_scorer("+".join(model.objectives), model, free=True) for model in others]
    for done, reference in zip(Engine(own, scorers, free=True).generate(requests), expected, strict=True):
        assert done.token_ids == reference.token_ids
        assert done.logprobs == pytest.approx(reference.logprobs, abs=1e-4)
        assert done.guided_logprobs == pytest.approx(reference.guided_logprobs, abs=1e-4)


def test_a_model_with_tied_embeddings_gives_up_its_weights_but_for_those():
    tied = copy.deepcopy(tiny_base("llama"))
    tied.model.lm_head.weight = tied.model.get_input_embeddings().weight
    kept = copy.deepcopy(tied)
    requests = [request(str(i), p, seed=i) for i, p in enumerate(prompts(5, 1, 9))]
    expected = [done.token_ids for done in Engine(kept).generate(requests)]
    assert [done.token_ids for done in Engine(tied, free=True).generate(requests)] == expected


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", [*ROUNDED, "fastest"])
def test_rounded_models_decode_nearly_as_exact_ones(arch, kind):
    base, models = copy.deepcopy(tiny_base(arch)), value_models(arch)
    scorers = [make_scorer(m.objectives[0], copy.deepcopy(m), kind, free=True) for m in models]
    rounded = Engine(base, scorers, linears=kind, free=True)
    exact = Engine(tiny_base(arch), scorers_of(models))
    # the first token's state is the same in both, whatever they draw
    requests = [
        request(str(i), p, [{}, BOTH, ALL][i % 3], seed=i, max_tokens=1) for i, p in enumerate(prompts(*range(1, 31)))
    ]
    near = []
    for one, other in zip(rounded.generate(requests), exact.generate(requests), strict=True):
        assert np.isfinite([*one.logprobs, *one.guided_logprobs, one.kl]).all()
        if one.token_ids == other.token_ids:
            near.append(abs(one.logprobs[0] - other.logprobs[0]))
    assert len(near) > 20, "most tokens are the same"
    assert np.mean(near) < 0.2
    longer = [request(str(i), p, BOTH, seed=i, max_tokens=30) for i, p in enumerate(prompts(5, 1, 9))]
    for done in rounded.generate(longer):
        assert np.isfinite([*done.logprobs, *done.guided_logprobs, done.kl]).all()
        assert done.guided_steps == len(done.token_ids)
