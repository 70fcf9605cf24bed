"""DeepSpeed's JSON: what a run asks for, and what a user may add."""

import pytest

from vas.config import Train
from vas.configfile import merge
from vas.errors import VasError
from vas.training.deepspeed_config import deepspeed_config


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "expected"),
    [(16, 4, 1, (4, 4)), (16, 4, 2, (4, 2)), (4, 4, 2, (2, 1)), (6, 4, 1, (3, 2)), (16, 16, 1, (16, 1))],
)
def test_workers_and_accumulation_share_the_batch(batch, micro, workers, expected):
    made = deepspeed_config(Train(batch_size=batch, micro_batch_size=micro), workers, on_gpu=False)
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == expected


@pytest.mark.parametrize(("batch", "workers"), [(1, 4), (16, 3)])
def test_a_batch_that_workers_cannot_share_is_refused(batch, workers):
    with pytest.raises(VasError, match=f"{batch} prompts cannot be shared evenly by {workers} workers"):
        deepspeed_config(Train(batch_size=batch), workers, on_gpu=False)


def test_deepspeed_defaults_follow_the_machine():
    assert deepspeed_config(Train(), 1, on_gpu=False)["zero_optimization"] == {"stage": 0}
    assert deepspeed_config(Train(), 4, on_gpu=True)["zero_optimization"] == {"stage": 2}
    assert deepspeed_config(Train(), 4, on_gpu=True)["bf16"] == {"enabled": True}
    assert deepspeed_config(Train(gradient_clipping=0.5), 1, on_gpu=False)["gradient_clipping"] == 0.5
    assert deepspeed_config(Train(), 1, on_gpu=False)["optimizer"]["params"]["fused"]


def test_the_users_deepspeed_json_wins_key_by_key():
    over = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "optimizer": {"params": {"eps": 1e-6}}, "x": 1}
    made = deepspeed_config(Train(lr=2e-4, deepspeed=over), 2, on_gpu=True)
    assert made["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert made["optimizer"] == {"type": "AdamW", "params": {"lr": 2e-4, "torch_adam": True, "eps": 1e-6}}
    assert made["x"] == 1
    assert made["gradient_accumulation_steps"] == 2


def test_merge_replaces_what_is_no_mapping_on_both_sides():
    base = {"a": {"b": 1}, "c": 2}
    assert merge(base, {"a": 3, "c": {"d": 4}}) == {"a": 3, "c": {"d": 4}}
    assert base == {"a": {"b": 1}, "c": 2}


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_offload_is_deepspeeds_own(offload):
    train = Train(zero_stage=3, offload=offload, nvme_path="/fast/disk")
    zero = deepspeed_config(train, 2, on_gpu=False)["zero_optimization"]
    where = {"device": offload} | ({"nvme_path": "/fast/disk"} if offload == "nvme" else {})
    assert zero == {"stage": 3, "offload_optimizer": where, "offload_param": where}


def test_a_deepspeed_file_is_merged_but_for_what_it_leaves_to_the_run(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}')
    made = deepspeed_config(Train(deepspeed=str(file)), 2, on_gpu=False)
    assert made["zero_optimization"] == {"stage": 2}
    assert made["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "is a JSON object"),
        ('{"train_batch_size": 8}', "`train_batch_size` is the run's to say"),
        ('{"scheduler": {"type": "WarmupLR"}}', "`scheduler` is the run's to say"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_taken_is_refused(tmp_path, text, message):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(VasError, match=message):
        deepspeed_config(Train(deepspeed=str(file)), 2, on_gpu=False)
