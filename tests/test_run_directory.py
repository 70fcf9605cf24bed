"""Run directories: reopened with the config they began with, on disk and on S3; what is wrong with one is named."""

import json

import pytest

from vas import config, storage
from vas.errors import VasError
from vas.run.directory import RunDirectory, place_of


def run_config(runs_dir: str, **changes) -> config.RunConfig:
    content = {
        "name": "stored",
        "runs_dir": runs_dir,
        "base": {"model": "bundled:smollm2-135m-instruct"},
        "prompts": {"source": "bundled:demo"},
        "rewards": {"brief": {"use": "brevity"}},
    }
    return config.parse_config(content | changes, "test")


def test_a_run_cannot_be_a_bucket():
    assert place_of("s3://bucket/runs/demo/") == ("s3://bucket/runs", "demo")
    assert place_of("s3://bucket/demo") == ("s3://bucket", "demo")
    assert place_of("/demo") == ("/", "demo")
    with pytest.raises(VasError, match="cannot be a whole bucket"):
        place_of("s3://bucket")


def test_a_run_is_reopened_and_another_config_refused(tmp_path):
    run = RunDirectory.create(run_config(str(tmp_path)))
    with run.stage("prompts") as about:
        about["train"] = 3
    before = (tmp_path / "stored" / "run.json").read_bytes()
    assert RunDirectory.create(run_config(str(tmp_path), resources={"workers": 2})).done("prompts")
    with pytest.raises(VasError, match="another config: seed was 0, now 1"):
        RunDirectory.create(run_config(str(tmp_path), seed=1))
    assert (tmp_path / "stored" / "run.json").read_bytes() == before


def test_a_run_that_has_nothing_yet_takes_a_mended_config(tmp_path):
    """A first attempt with a wrong model id must not lock its name."""
    run = RunDirectory.create(run_config(str(tmp_path), base={"model": "no/such"}))
    with pytest.raises(KeyError), run.stage("prompts"):
        raise KeyError
    mended = RunDirectory.create(run_config(str(tmp_path)))
    assert mended.config.base.model == "bundled:smollm2-135m-instruct"
    assert RunDirectory.open(mended.location).config == mended.config


def test_an_interrupted_stage_says_so_and_goes_on(tmp_path):
    run = RunDirectory.create(run_config(str(tmp_path)))
    with pytest.raises(RuntimeError), run.stage("rollouts"):
        raise RuntimeError
    again = RunDirectory.open(run.location)
    assert again.about("rollouts")["state"] == "interrupted"
    assert not again.done("rollouts")
    with again.stage("rollouts"):
        pass
    assert RunDirectory.open(run.location).done("rollouts")


def test_a_run_that_is_not_there_suggests_the_nearest(tmp_path):
    RunDirectory.create(run_config(str(tmp_path)))
    with pytest.raises(VasError, match="did you mean 'stored'"):
        RunDirectory.open(str(tmp_path / "sotred"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"text"', "\udc80", '{"config": 3}'])
def test_a_damaged_run_json_is_named(tmp_path, content):
    file = tmp_path / "run.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(VasError) as caught:
        RunDirectory.open(str(tmp_path))
    assert caught.value.where == str(file)


def test_a_run_json_without_its_state_is_damaged(tmp_path):
    run = RunDirectory.create(run_config(str(tmp_path)))
    record = json.loads(storage.read_bytes(run.path("run.json")))
    for key in ("digest", "stages"):
        storage.write_bytes(run.path("run.json"), json.dumps({k: v for k, v in record.items() if k != key}).encode())
        with pytest.raises(VasError, match=f"damaged: .*{key}"):
            RunDirectory.open(run.location)


def test_a_run_directory_on_s3(bucket):
    run = RunDirectory.create(run_config(bucket))
    with run.stage("prompts") as about:
        about["train"] = 3
    again = RunDirectory.open(f"{bucket}/stored/")
    assert again.config == run.config
    assert again.done("prompts")
    assert again.about("prompts")["train"] == 3
    assert again.rollouts == f"{bucket}/stored/rollouts/round=0"
    with pytest.raises(VasError, match="seed was 0, now 1"):
        RunDirectory.create(run_config(bucket, seed=1))
    with pytest.raises(VasError, match="there is no run here"):
        RunDirectory.open(f"{bucket}/other")
