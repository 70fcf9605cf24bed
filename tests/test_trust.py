"""Whether values come true: the figures against brute force, V of states without Ray, roll-in, the card."""

import json
import math

import numpy as np
import pytest
import torch
from command import tiny_run
from scipy import stats
from tiny import tiny_base, tiny_tokenizer, tiny_value

from vas.evaluation.states import state_values
from vas.evaluation.trust import ROWS, card_section, judge, to_json
from vas.models.server import Prefix
from vas.rollouts.plan import BASE_SETTING, Plan, setting_key
from vas.rollouts.sampler import Sampler
from vas.schema import Prompt
from vas.training.card import with_section
from vas.training.metrics import CALIBRATION_BINS, Held, calibration, rank_correlation

# --- rank correlation ----------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1000, 12, 2], ids=["no ties", "ties", "two values"])
def test_rank_correlation_is_spearmans(levels):
    generator = np.random.default_rng(levels)
    value = generator.integers(levels, size=200).astype(float)
    reward = (value + generator.integers(levels, size=200)) // 2
    expected = stats.spearmanr(value, reward).statistic
    assert rank_correlation(value, reward) == pytest.approx(expected)
    assert rank_correlation(value, np.exp(value / levels)) == pytest.approx(1)
    assert rank_correlation(value, -value) == pytest.approx(-1)


def test_rank_correlation_of_what_never_varies_is_none():
    varied, constant = np.arange(5.0), np.ones(5)
    for pair in ((varied, constant), (constant, varied), (np.empty(0), np.empty(0)), (np.ones(1), np.ones(1))):
        assert math.isnan(rank_correlation(*pair))


def test_the_held_out_report_has_it():
    value, reward = np.random.default_rng(1).normal(size=(2, 50, 2))
    held = Held()
    held.add(value, reward, np.linspace(0, 1, 50))
    for j, metrics in enumerate(held.report(("positive", "brief")).values()):
        assert metrics["rank_correlation"] == rank_correlation(value[:, j], reward[:, j])
        assert len(metrics["calibration"]) == CALIBRATION_BINS


# --- the figures ---------------------------------------------------------------------------------


def simulate(prefixes=4000, completions=10, error=0.0, seed=0):
    """V of prefixes with a known error, and rewards around what each prefix is worth."""
    generator = np.random.default_rng(seed)
    worth = generator.normal(size=prefixes)
    rewards = [each + 1.5 * generator.normal(size=completions) for each in worth]
    return worth + error * generator.normal(size=prefixes), rewards


def trust_of(value, rewards, spread=0.3, final=None, reached=None, resamples=20):
    final, reached = (np.empty(0) if each is None else each for each in (final, reached))
    return judge("positive", value, rewards, np.full(len(value), spread), final, reached, resamples, seed=3)


def test_the_figures_against_their_definitions():
    generator = np.random.default_rng(2)
    value = generator.normal(size=23)
    rewards = [0.5 * v + 0.3 * generator.normal(size=generator.integers(2, 9)) for v in value]
    spread, final, reached = generator.uniform(size=23), generator.normal(size=40), generator.normal(size=40)
    trust = judge("positive", value, rewards, spread, final, reached, resamples=200, seed=0)
    means = [sum(each) / len(each) for each in rewards]
    noise = [
        sum((r - m) ** 2 for r in each) / (len(each) - 1) / len(each) for each, m in zip(rewards, means, strict=True)
    ]
    middle = sum(means) / 23
    misses = [m - v for m, v in zip(means, value, strict=True)]
    bias = sum(misses) / 23
    assert (trust.prefixes, trust.completions, trust.finished) == (23, sum(map(len, rewards)), 40)
    unexplained = sum((miss - bias) ** 2 for miss in misses) / sum((m - middle) ** 2 for m in means)
    assert trust.explained_variance == pytest.approx(1 - unexplained)
    assert trust.ceiling == pytest.approx(1 - (sum(noise) / 23) / (sum((m - middle) ** 2 for m in means) / 22))
    assert trust.rank_correlation == pytest.approx(stats.spearmanr(value, means).statistic)
    assert trust.mae == pytest.approx(sum(map(abs, misses)) / 23)
    assert trust.rmse == pytest.approx(math.sqrt(sum(miss**2 for miss in misses) / 23))
    assert trust.error == pytest.approx(math.sqrt(max(trust.rmse**2 - sum(noise) / 23, 0)))
    assert trust.spread == pytest.approx(math.sqrt(sum(s**2 for s in spread) / 23))
    assert trust.signal_to_noise == pytest.approx(trust.spread / trust.error)
    assert trust.after_eos_explained == pytest.approx(1 - np.var(reached - final) / np.var(reached))
    assert trust.after_eos_rmse == pytest.approx(np.sqrt(np.mean((reached - final) ** 2)))
    assert trust.explained_low < trust.explained_variance < trust.explained_high
    assert trust.rank_low < trust.rank_correlation < trust.rank_high
    assert trust.calibration == calibration(value, np.round(means, 9), 5)
    assert [point["value"] for point in trust.points] == pytest.approx(value.tolist())
    assert [point["error"] ** 2 for point in trust.points] == pytest.approx(noise)


def test_a_perfect_value_model_reaches_the_ceiling_and_has_no_error():
    for completions in (2, 10, 50):
        trust = trust_of(*simulate(completions=completions))
        assert trust.ceiling == pytest.approx(1 / (1 + 1.5**2 / completions), abs=0.03)
        assert trust.explained_variance == pytest.approx(trust.ceiling, abs=0.03)
        assert trust.error < 0.2


def test_the_error_does_not_depend_on_how_many_completions_there_are():
    for completions in (2, 10, 50):
        trust = trust_of(*simulate(completions=completions, error=0.5))
        assert trust.error == pytest.approx(0.5, abs=0.05)
        assert trust.signal_to_noise == pytest.approx(0.6, abs=0.07)


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_measured_is_null_and_a_dash():
    for value, rewards in (
        (np.array([0.1, 0.2, 0.3]), [np.full(n, 0.7) for n in (3, 10, 9)]),  # means that differ by rounding alone
        (np.array([0.1]), [np.array([0.2, 0.4])]),
    ):
        trust = trust_of(value, rewards)
        found = json.loads(to_json([trust]))["positive"]
        for name in ("explained_variance", "explained_low", "ceiling", "rank_correlation", "after_eos_rmse"):
            assert found[name] is None
        assert "nan" not in to_json([trust]).lower()
        assert ROWS["what a perfect V would explain"](trust) == "–"
        assert "| explained variance [95 % interval] | – [–, –] |" in card_section([trust])


# --- the card --------------------------------------------------------------------------------------


def test_a_section_of_the_card_is_put_at_its_end_once():
    front = "---\nlibrary_name: transformers\n---\n# Value model\n\ntext\n\n## Objectives\n\n| a |\n"
    once = with_section(front, "Trust", "first\n\n### More\n\nof it")
    assert once == front + "\n## Trust\n\nfirst\n\n### More\n\nof it\n"
    assert with_section(once, "Trust", "second") == front + "\n## Trust\n\nsecond\n"
    moved = with_section(once + "\n## Trustees\n\nstay\n", "Trust", "second")
    assert moved == front + "\n## Trustees\n\nstay\n\n## Trust\n\nsecond\n"


# --- V of states -----------------------------------------------------------------------------------


def test_values_of_states_and_of_their_candidates(tmp_path):
    value = tiny_value(objectives=("positive", "concise"))
    run = tiny_run(
        tmp_path, value, rollouts={"samples_per_prompt": 2, "sampling": {"temperature": 0.7, "max_tokens": 12}}
    )
    generator = np.random.default_rng(8)
    states = [tuple(generator.integers(4, 290, size=size).tolist()) for size in [1, *generator.integers(2, 40, 19)]]
    final = [(*states[n], tiny_tokenizer().eos_token_id) for n in (3, 1)]
    found = state_values(run.config, run.value, [Prefix(s) for s in states], [Prefix(s) for s in final])
    assert found.spread_NJ.shape == (20, 2)
    base = tiny_base().model
    for n, state in enumerate(states):
        assert found.value_NJ[n] == pytest.approx(value(torch.tensor([state]))[0, -1].numpy(), abs=1e-4)
        probability = torch.softmax(base(torch.tensor([state])).logits[0, -1] / 0.7, dim=-1)
        candidates = list(dict.fromkeys([*probability.topk(8).indices.tolist(), tiny_tokenizer().eos_token_id]))
        worth = torch.stack([value(torch.tensor([[*state, token]]))[0, -1] for token in candidates])
        weights = (probability[candidates] / probability[candidates].sum())[:, None]
        middle = (weights * worth).sum(0)
        expected = (weights * (worth - middle) ** 2).sum(0).sqrt()
        assert found.spread_NJ[n] == pytest.approx(expected.numpy(), abs=1e-4)
    for n, state in enumerate(final):
        assert found.final_MJ[n] == pytest.approx(value(torch.tensor([state]))[0, -1].numpy(), abs=1e-4)
    assert state_values(run.config, run.value, [Prefix(states[0])], []).final_MJ.shape == (0, 2)


# --- roll-in ---------------------------------------------------------------------------------------

PROMPT = Prompt("p", ({"role": "user", "content": "What does the fox do?"},))


def jobs_of(plan):
    return [job for number in range(plan.batches(100)) for job in plan.batch(number, 100)]


def test_a_prefix_makes_other_rollouts_with_other_random_numbers():
    plain = Plan([PROMPT], 2, 0)
    rolled, other = (Plan([PROMPT], 2, 0, prefixes={"p": prefixes}) for prefixes in ([[5], [5, 6]], [[5], []]))
    guided = Plan([PROMPT], 2, 0, setting=setting_key({"positive": 2}), prefixes=rolled.prefixes)
    without, jobs, second, steered = (jobs_of(plan) for plan in (plain, rolled, other, guided))
    assert ([job.prefix for job in without], [job.prefix for job in jobs]) == ([(), ()], [(5,), (5, 6)])
    seeds = [job.seed for job in (*without, *jobs, second[1])]
    assert len(set(seeds)) == 5  # not even an empty prefix gets the numbers that a prefix was drawn with
    assert second[0].seed == jobs[0].seed
    assert [job.seed for job in steered] == [job.seed for job in jobs]  # settings are compared under the same ones
    assert not {job.rollout_id for job in steered} & {job.rollout_id for job in jobs}
    assert {job.setting for job in jobs} == {BASE_SETTING}
    assert jobs_of(rolled) == jobs
    assert len({plan.key for plan in (plain, rolled, other, guided)}) == 4


def test_a_response_goes_on_from_its_prefix(tmp_path):
    run = tiny_run(tmp_path, rollouts={"samples_per_prompt": 2, "sampling": {"max_tokens": 12, "stop": ["q"]}})
    tokenizer = tiny_tokenizer()
    torn = tokenizer("a fox é", add_special_tokens=False).input_ids[:-1]  # ends inside a character
    prefixes = [[], torn, [*torn, 7], [7] * 12]
    plan = Plan([PROMPT], 4, 0, prefixes={"p": prefixes})
    free, begun, further, full = Sampler(run.config, [plan], str(tmp_path)).sample(jobs_of(plan))
    for row, prefix in zip((free, begun, further), prefixes, strict=False):
        tokens = row["response_token_ids"]
        assert row["error"] is None
        assert row["roll_in_length"] == len(prefix)
        assert tokens[: len(prefix)] == prefix
        assert len(prefix) < len(tokens) <= 12
        assert len(row["logprobs"]) == len(tokens) - len(prefix)
        assert row["response_text"] == tokenizer.decode(tokens, skip_special_tokens=True).partition("q")[0]
        logits = tiny_base().model(torch.tensor([row["prompt_token_ids"] + tokens])).logits[0]
        expected = torch.log_softmax(logits[:-1][-len(row["logprobs"]) :], dim=-1)
        taken = torch.tensor(tokens[len(prefix) :])[:, None]
        torch.testing.assert_close(torch.tensor(row["logprobs"]), expected.gather(1, taken)[:, 0], atol=1e-3, rtol=0)
    assert "max_tokens is out of its range: 0" in full["error"]  # there is nothing left to sample
    assert (full["finish_reason"], full["roll_in_length"]) == ("error", 12)
