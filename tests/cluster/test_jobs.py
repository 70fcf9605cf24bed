"""The scripts in jobs/ and `vas submit`, by hand and on a cluster that wants a token.

What takes minutes is in test_house.py: `make test-cluster`.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from command import ROOT, interrupt, message, python, python_environment
from ray_head import Head, brief_config, get, ray_head, submit
from s3_server import S3Server
from tools import ConfigMaker, on_s3, wait_until

from vas import storage
from vas.config import load_config
from vas.run.directory import RunDirectory

TRAIN, EVALUATE, PIPELINE = (str(ROOT / "jobs" / f"{name}.py") for name in ("train_value", "evaluate", "pipeline"))

BRIEF = ("evaluation.strengths=[{words: 4.0}]", "evaluation.best_of=[2]", "rollouts.samples_per_prompt=2")


@pytest.fixture
def config_file(tmp_path) -> Path:
    return brief_config(tmp_path)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as head:
        yield head


@pytest.mark.timeout(900)
def test_a_run_on_s3_goes_on_without_its_client_and_is_found_again(
    head: Head, server: S3Server, make_config: ConfigMaker, tmp_path
):
    content = on_s3(make_config("submitted", *BRIEF, prompts=12), "s3://test/jobs")
    content["resources"] = {"actors": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    handed_on = [word for name in server.environment for word in ("--env", name)]
    command = [sys.executable, "-m", "vas.cli.main", "submit", "config.yaml", *handed_on]
    known = python_environment() | head.client
    client = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=known)
    assert client.stderr is not None
    job = next(line for line in client.stderr if line.startswith("Job ")).split(";")[0].removeprefix("Job ")
    client.kill()
    client.wait()
    found = submit(tmp_path, "--attach", job, **head.client)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "explained variance on held-out prompts" in found.stdout
    run = RunDirectory.open("s3://test/jobs/runs/submitted")
    assert all(run.done(stage) for stage in ("prompts", "rollouts", "train", "evaluate"))
    assert b"</html>" in storage.read_bytes(run.path("evaluation", "report.html"))
    again = submit(tmp_path, "--attach", job, **head.client)
    assert (again.returncode, again.stdout) == (0, found.stdout)


def test_a_cluster_that_is_too_small_says_so_at_once(head: Head, tmp_path):
    """And the exit code is the job's."""
    brief_config(tmp_path)
    asked = ("--set", "resources.gpus_per_worker=1", "--set", "resources.cpus_per_worker=2")
    found = submit(tmp_path, "config.yaml", *asked, **head.client)
    assert found.returncode == 2, found.stdout + found.stderr
    assert "the cluster can never hold 1 training workers (2 CPU, 1 GPU each): there is room for none" in found.stdout
    assert "1 x (3 CPU)" in found.stdout
    assert "Traceback" not in found.stdout


@pytest.mark.parametrize("token", ["", "wrong" * 8])
def test_without_its_token_nothing_is_sent(head: Head, tmp_path, token):
    brief_config(tmp_path)
    tokens = {"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    for words in (["config.yaml"], ["--attach", "job"]):
        found = submit(tmp_path, *words, **{**head.client, "RAY_AUTH_TOKEN_PATH": "", **tokens})
        assert found.returncode == 2
        assert "Traceback" not in found.stderr
        assert "the cluster wants its token" in message(found.stderr)


def test_a_job_that_is_not_there(head: Head, tmp_path):
    none = submit(tmp_path, "--attach", "nothing", **head.client)
    assert none.returncode == 2
    assert "there is no such job" in message(none.stderr)


def test_no_port_answers_without_the_token(head: Head):
    host, _, first = head.address.partition(":")
    urls = [f"{head.url}{path}" for path in ("/api/jobs/", "/nodes?view=summary", "/api/serve/applications/")]
    for url in (*urls, f"http://{host}:{int(first) + 5}/api/job_agent/jobs/"):
        assert get(url).status_code == 401, url
        assert get(url, "wrong" * 8).status_code in (401, 403), url
    assert get(urls[0], head.token).status_code == 200


def test_a_script_submitted_by_ray_runs_and_fails_as_it_should(head: Head, config_file):
    run = RunDirectory.create(load_config(config_file))
    for stage in ("prompts", "rollouts", "train"):
        with run.stage(stage):
            pass
    ray_job = ("-m", "ray.scripts.scripts", "job", "submit", "--", sys.executable)
    found = python(*ray_job, TRAIN, "--config", str(config_file), **head.client)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "done already" in found.stdout
    unknown = python(*ray_job, TRAIN, "--config", str(config_file), "--set", "train.epocs=1", **head.client)
    assert unknown.returncode != 0
    assert "did you mean 'epochs'?" in unknown.stdout
    assert "exit code 2" in unknown.stdout + unknown.stderr


def refused(*words: str, script: str = TRAIN) -> str:
    found = python(script, *words)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    return message(found.stderr) or found.stderr


def test_what_is_not_ready_is_said(config_file, tmp_path):
    assert "give --config, --run or both" in refused()
    assert "cannot read the config" in refused("--config", str(tmp_path / "none.yaml"))
    assert "there is no run here" in refused("--run", str(tmp_path / "none"))
    text = refused("--config", str(config_file))
    assert "the rollouts are not finished" in text
    assert f"vas rollout {tmp_path / 'runs' / 'tiny'}" in text
    text = refused("--config", str(config_file), script=EVALUATE)
    assert f"vas train {tmp_path / 'runs' / 'tiny'}" in text


def test_a_run_is_found_by_its_directory(config_file, tmp_path):
    """`--run` says where a run lies, with a config or without; what is finished is not done again."""
    place = str(tmp_path / "elsewhere" / "mine")
    assert place in refused("--config", str(config_file), "--run", place)
    run = RunDirectory.open(place)
    assert (run.config.name, run.config.runs_dir) == ("mine", str(tmp_path / "elsewhere"))
    stages = ["rollouts", "train", "evaluate"]
    for stage in stages:
        with run.stage(stage):
            pass
    found = python(TRAIN, "--run", place)
    assert (found.returncode, found.stderr.split()) == (0, ["train", "done", "already"])
    found = python(PIPELINE, "--run", place)
    assert found.returncode == 0
    assert [line.split()[0] for line in found.stderr.splitlines()] == ["prompts", *stages]


def reader(pipe: Path) -> bool:
    """Whether somebody has opened the pipe, which then is left open."""
    with contextlib.suppress(OSError):
        return bool(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    return False


def test_an_interruption_is_no_error(tmp_path):
    """Here while it waits for its config on a pipe."""
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, TRAIN, "--config", str(pipe)], stderr=subprocess.PIPE, text=True, env=python_environment()
    )
    wait_until(lambda: reader(pipe), 60, "it waits for the rest", 0.1)
    assert "the same command goes on from there" in interrupt(process)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["config.yaml", "--set", "train.epocs=1"], "did you mean 'epochs'?"),
        (["../config.yaml"], "not in the working directory"),
        (["config.yaml", "--env", "VAS_NOT_SET"], "this variable is not set here"),
        (["config.yaml", "--attach", "job"], "give a config to submit, or --attach"),
        (["config.yaml"], "cannot reach the cluster's job API"),
        (["config.yaml", "--run", "runs/here"], "the cluster deletes it"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(tmp_path, words, said):
    inner = tmp_path / "inner"
    inner.mkdir()
    for folder in (tmp_path, inner):
        brief_config(folder)
    found = submit(inner, *words, RAY_API_SERVER_ADDRESS="http://127.0.0.1:9")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert said in message(found.stderr)
