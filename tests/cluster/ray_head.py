"""What the tests of jobs share: a cluster as cluster/on-premise/start.sh begins it, and a run that is to be trained."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx
import psutil
import yaml
from command import ROOT, python_environment, tiny_content
from tools import wait_until


def brief_config(folder: Path) -> Path:
    """A config whose training takes seconds, in a folder."""
    changes = {
        "value": {"layers": 1, "bins": 11},
        "train": {"epochs": 1, "batch_size": 4, "micro_batch_size": 2, "track": []},
        "resources": {"cpus_per_worker": 1},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_content(folder, **changes), sort_keys=False))
    return file


START = str(ROOT / "cluster" / "on-premise" / "start.sh")
SMALL = ("--disable-usage-stats", f"--object-store-memory={100 * 2**20}", "--block")


@dataclass
class Head:
    """A cluster that cluster/on-premise/start.sh began, which wants a token."""

    address: str
    """Of Ray itself, HOST:PORT."""
    url: str
    """Of its dashboard and job API."""
    folder: Path
    environment: dict[str, str]
    """What its machines were started with, and their commands need."""
    machines: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def client(self) -> dict[str, str]:
        """What a client of the job API needs in its environment."""
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
        return {name: self.environment[name] for name in names} | {"RAY_API_SERVER_ADDRESS": self.url}

    def add(self, role: str, *more: str) -> subprocess.Popen[bytes]:
        """Start another machine, as `ray start` options say, and wait until it has joined."""
        there = set(self.alive())
        machine = self.start("worker", self.address, role, *SMALL, *more)
        wait_until(lambda: set(self.alive()) - there, 60, "the machine joins", 0.3)
        return machine

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Run the script in the background, with ports that are free."""
        ports = {"FIRST_PORT": self.address.partition(":")[2] if words[0] == "head" else str(free_row(8))}
        with (self.folder / "output.txt").open("ab") as opened:
            machine = subprocess.Popen(
                ["bash", START, *words], stdout=opened, stderr=subprocess.STDOUT, env=self.environment | ports
            )
        self.machines.append(machine)
        return machine

    def alive(self) -> list[str]:
        """The machines' ids."""
        found = get(f"{self.url}/nodes?view=summary", self.token).json()["data"]["summary"]
        return [node["raylet"]["nodeId"] for node in found if node["raylet"].get("state") == "ALIVE"]

    @property
    def token(self) -> str:
        return Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def stop(self) -> None:
        """End every process; an orderly end takes half a minute."""
        for machine in self.machines:
            kill_all(machine)


def kill_all(machine: subprocess.Popen[bytes]) -> None:
    """A machine loses its power."""
    with contextlib.suppress(psutil.NoSuchProcess):
        everyone = [*psutil.Process(machine.pid).children(recursive=True), machine]
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    machine.wait(timeout=30)


def submit(folder: Path, *words: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `vas submit WORDS` in a folder, to its end."""
    command = [sys.executable, "-m", "vas.cli.main", "submit", *words]
    known = python_environment() | environment
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, env=known)
    print(found.stdout[-4000:], found.stderr[-2000:])
    return found


def get(url: str, token: str | None = None) -> httpx.Response:
    """GET, with the cluster's token or none."""
    return httpx.get(url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=30)


@contextlib.contextmanager
def ray_head(*more: str, port: int | None = None, **environment: str) -> Iterator[Head]:
    """A Ray cluster of one machine with 3 CPUs, beside others that may run here; `more` are options of `ray start`."""
    port, dashboard = port or free_row(8), free_row(1)
    # a folder of its own, so that nobody else's ray.init finds this cluster; short, for its sockets lie in it
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as name:
        folder = Path(name)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `ray`, and jobs' `python`
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        known = python_environment() | token | {"PATH": path, "DASHBOARD_PORT": str(dashboard)} | environment
        head = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", folder, known)
        try:
            first = head.start("head", *SMALL, f"--temp-dir={folder}", *(more or ["--num-cpus=3"]))
            wait_until(lambda: listens(dashboard) or first.poll() is not None, 120, "the dashboard listens", 0.2)
            assert first.poll() is None, head.output
            wait_until(head.alive, 60, "the head is there", 0.2)
            yield head
        finally:
            head.stop()


def free_row(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        first = random.randrange(20000, 32000)  # below those that systems hand out
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
