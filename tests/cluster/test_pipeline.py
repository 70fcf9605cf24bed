"""A whole tiny run through the stages on a real Ray, and what may go wrong in one."""

import json
import re
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from tools import command, committed, descendants, read_record, wait_until

from vas import schema, storage
from vas.config import RunConfig, parse_config
from vas.errors import VasError
from vas.models.base import load_base
from vas.models.value import ValueModel
from vas.prompts import load_prompts
from vas.rollouts import pipeline
from vas.rollouts.pipeline import sample
from vas.rollouts.plan import Plan
from vas.rollouts.stored import read_rollouts
from vas.run import stages
from vas.run.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("tiny_cluster")

RESULT_COLUMNS = {
    *("method", "setting", "objective", "n", "reward_mean", "ci_low", "ci_high", "kl", "length"),
    *("decode_flops", "tokens_generated", "tokens_per_s", "seed", "git_revision"),
}


@pytest.fixture(scope="module")
def run(whole_run: RunDirectory) -> RunDirectory:
    """A run that went through all stages."""
    return whole_run


@pytest.fixture(scope="module")
def rows(run: RunDirectory) -> list[dict]:
    """The rollout rows of `run`."""
    return read_rollouts(run.rollouts).to_pylist()


def config_of(content: dict[str, Any]) -> RunConfig:
    return parse_config(content, "this test")


def plan_of(config: RunConfig) -> Plan:
    return Plan(load_prompts(config.prompts), config.rollouts.samples_per_prompt, config.seed)


def expected_ids(plan: Plan) -> list[str]:
    return sorted(plan.rollout_id(prompt, n) for prompt in plan.prompts for n in range(plan.samples))


def ids_of(rows: list[dict]) -> list[str]:
    return sorted(row["rollout_id"] for row in rows)


# --- a whole run -------------------------------------------------------------------------------


def test_rollouts_keep_the_contract(run, rows):
    for file in storage.list_files(run.rollouts, ".parquet"):
        assert pq.read_schema(file).equals(schema.rollout_schema(["brief", "words"]))
    assert ids_of(rows) == expected_ids(plan_of(run.config))
    held_out = {prompt.prompt_id: prompt.held_out for prompt in plan_of(run.config).prompts}
    assert 0 < sum(held_out.values()) < len(held_out)
    for row in rows:
        assert row["rollout_id"] == schema.rollout_id(0, 0, row["prompt_id"], row["sample_index"])
        assert row["held_out"] == held_out[row["prompt_id"]]
        assert row["error"] is None
        assert row["base_model"] == run.config.base.model
        assert (row["round"], row["roll_in_length"]) == (0, 0)
        words = len(row["response_text"].split())
        assert row["rewards"]["words"] == words
        assert row["rewards"]["brief"] == pytest.approx(0.0 if words < 2 else 1 - words / 30)


def test_responses_and_their_log_probabilities_are_the_base_models(run, rows):
    base = load_base(run.config.base)
    for row in rows:
        prompt, response = row["prompt_token_ids"], row["response_token_ids"]
        logits = base.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["logprobs"]), expected, atol=1e-3, rtol=0)
        ended = response[-1] in base.eos_token_ids
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert ended or len(response) == 8
        assert row["tokenizer_digest"] == base.tokenizer_digest
        assert row["response_text"] == base.tokenizer.decode(response, skip_special_tokens=True)


def test_run_json_says_how_it_went(run):
    record = read_record(Path(run.location))
    assert {name: stage["state"] for name, stage in record["stages"].items()} == dict.fromkeys(
        ["prompts", "rollouts", "train", "evaluate"], "done"
    )
    assert record["digest"] == run.config.digest()
    assert (record["stages"]["rollouts"]["rows"], record["stages"]["rollouts"]["errors"]) == (96, {})
    assert set(record["stages"]["train"]["explained_variance"]) == {"brief", "words"}
    assert all(stage["seconds"] >= 0 for stage in record["stages"].values())


def test_the_value_model_is_a_checkpoint_with_a_card(run, rows):
    model = ValueModel.load(run.value)
    assert model.objectives == ("brief", "words")
    assert model.config.backbone_config.num_hidden_layers == 1
    assert model.config.run_digest == run.config.digest()
    assert model.config.tokenizer_digest == rows[0]["tokenizer_digest"]
    learned = [row["rewards"]["words"] for row in rows if not row["held_out"]]
    assert model.config.objectives[1]["mean"] == pytest.approx(sum(learned) / len(learned))
    values = model(torch.tensor([rows[0]["prompt_token_ids"] + rows[0]["response_token_ids"]]))
    assert values.isfinite().all()
    assert values.std() > 0  # the heads have left zero
    card = Path(run.value, "README.md").read_text()
    for objective in ("brief", "words"):
        table = card.split(f"## Calibration: {objective}")[1].split("##")[0]
        assert len(re.findall(r"^\| -?\d", table, re.MULTILINE)) == 10
    (history,) = json.loads(Path(run.value, "training.json").read_text())
    assert len(history["losses"]) >= 4
    assert not list(Path(run.value).rglob("*.bin")) + list(Path(run.value).rglob("*.p*kl"))


def test_guided_responses_keep_the_contract(run):
    responses = read_rollouts(run.path("evaluation", "responses"))
    assert responses.schema.equals(schema.rollout_schema(["brief", "words"], guided=True))
    held_out = [prompt for prompt in plan_of(run.config).prompts if prompt.held_out]
    settings = {row["setting"] for row in responses.to_pylist()}
    assert [json.loads(setting) for setting in sorted(settings)] == [{"brief": 2.0, "words": -2.0}, {"words": 4.0}]
    expected = [id_ for setting in settings for id_ in expected_ids(Plan(held_out, 1, run.config.seed, 0, setting))]
    assert ids_of(responses.to_pylist()) == sorted(expected)
    for row in responses.to_pylist():
        assert row["error"] is None
        assert row["kl"] >= 0
        assert row["value_positions"] > row["base_positions"] > 0
        assert len(row["guided_logprobs"]) == len(row["logprobs"]) == len(row["response_token_ids"])


def half_finished(run: RunDirectory, rows: list[dict]) -> Plan:
    """The plan of the completions: ten for each held-out prompt, from half of its first rollout."""
    first = {row["prompt_id"]: row["response_token_ids"] for row in rows if row["sample_index"] == 0}
    held_out = [prompt for prompt in plan_of(run.config).prompts if prompt.held_out]
    halves = {prompt.prompt_id: first[prompt.prompt_id] for prompt in held_out}
    prefixes = {name: [tokens[: len(tokens) // 2]] * 10 for name, tokens in halves.items()}
    return Plan(held_out, 10, run.config.seed, prefixes=prefixes)


def test_completions_go_on_from_half_of_the_first_rollouts(run, rows):
    plan, base = half_finished(run, rows), load_base(run.config.base)
    completions = read_rollouts(run.path("evaluation", "completions"))
    assert completions.schema.equals(schema.rollout_schema(["brief", "words"]))
    assert ids_of(completions.to_pylist()) == expected_ids(plan)
    for row in completions.to_pylist():
        prefix, response = plan.prefixes[row["prompt_id"]][0], row["response_token_ids"]
        assert (row["error"], row["roll_in_length"]) == (None, len(prefix))
        assert response[: len(prefix)] == prefix
        assert len(response) == len(prefix) + len(row["logprobs"]) <= 8
        assert row["response_text"] == base.tokenizer.decode(response, skip_special_tokens=True)
        assert row["rewards"]["words"] == len(row["response_text"].split())
    assert len({tuple(row["response_token_ids"]) for row in completions.to_pylist()}) > 2 * len(plan.prompts)


def test_completions_that_are_missing_are_sampled_again_and_no_others(run, rows, tmp_path):
    location = tmp_path / "completions"
    shutil.copytree(run.path("evaluation", "completions"), location)
    before = read_rollouts(str(location)).to_pylist()
    next(location.glob("*.parquet")).unlink()
    kept = {row["rollout_id"]: row for row in read_rollouts(str(location)).to_pylist()}
    summary = sample(run.config, [half_finished(run, rows)], str(location), "completions")
    again = {row["rollout_id"]: row for row in read_rollouts(str(location)).to_pylist()}
    assert summary.sampled == len(before) - len(kept) > 0
    assert committed(str(location)) == committed(run.path("evaluation", "completions"))
    assert {name: again[name] for name in kept} == kept
    for row in before:
        assert again[row["rollout_id"]]["response_token_ids"] == row["response_token_ids"]


def test_values_are_held_against_the_completions(run, rows):
    found = json.loads(Path(run.path("evaluation", "trust.json")).read_text())
    assert list(found) == ["brief", "words"]
    plan, model = half_finished(run, rows), ValueModel.load(run.value)
    completions = read_rollouts(run.path("evaluation", "completions")).to_pylist()
    asked = {row["prompt_id"]: row["prompt_token_ids"] for row in rows}
    finished = [row for row in rows if row["held_out"] and row["finish_reason"] == "stop"]
    for j, objective in enumerate(model.config.objectives):
        name, mean, std = objective["name"], objective["mean"], objective["std"]
        assert (found[name]["prefixes"], found[name]["completions"]) == (len(plan.prompts), 10 * len(plan.prompts))
        assert found[name]["finished"] == len(finished)
        for prompt, point in zip(plan.prompts, found[name]["points"], strict=True):
            state = [*asked[prompt.prompt_id], *plan.prefixes[prompt.prompt_id][0]]
            rewards = [row["rewards"][name] for row in completions if row["prompt_id"] == prompt.prompt_id]
            assert point["value"] == pytest.approx(float(model(torch.tensor([state]))[0, -1, j]), abs=1e-3)
            assert point["reward"] == pytest.approx((sum(rewards) / 10 - mean) / std, abs=1e-6)
            assert point["completions"] == 10
        misses = [
            float(model(torch.tensor([row["prompt_token_ids"] + row["response_token_ids"]]))[0, -1, j])
            - (row["rewards"][name] - mean) / std
            for row in finished
        ]
        square = sum(miss**2 for miss in misses)
        assert found[name]["after_eos_rmse"] == pytest.approx(
            (square / len(misses)) ** 0.5 if misses else None, abs=1e-3
        )
    card = Path(run.value, "README.md").read_text()
    assert card.startswith("---\n")
    assert card.count("## Trust\n") == 1
    assert "| spread ÷ error |" in card.split("## Trust\n")[1]
    assert "Do the values come true?" in Path(run.path("evaluation", "report.html")).read_text()


def test_results_have_a_row_per_method_setting_and_objective(run):
    table = pq.read_table(run.path("evaluation", "results.parquet"))
    assert set(table.column_names) >= RESULT_COLUMNS
    results = table.to_pylist()
    assert Counter((row["method"], row["objective"]) for row in results) == {
        (method, objective): settings
        for method, settings in {"base": 1, "best-of-n": 6, "vas": 2}.items()
        for objective in ("brief", "words")
    }
    for row in results:
        assert row["ci_low"] <= row["reward_mean"] <= row["ci_high"]
        assert row["n"] == sum(prompt.held_out for prompt in plan_of(run.config).prompts)
        assert min(row["length"], row["decode_flops"], row["tokens_generated"], row["tokens_per_s"]) > 0
        assert isinstance(json.loads(row["setting"]), dict)
        assert row["git_revision"] == run.revision


def test_the_report_stands_on_its_own(run):
    report = Path(run.path("evaluation", "report.html")).read_text()
    assert not re.findall(r"<link|<script[^>]+src|@import|url\(\s*['\"]?(?!data:)\w", report)
    sources = re.findall(r"<img[^>]+src=[\"']?([^\"' >]{0,20})", report)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    for word in ("whole", "brief", "words", "best of 4"):
        assert word in report
    assert list(Path(run.path("evaluation", "figures")).glob("*.png"))


def test_a_finished_run_is_left_alone(run):
    def files() -> dict[Path, tuple[int, int]]:
        found = [path for path in Path(run.location).rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}

    before = files()
    again = RunDirectory.create(run.config)
    for stage in stages.STAGES.values():
        stage(again)
    assert files() == before


# --- who samples, and who dies, makes no difference ---------------------------------------------


def test_two_actors_one_of_them_killed_sample_the_same_rows(make_config, rows, tmp_path):
    config = config_of(make_config("whole", "rollouts.batch_size=4", "resources.actors=2"))
    location = str(tmp_path / "rollouts")
    killed: list[tuple[int, int]] = []  # (pid, files there were)

    def samplers() -> list[psutil.Process]:
        return [process for process in descendants(psutil.Process().pid) if "Sampler" in command(process)]

    def kill_one() -> None:
        wait_until(lambda: committed(location), 120, "a committed file")
        victim = samplers()[0]
        killed.append((victim.pid, committed(location)))
        victim.kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    sample(config, [plan_of(config)], location, "rollouts")
    killer.join()
    (_, files), *_ = killed
    assert 0 < files < 24
    found = read_rollouts(location).to_pylist()
    assert ids_of(found) == ids_of(rows)
    one_actor = {row["rollout_id"]: row for row in rows}
    for row in found:
        expected = one_actor[row["rollout_id"]]
        assert row["response_token_ids"] == expected["response_token_ids"]
        assert row["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)
        assert row["rewards"] == expected["rewards"]


# --- rows that fail ----------------------------------------------------------------------------

MOODY_REWARD = '''
from pathlib import Path

def score(prompts, responses, mended):
    """Cannot score a response with an `e` in it, until the file `mended` is there."""
    if any("e" in response for response in responses) and not Path(mended).exists():
        raise ValueError("no score for an e")
    return [float(len(response)) for response in responses]
'''


def test_rows_that_fail_are_marked_and_tried_again(make_config, tmp_path):
    reward, mended = tmp_path / "moody.py", tmp_path / "mended"
    reward.write_text(MOODY_REWARD)
    content = make_config("moody", "rollouts.batch_size=8", prompts=6, more=("the fox " * 600,))
    content["rewards"]["words"] = {"use": f"python:{reward}:score", "params": {"mended": str(mended)}}
    config, location = config_of(content), str(tmp_path / "rollouts")
    plan = plan_of(config)
    too_long = next(prompt.prompt_id for prompt in plan.prompts if len(prompt.last_user_text()) > 1000)

    first = sample(config, [plan], location, "first pass")
    rows = read_rollouts(location).to_pylist()
    assert ids_of(rows) == expected_ids(plan)
    long_rows = [row for row in rows if row["prompt_id"] == too_long]
    short_rows = [row for row in rows if row["prompt_id"] != too_long]
    assert len(long_rows) == 4
    for row in long_rows:
        assert "room for 1024" in row["error"]
        assert (row["finish_reason"], row["response_token_ids"], row["rewards"]) == ("error", [], None)
    failed = [row for row in short_rows if "e" in row["response_text"]]
    assert 0 < len(failed) < len(short_rows)
    for row in short_rows:
        if row in failed:
            assert (row["error"], row["finish_reason"]) == ("words: ValueError: no score for an e", "error")
            assert row["rewards"]["words"] is None
            assert row["rewards"]["brief"] is not None
        else:
            assert (row["error"], row["rewards"]["words"]) == (None, len(row["response_text"]))
    assert (first.rows, first.sampled, sum(first.errors.values())) == (28, 28, 4 + len(failed))

    mended.touch()
    second = sample(config, [plan], location, "second pass")
    again = {row["rollout_id"]: row for row in read_rollouts(location).to_pylist()}
    assert ids_of(read_rollouts(location).to_pylist()) == expected_ids(plan)
    assert (second.rows, second.sampled, sum(second.errors.values())) == (28, 4 + len(failed), 4)
    for row in short_rows:
        now = again[row["rollout_id"]]
        assert now["error"] is None
        assert now["response_token_ids"] == row["response_token_ids"]
        if row not in failed:
            assert now == row  # not sampled again
    assert all("room for 1024" in again[row["rollout_id"]]["error"] for row in long_rows)


def test_failed_rows_of_a_finished_stage_are_tried_again_until_training_begins(make_config, tmp_path):
    reward, mended = tmp_path / "moody.py", tmp_path / "mended"
    reward.write_text(MOODY_REWARD)
    content = make_config("later", prompts=6)
    content["rewards"]["words"] = {"use": f"python:{reward}:score", "params": {"mended": str(mended)}}
    run = RunDirectory.create(config_of(content))
    stages.rollout(run)
    assert run.done("rollouts")
    assert run.about("rollouts")["errors"]
    mended.touch()
    stages.rollout(run)
    assert run.about("rollouts")["errors"] == {}
    assert ids_of(read_rollouts(run.rollouts).to_pylist()) == expected_ids(plan_of(run.config))


def test_a_batch_that_ends_its_process_each_time_stops_the_run_and_nothing_else_is_lost(
    make_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "RETRIES", 0)
    monkeypatch.setattr(pipeline, "FRUITLESS_PASSES", 1)
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import os\n"
        "def deadly(prompts, responses):\n"
        "    if any('deadly' in prompt.last_user_text() for prompt in prompts):\n"
        "        os._exit(1)\n"
        "    return [0.0] * len(responses)\n"
    )
    content = make_config("deadly", prompts=12, more=("what is a deadly question that is longer than the others?",))
    content["rewards"]["words"] = {"use": f"python:{reward}:deadly"}
    config = config_of(content)
    plan, location = plan_of(config), str(tmp_path / "rows")
    with pytest.raises(VasError, match=r"die again and again[\s\S]*1 batches are left"):
        sample(config, [plan], location, "deadly")
    assert committed(location) == plan.batches(config.rollouts.batch_size) - 1
