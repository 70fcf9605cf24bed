"""What the cluster tests share: a tiny base model, prompts, and the config of a tiny run."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fits import config_of, workers, write_rollouts
from s3_server import S3Server, s3_server
from tiny import save_tiny_base
from tools import ConfigMaker

from vas.config import Resources, parse_config
from vas.configfile import override
from vas.run.cluster import ray_cluster
from vas.run.directory import RunDirectory
from vas.run.stages import run_all
from vas.training.trainer import train


def tiny_config(
    folder: Path, base: str, name: str, *overrides: str, prompts: int = 24, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The config of a tiny run in a folder, as a mapping."""
    asked = [f"what does the fox think of the number {n}?" for n in range(prompts)] + list(more)
    source = folder / f"{name}.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": text}) for text in asked))
    content = {
        "name": name,
        "runs_dir": str(folder),
        "base": {"model": base},
        "prompts": {"source": str(source), "held_out": 0.3},
        "rewards": {"brief": {"use": "brevity", "params": {"min_words": 2}}, "words": {"use": "length"}},
        "rollouts": {"samples_per_prompt": 4, "batch_size": 16, "sampling": {"max_tokens": 8}},
        "value": {"layers": 1, "bins": 11},
        "train": {"epochs": 1, "batch_size": 4, "micro_batch_size": 2},
        "evaluation": {
            "best_of": [2, 4],
            "strengths": [{"words": 4.0}, {"brief": 2.0, "words": -2.0}],
            "candidates": 4,
            "bootstrap": 50,
            "samples_shown": 2,
        },
        "resources": {"num_cpus": 2, "actors": 1, "object_store_memory": 200 * 2**20},
    }
    return override(content, overrides)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> str:
    """A tiny base model on disk."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="module")
def tiny_cluster() -> Iterator[None]:
    """Ray on this machine, for as long as a module's tests take."""
    with ray_cluster(Resources(num_cpus=2, object_store_memory=200 * 2**20)):
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """A real S3 server, which the environment names."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def make_config(tmp_path_factory, base_folder) -> ConfigMaker:
    """A maker of a tiny run's config, as a mapping: `make_config(name, "a.b=c", …, prompts=24)`."""
    return partial(tiny_config, tmp_path_factory.mktemp("runs"), base_folder)


@pytest.fixture(scope="session")
def whole_content(tmp_path_factory, base_folder) -> dict[str, Any]:
    """The config of `whole_run`."""
    shared = "train.deepspeed={zero_optimization: {stage: 2}}"
    return tiny_config(tmp_path_factory.mktemp("whole"), base_folder, "whole", *workers(2, shared))


@pytest.fixture(scope="session")
def whole_run(whole_content) -> RunDirectory:
    """A run that went through all stages, trained by two workers that share out optimizer state and gradients."""
    run = RunDirectory.create(parse_config(whole_content, "this test"))
    run_all(run)
    return run


@pytest.fixture(scope="session")
def rollouts(tmp_path_factory) -> str:
    """Rollouts of many lengths, in several files, with two rewards that their tokens tell."""
    return write_rollouts(tmp_path_factory.mktemp("rollouts"))


@pytest.fixture
def fit(make_config: ConfigMaker, rollouts: str, tmp_path):
    """Trains with overrides; returns the checkpoint's folder. The same name goes on where it stopped."""

    def run(name: str, *overrides: str) -> Path:
        output = tmp_path / name / "value"
        train(config_of(make_config, *overrides), [rollouts], str(tmp_path / name / "train"), str(output))
        return output

    return run


@pytest.fixture(scope="session")
def alone(base_folder: str, rollouts: str, tmp_path_factory) -> Path:
    """What one worker makes, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    config = config_of(partial(tiny_config, folder, base_folder), *workers(1))
    with ray_cluster(config.resources):
        train(config, [rollouts], str(folder / "train"), str(folder / "value"))
    return folder / "value"
