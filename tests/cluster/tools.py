"""Small things that the cluster tests share: waiting, and looking at files and processes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from vas import storage

SEEDS = range(int(os.environ.get("VAS_CHAOS_SEEDS", "1")))  # of the tests in which chance strikes
# of a cluster on which a machine that is gone is missed within seconds
IMPATIENT = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
ConfigMaker = Callable[..., dict[str, Any]]


def wait_until(condition: Callable[[], Any], seconds: float, what: str, poll: float = 0.02) -> Any:
    """Ask every `poll` seconds until `condition()` is truthy and return it; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(poll)
    return found


def committed(location: str) -> int:
    """Number of committed Parquet files under a location."""
    return len(storage.list_files(location, ".parquet"))


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below a process; none if it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def read_record(run: Path) -> dict[str, Any]:
    """A run's run.json."""
    return json.loads((run / "run.json").read_text())


def command(process: psutil.Process) -> str:
    """What it was started as, or calls itself; nothing once it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def checkpoints(train: str | Path) -> dict[str, int]:
    """The training checkpoints that Ray Train would go on from, and the epochs they have behind them."""
    snapshot = Path(train) / "ray_train" / "checkpoint_manager_snapshot.json"
    if not snapshot.exists():
        return {}
    try:
        results = json.loads(snapshot.read_text())["checkpoint_results"]
    except json.JSONDecodeError:  # it is being written
        return {}
    return {result["checkpoint_dir_name"]: result["metrics"]["epoch"] for result in results}


def on_s3(content: dict[str, Any], place: str) -> dict[str, Any]:
    """The same config with its prompts and its run directory on S3."""
    prompts = content["prompts"]
    if not prompts["source"].startswith("bundled:"):
        source = f"{place}/prompts.jsonl"
        storage.write_bytes(source, Path(prompts["source"]).read_bytes())
        prompts = prompts | {"source": source}
    return content | {"runs_dir": f"{place}/runs", "prompts": prompts}
