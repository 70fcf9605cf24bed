"""An endpoint for tests: Ray Serve on a cluster of its own, with tiny models, and its replicas' processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import psutil
import ray
from command import tiny_run
from ray import serve
from ray.serve.config import HTTPOptions
from tiny import tiny_tokenizer, tiny_value
from tools import command, descendants, wait_until

from benchmarks.llama import free_port
from vas.config import Resources
from vas.run.cluster import ray_cluster
from vas.serving.app import build

PORT = free_port()  # two test processes may serve at once
URL = f"http://127.0.0.1:{PORT}"
CHAT = [{"role": "user", "content": "what does the fox think of the weather?"}]


def keys_of(folder: Path, **more: Any) -> dict[str, Any]:
    """Serving's keys for a run with a colocated value model, made in `folder`, and a second one beside it."""
    run = tiny_run(folder)
    other = folder / "other"
    if not other.exists():
        tiny_value(objectives=("short",), seed=21).save(str(other), tiny_tokenizer(), "# Another one")
    models = [{"path": run.value}, {"path": str(other), "name": "other", "placement": "deployment"}]
    return {"run": run.location, "value_models": models, "drain_seconds": 60, "name": "tiny"} | more


@contextmanager
def cluster(cpus: int = 12) -> Iterator[None]:
    """Ray with so many logical CPUs, as `vas serve` begins it, and Serve's proxy."""
    with ray_cluster(Resources(num_cpus=cpus, object_store_memory=200 * 2**20), spare_cpus=0), proxy():
        yield


@contextmanager
def proxy() -> Iterator[None]:
    """Serve's proxy on the cluster that is joined, and an end of both."""
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=PORT))
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def run(keys: dict[str, Any]) -> None:
    """Deploy the application, or a new version of it, and wait until it is up."""
    serve.run(build(keys), name="vas", route_prefix="/")


def client(key: str = "none", **options: Any) -> openai.OpenAI:
    """The OpenAI client that people have."""
    return openai.OpenAI(base_url=f"{URL}/v1", api_key=key, **{"max_retries": 0, "timeout": 120} | options)


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas on this test's own cluster, the oldest first."""
    name = f"ray::ServeReplica:vas:{deployment}"
    found = [process for process in descendants(os.getpid()) if command(process).startswith(name)]
    return sorted(found, key=lambda process: process.create_time())


def kill(deployment: str) -> None:
    """SIGKILL the oldest replica of a deployment."""
    os.kill(replicas(deployment)[0].pid, signal.SIGKILL)


def states() -> list[dict[str, Any]]:
    """What one replica of the base model holds; with several, whichever is asked."""
    return [serve.get_deployment_handle("BaseModel", "vas").state.remote().result(timeout_s=30)]


def idle(seconds: float = 20) -> dict[str, Any]:
    """The base model's replica, once nothing is under way."""

    def at_rest() -> dict[str, Any] | None:
        return next((state for state in states() if not state["running"] + state["waiting"]), None)

    return wait_until(at_rest, seconds, "idle", 0.1)


def get(path: str, **options: Any) -> httpx.Response:
    """GET a path of the endpoint."""
    return httpx.get(URL + path, timeout=60, **options)


def post(path: str, **options: Any) -> httpx.Response:
    """POST to a path of the endpoint."""
    return httpx.post(URL + path, timeout=60, **options)
