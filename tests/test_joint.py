"""Short prompts are read in the pass that decodes others."""

import numpy as np
import pytest
import torch
from naive import BOTH, ONE, alone, counting, drain, guided_setup, prompts, request, scorers_of
from tiny import tiny_base, tiny_value

from vas.decoding import attention
from vas.decoding.attention import alike
from vas.decoding.engine import Engine
from vas.decoding.runner import ModelRunner

# --- the pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "width", "spans"),
    [
        ([1] * 16, 100, [(0, 16)]),
        ([1] * 15 + [40], 100, [(0, 15), (15, 16)]),
        ([40, 38, 41, 39], 100, [(0, 4)]),
        ([1, 1, 40], 100, [(0, 3)]),  # 78 tokens too many cost less than a grid more
        ([0, 0, 0, 900], 100, [(3, 4)]),  # nobody asks about the first ones
        ([21] * 8 + [60], 2000, [(0, 8), (8, 9)]),
    ],
)
def test_sequences_with_much_the_same_numbers_of_tokens_attend_together(tokens, width, spans):
    reach = np.full(len(tokens) + 2, width)
    assert alike(np.array(tokens), reach, slice(0, len(tokens))) == [slice(*span) for span in spans]
    shifted = alike(np.array([7, *tokens, 7]), reach, slice(1, len(tokens) + 1))
    assert [(span.start - 1, span.stop - 1) for span in shifted] == spans


def test_what_one_sequence_reads_does_not_keep_others_apart():
    tokens, reach = np.array([22, 21] * 8 + [21]), np.array([60] * 16 + [8000])
    assert alike(tokens, reach, slice(0, 17)) == [slice(0, 16), slice(16, 17)]


@torch.inference_mode()
def passes(padding: int, monkeypatch) -> list[torch.Tensor]:
    """Outputs and branches of sequences with very different numbers of tokens."""
    monkeypatch.setattr(attention, "PADDING", padding)
    runner = ModelRunner(tiny_value(layers=3).backbone)
    for owner in range(6):
        runner.cache.add(owner)
    found = [runner.extend(range(6), prompts(30, 1, 2, 1, 25, 9))]
    taken = [[7], [], *prompts(40), [8], [9, 10], []]
    index, candidates = np.array([0] * 3 + [1] * 9 + [2] * 4 + [5] * 2), np.arange(18)
    output, where = runner.branch(range(6), taken, index, candidates)
    runner.keep({1: 5, 2: 13, 5: 16}, where)
    found += [output, *where.branches]
    found += [runner.extend(range(6), [[3], *prompts(20), [4], [5], [6], [7]], last=True)]
    return found


def test_a_pass_with_several_grids_is_the_same_pass(monkeypatch):
    for ours, whole in zip(passes(0, monkeypatch), passes(10**9, monkeypatch), strict=True):
        assert ours.shape == whole.shape
        assert torch.allclose(ours, whole, atol=1e-5)


# --- prompts in passing ------------------------------------------------------------------------


def test_a_short_prompt_is_read_in_the_pass_that_decodes_the_others(monkeypatch):
    _, _, engine = guided_setup("llama", ending=())
    first, second, third = (
        request(str(i), p, objectives, seed=i)
        for i, (p, objectives) in enumerate(zip(prompts(9, 30, 12), (BOTH, ONE, {}), strict=True))
    )
    ran = counting(engine, monkeypatch)
    engine.add(first)
    engine.step()
    engine.step()
    engine.add(second)
    engine.add(third)
    assert [token.request_id for token in engine.step()] == ["1", "2", "0"], "first ones first"
    assert ran == [9, 1, 1 + 30 + 12]
    done = drain(engine)
    for asked in (first, second, third):
        assert done[asked.request_id].token_ids == alone(asked)
        assert done[asked.request_id].base_positions == len(asked.prompt_token_ids) - 1 + 12


def test_long_prompts_and_those_that_others_wait_for_have_passes_of_their_own(monkeypatch):
    _, _, engine = guided_setup("llama", ending=())
    ran = counting(engine, monkeypatch)
    (long,) = prompts(150)
    engine.add(request("long", long, BOTH))
    engine.step()
    assert ran == [149, 1]
    samples = [request(f"sample {i}", prompts(20, seed=1)[0], BOTH, seed=i) for i in range(3)]
    for sample in samples:
        engine.add(sample)
    engine.step()
    assert ran[2:] == [19, 4], "all samples copy what the first has read, and have their token at once"
    done = drain(engine)
    for sample in samples:
        assert done[sample.request_id].token_ids == alone(sample)


def test_what_is_read_in_passing_keeps_to_the_budget(monkeypatch):
    base, models, _ = guided_setup("llama", ending=())
    engine = Engine(base, scorers_of(models), prefill_tokens=20)
    ran = counting(engine, monkeypatch)
    requests = [request(str(i), p, ONE, seed=i, max_tokens=5) for i, p in enumerate(prompts(13, 7, 9, 30))]
    for asked in requests:
        engine.add(asked)
    engine.step()
    assert ran == [13 + 7], "18 tokens that were unread; the 8 of the third prompt are too many"
    done = drain(engine)
    for asked in requests:
        assert done[asked.request_id].token_ids == alone(asked)


def test_a_long_prompt_is_not_kept_waiting_by_younger_short_ones():
    base, models, _ = guided_setup("llama", ending=())
    engine = Engine(base, scorers_of(models), prefill_tokens=130)
    (long,) = prompts(400)
    engine.add(request("long", long))
    for step in range(3):  # 130, 130, and 130 tokens
        engine.add(request(str(step), prompts(100, seed=5 + step)[0], max_tokens=1))
        assert engine.step() == []
    assert sorted(token.request_id for token in engine.step()) == ["0", "long"], "9 tokens, and then 99 of the next"


@pytest.mark.parametrize("kind", ["long", "blocks", "a source", "short"])
def test_a_prefix_is_shared_with_what_a_value_model_has_not_read_of_it_yet(kind):
    """A request whose steps are not guided lets its prompt wait; who shares it has values of the whole all the same."""
    base, models, engine = guided_setup("llama", ending=())
    unguided = request("unguided", prompts(60)[0], BOTH, schedule="entropy:99", max_tokens=20)
    rests = prompts(150 if kind == "long" else 7, 5, seed=4)
    shared = unguided.prompt_token_ids[:50]
    schedule = "block:4" if kind == "blocks" else "token"
    requests = [
        request(str(i), (*shared, *rest), BOTH, seed=i, schedule=schedule)
        for i, rest in enumerate([rests[0], (*rests[0], *rests[1])] if kind == "a source" else [rests[0]])
    ]
    engine.add(unguided)
    engine.step()
    assert engine._scorers[0]._runner.cache.lengths["unguided", 0] == 0
    for asked in requests:
        engine.add(asked)
    done = drain(engine)
    for asked in requests:
        (reference,) = Engine(base, scorers_of(models)).generate([asked])
        found = done[asked.request_id]
        assert found.token_ids == reference.token_ids
        assert found.guided_logprobs == pytest.approx(reference.guided_logprobs, abs=1e-6)


def test_switched_off_prompts_have_passes_of_their_own(monkeypatch):
    monkeypatch.setenv("VAS_OFF", "joint_prefill")
    engine = Engine(tiny_base("llama"))
    ran = counting(engine, monkeypatch)
    engine.add(request("r", prompts(9)[0]))
    engine.step()
    assert ran == [8, 1]
