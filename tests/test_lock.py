"""One process works on a run at a time, on disk and on S3, whatever becomes of the others."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from command import python_environment
from s3_proxy import s3_proxy
from test_run_directory import run_config

from vas import storage
from vas.errors import VasError
from vas.run import lease, lock
from vas.run.directory import RunDirectory
from vas.run.holder import Holder

# holds a run until its input ends, with what VasErrors say on its output
WORKER = """
import sys
from vas.run.directory import RunDirectory
from vas.errors import VasError
from vas.run import lease
lease.LEASE_S, lease.RENEW_S = float(sys.argv[2]), 0.3
try:
    with RunDirectory.open(sys.argv[1]).stage("rollouts"):
        print("held", flush=True)
        sys.stdin.read()
    print("done", flush=True)
except VasError as error:
    print("refused:", " | ".join(str(error).splitlines()), flush=True)
"""


class Worker:
    """Such a process."""

    def __init__(self, location: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, location, str(lease.LEASE_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=python_environment(),
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def says(self) -> str:
        return self.process.stdout.readline().strip()

    def end(self) -> str:
        self.process.stdin.close()
        return self.says()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture(params=["disk", "s3"])
def runs_dir(request, tmp_path):
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")


@pytest.fixture
def workers() -> Iterator:
    """Starts workers; none outlives the test."""
    started: list[Worker] = []

    def start(location: str) -> Worker:
        started.append(Worker(location))
        return started[-1]

    yield start
    for worker in started:
        worker.process.kill()
        worker.process.wait()


@pytest.fixture(autouse=True)
def renewed_often(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.3)


@pytest.fixture
def short_lease(monkeypatch):
    """For tests that wait until one has run out."""
    monkeypatch.setattr(lease, "LEASE_S", 2.5)


def test_of_two_one_works_and_the_other_is_told_who(runs_dir, workers):
    run = RunDirectory.create(run_config(runs_dir))
    both = [workers(run.location) for _ in range(2)]
    with contextlib.suppress(VasError):  # reading needs no lock
        RunDirectory.open(run.location)
    said = {worker: worker.says() for worker in both}
    (winner,) = (worker for worker in both if said[worker] == "held")
    (loser,) = (worker for worker in both if worker is not winner)
    user = psutil.Process().username()
    assert f"{user}@{os.uname().nodename} (process {winner.pid}) has been working on this run" in said[loser]
    assert f"where: {run.location}" in said[loser]
    assert f"mend:  wait for it to end, or stop it there (kill {winner.pid})" in said[loser]
    with pytest.raises(VasError, match=f"process {winner.pid}"), run.stage("train"):
        pass
    assert winner.end() == "done"
    with run.held():
        assert run.done("rollouts"), "what the winner did is known"
    assert not storage.exists(run.path("run.lock"))


def test_one_process_may_hold_a_run_twice(runs_dir):
    run = RunDirectory.create(run_config(runs_dir))
    with run.held(), run.stage("prompts"):
        with RunDirectory.open(run.location).held():
            pass
        assert storage.exists(run.path("run.lock"))
    assert not storage.exists(run.path("run.lock"))
    assert RunDirectory.open(run.location).done("prompts")


def test_a_killed_holder_holds_nothing(runs_dir, workers, capsys):
    run = RunDirectory.create(run_config(runs_dir))
    victim = workers(run.location)
    assert victim.says() == "held"
    victim.signal(signal.SIGKILL)
    with run.held():
        assert run.about("rollouts")["state"] == "running"
    assert "waiting" not in capsys.readouterr().err, "it is known to have ended"


def test_a_run_that_is_begun_by_two_at_once_is_one_run(runs_dir):
    code = (
        "import sys; from vas.config import RunConfig; from vas.run.directory import RunDirectory\n"
        "config = RunConfig.model_validate_json(sys.argv[1]); print('ready', flush=True)\n"
        "sys.stdin.readline(); print(RunDirectory.create(config).location)"
    )
    words = [sys.executable, "-c", code, run_config(runs_dir).model_dump_json()]
    both = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=python_environment())
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in both] == [f"{runs_dir}/stored\n"] * 2


def test_another_config_is_refused_to_who_comes_second(runs_dir, monkeypatch):
    """Here the second sees no run.json when it looks, and one when it writes."""
    first = RunDirectory.create(run_config(runs_dir))
    before = storage.read_bytes(first.path("run.json"))
    monkeypatch.setattr(storage, "exists", lambda location: False)
    with pytest.raises(VasError, match="another config: seed was 0, now 1"):
        RunDirectory.create(run_config(runs_dir, seed=1))
    assert RunDirectory.create(run_config(runs_dir)).location == first.location
    assert storage.read_bytes(first.path("run.json")) == before


def test_a_run_that_works_is_not_begun_anew(runs_dir, workers):
    run = RunDirectory.create(run_config(runs_dir))
    worker = workers(run.location)
    assert worker.says() == "held"
    with pytest.raises(VasError, match=f"process {worker.pid}"):
        RunDirectory.create(run_config(runs_dir, seed=1))
    assert worker.end() == "done"


# --- leases -------------------------------------------------------------------------------------


def elsewhere(**changes) -> Holder:
    """A holder on another machine."""
    return Holder(**(vars(Holder.me()) | {"host": "elsewhere", "machine": "another", "pid": 1} | changes))


def test_a_lease_from_elsewhere_is_taken_over_when_it_has_run_out(bucket, capsys, short_lease):
    run = RunDirectory.create(run_config(bucket))
    storage.write_bytes(run.path("run.lock"), elsewhere().to_bytes())
    began = time.monotonic()
    with run.held():
        assert time.monotonic() - began > 1
    said = capsys.readouterr().err
    assert "waiting" in said
    assert "elsewhere (process 1)" in said
    storage.write_bytes(run.path("run.lock"), elsewhere().to_bytes())
    time.sleep(lease.LEASE_S + 1.1)
    with run.held():
        assert "waiting" not in capsys.readouterr().err, "the server's clock says that it has run out"


def test_of_two_that_would_take_over_one_does(bucket, workers, short_lease):
    run = RunDirectory.create(run_config(bucket))
    storage.write_bytes(run.path("run.lock"), elsewhere().to_bytes())
    both = [workers(run.location) for _ in range(2)]
    assert sorted(worker.says().split(":")[0] for worker in both) == ["held", "refused"]


def test_who_was_away_too_long_stops_and_says_who_took_over(bucket, workers, short_lease):
    run = RunDirectory.create(run_config(bucket))
    holder = workers(run.location)
    assert holder.says() == "held"
    holder.signal(signal.SIGSTOP)
    try:
        with run.held():
            holder.signal(signal.SIGCONT)
            said = holder.says()  # without its input having ended: it was interrupted
            with run.stage("train"):
                pass
    finally:
        holder.signal(signal.SIGCONT)
    assert f"(process {os.getpid()}) took this run over" in said
    assert f"where: {run.location}" in said
    record = RunDirectory.open(run.location)
    assert record.done("train")
    assert record.about("rollouts")["state"] == "running", "the other one did not write after that"


def test_the_lost_lease_shows_as_such_to_whoever_was_waiting(bucket):
    run = RunDirectory.create(run_config(bucket))

    def work() -> None:
        with run.held():
            storage.write_bytes(run.path("run.lock"), elsewhere().to_bytes())
            time.sleep(30)

    with pytest.raises(VasError, match=r"elsewhere \(process 1\) took this run over"):
        work()
    assert Holder.read(storage.read_bytes(run.path("run.lock"))).host == "elsewhere", "it is left to its holder"


def test_run_json_is_not_written_over_anothers(bucket):
    run = RunDirectory.create(run_config(bucket))
    with pytest.raises(VasError, match="another process has changed this run"), run.stage("prompts"):
        storage.write_bytes(run.path("run.json"), b"{}")
    assert storage.read_bytes(run.path("run.json")) == b"{}"


def test_a_lease_outlasts_an_outage(s3_store, bucket, monkeypatch, short_lease):
    """A holder that cannot reach the server goes on, and still has its lease afterwards."""
    with s3_proxy(s3_store, kinds=["reset_before", "slow_down"]) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        run = RunDirectory.create(run_config(bucket))
        with run.stage("prompts"):
            proxy.rate = 1.0
            time.sleep(lease.LEASE_S + 0.5)
            proxy.rate = 0.0
            time.sleep(1)
    assert run.done("prompts")
    assert not storage.exists(run.path("run.lock"))


def test_a_lease_that_somebody_removed_is_written_again(bucket):
    run = RunDirectory.create(run_config(bucket))
    with run.held():
        storage.delete(run.path("run.lock"))
        time.sleep(1.0)
        assert storage.exists(run.path("run.lock"))


# --- files --------------------------------------------------------------------------------------


def test_a_lock_file_that_a_dead_process_left_is_no_lock(tmp_path):
    run = RunDirectory.create(run_config(str(tmp_path)))
    storage.write_bytes(run.path("run.lock"), elsewhere().to_bytes())
    with run.held():
        assert Holder.read(storage.read_bytes(run.path("run.lock"))).pid == os.getpid()


def test_a_place_without_rights_is_said(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VasError, match="cannot write here"), lock.hold(str(tmp_path / "file")):
        pass


def test_processes_are_told_apart():
    me = Holder.me()
    assert not me.gone()
    assert Holder(**(vars(me) | {"began": me.began - 100})).gone(), "another process has the pid"
    assert not elsewhere(pid=2**22 + 1).gone()
    assert Holder.read(me.to_bytes(3)) == me
    assert Holder.read(b"") is None
    assert Holder.read(b"[]") is None
