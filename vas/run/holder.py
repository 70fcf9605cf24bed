"""Who works on a run: what a lock says of the process that holds it."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from vas.errors import VasError


@dataclass(frozen=True)
class Holder:
    """A process that works on a run.

    machine: tells machines, their boots and their containers apart, for a pid means something in one of them only.
    began: when the process began, in seconds since 1970; since: when it took the lock.
    token: of this one hold, so that a holder knows its own lock again.
    """

    user: str
    host: str
    machine: str
    pid: int
    began: float
    since: str
    token: str

    @classmethod
    def me(cls) -> Holder:
        """This process, from now on."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have no name
            user = str(os.getuid())
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        pid = os.getpid()
        return cls(user, socket.gethostname(), _machine(), pid, _began(pid) or 0.0, since, uuid.uuid4().hex)

    @classmethod
    def read(cls, content: bytes) -> Holder | None:
        """The holder that a lock names; None if it names none."""
        try:
            known = json.loads(content)
            return cls(**{name: known[name] for name in cls.__dataclass_fields__})
        except (ValueError, KeyError, TypeError):
            return None

    def to_bytes(self, renewals: int = 0) -> bytes:
        """What the lock's file holds; every renewal is another content, and so another ETag."""
        return json.dumps(asdict(self) | {"renewals": renewals}, indent=2).encode()

    def gone(self) -> bool:
        """True if the process is known to have ended; one of another machine is not known to."""
        if self.machine != _machine():
            return False
        began = _began(self.pid)
        return began is None or abs(began - self.began) > 2  # another process has the pid by now

    def __str__(self) -> str:
        return f"{self.user}@{self.host} (process {self.pid})"


def refusal(holder: Holder | None, location: str) -> VasError:
    """Why a run cannot be worked on: another process does."""
    if holder is None:
        return VasError("another process works on this run", location, "wait for it to end, or stop it")
    mend = f"wait for it to end, or stop it there (kill {holder.pid}); another run takes another `name`"
    return VasError(f"{holder} has been working on this run since {holder.since}", location, mend)


def loss(holder: Holder | None, location: str) -> VasError:
    """Why a run cannot be worked on any longer."""
    who = f"{holder} took this run over at {holder.since}" if holder else "another process has changed this run"
    return VasError(who, location, "leave it to the other one, or give the same command again once that has ended")


def _began(pid: int) -> float | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    return None


def _machine() -> str:
    with suppress(OSError):  # Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.getnode()}"
