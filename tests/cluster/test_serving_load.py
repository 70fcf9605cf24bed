"""Many clients at once, well- and ill-behaved: nothing breaks, nothing leaks, and all of it is counted.

A few seconds here; `make load-serving` has 200 clients for ten minutes, and memory is looked at then, for it says
something after minutes only.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import pytest
from serving import CHAT, URL, cluster, get, idle, keys_of, replicas, run
from tools import wait_until

SECONDS = float(os.environ.get("VAS_LOAD_SECONDS", "8"))
CLIENTS = int(os.environ.get("VAS_LOAD_CLIENTS", "24"))
LONG = SECONDS >= 60
LONGEST = 48
PARTS = ("Gateway", "BaseModel", "ValueModel-other")

pytestmark = pytest.mark.timeout(2 * SECONDS + 400)


@pytest.fixture(scope="module", autouse=True)
def keys(tmp_path_factory):
    """One replica of each kind."""
    gate = {"limits": {"max_tokens": LONGEST, "n": 4}}
    content = keys_of(tmp_path_factory.mktemp("load"), gate=gate, max_sequences=32, max_waiting=48)
    with cluster():
        run(content)
        yield content


def body_of(chance: random.Random) -> dict[str, Any]:
    """A request with a prompt, a length and strengths of its own."""
    words = " ".join(chance.choices(["the", "fox", "dog", "weather", "rests", "north"], k=chance.randint(1, 60)))
    objectives = {name: chance.uniform(-4, 4) for name in ("positive", "concise", "short") if chance.random() < 0.4}
    return {
        "model": "tiny",
        "messages": [*CHAT, {"role": "assistant", "content": words}, {"role": "user", "content": words[::-1]}],
        "max_tokens": chance.randint(1, LONGEST),
        "seed": chance.randrange(10**6),
        "n": chance.choice([1, 1, 1, 2]),
        "stream": chance.random() < 0.6,
        "guidance": {"objectives": objectives, "candidates": chance.choice([4, 8, 20])},
    }


def spoil(body: dict[str, Any], chance: random.Random) -> None:
    """Make a request a bad one."""
    wrong = [("model", "no"), ("temperature", -1), ("n", 99), ("messages", []), ("nonsense", True), ("stop", [""])]
    body.update([chance.choice(wrong)])


async def client(number: int, until: float, seen: Counter[str], tokens: Counter[str]) -> None:
    """Ask again and again; count what comes of it."""
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=URL, timeout=120) as http:
        while time.monotonic() < until:
            body, kind = body_of(chance), chance.random()
            if kind < 0.1:
                spoil(body, chance)
            if 0.1 < kind < 0.2:  # leave at some time
                with suppress(TimeoutError):
                    await asyncio.wait_for(http.post("/v1/chat/completions", json=body), chance.uniform(0.01, 1))
                seen["left"] += 1
                continue
            response = await http.post("/v1/chat/completions", json=body)
            seen[str(response.status_code)] += 1
            if response.status_code == 200 and not body["stream"]:
                tokens["whole"] += response.json()["usage"]["completion_tokens"]
            elif response.status_code == 200:
                assert response.text.endswith("data: [DONE]\n\n")
                chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
                reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
                assert len(reasons) == body["n"]
            elif response.status_code in (429, 503):
                assert response.headers["retry-after"]
                await asyncio.sleep(0.5)


async def load(seconds: float, clients: int) -> Counter[str]:
    """So many clients for so long."""
    seen: Counter[str] = Counter()
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(number, until, seen, Counter()) for number in range(clients)))
    return seen


def memory() -> dict[str, float]:
    """Resident memory of each deployment's processes, in MiB."""
    return {part: sum(p.memory_info().rss for p in replicas(part)) / 2**20 for part in PARTS}


def counted() -> Counter[str]:
    """Requests by status, as the metrics have them."""
    found: Counter[str] = Counter()
    for line in get("/metrics").text.splitlines():
        if line.startswith("vas_requests_total{") and 'route="/v1/chat/completions"' in line:
            status = line.partition('status="')[2].partition('"')[0]
            found[status] += float(line.rpartition(" ")[2])
    return found


def test_many_clients_at_once():
    warm = asyncio.run(load(SECONDS / 4, CLIENTS))
    before, held = memory(), idle()["kv_bytes"]
    seen = asyncio.run(load(SECONDS, CLIENTS))
    print(f"{CLIENTS} clients, {SECONDS:.0f} s: {dict(seen)}")
    assert set(seen) <= {"200", "400", "404", "429", "503", "left"}
    assert seen["200"] > CLIENTS
    state = idle()
    after = memory()
    print(f"memory in MiB, before and after: {before} {after}; KV bytes: {held} {state['kv_bytes']}")
    assert state["streams"] == 0
    if LONG:
        assert state["kv_bytes"] <= held
        for part in PARTS:
            assert after[part] < 1.1 * before[part] + 30, (before, after)
    answered = warm + seen
    left = answered.pop("left")  # some before the gateway heard of them, some after it had answered
    wait_until(lambda: all(counted()[status] >= answered[status] for status in answered), 90, "all answers counted", 2)
    total = counted()
    print(f"answers: {dict(answered)}, left: {left}; counted: {dict(total)}")
    assert set(total) <= {"200", "400", "404", "429", "503", "499"}
    for status in ("400", "404"):
        assert total[status] == answered[status]
    assert sum(total.values()) <= sum(answered.values()) + left
    assert total["499"] > 0
