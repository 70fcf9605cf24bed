"""Replicas come with the load and go with it, and no stream is cut on the way.

Runs in `make chaos-serving`: on two cores, replicas that start under load take minutes.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.cluster_utils import Cluster
from serving import CHAT, client, keys_of, proxy, replicas, run
from tools import wait_until

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif("VAS_CHAOS_KILLS" not in os.environ, reason="takes minutes: make chaos-serving"),
]


@pytest.fixture(scope="module")
def raylets():
    """A cluster of three."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 100 * 2**20})
    for _ in range(2):
        nodes.add_node(num_cpus=4, object_store_memory=100 * 2**20)
    ray.init(nodes.address, log_to_driver=False)
    try:
        with proxy():
            yield
    finally:
        nodes.shutdown()


def test_replicas_follow_the_load(raylets, tmp_path):
    scaling = {"min": 1, "max": 3, "cpus": 2, "upscale_delay": 1, "downscale_delay": 4}
    keys = keys_of(tmp_path, replicas=scaling, max_sequences=8, max_waiting=64, gate={"limits": {"max_tokens": 200}})
    keys["value_models"].pop()
    run(keys)
    heavy, light = threading.Event(), threading.Event()
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 60, "stream": True}
    asked |= {"extra_body": {"guidance": {"objectives": {"positive": 1.0}}}}

    def ask(seed: int, stop: threading.Event) -> int:
        count = 0
        while not stop.is_set():
            reasons = [
                c.choices[0].finish_reason for c in client(timeout=400).chat.completions.create(**asked, seed=seed)
            ]
            assert reasons[-1] in ("stop", "length")
            count += 1
        return count

    with ThreadPoolExecutor(30) as threads:
        asking = [threads.submit(ask, seed, heavy if seed < 28 else light) for seed in range(30)]
        try:
            wait_until(lambda: len(replicas("BaseModel")) == 3, 200, "three replicas", 0.5)
            heavy.set()
            wait_until(lambda: len(replicas("BaseModel")) == 1, 200, "one replica again", 0.5)
        finally:
            heavy.set()
            light.set()
        counts = [each.result(timeout=200) for each in asking]
    assert all(counts)
