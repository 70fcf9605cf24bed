"""Vocab heads: all next tokens from the parent state, and how they are distilled from a value model."""

import copy
import dataclasses

import pytest
import torch
from naive import ALL, BOTH, ONE, TWO, also_ending_with, assert_same, naive, prompts, request, rows_in_use, scorers_of
from tiny import tiny_base, tiny_tokenizer, tiny_value

from vas.decoding.engine import Engine
from vas.decoding.scorer import ValueScorer, VocabScorer, make_scorer
from vas.models.heads import VocabHead
from vas.models.value import ValueModel, ValueModelConfig
from vas.training.distill import distill


def vocab_setup(arch: str):
    """A base model, a value model with two vocab heads and an ordinary one, in float64."""
    base = also_ending_with(tiny_base(arch, torch.float64), 83)
    other = "gpt2" if arch != "gpt2" else "llama"
    models = [
        tiny_value(arch, ("positive", "concise"), "vocab", torch.float64, layers=2),
        tiny_value(other, ("formal",), "categorical", torch.float64, layers=3, seed=8),
    ]
    return base, models, Engine(base, scorers_of(models))


# --- the head ----------------------------------------------------------------------------------


def test_values_are_those_of_plain_loops():
    torch.manual_seed(0)
    head = VocabHead(6)
    torch.nn.init.normal_(head.linear.bias)
    hidden, embedded = 3 * torch.randn(2, 3, 6), torch.randn(2, 3, 4, 6)
    found = head.values(head(hidden), embedded)
    assert found.shape == (2, 3, 4)
    for b in range(2):
        for t in range(3):
            state = hidden[b, t].tolist()
            size = (sum(x * x for x in state) / 6) ** 0.5
            u = [
                sum(w * x / size for w, x in zip(row, state, strict=True)) + bias
                for row, bias in zip(head.linear.weight.tolist(), head.linear.bias.tolist(), strict=True)
            ]
            for k in range(4):
                e = embedded[b, t, k].tolist()
                length = sum(x * x for x in e) ** 0.5
                expected = sum(x * y / length for x, y in zip(u, e, strict=True))
                assert found[b, t, k].item() == pytest.approx(expected, abs=1e-5)


def test_a_fresh_head_is_zero_and_lengths_do_not_count():
    head = VocabHead(6)
    hidden, embedded = torch.randn(5, 6), torch.randn(5, 4, 6)
    head.reset()
    assert head.values(head(hidden), embedded).abs().max() == 0
    torch.nn.init.normal_(head.linear.weight)
    once = head.values(head(hidden), embedded)
    torch.testing.assert_close(head.values(head(7 * hidden), 0.1 * embedded), once)


def test_a_value_model_with_vocab_heads_has_no_values_of_states():
    model = tiny_value("llama", head="vocab")
    assert model.scores_vocabulary
    with pytest.raises(AssertionError, match="no value of the state itself"):
        model(torch.tensor([[5, 6]]))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_saved_model_loads_as_it_was(arch, tmp_path):
    original = tiny_value(arch, ("positive", "concise"), "vocab")
    config = ValueModelConfig(**(original.config.to_dict() | {"head": {"kind": "vocab"}}))
    model = ValueModel(config)
    model.load_state_dict(original.state_dict())
    model.save(str(tmp_path / "value"), tiny_tokenizer(), "a card")
    loaded = ValueModel.load(str(tmp_path / "value"))
    assert loaded.config.head == {"kind": "vocab"}
    assert loaded.objectives == ("positive", "concise")
    assert loaded.scores_vocabulary
    assert [type(head) for head in loaded.heads] == [VocabHead] * 2
    ids, tokens = torch.tensor([[5, 90, 41, 7]]), torch.tensor([[[3, 0, 250]] * 4])
    expected, found = (m.next_values(m.outputs(m.hidden(ids)), tokens) for m in (original, loaded))
    assert found.shape == (1, 4, 3, 2)
    torch.testing.assert_close(found, expected)


# --- the engine --------------------------------------------------------------------------------


def vocab_requests() -> list:
    """Requests of which most need vocab heads, some beside an ordinary value model."""
    p = prompts(7, 1, 18, 3, 11, 2, 9, 14, 5)
    return [
        request("plain", p[0], seed=0),
        request("one objective", p[1], ONE, seed=1),
        request("greedy", p[2], TWO, temperature=0, candidates=6),
        request("beside an ordinary model", p[3], BOTH, seed=3, candidates=5),
        request("beside an ordinary model, greedy", p[4], ALL, temperature=0),
        request("the ordinary model alone", p[5], {"formal": 2.0}, seed=5),
        request("entropy schedule", p[6], ALL, seed=6, schedule="entropy:3", max_tokens=20),
        request("adaptive k", p[7], BOTH, seed=7, candidates=30, candidate_mass=0.6),
        request("mean, drop", p[8], ALL, seed=8, baseline="mean", outside="drop", top_k=50),
        request("soft means nothing to a vocab head", p[0], ALL, seed=9, value="soft"),
        request("all tokens are candidates", p[1], TWO, seed=10, candidates=1000, max_tokens=4),
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_decoding_with_vocab_heads_is_the_naive_reference(arch):
    base, models, engine = vocab_setup(arch)
    requests = vocab_requests()
    expected = [naive(base, models, asked) for asked in requests]
    for done, reference in zip(engine.generate(requests), expected, strict=True):
        assert_same(done, reference)
    assert rows_in_use(engine) == [0, 0, 0]
    for i in (1, 3, 6):  # the same engine, one request at a time
        assert_same(engine.generate([requests[i]])[0], expected[i])
    plain = [naive(base, models, dataclasses.replace(asked, guidance=requests[0].guidance)) for asked in requests]
    moved = sum(one.token_ids != other.token_ids for one, other in zip(plain, expected, strict=True))
    assert moved > 6, "the heads should have a say"


def test_a_step_runs_one_position_whatever_k_is():
    _, _, engine = vocab_setup("llama")
    (prompt,) = prompts(9)
    for candidates in (1, 4, 200):
        asked = request("r", prompt, TWO, seed=3, candidates=candidates, max_tokens=20)
        (done,) = engine.generate([asked])
        assert done.value_positions == {"positive+concise": len(prompt) - 1 + len(done.token_ids)}
        assert done.base_positions == len(prompt) - 1 + len(done.token_ids)


def test_the_heads_choose_the_scorer():
    assert isinstance(make_scorer("v", tiny_value("llama", head="vocab")), VocabScorer)
    for head in ("scalar", "categorical"):
        assert isinstance(make_scorer("v", tiny_value("llama", head=head)), ValueScorer)


# --- distillation ------------------------------------------------------------------------------


def learnable(model: ValueModel) -> ValueModel:
    """The same model with layers that do little, so that values depend on the last token most, as u(s)·e_a can."""
    model = copy.deepcopy(model)
    for name, parameter in model.backbone.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", "c_proj", "wpe")):
            parameter.mul_(0.01)
    return model


@pytest.mark.parametrize(("arch", "head"), [("llama", "categorical"), ("gpt2", "scalar")])
def test_a_distilled_model_explains_its_teacher_and_decodes(arch, head):
    base = tiny_base(arch)
    objectives = ("positive", "concise")
    teacher = learnable(tiny_value(arch, objectives, head))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    sampled = [request(str(i), p, seed=i, max_tokens=24) for i, p in enumerate(prompts(*[6, 2, 9, 4] * 30))]
    done = Engine(base).generate(sampled)
    rollouts = [(r.prompt_token_ids, c.token_ids) for r, c in zip(sampled, done, strict=True)]
    torch.manual_seed(0)
    student, explained = distill(base, teacher, rollouts, candidates=10, epochs=30, lr=3e-3)
    assert 0.3 < explained < 1

    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.config.head["kind"] == head
    assert student.config.head == {"kind": "vocab"}
    assert student.objectives == objectives
    assert all(torch.equal(t, teacher.backbone.state_dict()[n]) for n, t in student.backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in student.parameters())

    asked = [request(str(i), p, TWO, seed=i, max_tokens=8) for i, p in enumerate(prompts(5, 1, 12, 7, seed=4))]
    for one, completion in zip(asked, Engine(base, scorers_of([student])).generate(asked), strict=True):
        assert_same(completion, naive(base, [student], one))
