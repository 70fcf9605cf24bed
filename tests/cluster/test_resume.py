"""A run that is stopped, politely or not, in every stage: the same command goes on from there."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from tools import SEEDS, ConfigMaker, checkpoints, command, committed, descendants, read_record, wait_until

from vas.config import parse_config
from vas.models.value import ValueModel
from vas.prompts import load_prompts
from vas.rollouts.plan import Plan, setting_key
from vas.rollouts.stored import read_rollouts

ROOT = Path(__file__).parents[2]
EPOCHS = 3
BOTH = (signal.SIGINT, signal.SIGKILL)
# every kind of stop in every stage where chance strikes often, else one of each kind
STOPS: dict[str, tuple[signal.Signals, ...]] = (
    {"rollouts": BOTH, "train": BOTH, "evaluate": BOTH}
    if len(SEEDS) > 1
    else {"train": (signal.SIGKILL,), "evaluate": (signal.SIGINT,)}
)
# When the raylet died a hard death, its agents go on trying to tell the head of it for a minute.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@pytest.fixture
def config_file(make_config: ConfigMaker, tmp_path) -> Path:
    """A run whose every stage lasts some seconds."""
    content = make_config(
        "stopped",
        "rollouts.samples_per_prompt=8",
        "rollouts.batch_size=8",
        "evaluation.samples_per_prompt=4",
        f"train.epochs={EPOCHS}",
        prompts=40,
    )
    file = tmp_path / "stopped.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


class Driver:
    """`vas run CONFIG` in a process, and a process group, of its own."""

    def __init__(self, config_file: Path) -> None:
        self._log = config_file.with_suffix(f".{time.monotonic_ns()}.log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vas.cli.main", "run", str(config_file)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Until the condition holds; the driver must be alive then."""
        wait_until(lambda: condition() or self._process.poll() is not None, 120, what)
        assert self._process.poll() is None, f"it ended before this: {what}\n{self.output}"

    def stop(self, how: signal.Signals) -> int:
        """Send the signal to this process alone, and see everything it started end too; returns the exit code."""
        below = descendants(self._process.pid)
        sessions = set(re.findall(r"session_[\d_-]+", " ".join(command(process) for process in below)))
        self._process.send_signal(how)
        code = self._process.wait(timeout=60)

        def left() -> list[str]:
            others = [p for p in psutil.process_iter() if any(session in command(p) for session in sessions)]
            return [command(p) for p in {*below, *others} if is_alive(p) and not command(p).startswith(AGENTS)]

        assert sessions, "Ray was not there yet"
        wait_until(lambda: not left(), 60, "an end of what the driver started", poll=0.5)
        return code

    def end(self) -> int:
        """Wait for the run to be done; returns the exit code."""
        return self._process.wait(timeout=240)

    def close(self) -> None:
        """Leave nothing behind, whatever a test did."""
        if self._process.poll() is None:
            self.stop(signal.SIGINT)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def files_of(folder: Path) -> dict[Path, int]:
    """Committed files and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


@pytest.mark.timeout(1200)
def test_a_run_stopped_in_every_stage_ends_as_if_it_never_was(config_file, request):
    config = parse_config(yaml.safe_load(config_file.read_text()), "this test")
    run = Path(config.runs_dir, config.name)
    rollouts, responses = run / "rollouts" / "round=0", run / "evaluation" / "responses"
    train = str(run / "train")

    def start() -> Driver:
        driver = Driver(config_file)
        request.addfinalizer(driver.close)
        return driver

    def under_way(stage: str) -> Callable[[], bool]:
        """True when the stage runs, and there is more to show for it than there is now."""
        count = {
            "rollouts": lambda: committed(str(rollouts)),
            "train": lambda: len(checkpoints(train).keys() - seen),
            "evaluate": lambda: committed(str(responses)),
        }[stage]
        seen = checkpoints(train).keys()
        before = count()

        def more() -> bool:
            state = read_record(run)["stages"].get(stage, {}).get("state") if (run / "run.json").exists() else None
            return state == "running" and count() > before

        return more

    kept: dict[Path, int] = {}
    epochs = [0]
    for stage, hows in STOPS.items():
        for how in hows:
            began = time.monotonic()
            condition = under_way(stage)
            driver = start()
            driver.wait_for(condition, f"the stage {stage} under way")
            hit = time.monotonic()
            code = driver.stop(how)
            print(f"{stage} {how.name}: hit after {hit - began:.1f} s, gone after {time.monotonic() - hit:.1f} s more")
            state = read_record(run)["stages"][stage]["state"]
            if how == signal.SIGINT:
                assert (code, state) == (130, "interrupted"), driver.output
                assert "Interrupted. What is finished is kept; the same command goes on from there." in driver.output
                assert "Traceback" not in driver.output
            else:
                assert (code, state) == (-signal.SIGKILL, "running")
            now = files_of(rollouts) | files_of(responses)
            assert now.items() >= kept.items()  # nothing that was committed is sampled again
            kept = now
            if stage == "train":
                epochs.append(max(checkpoints(train).values()))
                assert epochs[-1] > epochs[-2]  # the new checkpoint goes on from the last one
    trained = checkpoints(train)
    began = time.monotonic()
    driver = start()
    assert driver.end() == 0, driver.output
    print(f"to the end: {time.monotonic() - began:.1f} s")

    assert {stage["state"] for stage in read_record(run)["stages"].values()} == {"done"}
    assert checkpoints(train) == trained  # a finished stage is left alone
    assert (files_of(rollouts) | files_of(responses)).items() >= kept.items()
    prompts = load_prompts(config.prompts)
    assert_rows(rollouts, [Plan(prompts, 8, config.seed)])
    held_out = [prompt for prompt in prompts if prompt.held_out]
    settings = [setting_key(strengths) for strengths in config.evaluation.strengths]
    assert_rows(responses, [Plan(held_out, 4, config.seed, setting=setting) for setting in settings])
    assert ValueModel.load(str(run / "value" / "default")).objectives == ("brief", "words")
    history = json.loads((run / "value" / "default" / "training.json").read_text())
    assert [entry["epoch"] for entry in history] == list(range(1, EPOCHS + 1))
    assert pq.read_table(run / "evaluation" / "results.parquet").num_rows == 18
    assert (run / "evaluation" / "report.html").exists()


def assert_rows(folder: Path, plans: list[Plan]) -> None:
    """The folder holds the plans' rows, each once, none failed."""
    rows = read_rollouts(str(folder))
    expected = [plan.rollout_id(prompt, n) for plan in plans for prompt in plan.prompts for n in range(plan.samples)]
    assert sorted(rows["rollout_id"].to_pylist()) == sorted(expected)
    assert rows["error"].null_count == rows.num_rows
