"""A run, and an endpoint, of a base model that can only be called: llama.cpp has it, and here there is its tokenizer.

The value model has another tokenizer than the base model, too.
"""

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import ray
import serving
from openai_server import proxy

from benchmarks.llama import MODEL, llama_server
from benchmarks.other_tokenizer import save_with_another_tokenizer
from vas import storage
from vas.config import Resources, RunConfig, parse_config
from vas.decoding.engine import Engine
from vas.decoding.loading import load_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.errors import VasError
from vas.models.base import encode_prompt, load_base, load_tokenizer
from vas.rewards import load_rewards
from vas.rollouts.pipeline import sample
from vas.rollouts.plan import Plan
from vas.rollouts.stored import read_rollouts
from vas.run import stages
from vas.run.cluster import ray_cluster
from vas.run.directory import RunDirectory

REWARD = """
def articles(prompts, responses):
    return [response.lower().split().count("the") for response in responses]
"""
BETA, PROMPTS = 5.0, 34
STALL = 11.0  # seconds


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    with llama_server(4) as url:
        yield url


@pytest.fixture(scope="module")
def content(llama: str, tmp_path_factory) -> dict[str, Any]:
    """A run's config: base.model is a folder that has no weights."""
    folder = tmp_path_factory.mktemp("api")
    load_tokenizer(MODEL).save_pretrained(folder / "base")
    (folder / "reward.py").write_text(REWARD)
    return {
        "name": "called",
        "runs_dir": str(folder / "runs"),
        "base": {"model": str(folder / "base"), "openai": llama, "concurrency": 4},
        "prompts": {"source": "bundled:demo", "limit": PROMPTS},
        "rewards": {"the": {"use": f"python:{folder / 'reward.py'}:articles"}},
        "rollouts": {"samples_per_prompt": 3, "batch_size": 64, "sampling": {"max_tokens": 12}},
        "value": {"backbone": save_with_another_tokenizer(folder / "backbone"), "layers": 3},
        # in a dozen steps values learn little from values
        "train": {"epochs": 2, "batch_size": 4, "lr": 3e-4, "head_lr": 6e-3, "td_lambda": 1.0},
        "evaluation": {
            "candidates": 8,
            "best_of": [2],
            "strengths": [{"the": BETA}],
            "trust_prompts": 2,
            "trust_completions": 2,
        },
        "resources": {"num_cpus": 2, "actors": 1, "object_store_memory": 200 * 2**20},
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(Resources(num_cpus=2, object_store_memory=200 * 2**20)):
        yield


@pytest.fixture(scope="module")
def run(content: dict[str, Any], cluster: None) -> RunDirectory:
    run = RunDirectory.create(config_of(content))
    stages.run_all(run)
    return run


def config_of(content: dict[str, Any], **sections: Any) -> RunConfig:
    return parse_config(content | sections, "this test")


def test_all_stages_are_done_without_the_weights(run):
    assert not storage.list_files(run.config.base.model, ".safetensors")
    with pytest.raises(VasError, match="cannot load the model"):
        load_base(run.config.base)
    rows = read_rollouts(run.rollouts).to_pylist()
    assert len(rows) == PROMPTS * 3
    assert all(row["error"] is None and row["base_model"] == run.config.base.model for row in rows)
    spent = json.loads(storage.read_bytes(run.path("usage.json")))
    assert spent["calls"] > len(rows)
    report = storage.read_bytes(run.path("evaluation", "report.html")).decode()
    assert f"{spent['calls']:,} calls" in report


def test_guidance_by_a_model_with_another_tokenizer_beats_the_base_model(run):
    results = storage.read_table([run.path("evaluation", "results.parquet")]).to_pylist()
    base, guided = (next(row for row in results if row["method"] == method) for method in ("base", "vas"))
    assert guided["ci_low"] > base["ci_high"]
    assert guided["kl"] > 0


def test_local_weights_are_guided_as_far(run):
    """The served model is 4-bit, the local one its dequantised twin; other random numbers; equal β."""
    base = load_base(run.config.base.model_copy(update={"model": MODEL, "openai": None}))
    engine = Engine(base, [load_scorer("value", run.value, base, "exact")])
    prompts = [prompt for prompt in stages.prepare(run) if prompt.held_out]
    how = GuidanceParams.of(run.config.evaluation, {"the": BETA})
    requests = [
        Request(
            f"{i}/{n}",
            tuple(encode_prompt(base.tokenizer, prompt)),
            SamplingParams.of(run.config.rollouts.sampling, 2 * i + n),
            how,
        )
        for i, prompt in enumerate(prompts)
        for n in range(2)
    ]
    reward = load_rewards(run.config.rewards)["the"]
    local = np.array(list(reward([], [each.text for each in engine.generate(requests)])), float)
    results = storage.read_table([run.path("evaluation", "results.parquet")]).to_pylist()
    guided = next(row for row in results if row["method"] == "vas")
    half = (guided["ci_high"] - guided["ci_low"]) / 2
    margin = np.hypot(half, 1.96 * local.reshape(-1, 2).mean(1).std(ddof=1) / len(prompts) ** 0.5)
    assert abs(local.mean() - guided["reward_mean"]) < margin


def test_a_budget_ends_a_run_cleanly_and_it_goes_on(content, run):
    short = content | {"name": "budget", "prompts": {"source": "bundled:demo", "limit": 8}}
    short["rollouts"] = {"samples_per_prompt": 2, "batch_size": 4, "sampling": {"max_tokens": 6}}
    config = config_of(short, base=content["base"] | {"most_calls": 5})
    first = RunDirectory.create(config)
    with pytest.raises(VasError, match="budget of 5 calls is spent"):
        stages.rollout(first)
    done = {row["rollout_id"]: row for row in read_rollouts(first.rollouts).to_pylist() if row["error"] is None}
    assert len(done) == 5
    assert json.loads(storage.read_bytes(first.path("usage.json")))["calls"] == 5
    assert not first.done("rollouts")
    again = RunDirectory.open(first.location, ["base.most_calls=16"])
    stages.rollout(again)
    rows = {row["rollout_id"]: row for row in read_rollouts(again.rollouts).to_pylist()}
    assert len(rows) == 16
    assert all(row["error"] is None for row in rows.values())
    assert all(rows[name]["response_token_ids"] == row["response_token_ids"] for name, row in done.items())
    assert json.loads(storage.read_bytes(first.path("usage.json")))["calls"] == 16


def test_whatever_a_server_does_every_row_is_there(content, run, tmp_path, monkeypatch):
    """Faults under a guided plan: what passes is got over, what does not is said in its row."""
    passing = itertools.cycle(
        [(429, {"Retry-After": "0.1"}, {}), (500, {}, "broken"), (200, {}, "{"), None, (503, {}, {}), None]
    )
    lasting = {
        0: ((400, {}, {"error": {"message": "context length exceeded"}}), "context length exceeded"),
        1: ((200, {}, {"choices": [{"text": "x", "finish_reason": "length"}]}), "no log-probs"),
    }
    marks: dict[str, tuple[Any, str]] = {}
    count = itertools.count()

    def change(path: str, body: dict[str, Any]) -> Any:
        if body["logprobs"] < 200 or len(body["prompt"]) < 5:
            return None
        name = str(body["prompt"][:40])
        if len(marks) < len(lasting) and name not in marks:
            marks[name] = lasting[len(marks)]
        if name in marks:
            return marks[name][0]
        place = next(count)
        if place == 10:
            time.sleep(STALL)  # the call is tried again meanwhile
        return next(passing) if place % 7 == 0 else None

    prompts = list(stages.prepare(run))[:8]
    with proxy(content["base"]["openai"], change) as front:
        base = content["base"] | {"openai": front, "attempts": 4, "timeout": STALL - 1}
        plan = Plan(prompts, 1, 3, setting='{"the": 5.0}')
        config = config_of(content, name="faults", base=base)
        summary = sample(config, [plan], str(tmp_path), "faults", run.value)
    rows = read_rollouts(str(tmp_path)).to_pylist()
    assert sorted(row["rollout_id"] for row in rows) == sorted(plan.rollout_id(prompt, 0) for prompt in prompts)
    errors = [row["error"] for row in rows if row["error"] is not None]
    assert len(errors) == len(marks) == sum(summary.errors.values()) == 2
    assert all(any(said in error for error in errors) for _, said in marks.values())
    assert next(count) > 20


def test_an_endpoint_in_front_of_the_server(run, content):
    """The OpenAI client, unchanged: the base model, guidance by tokens and by blocks, streamed; and what fails."""
    ray.shutdown()
    down: list[bool] = []

    def change(path: str, body: dict[str, Any]) -> Any:
        return (401, {}, {"error": {"message": "the key has expired"}}) if down else None

    with proxy(content["base"]["openai"], change) as front, serving.cluster():
        base = run.config.base.model_copy(update={"openai": front}).model_dump()
        about = {"name": "called", "drain_seconds": 10, "sends_per_second": 1000}  # a chunk a token
        serving.run({"run": run.location, "base": base, **about})
        client = serving.client()

        def ask(**more: Any) -> tuple[str, list[str]]:
            asked = {"model": "called", "messages": serving.CHAT, "max_tokens": 16, "seed": 3, "extra_body": more}
            whole = client.chat.completions.create(**asked)
            stream = client.chat.completions.create(**asked, stream=True)
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
            return whole.choices[0].message.content, [piece for piece in pieces if piece]

        said, pieces = ask()
        assert said == "".join(pieces)
        objectives = {"the": 8.0}
        said, pieces = ask(guidance={"objectives": objectives})
        assert said == "".join(pieces)
        assert len(pieces) > 4
        assert said.lower().split().count("the") > 1
        said, pieces = ask(guidance={"objectives": objectives, "schedule": "block:4", "candidates": 4})
        assert said == "".join(pieces)
        assert 2 <= len(pieces) <= 4
        told = client.completions.create(
            model="called", prompt="The capital of France is", max_tokens=3, seed=3, logprobs=2
        )
        assert all(len(top) == 2 for top in told.choices[0].logprobs.top_logprobs)
        down.append(True)
        with pytest.raises(openai.APIStatusError, match="the key has expired") as caught:
            ask(guidance={"objectives": objectives})
        assert caught.value.status_code == 502
        down.clear()
        assert ask(guidance={"objectives": objectives})[0]
