"""A whole run whose every path is on a real S3 server: the same as on disk, and the same again under faults.

The demo itself, on disk and on S3, takes a quarter of an hour each: `make demo-on-s3`.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import ROOT, message, vas
from s3_proxy import KILLS, KINDS, s3_proxy
from tools import SEEDS, on_s3

from vas import storage
from vas.config import RunConfig, parse_config
from vas.models.value import ValueModel
from vas.rollouts.stored import read_rollouts
from vas.run.directory import RunDirectory
from vas.run.stages import run_all

pytestmark = pytest.mark.usefixtures("server")

DEMO = bool(os.environ.get("VAS_DEMO_ON_S3"))
SAME = ("prompt_token_ids", "response_token_ids", "rewards", "finish_reason", "held_out")


@pytest.fixture(scope="module")
def content(whole_content: dict[str, Any]) -> dict[str, Any]:
    """The config of the runs that are compared."""
    return yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text()) if DEMO else whole_content


@pytest.fixture(scope="module")
def on_disk(content, request, tmp_path_factory) -> RunDirectory:
    """The whole run on local disk."""
    if not DEMO:
        return request.getfixturevalue("whole_run")
    return finished(parse_config(content | {"runs_dir": str(tmp_path_factory.mktemp("disk"))}, "this test"))


def finished(config: RunConfig) -> RunDirectory:
    run = RunDirectory.create(config)
    run_all(run)
    return run


def files_of(run: RunDirectory) -> set[str]:
    """The run's files; what Ray Train names after a clock, and where prompts came from, left out."""
    names = {file.removeprefix(run.location).lstrip("/") for file in storage.list_files(run.location, hidden=True)}
    return {
        re.sub(r"packed/\w+", "packed/…", re.sub(r"events\.out\.\S+", "events", name))
        for name in names
        if "ray_train" not in name
    }


def assert_same(run: RunDirectory, expected: RunDirectory) -> None:
    """The runs have the same rollouts, guided responses and values."""
    for part in ("rollouts/round=0", "evaluation/responses", "evaluation/completions"):
        rows, wanted_rows = (read_rollouts(each.path(part)).to_pylist() for each in (run, expected))
        found, wanted = ({row["rollout_id"]: row for row in each} for each in (rows, wanted_rows))
        assert len(found) == len(rows)
        assert found.keys() == wanted.keys()
        differ = [name for name in found if any(found[name][column] != wanted[name][column] for column in SAME)]
        assert not differ, f"{part}: {len(differ)} of {len(found)} rows differ, {differ[0]} first"
    value, other = ValueModel.load(run.value), ValueModel.load(expected.value)
    assert value.objectives == other.objectives
    for (name, tensor), theirs in zip(value.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(tensor, theirs, atol=1e-5, rtol=1e-4, msg=name)
    assert b"</html>" in storage.read_bytes(run.path("evaluation", "report.html"))


def assert_on_s3(run: RunDirectory, expected: RunDirectory) -> None:
    """The run is the expected one, all of it on S3, with nothing left behind or gone astray."""
    assert run.location.startswith("s3://test/")
    assert_same(run, expected)
    assert files_of(run) == files_of(expected)
    snapshot = run.path("train", "ray_train", "checkpoint_manager_snapshot.json")
    assert json.loads(storage.read_bytes(snapshot))["checkpoint_results"]
    assert not Path("s3:").exists()
    assert not storage.list_files(run.location, suffix=".lock")
    again = RunDirectory.open(run.location)
    assert all(again.done(stage) for stage in ("prompts", "rollouts", "train", "evaluate"))


@pytest.mark.skipif(not (DEMO or len(SEEDS) > 1), reason="under faults it is the same, and more")
@pytest.mark.timeout(7200)
def test_a_run_on_s3_is_the_run_on_disk(content, on_disk):
    run = finished(parse_config(on_s3(content, "s3://test/whole"), "this test"))
    assert_on_s3(run, on_disk)


# What dies in turn: a task that writes a batch, before and after it took effect; the driver between a stage's data
# and its commit; the training worker in the midst of its checkpoint; the driver between that and its commit.
CRASHES = [
    ("task", "kill_before", r"^PUT .*/rollouts/round%3D0/[^_/]*\.parquet"),
    ("task", "kill_after", r"^PUT .*/rollouts/round%3D0/[^_/]*\.parquet"),
    ("driver", "kill_before", r"^PUT .*/run\.json"),
    ("worker", "kill_after", r"^PUT .*/value/default/model\.safetensors"),
    ("driver", "kill_before", r"^PUT .*/run\.json"),
    ("task", "kill_after", r"^PUT .*/evaluation/responses/[^_/]*\.parquet"),
    ("driver", "kill_before", r"^PUT .*/evaluation/report\.html"),
]
if len(SEEDS) == 1:  # one of each
    CRASHES = CRASHES[1:4]


@pytest.mark.skipif(DEMO, reason="the demo is run undisturbed")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_whose_store_fails_and_whose_processes_die_is_the_same_run(server, content, on_disk, tmp_path, seed):
    content = on_s3(content, f"s3://test/faults-{seed}")
    file = tmp_path / "faults.yaml"
    file.write_text(yaml.safe_dump(content))
    with s3_proxy(server, rate=0.08, seed=seed, stall_s=0.5) as proxy:
        for _, kind, request in CRASHES:
            proxy.plan(kind, only=request)
        killed = 0
        for _ in range(12):
            attempt = vas("run", file, timeout=400, **proxy.environment)
            print(attempt.stdout[-2000:], attempt.stderr[-3000:])
            if attempt.returncode == 0:
                break
            if attempt.returncode < 0:
                killed += 1
            else:  # it stopped by itself, and says why
                assert "Traceback" not in attempt.stderr
                assert message(attempt.stderr), attempt.stderr
        assert attempt.returncode == 0
        print(f"{proxy.requests} requests, {killed} drivers killed, faults: {dict(proxy.injected)}")
        assert proxy.injected.keys() >= KILLS.keys()
        assert sum(proxy.injected[kind] for kind in KILLS) == len(CRASHES)
        assert killed == sum(who == "driver" for who, _, _ in CRASHES)
        assert sum(proxy.injected[kind] for kind in KINDS) > 20
    assert_on_s3(RunDirectory.open(f"{content['runs_dir']}/{content['name']}"), on_disk)
