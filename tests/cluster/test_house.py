"""Clusters as our files start them, used as operators do: every job, an endpoint, machines that come and go.

Takes some minutes: `make test-cluster`. What is short enough of it is in test_jobs.py.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from command import ROOT, python, python_environment
from ray_head import Head, free_row, kill_all, ray_head, submit
from s3_server import S3Server
from tools import IMPATIENT, ConfigMaker, committed, on_s3, wait_until

from vas import storage
from vas.rollouts.stored import read_rollouts
from vas.run.directory import RunDirectory

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif("VAS_TEST_CLUSTER" not in os.environ, reason="takes minutes: make test-cluster"),
]
HEAD_ID = "f" * 51 + "00000"  # what Ray's provider of machines that are processes expects
GROWING = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}
COMMANDS = (
    *("initialization", "setup", "head_setup", "worker_setup"),
    *("head_start_ray", "worker_start_ray"),
)
# long enough to be struck in each stage
LASTING = (
    *("rollouts.batch_size=8", "rollouts.sampling.max_tokens=24"),
    *("train.epochs=4", "train.checkpoint_steps=2"),
    *("evaluation.strengths=[{words: 4.0}, {brief: 2.0}, {words: -2.0}, {brief: 4.0}]",),
)


def job(head: Head, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of jobs/ through plain `ray job submit`, with the working tree."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(ROOT), "--"]
    known = python_environment() | head.client
    found = subprocess.run(
        [*command, "python", f"jobs/{script}.py", *words], capture_output=True, text=True, timeout=600, env=known
    )
    print(found.stdout[-3000:], found.stderr[-2000:])
    return found


def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)


def ask(port: int, seed: int = 0, tokens: int = 16) -> str:
    """A steered and streamed answer."""
    chunks = client(port).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "what does the fox think?"}],
        max_tokens=tokens,
        seed=seed,
        stream=True,
        extra_body={"guidance": {"objectives": {"words": 2.0}}},
    )
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert pieces[-1].finish_reason in ("stop", "length")
    return "".join(piece.delta.content or "" for piece in pieces)


def written(file: Path, content: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


def test_each_job_alone_then_an_endpoint(server: S3Server, make_config: ConfigMaker, tmp_path):
    content = on_s3(make_config("alone"), "s3://test/alone") | {"resources": {"actors": 1}}
    config = str(written(tmp_path / "config.yaml", content))
    other = content | {"name": "other", "rewards": {"brief": {"use": "brevity"}, "words": {"use": "length"}}}
    with ray_head("--num-cpus=5", **server.environment) as head:
        for script in ("generate_rollouts", "train_value", "evaluate"):
            found = job(head, script, "--config", config)
            assert found.returncode == 0
        run = RunDirectory.open("s3://test/alone/runs/alone")
        assert all(run.done(stage) for stage in ("prompts", "rollouts", "train", "evaluate"))
        rescored = written(tmp_path / "other.yaml", other)
        assert job(head, "score_rollouts", "--config", str(rescored), "--from", run.location).returncode == 0
        mine, theirs = (
            {row["rollout_id"]: row["response_token_ids"] for row in read_rollouts(each.path("rollouts")).to_pylist()}
            for each in (run, RunDirectory.open("s3://test/alone/runs/other"))
        )
        assert mine == theirs
        assert job(head, "pipeline", "--run", run.location).returncode == 0  # all of it is there
        port = free_row(1)
        names = ("--set", "name=tiny", "--set", "replicas.cpus=1", "--port", str(port))
        assert job(head, "serve", "--run", run.location, *names).returncode == 0
        steered = ask(port)
        assert steered
        never = job(head, "serve", "--run", run.location, *names, "--set", "replicas.min=50")
        assert never.returncode != 0
        assert "the cluster can never hold 50 replicas of the base model" in never.stdout
        deploy(head, tmp_path, port, {"run": run.location})
        assert ask(port) == steered


def deploy(head: Head, folder: Path, port: int, args: dict[str, Any], **more: Any) -> None:
    """`serve deploy cluster/serve/demo.yaml`, with other arguments, and wait until it is there."""
    content = yaml.safe_load((ROOT / "cluster" / "serve" / "demo.yaml").read_text()) | more
    content["http_options"]["port"] = port
    application = content["applications"][0]
    application["args"] |= {"name": "tiny"} | args
    application["deployments"][0]["user_config"]["presets"] = {"cheerful": {"objectives": {"words": 2}}}
    file = str(written(folder / "serve.yaml", content))
    found = python("-m", "ray.serve.scripts", "deploy", file, **head.client, RAY_DASHBOARD_ADDRESS=head.url)
    assert found.returncode == 0, found.stdout + found.stderr

    def there() -> bool:
        with contextlib.suppress(openai.APIConnectionError, openai.InternalServerError, openai.NotFoundError):
            return "tiny:cheerful" in [each.id for each in client(port).models.list().data]
        return False

    wait_until(there, 200, "the endpoint, as the file has it", 1)


def autoscaling(folder: Path, port: int) -> Path:
    """What `ray up` would leave on the head, for machines that are processes here."""
    kind = {"node_config": {}, "min_workers": 0}
    small = {"object_store_memory": 80 * 2**20}
    return written(
        folder / "autoscaling.yaml",
        {
            "cluster_name": "here",
            "max_workers": 4,
            "idle_timeout_minutes": 0.2,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "launch_multiple": True,
                "gcs_address": f"127.0.0.1:{port}",
                "head_node_id": HEAD_ID,
            },
            "available_node_types": {
                "ray.head.default": {"node_config": {}, "resources": {"CPU": 1}, "max_workers": 0},
                "sampling": kind | {"resources": {"CPU": 1, "sampling": 1} | small, "max_workers": 2},
                "scoring": kind | {"resources": {"CPU": 2, "scoring": 1} | small, "max_workers": 1},
            },
            "head_node_type": "ray.head.default",
            "auth": {},
            "cluster_synced_files": [],
            **{f"{kind}_commands": [] for kind in COMMANDS},
        },
    )


def test_machines_come_for_rollouts_and_go(make_config: ConfigMaker, tmp_path, server: S3Server):
    content = on_s3(make_config("grown", "rollouts.samples_per_prompt=8", prompts=80), "s3://test/grown")
    placed = {"actors": 2, "actors_on": "sampling", "reward_actors_on": "scoring"}
    written(tmp_path / "config.yaml", content | {"resources": placed})
    port = free_row(8)
    scaling = f"--autoscaling-config={autoscaling(tmp_path, port)}"
    with ray_head("--num-cpus=1", scaling, port=port, **GROWING, **server.environment) as head:
        assert len(head.alive()) == 1
        join = f"import ray; ray.init({head.address!r}); print(ray.nodes())"
        refused = python("-c", join, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="wrong" * 8)
        assert refused.returncode != 0
        assert "NodeID" not in refused.stdout
        most = []
        with ThreadPoolExecutor(1) as thread:
            submitted = thread.submit(submit, tmp_path, "config.yaml", "--stage", "rollouts", **head.client)
            while not submitted.done():
                most.append(len(head.alive()))
                time.sleep(0.5)
        found = submitted.result()
        assert found.returncode == 0, found.stdout + found.stderr
        assert max(most) == 4  # the head, two that sample, one that scores
        wait_until(lambda: len(head.alive()) == 1, 90, "the machines go again", 1)
        began = time.monotonic()
        asked = ("--run", "s3://test/grown/none", "--set", "resources.gpus_per_actor=1")
        never = submit(tmp_path, "config.yaml", "--stage", "rollouts", *asked, **head.client)
        assert never.returncode == 2
        assert "the cluster can never hold 2 sampler actors (1 CPU, 1 GPU" in never.stdout
        assert time.monotonic() - began < 30


def test_a_machine_dies_in_each_stage(server: S3Server, make_config: ConfigMaker, tmp_path):
    """Rollouts, training and evaluation lose a machine each, and so does the endpoint under open streams."""
    content = on_s3(make_config("struck", *LASTING, prompts=60), "s3://test/struck")
    placed = {"actors": 2, "workers": 2, "cpus_per_worker": 1, "actors_on": "work", "workers_on": "work"}
    written(tmp_path / "config.yaml", content | {"resources": placed})
    where = "s3://test/struck/runs/struck"
    with ray_head("--num-cpus=3", '--resources={"front": 1}', **IMPATIENT, **server.environment) as head:
        workers = [head.add("work", "--num-cpus=1") for _ in range(2)]

        def strike(when: Callable[[], Any], what: str) -> None:
            wait_until(lambda: when() or submitted.done(), 400, what, 0.1)
            assert not submitted.done(), what
            kill_all(workers.pop(0))
            workers.append(head.add("work", "--num-cpus=1"))

        with ThreadPoolExecutor(1) as thread:
            submitted = thread.submit(submit, tmp_path, "config.yaml", timeout=1200, **head.client)
            strike(lambda: committed(f"{where}/rollouts/round=0") >= 5, "rollouts")
            strike(lambda: storage.exists(f"{where}/train/ray_train/checkpoint_manager_snapshot.json"), "training")
            strike(lambda: committed(f"{where}/evaluation/responses") >= 2, "evaluation")
            found = submitted.result(timeout=900)
        assert found.returncode == 0
        run = RunDirectory.open(where)
        rows = read_rollouts(run.path("rollouts")).to_pylist()
        assert len({row["rollout_id"] for row in rows}) == len(rows) == 60 * 4
        assert not any(row["error"] for row in rows)
        assert b"</html>" in storage.read_bytes(run.path("evaluation", "report.html"))
        replicas = {"min": 2, "cpus": 1, "runs_on": "work"}
        args = {"run": where, "replicas": replicas, "gateways": {"cpus": 0.5, "runs_on": "front"}}
        port = free_row(1)
        deploy(head, tmp_path, port, args, proxy_location="HeadOnly")  # all machines have this one's ports
        expected = [ask(port, seed, 200) for seed in range(8)]
        with ThreadPoolExecutor(8) as threads:
            asked = [threads.submit(ask, port, seed, 200) for seed in range(8)]
            time.sleep(1.0)
            assert not all(each.done() for each in asked)
            kill_all(workers.pop(0))
            assert [each.result(timeout=200) for each in asked] == expected
