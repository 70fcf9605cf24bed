"""A run of two rounds, and one that takes another's responses, on a real Ray."""

import json
import shutil
from pathlib import Path

import pytest
from test_pipeline import config_of, expected_ids, ids_of
from tools import ConfigMaker, read_record

from vas import storage
from vas.errors import VasError
from vas.models.value import ValueModel
from vas.rollouts.plan import Plan, setting_key
from vas.rollouts.stored import read_rollouts
from vas.run import stages
from vas.run.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("tiny_cluster")


@pytest.fixture(scope="module")
def run(make_config: ConfigMaker, tiny_cluster) -> RunDirectory:
    """A whole run of two rounds."""
    run = RunDirectory.create(config_of(make_config("rounds", "rounds=2", "rollouts.roll_in=[{words: 4}, {brief: 2}]")))
    stages.run_all(run)
    return run


def rounds_of(run: RunDirectory) -> tuple[list[dict], list[dict]]:
    first, second = (read_rollouts(run.path("rollouts", f"round={number}")).to_pylist() for number in (0, 1))
    return first, second


def test_each_round_has_its_rows_its_value_model_and_its_summary(run):
    first, second = rounds_of(run)
    prompts = stages.prepare(run)
    settings = [setting_key(each) for each in run.config.rollouts.roll_in]
    assert ids_of(first) == expected_ids(Plan(prompts, 4, run.config.seed))
    assert ids_of(second) == expected_ids(Plan(prompts, 4, run.config.seed, 1, roll_in=settings))
    assert {
        stage: about["state"] for stage, about in read_record(Path(run.location))["stages"].items()
    } == dict.fromkeys(["prompts", "rollouts 0", "train 0", "rollouts", "train", "evaluate"], "done")
    early, late = ValueModel.load(f"{run.value}-round=0"), ValueModel.load(run.value)
    assert early.objectives == late.objectives == ("brief", "words")
    for name in ("mean", "std"):  # of round 0 alone
        assert early.config.objectives[1][name] == pytest.approx(late.config.objectives[1][name])
    summary = json.loads(storage.read_bytes(run.path("rollouts", "summary.json")))
    for number, rows in enumerate((first, second)):
        about = summary[f"round={number}"]
        assert about["rows"] == len(rows) == sum(about["rewards"]["words"]["histogram"]["counts"])
        assert about["tokens"] == sum(len(row["logprobs"]) for row in rows)
        assert Path(run.path("rollouts", f"round={number}.png")).stat().st_size > 10_000


def test_responses_of_the_second_round_begin_under_guidance_and_the_base_model_ends_them(run):
    _, second = rounds_of(run)
    lengths = {row["roll_in_length"] for row in second}
    assert min(lengths) == 0
    assert max(lengths) >= 5
    for row in second:
        assert row["error"] is None
        assert (row["round"], len(row["logprobs"])) == (1, len(row["response_token_ids"]) - row["roll_in_length"])
        assert len(row["logprobs"]) > 0
        assert len(row["response_token_ids"]) <= 8
    assert {row["held_out"] for row in second} == {True, False}


def test_a_run_takes_the_responses_of_another(make_config, run, tmp_path):
    content = make_config("taken", "rewards={long: {use: length}}", "evaluation.strengths=[{long: 2}]")
    for change, differ in (({"seed": 1}, "seed"), ({"prompts": content["prompts"] | {"limit": 9}}, "prompts")):
        with pytest.raises(VasError, match=f"{differ} differ"):
            stages.rollout(RunDirectory.create(config_of(content | change | {"name": differ})), run.location)
    source = RunDirectory.open(shutil.copytree(run.location, str(tmp_path / "source")))
    theirs = {row["rollout_id"]: row for row in rounds_of(source)[0]}
    storage.delete(storage.list_files(source.path("rollouts", "round=0"), ".parquet")[0])  # what it lacks is sampled
    taken = RunDirectory.create(config_of(content))
    stages.rollout(taken, source.location)
    rows = read_rollouts(taken.rollouts).to_pylist()
    assert ids_of(rows) == ids_of(list(theirs.values()))
    for row in rows:
        assert row["error"] is None
        assert row["rewards"] == {"long": len(row["response_text"].split())}
        assert row["response_token_ids"] == theirs[row["rollout_id"]]["response_token_ids"]
