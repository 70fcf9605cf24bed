"""Training on a real Ray with real DeepSpeed: whoever computes it, and whatever breaks, it is the same training."""

import json
import subprocess
import sys
import threading

import psutil
import pytest
import ray
from fits import assert_same_training, config_of, resumed, workers
from tools import SEEDS, checkpoints, command, descendants, wait_until

pytestmark = pytest.mark.usefixtures("tiny_cluster")

# --- the same training whoever computes it --------------------------------------------------------


# DeepSpeed leaves a model as small as this one whole; where weights are shared out, workers wait for each other
SMALL_TOO = "train.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"


@pytest.mark.parametrize("stage", [2, 3])  # at 0 in spite of a fault, below
def test_two_workers_train_as_one(fit, alone, stage):
    assert_same_training(fit("two", *workers(2, f"train.zero_stage={stage}", SMALL_TOO)), alone)


# --- faults ---------------------------------------------------------------------------------------

SLOW = ("train.checkpoint_steps=1",)
DRIVER = """
import json, sys, ray
from vas.config import parse_config
from vas.training.trainer import train

address, content, rollouts, storage, output = json.loads(sys.argv[1])
ray.init(address=address, log_to_driver=False)
train(parse_config(content, "the driver"), [rollouts], storage, output)
"""


def training_workers() -> list[psutil.Process]:
    return [process for process in descendants(psutil.Process().pid) if "RayTrainWorker" in command(process)]


def test_a_worker_that_is_killed_in_an_epoch_costs_nothing(fit, alone, tmp_path):
    storage = tmp_path / "killed" / "train"

    def kill_one() -> None:
        wait_until(lambda: checkpoints(storage), 120, "a checkpoint")
        training_workers()[-1].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    disturbed = fit("killed", *workers(2, *SLOW))
    killer.join()
    assert resumed(disturbed)
    assert_same_training(disturbed, alone)


@pytest.mark.parametrize("stage", [2, 3] if len(SEEDS) > 1 else [3])  # at 0 nothing is shared out
def test_one_worker_goes_on_where_two_were_stopped(fit, alone, make_config, rollouts, tmp_path, stage):
    overrides = (*SLOW, f"train.zero_stage={stage}")
    storage, output = tmp_path / "stopped" / "train", tmp_path / "stopped" / "value"
    content = config_of(make_config, *workers(2, *overrides)).model_dump(mode="json")
    address = ray.get_runtime_context().gcs_address  # "auto" may find another cluster on this machine
    words = [sys.executable, "-c", DRIVER, json.dumps([address, content, rollouts, str(storage), str(output)])]
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(words, stdout=log, stderr=log)
        wait_until(lambda: checkpoints(storage) or driver.poll() is not None, 120, "a checkpoint")
        driver.kill()
        driver.wait()
    wait_until(lambda: not training_workers(), 60, "no worker left")
    assert fit("stopped", *workers(1, *overrides)) == output
    assert resumed(output)
    assert_same_training(output, alone)
