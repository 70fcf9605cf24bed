"""What every HTTP request passes: its id, its key, its size, and its line in the access log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import TaskCancelledError

from vas.serving.errors import ApiError

if TYPE_CHECKING:
    from vas.serving.gateway import Gateway

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("ray.serve.vas")
access = logging.getLogger("ray.serve.vas.access")

OPEN = "/health"
PAGES = ("/", "/docs")  # for browsers, which ask for a password and then send it with all that a page asks for
CLOSED_BY_CLIENT = 499


class Front:
    """ASGI middleware around the gateway's routes."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gateway: Gateway = serve.get_replica_context().servable_object
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get(b"x-request-id", "")[:64]  # Serve gives one to requests that bring none
        started, status, caller, begun, ended = time.perf_counter(), 500, "", False, False

        async def answer(message: Message) -> None:
            nonlocal status, begun, ended
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
            elif not message.get("more_body"):
                ended = True
            await send(message)

        scope.setdefault("state", {})
        try:
            try:
                if scope["path"] != OPEN:
                    who = gateway.doorkeeper.admit(_authorization(scope["method"], headers))
                    scope["state"]["caller"], caller = who, who.name
                length = headers.get(b"content-length", "0")
                if length.isdecimal() and int(length) > gateway.gate.limits.body_bytes:
                    raise too_large(gateway.gate.limits.body_bytes)
            except ApiError as error:
                response = error.response()
                if error.status == 401 and scope["path"] in PAGES:
                    response.headers["WWW-Authenticate"] = 'Basic realm="the password is an API key", Bearer'
                await response(scope, receive, answer)
                return
            await self._app(scope, receive, answer)
            if not ended:  # the client left, and there was nobody to send the rest to
                status = CLOSED_BY_CLIENT
        except asyncio.CancelledError:
            status = CLOSED_BY_CLIENT
            raise
        except TaskCancelledError:  # what Serve's `receive` raises for it
            status = CLOSED_BY_CLIENT
        except Exception:
            logger.exception("request %s failed", request_id)
            if begun:
                status = 500
            else:
                await ApiError(500, "the server failed").response()(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            if status == CLOSED_BY_CLIENT:
                gateway.metrics.disconnect()
            gateway.metrics.request(route, status, caller, seconds)
            line = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            line |= {"seconds": round(seconds, 4), "key": caller} | scope["state"].get("log", {})
            access.info(json.dumps(line))


def _authorization(method: str, headers: dict[bytes, str]) -> str | None:
    """The header; a browser's only with what no form of another site can make it send: a GET, or JSON."""
    given = headers.get(b"authorization")
    kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if given and given.lower().startswith("basic ") and method != "GET" and kind != "application/json":
        return None
    return given


def too_large(limit: int) -> ApiError:
    """A body larger than the limit."""
    return ApiError(413, f"the body is larger than {limit:,} bytes", code="body_too_large")


async def body_of(receive: Receive, limit: int) -> bytes:
    """The body of a request. Raises ApiError once it is larger than the limit, whatever its headers said."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(CLOSED_BY_CLIENT, "the client left")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large(limit)
        if not message.get("more_body"):
            return b"".join(parts)
