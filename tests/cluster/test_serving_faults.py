"""Replicas die under open streams: no request fails, and every text is what it would have been.

VAS_CHAOS_KILLS (default 1): how often each kind of replica is killed; `make chaos-serving` says 20.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from ray import serve
from serving import CHAT, client, cluster, get, idle, keys_of, kill, replicas, run
from tiny import tiny_tokenizer, tiny_value
from tools import wait_until

KILLS = int(os.environ.get("VAS_CHAOS_KILLS", "1"))
STREAMS, TOKENS = 16, 160
GUIDANCE = {"guidance": {"objectives": {"positive": 1.5, "short": -1.0}}}

pytestmark = pytest.mark.timeout(300 + 60 * KILLS)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two replicas of the base model, with a colocated value model, and two of a second one."""
    content = keys_of(
        tmp_path_factory.mktemp("faults"),
        replicas={"min": 2},
        max_waiting=64,
        gate={"limits": {"max_tokens": TOKENS}},
    )
    content["value_models"][1]["replicas"] = {"min": 2}
    with cluster(cpus=16):
        run(content)
        yield content


def stream(seed: int, opened: threading.Semaphore | None = None, **more) -> list[str]:
    """The pieces of a streamed chat, sampled at temperature 1."""
    pieces = []
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": TOKENS, "seed": seed, "extra_body": GUIDANCE} | more
    last = None
    for chunk in client().chat.completions.create(stream=True, **asked):
        if chunk.choices and opened is not None and not pieces:
            opened.release()
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            last = choice.finish_reason or last
    assert last in ("stop", "length")
    return pieces


@pytest.fixture(scope="module")
def undisturbed(keys) -> list[str]:
    """What the streams say when nothing happens to them."""
    with ThreadPoolExecutor(STREAMS) as threads:
        return ["".join(pieces) for pieces in threads.map(stream, range(STREAMS))]


@pytest.mark.parametrize("kind", ["ValueModel-other", "BaseModel"])
@pytest.mark.parametrize("number", range(KILLS))
def test_streams_outlive_a_replica(keys, undisturbed, kind, number):
    wait_until(lambda: len(replicas(kind)) == 2, 120, f"two replicas of {kind}", 0.2)
    _settled()
    opened = threading.Semaphore(0)
    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [threads.submit(stream, seed, opened) for seed in range(STREAMS)]
        for _ in range(STREAMS):
            assert opened.acquire(timeout=60)
        assert sum(each.done() for each in streams) < STREAMS  # else it came too late
        kill(kind)
        texts = ["".join(each.result(timeout=120)) for each in streams]
    assert texts == undisturbed


def _settled() -> None:
    """Until Serve has replaced what died."""
    wanted = {"Gateway": {"RUNNING": 1}, "BaseModel": {"RUNNING": 2}, "ValueModel-other": {"RUNNING": 2}}

    def settled() -> bool:
        deployments = serve.status().applications["vas"].deployments
        return {name: about.replica_states for name, about in deployments.items()} == wanted

    wait_until(settled, 120, "all replicas run", 0.5)


def test_a_new_value_model_goes_live_under_load(keys, tmp_path):
    _settled()
    before = _digests()
    tiny_value(objectives=("short",), seed=99).save(str(tmp_path / "newer"), tiny_tokenizer(), "# A newer one")
    keys["value_models"][1]["path"] = str(tmp_path / "newer")
    done, count = threading.Event(), []

    def ask(seed: int) -> None:
        while not done.is_set():
            count.append(len(stream(seed, max_tokens=24)))

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, seed) for seed in range(4)]
        try:
            run(keys)
            wait_until(lambda: _digests() != before, 120, "a new digest", 0.2)
            time.sleep(2)
        finally:
            done.set()
        for each in asking:
            each.result(timeout=120)
    after = _digests()
    assert after["short"] != before["short"]
    assert after["positive"] == before["positive"]
    assert len(count) > 8
    idle()


def _digests() -> dict[str, str]:
    return {each["id"]: each["digest"] for each in get("/v1/objectives").json()["data"]}


def test_a_value_model_that_is_gone_fails_requests_or_goes_unguided(keys):
    """Kill both replicas, again and again, until the base model's patience ends."""
    done = threading.Event()

    def strike():
        while not done.is_set():
            for process in replicas("ValueModel-other"):
                process.kill()
            time.sleep(0.05)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        asked = {"model": "tiny", "messages": CHAT, "max_tokens": 2, "seed": 1}
        guidance = {"objectives": {"short": 2.0}, "on_error": "unguided"}
        found = client().chat.completions.create(**asked, extra_body={"guidance": guidance})
        assert found.choices[0].guidance["lost_steps"] >= 1
        guidance["on_error"] = "fail"
        with pytest.raises(openai.InternalServerError, match="value model"):
            client().chat.completions.create(**asked, extra_body={"guidance": guidance})
        assert client().chat.completions.create(**asked).choices
    finally:
        done.set()
        thread.join()

    def guided() -> bool:
        try:
            return bool(client().chat.completions.create(**asked, extra_body={"guidance": guidance}).choices)
        except openai.InternalServerError:
            return False

    wait_until(guided, 60, "guidance once there are replicas again", 0.5)
