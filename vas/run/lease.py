"""A lock on S3: an object that its holder renews every few seconds. One that is not renewed is nobody's.

All changes are conditional (If-None-Match, If-Match), so that of two that try the server lets one through. How old
a lease is, the server's clock says, or its not changing while one watches; clocks of two machines are not compared.
"""

from __future__ import annotations

import signal
import threading
import time

from vas import s3
from vas.errors import VasError
from vas.progress import console
from vas.run.holder import Holder, loss, refusal

LEASE_S = 15.0  # a lease that was not renewed for so long is nobody's
RENEW_S = 4.0
_AGAIN_S = 0.5  # pause before asking again


class Lease:
    """A lease on a run, from its making to `release`.

    If another process takes it over, the main thread is interrupted and `check` raises.
    """

    def __init__(self, file: str, location: str) -> None:
        """Take the lease. Raises VasError if another process has it.

        Where that cannot be told (another machine's, not renewed just now), it watches for up to LEASE_S.
        """
        self._file, self._location = file, location
        self._me, self._renewals = Holder.me(), 0
        self._lost: VasError | None = None
        self._ended = threading.Event()
        s3.objects(hurried=True)  # takes a second or two to make, which the lease is not to lose once it runs
        self._etag = self._take()
        self._by_main = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._keep, name="vas-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises VasError if another process took the run over."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Remove the lease, unless it is another's. Without an answer it is left to run out."""
        self._ended.set()
        self._thread.join()
        for _ in range(6):
            try:
                # Renewed just now, nobody takes it over before it is removed. Not one removal that is tried again
                # and again: the second might meet the lease of who came after the first.
                if self._renew():
                    s3.objects(hurried=True).delete(self._file)
                return
            except VasError:
                time.sleep(_AGAIN_S)

    def _take(self) -> str:
        """The version of the lease, once it is ours."""
        objects, mine = s3.objects(), self._me.to_bytes()
        first: str | None = None  # the version that was found first
        watched_from = 0.0
        while True:
            if (etag := objects.write_new(self._file, mine)) is not None:
                return etag
            asked = time.monotonic()
            found = objects.read(self._file)
            if found is None:  # it has just ended
                continue
            holder = Holder.read(found.content)
            if first is not None and found.etag != first:
                raise refusal(holder, self._location)  # renewed, or taken by a third
            gone = holder is not None and holder.gone()
            if gone or found.age_s > LEASE_S or (first is not None and asked - watched_from > LEASE_S):
                if (etag := objects.write_over(self._file, mine, found.etag)) is not None:
                    end = "has ended" if gone else "has not been heard of any more"
                    console.print(f"going on     after {holder or 'another process'}, which {end}", highlight=False)
                    return etag
            elif first is None:
                since = f" since {holder.since}" if holder else ""
                console.print(
                    f"waiting      up to {LEASE_S:.0f} s, to see whether {holder or 'another process'} "
                    f"still works on this run{since}",
                    highlight=False,
                )
            if first is None:
                first, watched_from = found.etag, time.monotonic()
            time.sleep(_AGAIN_S)

    def _keep(self) -> None:
        """Renew the lease until it is released or lost."""
        pause = RENEW_S
        while not self._ended.wait(pause):
            try:
                if not self._renew():
                    if self._by_main:
                        _interrupt_main()
                    return
                pause = RENEW_S
            except VasError:  # the server does not answer now, which says nothing of who has the lease
                pause = _AGAIN_S

    def _renew(self) -> bool:
        """Renew the lease once; False if it is another's. Raises VasError if there is no answer."""
        objects = s3.objects(hurried=True)
        while self._lost is None:
            self._renewals += 1
            content = self._me.to_bytes(self._renewals)
            etag = objects.write_over(self._file, content, self._etag)
            found = None if etag else objects.read(self._file)
            if etag is None and found is None:  # somebody removed the file
                etag = objects.write_new(self._file, content)
                found = None if etag else objects.read(self._file)
            if etag is not None:
                self._etag = etag
                return True
            if found is None:  # removed again
                continue
            holder = Holder.read(found.content)
            if holder is not None and holder.token == self._me.token:  # a renewal of ours, whose answer was lost
                self._etag = found.etag
            else:
                self._lost = loss(holder, self._location)
        return False


def _interrupt_main() -> None:
    """Wake the main thread, whatever it waits for, as Ctrl-C does; what is begun with `&` may be deaf to that."""
    deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM if deaf else signal.SIGINT)
