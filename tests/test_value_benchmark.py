"""The benchmark of value models: who shares which rollouts, what it says of states, and what a choice is worth."""

import sys
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from command import ROOT
from tiny import tiny_value

from vas.training.batches import collate
from vas.training.metrics import explained_variance, rank_correlation
from vas.training.objective import ValueObjective

sys.path.insert(0, str(ROOT))
from benchmarks.study import SAMPLES, STEP, Design, cached, judge, rollouts_needed
from benchmarks.value import EXPLAINED, HEADS, LAMBDAS, RANKS, RESAMPLES, Estimate, drawing, effects, of_states

DESIGNS = [Design(*each) for each in product(HEADS, LAMBDAS, SAMPLES)]


def packed_rows(count: int) -> list[dict]:
    """Packed rows of a few responses each."""
    random = np.random.default_rng(0)
    return [
        {
            "prompt": random.integers(4, 290, 5).tolist(),
            "responses": [random.integers(4, 290, length).tolist() for length in (3, 7, 5)],
            "rewards": [[float(reward)] for reward in random.normal(size=3)],
            "ended": [True, False, True],
            "first": [0, 0, 0],
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("total", [STEP, 10 * STEP])
def test_every_design_finds_its_rollouts_and_none_is_sampled_in_vain(total):
    needs = rollouts_needed(total)
    used = Counter()
    for samples in SAMPLES:
        prompts = total // samples
        assert all(need >= samples for need in needs[:prompts])
        for prompt in range(prompts):
            used[prompt] = max(used[prompt], samples)
        assert samples * prompts == total
        assert STEP % samples == 0
    assert needs == [used[prompt] for prompt in range(total)]


def test_judge_says_what_the_model_says_of_each_prompt_alone():
    model, rows = tiny_value(), packed_rows(4)
    states = judge(model, rows)
    about = model.config.objectives[0]
    assert len(states["value_M"]) == len(states["reward_M"]) == 4 * (4 + 7 + 6)  # a cut response has no last state
    start = 0
    for number, row in enumerate(rows):
        for response, (reward,), ended in zip(row["responses"], row["rewards"], row["ended"], strict=True):
            tokens = torch.tensor([row["prompt"] + response])
            value_T = model(tokens)[0, len(row["prompt"]) - 1 :, 0][: len(response) + ended]
            part = slice(start, start + len(value_T))
            np.testing.assert_allclose(states["value_M"][part], value_T.numpy(), atol=1e-4)
            np.testing.assert_allclose(states["reward_M"][part], (reward - about["mean"]) / about["std"], atol=1e-5)
            assert (states["row_M"][part] == number).all()
            start += len(value_T)


def test_measures_are_those_of_training_and_resamples_lie_about_them():
    rows = packed_rows(40)
    states = judge(tiny_value(), rows)
    _, values = ValueObjective(tiny_value(), 1.0)(batch := collate(rows))
    assert states["value_M"].shape == values[batch.trained_NS].shape[:1]
    for measure in (explained_variance, rank_correlation):
        found = of_states(states, measure)
        assert found.value == measure(states["value_M"], states["reward_M"])
        assert found.resampled_R.shape == (RESAMPLES,)
        assert np.ptp(found.resampled_R) > 0
        assert abs(found.resampled_R.mean() - found.value) < 2 * found.resampled_R.std()


def test_effects_are_the_differences_that_choices_make():
    heads, lambdas, samples = ({"scalar": -0.1}, {0.95: 0.2}, {4: 0.03, 1: -0.3})  # against the first of each
    noise_R = np.random.default_rng(0).normal(size=RESAMPLES)  # prompts that are easy or hard for all alike
    measured = {}
    for design in DESIGNS:
        worth = (heads.get(design.head, 0), lambdas.get(design.td_lambda, 0), samples.get(design.samples, 0))
        value = 0.5 + sum(worth)
        measured[design] = {EXPLAINED: Estimate(value, value + noise_R)}
    rows = {row.case: row for row in effects(measured)}
    assert {row.metric for row in rows.values()} == {EXPLAINED}
    for case, expected in {
        "scalar - categorical, 6 pairs": -0.1,
        "λ = 0.95 - λ = 1, 6 pairs": 0.2,
        "4 a prompt - 8 a prompt, 4 pairs": 0.03,
        "1 a prompt - 8 a prompt, 4 pairs": -0.3,
    }.items():
        assert rows[case].value == pytest.approx(expected)
        assert rows[case].unit == f"[{expected:.3f}, {expected:.3f}]"
    assert rows["spread of designs about the sum of the effects"].value == pytest.approx(0, abs=1e-12)
    lucky = DESIGNS[3]
    measured[lucky] = {EXPLAINED: Estimate(measured[lucky][EXPLAINED].value + 0.1, noise_R)}
    assert {row.case: row for row in effects(measured)}["spread of designs about the sum of the effects"].value > 0.01
    few = {design: measured[design] for design in DESIGNS[:2]}
    assert [row.case for row in effects(few)] == ["4 a prompt - 8 a prompt, 1 pairs"]


def test_what_is_cached_is_not_made_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(3)}

    file = tmp_path / "arrays.npz"
    for _ in range(2):
        np.testing.assert_array_equal(cached(file, make)["a"], [0, 1, 2])
    assert len(made) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["arrays.npz"]


def test_the_figure_takes_designs_that_lack_a_distance():
    spread_R = np.linspace(0.1, 0.3, RESAMPLES)
    some = {EXPLAINED: Estimate(0.2, spread_R), RANKS: Estimate(0.4, spread_R)}
    reached = some | {"reward at KL 5": Estimate(0.2, spread_R)}
    measured = {design: reached if design.head == "scalar" else some for design in DESIGNS}
    assert drawing(measured, 5.0).startswith(b"\x89PNG")
