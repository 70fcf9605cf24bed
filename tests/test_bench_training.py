"""The training benchmark's entrants do the same work on the same rollouts, so that only speed is compared."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from command import ROOT, tiny_config
from tiny import tiny_objective

from vas import schema, storage
from vas.config import RunConfig
from vas.run.directory import RunDirectory
from vas.training.batches import collate as packed_batch
from vas.training.objective import ValueObjective
from vas.training.packing import packed_file

sys.path.insert(0, str(ROOT))
from benchmarks import hf_trainer
from benchmarks.apart import Apart
from benchmarks.fitting import Worker, fresh_model
from benchmarks.hf_trainer import Reference
from benchmarks.training import Material, Round, memory

PROMPTS, SAMPLES = 12, 3
NAMES = ["positive", "concise"]
OBJECTIVES = [tiny_objective(name) for name in NAMES]


def rollouts(prompts: int, held_out: int = 0) -> pa.Table:
    """Rollouts of many lengths, some of them cut off; the first few prompts are held out."""
    random = np.random.default_rng(0)
    rows = []
    for prompt in range(prompts):
        asked = random.integers(4, 290, random.integers(1, 20)).tolist()
        for sample in range(SAMPLES):
            response = random.integers(4, 290, random.integers(1, 30)).tolist()
            rows.append(
                {
                    "rollout_id": f"{prompt}/{sample}",
                    "prompt_id": f"{prompt:02}",
                    "prompt_token_ids": asked,
                    "response_token_ids": response,
                    "finish_reason": "stop" if random.random() < 0.6 else "length",
                    "held_out": prompt < held_out,
                    "rewards": {"positive": float(random.normal()), "concise": -float(len(response))},
                }
            )
    return pa.Table.from_pylist(rows, schema=schema.rollout_schema(NAMES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    return tiny_config(
        folder,
        value={"layers": 2, "bins": 11},
        train={"batch_size": 4, "micro_batch_size": 4, "precision": "float32", "td_lambda": 1.0},
        rollouts={"samples_per_prompt": SAMPLES},
    )


@pytest.fixture(scope="module")
def data(folder: Path) -> Round:
    return Round.of(rollouts(PROMPTS), NAMES, str(folder / "data"))


@pytest.fixture(scope="module")
def worker(config: RunConfig) -> Iterator[Apart]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Apart(Worker, config, OBJECTIVES, 1, port) as apart:
        yield apart


@pytest.fixture(scope="module")
def reference(config: RunConfig) -> Iterator[Apart]:
    with Apart(Reference, config, OBJECTIVES, 1) as apart:
        yield apart


def test_both_packings_hold_the_same_rollouts(data: Round):
    shared, alone = (storage.read_table([packed_file(each, 0)]).to_pylist() for each in (data.shared, data.alone))
    assert len(shared) == PROMPTS
    assert len(alone) == data.rollouts == PROMPTS * SAMPLES
    assert all(len(row["responses"]) == 1 for row in alone)
    assert [(row["prompt"], each) for row in shared for each in row["responses"]] == [
        (row["prompt"], row["responses"][0]) for row in alone
    ]
    assert data.tokens == packed_batch(shared).tokens < packed_batch(alone).tokens


def test_trainer_has_the_objectives_loss(config: RunConfig, data: Round):
    """On one rollout a row, with padding, and with responses that were cut off."""
    model = fresh_model(config, OBJECTIVES)
    rows = storage.read_table([packed_file(data.shared, 0)]).to_pylist()
    batch = packed_batch(rows)
    assert not all(ended for row in rows for ended in row["ended"])
    ours = ValueObjective(model, 1.0)(batch)[0] / batch.trained_NS.sum()
    examples = hf_trainer.examples(rows, OBJECTIVES)
    trainer = object.__new__(hf_trainer._Trainer)
    trainer.counter = hf_trainer._Counter()
    theirs = trainer.compute_loss(model, hf_trainer.collate(examples))
    torch.testing.assert_close(theirs, ours, atol=0, rtol=1e-5)
    assert trainer.counter.tokens == sum(len(example["input_ids"]) for example in examples)
    assert trainer.counter.places == len(examples) * max(len(example["input_ids"]) for example in examples)


def test_entrants_begin_alike_and_run_every_token(worker: Apart, reference: Apart, data: Round, folder: Path):
    step = Round.of(rollouts(4), NAMES, str(folder / "step"))
    ours, theirs = worker.call("fit", step.shared, 4), reference.call("fit", step.alone, 4 * SAMPLES)
    assert ours.result().losses == pytest.approx(theirs.result().losses, rel=1e-5)
    fitted = {
        "sorted": worker.call("fit", data.shared, 4).result(),
        "unsorted": worker.call("fit", data.shared, 4, False).result(),
        "alone": worker.call("fit", data.alone, 4 * SAMPLES).result(),
        "trainer": reference.call("fit", data.alone, 4 * SAMPLES).result(),
        "trainer, by length": reference.call("fit", data.alone, 4 * SAMPLES, True).result(),
    }
    for name, each in fitted.items():
        assert len(each.losses) == PROMPTS / 4, name
        assert np.isfinite(each.losses).all(), name
        assert each.seconds > 0, name
        assert each.tokens == (data.tokens if "sorted" in name else fitted["alone"].tokens), name
        assert each.places >= each.tokens, name
    assert fitted["sorted"].places < fitted["unsorted"].places


def test_a_runs_material_is_sampled_by_prompt(folder: Path, config: RunConfig):
    run = RunDirectory.create(config)
    storage.write_table(storage.join(run.rollouts, "0.parquet"), rollouts(PROMPTS, held_out=3))
    material = Material.load(run.location, layers=1)
    assert material.config.value.layers == 1
    assert [each["name"] for each in material.objectives] == NAMES
    for held_out, prompts in ((False, 5), (True, 2)):
        sample = material.sample(prompts, 0, held_out)
        assert len(sample) == prompts * SAMPLES
        assert set(sample["held_out"].to_pylist()) == {held_out}
    assert material.sample(5, 0) != material.sample(5, 1)


def test_the_memory_of_two_workers_is_weighed(folder: Path, config: RunConfig, monkeypatch):
    monkeypatch.setattr("benchmarks.training.MEMORY_LAYERS", 2)
    rows = memory(Material(config, OBJECTIVES, rollouts(PROMPTS)), [(3, True)], str(folder))
    figures = {row.metric: row.value for row in rows[:-1]}
    assert 50 < figures["before the model"] < 2000
    assert figures["building, above that"] > 0
    assert figures["a step, above that"] >= figures["between steps, above that"] > 0
    assert rows[-1].value == 1
