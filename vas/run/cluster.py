"""The Ray cluster of a run: one that is there already, or one on this machine for as long as it takes."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data
from ray.exceptions import RayError

from vas.config import Resources
from vas.errors import VasError

# Torch threads that spin while they wait starve whatever else has a core.
WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# A deployment's code and its handles share an event loop: a thread fewer to wait for at each hop of a request.
SERVE_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
# A cluster of one machine that ends with the run: nobody preempts it, and its logs are our own.
LOCAL_ENVIRONMENT = SERVE_ENVIRONMENT | {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # With the loops above, HTTP and Ray take 30 ms of a first token instead of 48. Not for several machines: gRPC hears
    # after minutes that one has vanished
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "grpc_proxy": "",  # or gRPC asks the machine's HTTP proxy for its neighbours
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # ten times a second takes 4 % of a core from the engine
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",  # again ten times a second, 1 % of a core
    # Without a dashboard nobody reads the figures of processes, and we show no worker's log: 2 % of a core
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "60",
}
FORWARDED = (
    *("VAS_CACHE", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    *("MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"),
)


@contextmanager
def ray_cluster(resources: Resources, spare_cpus: int = 1) -> Iterator[None]:
    """Ray for the time of the block; a cluster that was joined is left running.

    On this machine we give Ray one logical CPU more than there are cores, or `spare_cpus`: reading, scoring
    and writing are light, and the cores are the models'.
    """
    environment = WORKER_ENVIRONMENT | {name: os.environ[name] for name in FORWARDED if name in os.environ}
    if ray.is_initialized():  # a test or a notebook brought its own
        _quieten()
        yield
        return
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths mean the same in training workers
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # what a job was given we have, and forward, too: no conflict
    address = resources.address or os.environ.get("RAY_ADDRESS")  # a submitted job finds its cluster there
    try:
        if address:
            ray.init(address, runtime_env={"env_vars": environment}, log_to_driver=False, logging_level=logging.WARNING)
        else:
            os.environ.update(LOCAL_ENVIRONMENT | environment)  # the workers inherit it, and need no runtime_env agent
            ray.init(
                "local",  # not one that somebody else has begun on this machine
                num_cpus=(resources.num_cpus or os.cpu_count() or 1) + spare_cpus,
                object_store_memory=resources.object_store_memory,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError, RayError) as error:
        raise VasError(
            f"cannot reach the Ray cluster: {str(error).splitlines()[0]}",
            f"resources.address: {address}",
            "start one with `ray start --head`, or leave the address empty",
        ) from None
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler in C++ would abort the process 3 s after SIGTERM, in the middle of its clearing up
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    try:
        _quieten()
        yield
    finally:
        ray.shutdown()


def _quieten() -> None:
    """Our own progress replaces Ray Data's."""
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # `max_task_retries` has no other way in
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
