"""Training without Ray: packing, batches, targets, metrics, and that the objective learns."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import ARCHITECTURES, tiny_objective, tiny_value

from vas import guidance, schema, storage
from vas.models.value import ValueModel
from vas.training.batches import collate
from vas.training.data import Packed
from vas.training.metrics import CALIBRATION_BINS, Held, calibration, explained_variance
from vas.training.objective import ValueObjective
from vas.training.packing import PACKED_SCHEMA, ROW_TOKENS, lengths, pack, packed_file, write_index

VOCAB = 290


def rollout(prompt_id: str, prompt: list[int], response: list[int], reward: float = 1.0, **other: Any) -> dict:
    """A rollout row with one objective, `positive`; `other` overrides columns."""
    return {
        "rollout_id": f"{prompt_id}/{len(response)}",
        "prompt_id": prompt_id,
        "prompt_token_ids": prompt,
        "response_token_ids": response,
        "finish_reason": "stop",
        "held_out": False,
        "error": None,
        "rewards": {"positive": reward},
    } | other


def packed(rows: list[dict], objectives: tuple[str, ...] = ("positive",)) -> list[dict]:
    """What `pack` makes of rollout rows."""
    table = pa.Table.from_pylist(rows, schema=schema.rollout_schema(list(objectives)))
    return pack(table, list(objectives)).to_pylist()


def tokens(generator: np.random.Generator, count: int) -> list[int]:
    """Random tokens, no special ones."""
    return generator.integers(4, VOCAB, count).tolist()


# --- packing -----------------------------------------------------------------------------------


def test_a_prompt_is_packed_once_with_all_its_responses():
    rows = [
        rollout("a", [5, 6], [7, 8], 1.0),
        rollout("b", [9], [10], 2.0, finish_reason="length"),
        rollout("a", [5, 6], [11, 12, 13], 3.0, finish_reason="length"),
    ]
    assert packed(rows) == [
        {
            "prompt": [5, 6],
            "responses": [[7, 8], [11, 12, 13]],
            "rewards": [[1.0], [3.0]],
            "ended": [True, False],
            "first": [0, 0],
        },
        {"prompt": [9], "responses": [[10]], "rewards": [[2.0]], "ended": [False], "first": [0]},
    ]


def test_rewards_are_packed_in_the_order_of_the_objectives():
    row = rollout("a", [5], [6], rewards={"positive": 1.0, "brief": 2.0})
    table = pa.Table.from_pylist([row], schema=schema.rollout_schema(["positive", "brief"]))
    assert pack(table, ["brief", "positive"]).to_pylist()[0]["rewards"] == [[2.0, 1.0]]


def test_failed_and_empty_rollouts_stay_out():
    failed = rollout("a", [5], [6], error="positive: ValueError: no", rewards={"positive": None}, finish_reason="error")
    undecoded = rollout("b", [5], [], error="the prompt is too long", rewards=None, finish_reason="error")
    good = rollout("a", [5], [7, 8])
    assert [row["responses"] for row in packed([failed, undecoded, good])] == [[[7, 8]]]


def test_nothing_good_packs_to_no_row():
    table = pack(pa.Table.from_pylist([], schema=schema.rollout_schema(["positive"])), ["positive"])
    assert table.num_rows == 0
    assert table.schema == PACKED_SCHEMA


def test_a_row_that_grows_too_long_is_split_and_brings_the_prompt_again():
    generator = np.random.default_rng(0)
    prompt = tokens(generator, 100)
    responses = [tokens(generator, 500) for _ in range(9)]
    rows = packed([rollout("a", prompt, response) for response in responses])
    assert [row["prompt"] for row in rows] == [prompt] * len(rows)
    assert all(len(prompt) + sum(map(len, row["responses"])) <= ROW_TOKENS for row in rows)
    assert sorted(len(row["responses"]) for row in rows) == [3, 3, 3]
    assert sorted(response for row in rows for response in row["responses"]) == sorted(responses)


def test_a_response_longer_than_a_row_still_has_one():
    response = tokens(np.random.default_rng(0), ROW_TOKENS + 1)
    assert [len(row["responses"]) for row in packed([rollout("a", [5], response), rollout("a", [5], [6])])] == [1, 1]


def test_a_full_row_takes_no_other_prompts_name():
    """A prompt may be called as another one's next row might be."""
    prompts = {"x": [5], "x/0": [6], "x/1": [7], "x/2": [8]}
    long = [9] * (ROW_TOKENS - 1)
    rows = packed(
        [rollout(name, prompt, response) for name, prompt in prompts.items() for response in (long, [1], [2])]
    )
    assert sorted((row["prompt"], row["responses"]) for row in rows) == sorted(
        (prompt, responses) for prompt in prompts.values() for responses in ([long], [[1], [2]])
    )


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_every_worker_runs_as_many_batches(tmp_path, workers):
    """Where workers share a model's weights, each waits in every pass for all the others."""
    files = [
        packed([rollout(f"{file}-{n}", [5], [n + 6]) for n in range(count)]) for file, count in enumerate((0, 5, 3))
    ]
    tables = [pa.Table.from_pylist(rows, schema=PACKED_SCHEMA) for rows in files]
    for number, table in enumerate(tables):
        storage.write_table(packed_file(str(tmp_path), number), table)
    write_index(str(tmp_path), [lengths(table) for table in tables])
    shares = [list(Packed(str(tmp_path)).batches(2, rank, workers)) for rank in range(workers)]
    assert len({len(share) for share in shares}) == 1
    trained = [batch for share in shares for batch in share if batch.trained_NS.any()]
    assert sorted(token for batch in trained for token in batch.input_ids_BT[:, 1].tolist()) == sorted(
        row["responses"][0][0] for rows in files for row in rows
    )


def test_states_are_the_prompts_end_and_every_token_of_the_response():
    rows = packed([rollout("a", [5, 6, 7], [8, 9]), rollout("a", [5, 6, 7], [10]), rollout("b", [11], [12, 13])])
    batch = collate(rows)
    assert batch.row_N.tolist() == [0, 0, 1]
    assert batch.last_N.tolist() == [2, 1, 2]
    states = [batch.input_ids_BT[b][columns].tolist() for b, columns in zip(batch.row_N, batch.state_NS, strict=True)]
    assert [s[: last + 1] for s, last in zip(states, batch.last_N, strict=True)] == [[7, 8, 9], [7, 10], [11, 12, 13]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 0, 0, 0]]
    assert batch.tokens == 9


def test_only_a_response_that_ended_itself_has_a_terminal_state():
    responses = {"stop": [8, 9], "length": [10, 11, 12]}
    rows = packed([rollout("a", [5], response, finish_reason=reason) for reason, response in responses.items()])
    assert collate(rows).trained_NS.tolist() == [
        [True, True, True, False],  # two tokens: states 0 to 2, then padding
        [True, True, True, False],  # three tokens: the last state is not terminal
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_packed_batch_has_the_values_of_each_response_alone(arch):
    generator = np.random.default_rng(1)
    model = tiny_value(arch, dtype=torch.float64)
    prompts = {name: tokens(generator, length) for name, length in {"a": 9, "b": 1, "c": 30}.items()}
    alone = [(name, tokens(generator, length)) for name, length in zip("aaabccc", [4, 1, 17, 12, 3, 8, 1], strict=True)]
    rows = packed([rollout(name, prompts[name], response, n) for n, (name, response) in enumerate(alone)])
    batch = collate(rows)
    _, values_NSJ = ValueObjective(model, 1.0)(batch)
    for values, last, reward in zip(values_NSJ, batch.last_N, batch.rewards_NJ, strict=True):
        name, response = alone[int(reward)]  # the reward is the response's number
        expected = model(torch.tensor([prompts[name] + response]))[0, len(prompts[name]) - 1 :]
        assert last == len(response)
        torch.testing.assert_close(values[: last + 1], expected, atol=1e-5, rtol=0)


# --- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("td_lambda", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("head", ["scalar", "categorical"])
def test_the_loss_is_the_heads_over_the_trained_states(head, td_lambda):
    """Target by target, from the recursion of TD(λ), with the reward at the terminal state."""
    generator = np.random.default_rng(2)
    model = tiny_value("llama", objectives=("positive", "brief"), head=head)
    reasons = ["stop", "length", "stop"]
    rows = [
        rollout(
            name,
            tokens(generator, 5),
            tokens(generator, length),
            rewards={"positive": float(generator.normal()), "brief": float(generator.normal())},
            finish_reason=reason,
        )
        for name, length, reason in zip("abc", [4, 6, 1], reasons, strict=True)
    ]
    batch = collate(packed(rows, ("positive", "brief")))
    loss, values_NSJ = ValueObjective(model, td_lambda)(batch)
    per_head: list[list[torch.Tensor]] = [[], []]
    for n, row in enumerate(rows):
        length = len(row["response_token_ids"])
        hidden = model.hidden(torch.tensor([row["prompt_token_ids"] + row["response_token_ids"]]))[0]
        outputs = model.outputs(hidden[len(row["prompt_token_ids"]) - 1 :])
        for j, name in enumerate(("positive", "brief")):
            target = (row["rewards"][name] - 0.5) / 2.0  # the mean and std of tiny_objective
            targets = [target]
            for t in reversed(range(length)):
                target = (1 - td_lambda) * float(values_NSJ[n, t + 1, j]) + td_lambda * target
                targets.insert(0, target)
            assert targets[-1] == pytest.approx((row["rewards"][name] - 0.5) / 2.0)
            losses = model.heads[j].loss(outputs[j], torch.tensor(targets))
            per_head[j].append(losses if row["finish_reason"] == "stop" else losses[:-1])
    expected = torch.stack([torch.cat(losses).mean() for losses in per_head]).mean()
    torch.testing.assert_close(loss / batch.trained_NS.sum(), expected, atol=1e-5, rtol=1e-5)


def test_no_gradient_flows_through_the_targets():
    """With λ=0 the last state's value is a target too; its own loss is all that moves it."""
    model = ValueModel(tiny_value("llama", head="scalar").config)
    for head in model.heads:
        torch.nn.init.normal_(head.linear.weight)
    batch = collate(packed([rollout("a", [5, 6], [7, 8], 3.0)]))
    objective = ValueObjective(model, 0.0)
    loss, values_NSJ = objective(batch)
    (loss / batch.trained_NS.sum()).backward()
    targets = guidance.td_lambda_targets(values_NSJ, objective.standardise(batch.rewards_NJ), batch.last_N, 0.0)
    hidden = model.hidden(torch.tensor([[5, 6, 7, 8]]))[0, 1:]
    error = values_NSJ[0, :, 0] - targets[0, :, 0]
    torch.testing.assert_close(model.heads[0].linear.weight.grad[0], (error[:, None] * hidden).mean(0))


# --- learning ----------------------------------------------------------------------------------

STEPS = 160
SCORES = {20: -1.0, 80: 0.0, 140: 2.0, 200: 5.0}


def told_by_a_token(generator: np.random.Generator, prompts: int) -> list[dict]:
    """Packed rows whose reward is that of the response's first token, which the others say nothing of."""
    return packed(
        [
            rollout(f"{number}", prompt, [first, *generator.integers(4, 12, 5).tolist()], SCORES[first])
            for number in range(prompts)
            for prompt in [tokens(generator, 4)]
            for first in generator.choice(list(SCORES), 4).tolist()
        ]
    )


@pytest.mark.parametrize("td_lambda", [1.0, 0.95])
@pytest.mark.parametrize("head", ["scalar", "categorical"])
def test_the_objective_learns_a_reward_that_a_token_tells(head, td_lambda):
    generator = np.random.default_rng(3)
    rewards = np.array(list(SCORES.values()))
    scaled = (rewards - rewards.mean()) / rewards.std()
    about = tiny_objective("positive") | {
        "mean": rewards.mean(),
        "std": rewards.std(),
        "low": scaled.min() - 0.1,
        "high": scaled.max() + 0.1,
    }
    config = tiny_value("llama", head=head).config.to_dict() | {"objectives": [about]}
    torch.manual_seed(0)
    model = ValueModel(ValueModel.config_class.from_dict(config))
    objective = ValueObjective(model, td_lambda)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.backbone.parameters(), "lr": 6e-3, "weight_decay": 0.01},
            {"params": model.heads.parameters(), "lr": 1e-2, "weight_decay": 0.0},
        ]
    )
    losses = []
    for _ in range(STEPS):
        batch = collate(told_by_a_token(generator, 16))
        loss = objective(batch)[0] / batch.trained_NS.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        batch = collate(told_by_a_token(generator, 32))
        _, values_NSJ = objective(batch)
    told = values_NSJ[:, 1:]  # before the first token nothing is known
    known = objective.standardise(batch.rewards_NJ)[:, None].expand_as(told)
    assert np.mean(losses[-5:]) < losses[0] / 2
    assert explained_variance(told.numpy().ravel(), known.numpy().ravel()) > 0.9
    assert float(values_NSJ[:, 0].abs().mean()) < 0.3  # the mean reward, there being nothing to tell


# --- metrics -----------------------------------------------------------------------------------


def test_explained_variance():
    generator = np.random.default_rng(4)
    reward = generator.normal(size=500)
    value = 0.5 * reward + generator.normal(size=500)
    assert explained_variance(value, reward) == pytest.approx(1 - np.var(reward - value) / np.var(reward))
    assert explained_variance(reward, reward) == 1
    assert explained_variance(np.full(500, 3.0), reward) == pytest.approx(0)
    assert math.isnan(explained_variance(value, np.ones(500)))
    assert math.isnan(explained_variance(np.empty(0), np.empty(0)))


def test_calibration_has_bins_of_equal_count_ordered_by_value():
    generator = np.random.default_rng(5)
    value, reward = generator.normal(size=(2, 1005))
    table = calibration(value, reward)
    order = np.argsort(value)
    assert len(table) == CALIBRATION_BINS
    assert [row["states"] for row in table] == [101] * 5 + [100] * 5
    start = 0
    for row in table:
        part = order[start : start + row["states"]]
        assert row["value"] == pytest.approx(value[part].mean())
        assert row["reward"] == pytest.approx(reward[part].mean())
        start += row["states"]
    assert [len(calibration(value[:n], reward[:n])) for n in (0, 1, 3)] == [0, 1, 3]


def test_the_report_gathers_batches_workers_objectives_and_quarters():
    generator = np.random.default_rng(6)
    value, reward = generator.normal(size=(2, 300, 2))
    progress = generator.uniform(size=300)
    progress[:2] = 0.0, 1.0
    mine, others = Held(), Held()
    mine.add(value[:100], reward[:100], progress[:100])
    mine.add(value[100:150], reward[100:150], progress[100:150])
    others.add(value[150:], reward[150:], progress[150:])
    mine.extend(others)
    report = mine.report(("positive", "brief"))
    assert list(report) == ["positive", "brief"]
    for j, metrics in enumerate(report.values()):
        assert metrics["explained_variance"] == pytest.approx(explained_variance(value[:, j], reward[:, j]))
        assert metrics["calibration"] == calibration(value[:, j], reward[:, j])
        for quarter, explained in enumerate(metrics["by_quarter"]):
            inside = (progress >= quarter / 4) & ((progress < (quarter + 1) / 4) | (quarter == 3))
            assert explained == pytest.approx(explained_variance(value[inside, j], reward[inside, j]))
    assert Held().report(("positive",)) == {}
