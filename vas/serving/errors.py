"""Errors as OpenAI's API says them: a status, and a body that names the kind, the parameter and what to do."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

MOST = 500  # characters of a message
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    503: "overloaded_error",
}


def _sendable(text: str) -> str:
    """No longer than it should be, and without halves of surrogate pairs."""
    return text[:MOST].encode("utf-8", "replace").decode()


class ApiError(Exception):
    """What a client is told instead of an answer.

    status: HTTP's. param: the part of the request that is wrong. retry_after: seconds until it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(_sendable(message))  # it may quote the client
        self.status, self.code, self.retry_after = status, code, retry_after
        self.param = param and _sendable(param)

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message": …, "type": …, "param": …, "code": …}}`."""
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As an HTTP response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)
