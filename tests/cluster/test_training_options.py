"""What a training can do besides: adapters, new heads on an old backbone, less memory, slow targets, an early end."""

import json
from pathlib import Path

import pytest
import torch
from fits import assert_same_training, losses, resumed, workers

from vas.models.value import ValueModel
from vas.training.history import best

pytestmark = pytest.mark.usefixtures("tiny_cluster")

WORDS = ("rewards={words: {use: length}}", "evaluation.strengths=[]")
BRIEF = ("rewards={brief: {use: brevity}}", "evaluation.strengths=[]")


def test_less_memory_is_the_same_training(fit, alone):
    spared = ("train.gradient_checkpointing=true", "train.zero_stage=2", "train.offload=cpu")
    assert_same_training(fit("spared", *workers(1, *spared)), alone)


def test_adapters_are_merged_into_the_checkpoint(fit, alone):
    lora = fit("lora", *workers(1, "value.lora={rank: 4, alpha: 8}", "train.lr=0.01"))
    assert losses(lora)[0] == pytest.approx(losses(alone)[0], rel=1e-4)  # adapters begin at zero
    assert min(losses(lora)) < losses(lora)[0]
    merged, plain = (dict(ValueModel.load(str(place)).named_parameters()) for place in (lora, alone))
    assert merged.keys() == plain.keys()
    fresh = dict(ValueModel.load(str(lora)).backbone.named_parameters())
    moved = {name for name in fresh if not torch.equal(fresh[name], plain[f"backbone.{name}"])}
    assert any("q_proj" in name for name in moved)


def test_an_objective_is_added_to_a_value_model_that_stays_as_it_is(fit):
    old = ValueModel.load(str(first := fit("first", *workers(1, *WORDS))))
    second = fit("second", *workers(1, *BRIEF, f"value.extends={first}", "value.layers=null"))
    assert not resumed(second)  # each epoch exports the model with both, and training goes on
    new = ValueModel.load(str(second))
    assert new.objectives == ("words", "brief")
    tokens = torch.randint(4, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(new(tokens)[..., 0], old(tokens)[..., 0], atol=0, rtol=0)
    assert new(tokens)[..., 1].std() > 0
    for name, parameter in old.backbone.named_parameters():
        torch.testing.assert_close(parameter, new.backbone.get_parameter(name), atol=0, rtol=0)


def test_targets_of_a_slow_network_change_the_training_but_not_its_start(fit, alone):
    bootstrapped = [
        losses(fit(name, *workers(1, "train.td_lambda=0.5", *more)))
        for name, more in (("current", ()), ("slow", ("train.target_ema=0.9",)))
    ]
    assert bootstrapped[0][0] == pytest.approx(bootstrapped[1][0], rel=1e-4)
    assert bootstrapped[0][-1] != pytest.approx(bootstrapped[1][-1], rel=1e-4)


def test_training_stops_when_it_gets_no_better_and_keeps_the_best(fit):
    checkpoint = fit(
        "patient", *workers(1, "train.patience=1", "train.epochs=12", "train.lr=0.02", "train.head_lr=0.2")
    )
    history = json.loads((checkpoint / "training.json").read_text())
    assert len(history) < 12
    assert best(history) == len(history) - 2
    figures = history[best(history)]["held_out"]
    card = Path(checkpoint, "README.md").read_text()
    assert all(f"{figure['explained_variance']:.3f}" in card for figure in figures.values())
