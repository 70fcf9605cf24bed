"""JSON over HTTP to a server that may be busy, slow or gone for a while."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from vas.errors import Rejected, VasError

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before the first retry, and at most, where the server names none
LONGEST_ASKED = 900.0  # seconds; a server that asks for more is given up on
USERS_MISTAKES = (401, 403, 404)
BUSY = (408, 409, 429)


class Meter:
    """Counts what a server is asked, and may forbid more; this one does neither."""

    def allow(self) -> None:
        """Called before each call is sent; what it raises ends it."""

    def charge(self, prompt_tokens: int, completion_tokens: int) -> None:
        """What a call has cost, as the server counts it."""


class Client:
    """POSTs JSON, with retries. One client serves many threads.

    What may pass is tried again: 408, 409, 429 and 5xx, time-outs, broken connections, answers that are not JSON.
    Pauses double from half a second to a minute, are drawn at random from the upper half, so that clients do not
    come back all at once, and are never shorter than a Retry-After.

    url: the base URL; /v1 is added if it has no path. key: sent as a bearer token. timeout: seconds an answer may take.
    meter: asked before each attempt; what it raises ends the call.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        timeout: float,
        attempts: int,
        connections: int,
        meter: Meter | None = None,
    ) -> None:
        self.url, self.attempts, self.meter = _base(url), attempts, meter or Meter()
        self.counts: Counter[str] = Counter()
        """`calls`: requests sent; `retries`: those of them that were not the first."""
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._reached = False
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 30.0)),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the server answers with.

        Raises Rejected for what no retry would mend, and VasError after the last attempt.
        """
        where = f"{self.url}/{path}"
        for attempt in range(1, self.attempts + 1):
            if self._stopped.is_set():
                raise VasError("nobody waits for the server's answer any more", where)
            self.meter.allow()
            self._count(attempt)
            asked = None
            try:
                response = self._post(where, body)
                if response.is_success:
                    return response.json()
                problem = _message(response)
                if not _may_pass(response):
                    status = response.status_code
                    raise Rejected(_error(status, problem, where), _whole(response), status)
                asked = retry_after(response.headers.get("Retry-After"))
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            except ValueError as error:  # of response.json()
                problem = f"the answer is not JSON: {error}"
            if asked is not None and asked > LONGEST_ASKED:
                problem += f" (try again after {asked:.0f} s)"
                break
            if attempt == self.attempts or self._stopped.wait(_pause(attempt, asked)):
                break
            logger.debug("attempt %d of %d failed: %s", attempt, self.attempts, problem)
        gave_up = VasError(
            f"the server gave no answer in {attempt} attempts; the last: {problem}",
            where,
            "run again, and only what failed is sampled; more patience: base.attempts, base.timeout; "
            "less load: base.concurrency",
        )
        if not self._reached:  # most likely it was never started, or this is not its address
            raise Rejected(
                VasError(f"the server cannot be reached: {problem}", where, "start it, or mend base.openai"), True
            )
        raise gave_up

    def stop(self) -> None:
        """Let requests under way end without another attempt; the client is of no use after."""
        self._stopped.set()

    def close(self) -> None:
        """Break off requests under way, too."""
        self.stop()
        self._client.close()

    def _post(self, where: str, body: dict[str, Any]) -> httpx2.Response:
        try:
            response = self._client.post(where, json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise
        except httpx2.TransportError:
            self._reached = True
            raise
        self._reached = True
        return response

    def _count(self, attempt: int) -> None:
        with self._lock:
            self.counts["calls"] += 1
            self.counts["retries"] += attempt > 1


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date; None if it says nothing."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _pause(attempt: int, asked: float | None) -> float:
    """Seconds before the next attempt."""
    most = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
    return most * random.uniform(0.5, 1) if asked is None else asked + most * random.uniform(0, 0.5)


def _may_pass(response: httpx2.Response) -> bool:
    if _code(response) == "insufficient_quota":  # OpenAI says 429 for an account without money, too
        return False
    return response.status_code in BUSY or response.status_code >= 500


def _whole(response: httpx2.Response) -> bool:
    return response.status_code in USERS_MISTAKES or _code(response) == "insufficient_quota"


def _error(status: int, message: str, where: str) -> VasError:
    mend = {
        401: "set base.api_key_env to the environment variable that holds the server's key",
        403: "use a key that may use this model",
        404: "check base.openai, and base.served_name: the model's name at that server",
    }.get(status)
    return VasError(f"the server refuses: {message}", where, mend)


def _message(response: httpx2.Response) -> str:
    """What the server says is wrong, with the status, in one line."""
    content = _content(response)
    said = content.get("error") or content.get("message") or content.get("detail")
    if isinstance(said, dict):
        said = said.get("message")
    text = " ".join(str(said or response.text or response.reason_phrase).split())
    return f"{response.status_code} {text[:300]}"


def _code(response: httpx2.Response) -> object:
    error = _content(response).get("error")
    return error.get("code") if isinstance(error, dict) else None


def _content(response: httpx2.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _base(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        parsed, problem = None, str(error)
    else:
        problem = "it must begin with http:// or https:// and name a host"
    if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host:
        raise VasError(f"not a server's address: {problem}", f"base.openai: {url}", "e.g. http://localhost:8000/v1")
    return url.rstrip("/") + ("/v1" if parsed.path in ("", "/") else "")
