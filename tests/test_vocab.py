"""Vocab heads: all next tokens from the parent state, and how they are distilled from a value model."""

import copy
import dataclasses
import json
import math

import pyarrow as pa
import pytest
import torch
from command import tiny_config, tiny_run
from naive import ALL, BOTH, ONE, TWO, also_ending_with, assert_same, naive, prompts, request, rows_in_use, scorers_of
from tiny import tiny_base, tiny_tokenizer, tiny_value

from vas import storage
from vas.decoding.engine import Engine
from vas.decoding.scorer import ValueScorer, VocabScorer, make_scorer
from vas.errors import VasError
from vas.models.base import BaseModel
from vas.models.heads import VocabHead
from vas.models.value import ValueModel, ValueModelConfig
from vas.run.directory import RunDirectory
from vas.run.distilling import distill_run
from vas.training.agreement import agreement, errors
from vas.training.distill import VocabObjective, distill, judge, learn, new_student
from vas.training.history import best as best_epoch
from vas.training.lessons import Lessons, labels


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


def linear(layer: torch.nn.Linear, x: list[float]) -> list[float]:
    """A linear layer in plain loops."""
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * each for w, each in zip(row, x, strict=True)) + bias for row, bias in rows]


def test_values_are_those_of_plain_loops():
    torch.manual_seed(0)
    head = VocabHead(6).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    hidden, embedded = 3 * torch.randn(2, 3, 6), torch.randn(2, 3, 4, 6)
    found = head.values(head(hidden), embedded)
    assert found.shape == (2, 3, 4)
    for b in range(2):
        for t in range(3):
            state = hidden[b, t].tolist()
            size = (sum(x * x for x in state) / 6) ** 0.5
            between = [x / (1 + math.exp(-x)) for x in linear(head.hidden, [x / size for x in state])]
            u = linear(head.linear, between)
            for k in range(4):
                e = embedded[b, t, k].tolist()
                length = sum(x * x for x in e) ** 0.5
                expected = sum(x * y / length for x, y in zip(u, e, strict=True))
                assert found[b, t, k].item() == pytest.approx(expected, abs=1e-4)


def test_a_fresh_head_is_zero_and_lengths_do_not_count():
    head = VocabHead(6).eval()
    hidden, embedded = torch.randn(5, 6), torch.randn(5, 4, 6)
    head.reset()
    assert head.values(head(hidden), embedded).abs().max() == 0
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
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


# --- lessons -----------------------------------------------------------------------------------


def row(prompt: tuple[int, ...], *responses: tuple[int, ...]) -> dict:
    """A packed row."""
    return {
        "prompt": list(prompt),
        "responses": [list(response) for response in responses],
        "rewards": [[0.0, 0.0]] * len(responses),
        "ended": [True] * len(responses),
        "first": [0] * len(responses),
    }


@pytest.mark.parametrize(("arch", "head"), [("llama", "categorical"), ("gpt2", "scalar")])
def test_a_lesson_is_what_the_teacher_says_of_every_candidate(arch, head):
    base = also_ending_with(tiny_base(arch), 83)
    teacher = tiny_value(arch, ("positive", "concise"), head)
    (prompt, *responses) = prompts(5, 3, 1, 4)
    (lesson,) = Lessons(base, teacher, candidates=6, temperature=0.7)([row(prompt, *responses)])
    assert lesson.tokens_PK.shape == (8, 8)  # 3 + 1 + 4 parents; six tokens and two that end a response
    assert lesson.values_PKJ.shape == (8, 8, 2)
    parents = [[*prompt, *response[:t]] for response in responses for t in range(len(response))]
    for p, prefix in enumerate(parents):
        logprobs = torch.log_softmax(base.model(torch.tensor([prefix])).logits[0, -1] / 0.7, dim=-1)
        counts = lesson.logprobs_PK[p] > float("-inf")
        tokens = lesson.tokens_PK[p][counts]
        assert set(tokens.tolist()) == {*logprobs.topk(6).indices.tolist(), *base.eos_token_ids}
        torch.testing.assert_close(lesson.logprobs_PK[p][counts], logprobs[tokens], atol=1e-4, rtol=1e-4)
        for token, values in zip(tokens.tolist(), lesson.values_PKJ[p][counts], strict=True):
            torch.testing.assert_close(values, teacher(torch.tensor([[*prefix, token]]))[0, -1], atol=1e-4, rtol=1e-4)


def test_many_responses_are_taught_in_parts():
    base, teacher = tiny_base(), tiny_value()
    prompt, *responses = prompts(4, *[2, 3] * 10)
    make = Lessons(base, teacher, candidates=3)
    (whole,) = make([row(prompt, *responses)])
    each = make([row(prompt, response) for response in responses])
    for found, alone in zip(labels([whole], base.model.device), labels(each, base.model.device), strict=True):
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_agreement_by_hand():
    logprobs = torch.tensor([[0.5, 0.495, 0.005], [0.6, 0.4, 0.0]]).log()
    wanted = torch.tensor([[[1.0], [0.0], [5.0]], [[2.0], [-1.0], [99.0]]])
    found = torch.tensor([[[3.0], [1.0], [0.0]], [[0.0], [1.0], [0.0]]])
    figures = agreement(found, wanted, logprobs, ("positive",))["positive"]
    assert figures["best"] == 0.0  # of the first parent it is the third candidate, of the second the first
    assert figures["best_likely"] == 0.5  # of the first parent it is now the first
    assert agreement(wanted + 4, wanted, logprobs, ("positive",))["positive"] == {
        "explained": pytest.approx(1.0),
        "best": 1.0,
        "best_likely": 1.0,
        "best_weighted": 1.0,
    }
    found[0, 2] = 7.0
    figures = agreement(found, wanted, logprobs, ("positive",))["positive"]
    assert figures["best"] == 0.5
    assert figures["best_weighted"] == pytest.approx(4 / (4 + 3))  # the leads: 5 before 1, 2 before -1
    nothing = agreement(torch.zeros_like(wanted), wanted, logprobs, ("positive",))
    assert nothing["positive"]["explained"] == pytest.approx(0.0)


# --- distillation ------------------------------------------------------------------------------


def sampled_rows(base: BaseModel, number: int) -> list[dict]:
    """Rollouts of the base model, packed."""
    asked = [request(str(i), p, seed=i, max_tokens=24) for i, p in enumerate(prompts(*[6, 2, 9, 4] * number))]
    done = Engine(base).generate(asked)
    return [row(r.prompt_token_ids, c.token_ids) for r, c in zip(asked, done, strict=True)]


def learnable(model: ValueModel) -> ValueModel:
    """The same model with layers that do little, so that values depend on the last token most, as u(s)·e_a can."""
    model = copy.deepcopy(model)
    for name, parameter in model.backbone.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", "c_proj", "wpe")):
            parameter.mul_(0.01)
    return model


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_objective_reads_every_parent_state(arch):
    base, teacher = tiny_base(arch), tiny_value(arch, ("positive", "concise"))
    student = tiny_value(arch, ("positive", "concise"), "vocab", seed=9)
    a, b, *responses = prompts(5, 2, 3, 1, 4)
    lessons = Lessons(base, teacher, candidates=4)([row(a, *responses[:2]), row(b, responses[2])])
    objective = VocabObjective(student)
    found = objective.values(lessons, labels(lessons, student.device)[0])
    tokens, logprobs, wanted = labels(lessons, student.device)
    prefixes = [
        [*p, *r[:t]] for p, r in ((a, responses[0]), (a, responses[1]), (b, responses[2])) for t in range(len(r))
    ]
    for values, candidates, prefix in zip(found, tokens, prefixes, strict=True):
        outputs = student.outputs(student.hidden(torch.tensor([prefix]))[0, -1])
        torch.testing.assert_close(values, student.next_values(outputs, candidates), atol=1e-4, rtol=1e-4)
    teacher_like = new_student(teacher)
    for head in teacher_like.heads:
        torch.nn.init.normal_(head.linear.weight)
    teacher_like.eval()
    states, own = (VocabObjective(teacher_like, frozen).values(lessons, tokens) for frozen in (True, False))
    torch.testing.assert_close(states, own, atol=1e-4, rtol=1e-4)
    explained = agreement(found, wanted, logprobs, student.objectives)
    error, variance = errors(found, wanted, logprobs)
    for j, each in enumerate(explained.values()):
        assert each["explained"] == pytest.approx(1 - float(error[j] / variance[j]))
    assert float(objective(lessons)) > 0


@pytest.mark.parametrize(("arch", "head"), [("llama", "categorical"), ("gpt2", "scalar")])
def test_a_distilled_model_explains_its_teacher_and_decodes(arch, head):
    base = tiny_base(arch)
    objectives = ("positive", "concise")
    teacher = learnable(tiny_value(arch, objectives, head))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    torch.manual_seed(0)
    student, history = distill(base, teacher, sampled_rows(base, 15), candidates=10, epochs=8, lr=1e-3, head_lr=1e-2)
    best = history[best_epoch(history)]["unseen"]
    assert all(0.5 < best[name]["explained"] < 1 for name in objectives)
    assert all(best[name]["best"] > 0.4 for name in objectives)
    assert len(history) == 8

    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.config.head["kind"] == head
    assert student.config.head == {"kind": "vocab"}
    assert student.objectives == objectives
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert not any(parameter.requires_grad for parameter in student.parameters())

    asked = [request(str(i), p, TWO, seed=i, max_tokens=8) for i, p in enumerate(prompts(5, 1, 12, 7, seed=4))]
    for one, completion in zip(asked, Engine(base, scorers_of([student])).generate(asked), strict=True):
        assert_same(completion, naive(base, [student], one))


def test_of_the_epochs_the_best_on_unseen_rows_stays():
    """It learns the contrary, so every epoch is worse than the one before."""
    base, teacher = tiny_base(), learnable(tiny_value(objectives=("positive", "concise")))
    lessons = Lessons(base, teacher, candidates=4)(sampled_rows(base, 3))
    contrary = [dataclasses.replace(lesson, values_PKJ=-lesson.values_PKJ) for lesson in lessons[:8]]
    student, history = learn(new_student(teacher), contrary, lessons[8:], epochs=4, lr=1e-3, head_lr=1e-2)
    assert best_epoch(history) == 0
    assert history[-1]["losses"][-1] < history[0]["losses"][0]
    figures = [entry["unseen"] for entry in history]
    assert judge(student, lessons[8:], frozen=True) == figures[0]  # in whose epoch the backbone does not learn
    assert figures[-1]["positive"]["explained"] < figures[0]["positive"]["explained"]


# --- a run -------------------------------------------------------------------------------------


def test_a_run_is_distilled(tmp_path):
    run = tiny_run(tmp_path)
    with pytest.raises(VasError, match="is the value model to distil"):
        distill_run(run.location, run.config.value.name)
    base = tiny_base()
    columns = {"prompt_id": [], "prompt_token_ids": [], "response_token_ids": [], "rewards": []}
    for i, each in enumerate(sampled_rows(base, 2)):
        for column, value in zip(
            columns,
            (str(i), each["prompt"], each["responses"][0], {"positive": 0.5, "concise": 0.1}),
            strict=True,
        ):
            columns[column].append(value)
    rows = len(columns["prompt_id"])
    table = pa.table(
        columns
        | {"finish_reason": ["stop"] * rows, "error": pa.nulls(rows, pa.string()), "held_out": [False] * rows}
        | {"roll_in_length": [0] * rows},
    )
    storage.write_table(storage.join(run.rollouts, "some.parquet"), table)
    location = distill_run(run.location, epochs=1)
    assert location == run.path("value", "vocab")
    student = ValueModel.load(location)
    assert student.scores_vocabulary
    assert student.objectives == ("positive", "concise")
    card = storage.read_bytes(storage.join(location, "README.md")).decode()
    assert "teacher: value model `default`" in card
    assert "| positive |" in card
    assert len(json.loads(storage.read_bytes(storage.join(location, "training.json")))) == 1


def test_a_run_that_is_not_trained_is_not_distilled(tmp_path):
    run = RunDirectory.create(tiny_config(tmp_path))
    with pytest.raises(VasError, match="no finished value model"):
        distill_run(run.location)
