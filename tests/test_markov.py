"""Where values are known in closed form, every head finds them, whatever λ: the maths and the code as a whole."""

from typing import Any

import markov
import numpy as np
import pytest
import torch
from tiny import tiny_objective, tiny_value

from vas.decoding.engine import Engine
from vas.decoding.sequence import Request, SamplingParams
from vas.models.value import ValueModel, ValueModelConfig
from vas.training.agreement import errors
from vas.training.batches import collate
from vas.training.distill import VocabObjective, distill
from vas.training.lessons import Lessons, labels
from vas.training.metrics import explained_variance
from vas.training.objective import ValueObjective
from vas.training.schedule import factor

PROMPTS, SAMPLES, HELD_OUT = 2060, 4, 60
BATCH, EPOCHS, RATE = 8, 3, 1e-2
GOAL = 0.95
HEADS = {
    "scalar": {"kind": "scalar"},
    "hl_gauss": {"kind": "categorical", "bins": 21, "label": "hl_gauss"},
    "two_hot": {"kind": "categorical", "bins": 21, "label": "two_hot"},
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Packed rollouts of the chain, sampled by the engine."""
    random = np.random.default_rng(0)
    prompts = [tuple(random.choice(markov.STATES, random.integers(1, 4)).tolist()) for _ in range(PROMPTS)]
    requests = [
        Request(f"{p}/{n}", prompt, SamplingParams(max_tokens=80, seed=p * SAMPLES + n))
        for p, prompt in enumerate(prompts)
        for n in range(SAMPLES)
    ]
    done = Engine(markov.markov_base(), [], 64).generate(requests)
    responses = [done[p * SAMPLES : (p + 1) * SAMPLES] for p in range(PROMPTS)]
    return [
        {
            "prompt": list(prompt),
            "responses": [each.token_ids for each in group],
            "rewards": [[markov.exact([*prompt, *each.token_ids])] for each in group],
            "ended": [each.finish_reason == "stop" for each in group],
            "first": [0] * len(group),
        }
        for prompt, group in zip(prompts, responses, strict=True)
    ]


def fit(rows: list[dict[str, Any]], head: dict[str, Any], td_lambda: float) -> ValueModel:
    """A value model of a random tiny transformer, trained on rows."""
    rewards = np.array([reward for row in rows for reward in row["rewards"]])
    mean, std = float(rewards.mean()), float(rewards.std())
    about = tiny_objective("last") | {"mean": mean, "std": std, "low": -2.2 / std, "high": 2.2 / std}
    torch.manual_seed(0)
    model = ValueModel(
        ValueModelConfig(**(tiny_value("llama").config.to_dict() | {"objectives": [about], "head": head}))
    )
    for weight in model.backbone.parameters():
        if weight.ndim > 1:
            weight.data /= 4  # as models are initialised; tiny ones for comparisons are wilder
    objective = ValueObjective(model, td_lambda)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    steps = EPOCHS * (len(rows) // BATCH)
    for step in range(steps):
        start = step * BATCH % (len(rows) - BATCH + 1)
        batch = collate(rows[start : start + BATCH])
        optimizer.param_groups[0]["lr"] = RATE * factor(step, steps, 0.1)
        optimizer.zero_grad()
        (objective(batch)[0] / batch.trained_NS.sum()).backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def of_prefixes(rows: list[dict[str, Any]], model: ValueModel) -> tuple[np.ndarray, np.ndarray]:
    """Values of all prefixes of rows in the reward's units, as the model says and as they are."""
    batch = collate(rows)
    _, values_NSJ = ValueObjective(model, 1.0)(batch)
    found = values_NSJ[..., 0][batch.trained_NS] * model.config.objectives[0]["std"]
    told = [
        markov.exact([*row["prompt"], *response[:length]])
        for row in rows
        for response in row["responses"]
        for length in range(len(response) + 1)
    ]
    return found.numpy() + model.config.objectives[0]["mean"], np.array(told)


def test_the_chain_is_what_it_says():
    base = markov.markov_base()
    logits = base.model(torch.tensor([list(markov.STATES)])).logits[0]
    chances = torch.softmax(logits, -1)
    np.testing.assert_allclose(chances[:, list(markov.STATES)].numpy(), markov.transitions(), atol=1e-5)
    np.testing.assert_allclose(chances[:, base.eos_token_ids[0]].numpy(), markov.END, atol=1e-5)


@pytest.mark.parametrize("td_lambda", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_finds_the_exact_values(rows, head, td_lambda):
    found, told = of_prefixes(rows[-HELD_OUT:], fit(rows[:-HELD_OUT], HEADS[head], td_lambda))
    assert explained_variance(found, told) >= GOAL
    assert float(np.abs(found - told).mean()) < 0.2 * told.std()  # and is not off by a constant


def test_a_vocab_head_finds_the_exact_advantages(rows):
    """From a trained V, for every token that can come next."""
    base, teacher = markov.markov_base(), fit(rows[:-HELD_OUT], HEADS["scalar"], 0.5)
    student, _ = distill(base, teacher, rows[:300], candidates=6, epochs=3, lr=3e-3, head_lr=3e-3)
    lessons = Lessons(base, teacher, candidates=6)(rows[-HELD_OUT:])
    tokens, logprobs, taught = labels(lessons, torch.device("cpu"))
    parents = [
        [*row["prompt"], *response[:length]]
        for row in rows[-HELD_OUT:]
        for response in row["responses"]
        for length in range(len(response))
    ]
    scale = teacher.config.objectives[0]["std"]
    told = torch.tensor(
        [[markov.exact([*p, t]) for t in each] for p, each in zip(parents, tokens.tolist(), strict=True)]
    )
    told = told[..., None].to(taught) / scale
    with torch.no_grad():
        found = VocabObjective(student).values(lessons, tokens)
    for said in (taught, found):
        error, variance = errors(said, told, logprobs)
        assert float(1 - error / variance) >= GOAL
