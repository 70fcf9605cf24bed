"""One process works on a run at a time: `run.lock`, in the run directory, says which.

On disk the lock is the kernel's (flock), so it ends with the process; on S3 it is a lease (`vas.run.lease`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vas import storage
from vas.errors import VasError
from vas.progress import console
from vas.run.holder import Holder, loss, refusal
from vas.run.lease import Lease

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_guard = threading.RLock()
_held: dict[str, tuple[FileLock | Lease | None, int]] = {}  # locks of this process by location, and how deep it is in


@contextmanager
def hold(location: str) -> Iterator[FileLock | Lease | None]:
    """Work on the run at `location`, alone; within one process, blocks may lie inside each other.

    Yields the lock, or None where there are none. Raises VasError if another process works on the run; the block
    ends with a VasError if another took it over.
    """
    with _guard:
        lock, depth = _held.get(location, (None, 0))
        if not depth:
            lock = _take(location)
        _held[location] = lock, depth + 1
    try:
        yield lock
    except BaseException:
        if isinstance(lock, Lease):
            lock.check()  # it is what ended the block, in whatever guise
        raise
    finally:
        with _guard:
            lock, depth = _held.pop(location)
            if depth > 1:
                _held[location] = lock, depth - 1
            elif lock is not None:
                lock.release()


def taken_over(location: str) -> VasError:
    """The error of a process that finds the run changed by another."""
    found = storage.read_version(storage.join(location, "run.lock"))
    holder, me = Holder.read(found[0]) if found else None, Holder.me()
    if holder is not None and (holder.machine, holder.pid) == (me.machine, me.pid):
        holder = None  # who changed the run did so without its lock
    return loss(holder, location)


def _take(location: str) -> FileLock | Lease | None:
    file = storage.join(location, "run.lock")
    if location.startswith("s3://"):
        return Lease(file, location)
    if not storage.is_remote(location):
        with suppress(_NoLocksError):
            return FileLock(file, location)
    console.print(f"[yellow]There are no locks at {location}:[/yellow] see that no other process works on this run.")
    return None


class _NoLocksError(Exception):
    """The file system knows no locks."""


class FileLock:
    """The kernel's lock on a file, from its making to `release` or the process's end."""

    def __init__(self, file: str, location: str) -> None:
        """Raises VasError if another process has it, or the file cannot be written."""
        self._file = file
        try:
            os.makedirs(location, exist_ok=True)
            while not self._opened():
                pass
            os.truncate(self._descriptor, 0)
            os.write(self._descriptor, Holder.me().to_bytes())
        except BlockingIOError:
            raise refusal(_holder(file), location) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise _NoLocksError from None
            mend = "check the path, its rights and free space"
            raise VasError(f"cannot write here: {error.strerror}", file, mend) from None

    def _opened(self) -> bool:
        """Open and lock the file; False if who had it removed it meanwhile. Raises OSError."""
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_there():
                return True
        except OSError:
            os.close(self._descriptor)
            raise
        os.close(self._descriptor)
        return False

    def _is_there(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._file))
        return False

    def release(self) -> None:
        """Remove the file, then let go of it."""
        with suppress(OSError):
            if self._is_there():
                os.unlink(self._file)
        os.close(self._descriptor)


def _holder(file: str) -> Holder | None:
    """Who has the file; it may be about to write that."""
    for _ in range(20):
        with suppress(OSError), open(file, "rb") as opened:
            if holder := Holder.read(opened.read()):
                return holder
        time.sleep(0.05)
    return None
