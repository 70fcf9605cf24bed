"""The scripts in jobs/, submitted to a real Ray cluster and started by hand."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import yaml
from command import ROOT, interrupt, message, python, python_environment, tiny_content

from vas import schema, storage
from vas.config import load_config
from vas.models.value import ValueModel
from vas.run.directory import RunDirectory

TRAIN, EVALUATE, PIPELINE = (str(ROOT / "jobs" / f"{name}.py") for name in ("train_value", "evaluate", "pipeline"))


@pytest.fixture
def config_file(tmp_path) -> Path:
    """A config whose training takes seconds."""
    changes = {
        "value": {"layers": 1, "bins": 11},
        "train": {"epochs": 1, "batch_size": 4, "micro_batch_size": 2, "track": []},
        "resources": {"cpus_per_worker": 1},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_content(tmp_path, **changes), sort_keys=False))
    return file


def with_rollouts(run: RunDirectory) -> RunDirectory:
    """The run with rollouts of random tokens, whose rewards their tokens tell."""
    random = np.random.default_rng(0)
    rows = []
    for prompt in range(8):
        for sample in range(4):
            response = random.integers(4, 290, random.integers(2, 12)).tolist()
            rows.append(
                {
                    "rollout_id": f"{prompt}/{sample}",
                    "prompt_id": str(prompt),
                    "sample_index": sample,
                    "prompt_token_ids": [5, 6, 7, 8 + prompt],
                    "response_token_ids": response,
                    "finish_reason": "stop",
                    "held_out": prompt % 4 == 0,
                    "rewards": {"positive": float(np.mean(response)), "concise": -float(len(response))},
                }
            )
    table = pa.Table.from_pylist(rows, schema=schema.rollout_schema(["positive", "concise"]))
    storage.write_table(storage.join(run.rollouts, "rows.parquet"), table)
    for stage in ("prompts", "rollouts"):
        with run.stage(stage):
            pass
    return run


@contextlib.contextmanager
def ray_head() -> Iterator[dict[str, str]]:
    """A Ray cluster of one machine beside others that may run here; yields what its clients need to know."""
    port, dashboard, agent, client = free_ports(4)
    open_to_all = {"RAY_AUTH_MODE": "disabled"}  # by default the cluster wants a token, and its command line has none
    # a folder of its own, so that nobody else's ray.init finds this cluster; short, for its sockets lie in it
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--temp-dir={folder}", f"--port={port}", "--num-cpus=3", f"--object-store-memory={200 * 2**20}"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            f"--ray-client-server-port={client}",
        ]
        output = Path(folder, "output.txt")
        environment = python_environment() | open_to_all
        with output.open("wb") as opened:
            head = subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT, env=environment)
        try:
            while not answers(dashboard):
                assert head.poll() is None, output.read_text()
                time.sleep(0.2)
            yield open_to_all | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            everyone = [*psutil.Process(head.pid).children(recursive=True), head]
            for process in everyone:  # an orderly end takes it half a minute
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait(timeout=30)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_a_submitted_job_trains(config_file):
    run = with_rollouts(RunDirectory.create(load_config(config_file)))
    with ray_head() as environment:
        submit = ("-m", "ray.scripts.scripts", "job", "submit", "--", sys.executable)
        found = python(*submit, TRAIN, "--config", str(config_file), **environment)
        unknown = python(*submit, TRAIN, "--config", str(config_file), "--set", "train.epocs=1", **environment)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "explained variance on held-out prompts" in found.stdout
    assert RunDirectory.open(run.location).done("train")
    assert ValueModel.load(run.value).objectives == ("positive", "concise")
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


def test_an_interruption_is_no_error(tmp_path):
    """Here while it waits for its config on a pipe."""
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, TRAIN, "--config", str(pipe)], stderr=subprocess.PIPE, text=True, env=python_environment()
    )
    time.sleep(3)  # now it waits in open()
    assert "the same command goes on from there" in interrupt(process)
