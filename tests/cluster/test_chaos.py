"""Rollouts on three machines while actors, a machine and the driver are killed: nothing is lost, nothing twice.

One seed here; `make chaos-rollouts` runs ten.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from tools import IMPATIENT, SEEDS, ConfigMaker, command, committed, wait_until

from vas.config import parse_config
from vas.prompts import load_prompts
from vas.rollouts.pipeline import sample
from vas.rollouts.plan import Plan
from vas.rollouts.stored import read_rollouts
from vas.run.cluster import ray_cluster

ROOT = Path(__file__).parents[2]
MACHINE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture
def cluster(monkeypatch) -> Iterator[object]:
    """A head for light work and two machines for sampler actors, each a raylet of its own."""
    for name, value in (IMPATIENT | {"RAY_AUTH_MODE": "disabled"}).items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 150 * 2**20, "include_dashboard": False},
    )
    try:
        for _ in range(2):
            cluster.add_node(**MACHINE)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def content(make_config: ConfigMaker) -> dict:
    """Rollouts that take some seconds, in many batches."""
    return make_config(
        "chaos",
        "rollouts.samples_per_prompt=6",
        "rollouts.batch_size=12",
        "rollouts.sampling.max_tokens=24",
        prompts=120,
    )


@pytest.fixture(scope="module")
def undisturbed(content: dict, tmp_path_factory) -> dict[str, dict]:
    """The rows of a run on one machine that nobody disturbs."""
    config = parse_config(content, "this test")
    location = str(tmp_path_factory.mktemp("undisturbed"))
    with ray_cluster(config.resources):
        plan = Plan(load_prompts(config.prompts), config.rollouts.samples_per_prompt, config.seed)
        sample(config, [plan], location, "undisturbed")
    return {row["rollout_id"]: row for row in read_rollouts(location).to_pylist()}


class Driver:
    """`vas rollout CONFIG` on the cluster."""

    def __init__(self, file: Path) -> None:
        self._log = file.with_suffix(f".{time.monotonic_ns()}.log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vas.cli.main", "rollout", str(file)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            )

    @property
    def output(self) -> str:
        return self._log.read_text()


def samplers(cluster) -> list[psutil.Process]:
    """The processes of the sampler actors."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
    below = [
        child for pid in raylets if psutil.pid_exists(pid) for child in psutil.Process(pid).children(recursive=True)
    ]
    return [process for process in below if "Sampler" in command(process)]


def kill_an_actor(cluster, chance: random.Random) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        chance.choice(samplers(cluster)).kill()


def kill_a_machine(cluster, chance: random.Random) -> None:
    """A raylet dies, with all that runs under it; another machine joins."""
    cluster.remove_node(chance.choice(sorted(cluster.worker_nodes, key=str)), allow_graceful=False)
    cluster.add_node(**MACHINE)


@pytest.mark.timeout(800)
@pytest.mark.parametrize("seed", SEEDS)
def test_rollouts_survive(cluster, content, undisturbed, tmp_path, seed):
    chance = random.Random(seed)
    config = content | {
        "runs_dir": str(tmp_path),
        "resources": {"address": cluster.address, "actors": 2, "cpus_per_actor": 1},
    }
    file = tmp_path / "chaos.yaml"
    file.write_text(yaml.safe_dump(config))
    rollouts = str(tmp_path / "chaos" / "rollouts" / "round=0")
    batches = len(undisturbed) // 12
    blows = [kill_an_actor, kill_an_actor, kill_a_machine, None]  # None: the driver
    chance.shuffle(blows)
    moments = sorted(chance.sample(range(1, batches - 8), len(blows)))
    driver = Driver(file)
    struck = []
    for blow, moment in zip(blows, moments, strict=True):
        wait_until(
            lambda moment=moment, driver=driver: committed(rollouts) >= moment or driver.process.poll() is not None,
            120,
            f"{moment} batches\n{driver.output}",
        )
        if driver.process.poll() is not None:
            assert driver.process.returncode == 0, driver.output
            break
        struck.append(blow)
        time.sleep(chance.uniform(0, 0.3))
        if blow is not None:
            blow(cluster, chance)
            continue
        driver.process.kill()
        driver.process.wait()
        driver = Driver(file)
    assert len(struck) >= 3, "it was over before it could be disturbed"
    assert driver.process.wait(timeout=240) == 0, driver.output
    rows = read_rollouts(rollouts).to_pylist()
    assert sorted(row["rollout_id"] for row in rows) == sorted(undisturbed)
    for row in rows:
        expected = undisturbed[row["rollout_id"]]
        assert row["error"] is None
        assert row["response_token_ids"] == expected["response_token_ids"]
        assert row["rewards"] == expected["rewards"]
