"""Uniform passes, as a GPU decodes by them: here on a CPU, where they are computed instead of replayed."""

import copy
import dataclasses

import pytest
import torch
from naive import (
    BOTH,
    ONE,
    TWO,
    assert_same,
    assert_within,
    drain,
    guided_setup,
    mixed_requests,
    naive,
    prompts,
    request,
    rows_in_use,
    scorers_of,
)
from tiny import tiny_base, tiny_value

from vas.decoding import uniform
from vas.decoding.cache import COLUMNS, ROWS, KVCache
from vas.decoding.engine import Engine
from vas.decoding.graphs import Graphs

ARCHITECTURES = ["llama", "mistral", "qwen2"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(uniform, "pays", lambda model: True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_guided_decoding_is_the_naive_reference(arch):
    base, models, engine = guided_setup(arch)
    assert engine._runner.uniform
    requests = mixed_requests()
    for asked, completion in zip(requests, engine.generate(requests), strict=True):
        assert_same(completion, naive(base, models, asked))
    assert rows_in_use(engine) == [0, 0, 0]


def test_decoding_with_vocab_heads_is_the_naive_reference():
    base = tiny_base("llama", torch.float64)
    models = [tiny_value("llama", ("positive", "concise"), "vocab", torch.float64, layers=2)]
    engine = Engine(base, scorers_of(models))
    requests = [request(str(i), prompt, [TWO, {}][i % 2], seed=i) for i, prompt in enumerate(prompts(3, 9, 5, 12))]
    for asked, completion in zip(requests, engine.generate(requests), strict=True):
        assert_same(completion, naive(base, models, asked))


def test_most_steps_are_uniform_and_run_the_token_that_was_taken_again():
    base, models, _ = guided_setup("llama")
    base = dataclasses.replace(base, eos_token_ids=())
    engine = Engine(base, scorers_of(models[:1]))
    ragged = []
    for runner in (engine._runner, engine._scorers[0]._runner):
        run = runner._run
        runner._run = lambda *given, run=run, **named: ragged.append(given) or run(*given, **named)
    asked = request("r", prompts(20)[0], ONE, candidates=6, max_tokens=9)
    (done,) = engine.generate([asked])
    assert len(ragged) == 2, "the prompt, by each model"
    assert done.base_positions == 19 + 9
    assert done.value_positions == {"positive+concise": 19 + 9 * (1 + 6)}


def test_sequences_that_join_leave_and_wait_keep_their_tokens_within_the_memory_stated():
    base, models, _ = guided_setup("llama")
    limit = 2 * ROWS * COLUMNS
    requests = [
        request(str(i), prompt, [BOTH, ONE, {}][i % 3], seed=i, max_tokens=8 + 20 * (i % 4))
        for i, prompt in enumerate(prompts(*range(2, 50, 3)))
    ]
    free = Engine(base, scorers_of(models)).generate(requests)
    engine = Engine(base, scorers_of(models), max_sequences=len(requests), kv_tokens=limit)
    caches = [engine._runner.cache, *(scorer._runner.cache for scorer in engine._scorers)]
    for late in requests[5:]:
        engine.add(late)
    for _ in range(3):
        engine.step()
    for late in requests[:5]:
        engine.add(late)
    done = drain(engine, lambda: assert_within(limit, caches))
    assert engine.preempted
    for each in free:
        assert done[each.request_id].token_ids == each.token_ids


def test_a_cache_grows_by_doubling_where_each_shape_is_recorded():
    cache = KVCache(torch.device("cpu"))
    cache._doubling = True
    shapes = []
    for owner in range(20):
        cache.add(owner)
        cache.lengths[owner] = 40 * owner
        cache.grow(40 * owner + 1)
        shapes.append(cache._shape)
    assert list(dict.fromkeys(shapes)) == [
        (1, 128),
        (2, 128),
        (4, 128),
        (8, 256),
        (8, 512),
        (16, 512),
        (16, 1024),
        (32, 1024),
    ]
    assert [cache.columns(width) for width in (5, 129, 700)] == [128, 256, 1024]
    assert cache.allocated(17, 1024) == 32 * 2048
    assert cache.batch == 32


def test_what_is_no_number_does_not_reach_the_next_owner_of_a_row():
    base, models, _ = guided_setup("llama")
    engine = Engine(base, scorers_of(models))
    first, second = (request(name, prompts(7)[0], BOTH, seed=3) for name in ("first", "second"))
    expected = engine.generate([first])[0]
    for cache in (engine._runner.cache, engine._scorers[0]._runner.cache):
        assert cache.aside
        cache.add("broken")
        with torch.inference_mode():
            for layer in cache._layers:
                layer[:, cache.row_of["broken"]] = float("nan")
        cache.lengths["broken"] = cache.keys[0].shape[2]
        cache.free("broken")
    assert engine.generate([second])[0].token_ids == expected.token_ids


def test_growth_that_fails_midway_leaves_a_cache_that_works():
    cache, states = KVCache(torch.device("cpu")), torch.ones(1, 2, 1, 4)
    cache.add("a")
    cache.grow(10)
    for layer in range(3):
        cache.write(layer, torch.tensor([0]), torch.tensor([9]), states)
    cache._layers[1] = _Full(cache._layers[1])
    with pytest.raises(MemoryError):
        cache.grow(COLUMNS + 1)
    cache._layers[1] = cache._layers[1].layer
    cache.grow(COLUMNS + 1)
    for layer in range(3):
        cache.write(layer, torch.tensor([0]), torch.tensor([COLUMNS]), states)
        keys, _ = cache.read(layer, slice(0, 1), COLUMNS + 1)
        assert keys.sum(-1).flatten().nonzero().flatten().tolist() == [9, COLUMNS]


class _Full:
    """A layer for whose growth there is no memory."""

    def __init__(self, layer: torch.Tensor) -> None:
        self.layer, self.shape = layer, layer.shape

    def __getitem__(self, place: object) -> torch.Tensor:
        return self.layer[place]

    def new_zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        raise MemoryError


def test_without_a_gpu_nothing_is_recorded():
    graphs = Graphs(torch.device("cpu"))
    for number in range(6):
        assert graphs("key", lambda x: x + 1, torch.tensor([number])).tolist() == [number + 1]
    assert not graphs._recorded


def test_a_model_whose_frequencies_depend_on_the_length_is_run_as_before(monkeypatch):
    monkeypatch.undo()
    model = copy.deepcopy(tiny_base("llama").model)
    assert not uniform.pays(model), "on a CPU"
    on_a_gpu = type(model)
    monkeypatch.setattr(on_a_gpu, "device", torch.device("cuda"))
    assert uniform.pays(model)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert not uniform.pays(model)
