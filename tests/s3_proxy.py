"""A real HTTP proxy before a real S3 server, which makes some requests fail as real networks and stores do.

with s3_proxy(server, rate=0.2, seed=1, kinds=["slow_down", "reset_after"]) as proxy:
    ...  # with proxy.environment, in this process or in others
    assert proxy.injected["reset_after"] > 0
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

import psutil
from s3_server import S3Server

# kind of fault → what becomes of a request
KINDS = {
    "error": "is answered with 500 and does not reach the server",
    "slow_down": "is answered with 503 SlowDown and does not reach the server",
    "reset_before": "does not reach the server; the connection is reset",
    "reset_after": "takes effect, but the connection is reset before the answer",
    "error_after": "takes effect, but is answered with 500",
    "cut": "takes effect, but the connection is reset in the middle of the answer",
    "stall": "reaches the server only after `stall_s` seconds",
}
# kind of fault → what becomes of the process that asks; only where it is planned
KILLS = {
    "kill_before": "is killed before its request reaches the server",
    "kill_after": "is killed when its request has taken effect, before the answer",
}
_ERRORS = {"error": (500, "InternalError"), "error_after": (500, "InternalError"), "slow_down": (503, "SlowDown")}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}


class S3Proxy:
    """The proxy while it runs.

    environment: of clients that go through it. rate: share of requests that fail; may be changed at any time.
    requests, injected: how many requests came, and how many faults of each kind they met.
    """

    def __init__(self, server: S3Server, rate: float, seed: int, kinds: Sequence[str], only: str, stall_s: float):
        self.rate, self.stall_s = rate, stall_s
        self.requests = 0
        self.injected: Counter[str] = Counter()
        self.upstream = urlparse(server.endpoint).netloc
        self._kinds, self._only, self._random = list(kinds), re.compile(only), random.Random(seed)
        self._planned: deque[tuple[re.Pattern[str], str]] = deque()
        self._guard = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = server.environment | {"AWS_ENDPOINT_URL": self.endpoint}

    def plan(self, *kinds: str, only: str = "") -> None:
        """Faults of KINDS or KILLS for the next requests that match, one each, whatever the rate; "" passes one."""
        assert {"", *KINDS, *KILLS} >= set(kinds)
        with self._guard:
            self._planned.extend((re.compile(only), kind) for kind in kinds)

    def fault(self, request: str) -> str:
        """The fault that a request meets; "" for none. request: `METHOD /bucket/key?query`."""
        with self._guard:
            self.requests += 1
            if self._planned and self._planned[0][0].search(request):
                kind = self._planned.popleft()[1]
            else:
                unlucky = self._only.search(request) and self._random.random() < self.rate
                kind = self._random.choice(self._kinds) if unlucky else ""
            if kind:
                self.injected[kind] += 1
            return kind


@contextlib.contextmanager
def s3_proxy(
    server: S3Server,
    rate: float = 0.0,
    seed: int = 0,
    kinds: Sequence[str] = tuple(KINDS),
    only: str = "",
    stall_s: float = 1.0,
) -> Iterator[S3Proxy]:
    """Run a proxy before the server. only: a regular expression; other requests are passed as they are."""
    assert KINDS.keys() >= set(kinds)
    proxy = S3Proxy(server, rate, seed, kinds, only, stall_s)
    thread = threading.Thread(target=proxy._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy._server.shutdown()
        proxy._server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # clients keep connections open
    request_queue_size = 64
    proxy: S3Proxy

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # no FIN before it: a connection to be reset must not look ended

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has left


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self._body()
        proxy = self.server.proxy
        fault = proxy.fault(f"{self.command} {self.path}")
        if fault == "stall":
            time.sleep(proxy.stall_s)
        answer = None if fault in ("reset_before", "error", "slow_down", "kill_before") else self._forward(body)
        if fault in KILLS:
            _kill_owner(self.client_address)
        if fault in ("reset_before", "reset_after", *KILLS):
            self._reset()
        elif fault in _ERRORS or answer is None:
            self._refuse(*_ERRORS[fault])
        else:
            self._pass_on(*answer, cut=fault == "cut")

    def _pass_on(self, status: int, reason: str, headers: list[tuple[str, str]], content: bytes, cut: bool) -> None:
        """Answer as the server did, or, to cut it, with half of that."""
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if (
            self.command != "HEAD"
            and status not in (204, 304)
            and "content-length" not in {n.lower() for n, _ in headers}
        ):
            self.send_header("Content-Length", str(len(content)))  # it came in chunks
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._reset()

    def _body(self) -> bytes:
        """The request's body; what `aws-chunked` says inside it is the server's business."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _forward(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        """Ask the server: status, reason, headers and content of its answer.

        All headers go as they came, Host above all: they are signed.
        """
        upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=120)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            if "Content-Length" not in self.headers and "Transfer-Encoding" in self.headers:
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders()
            upstream.send(body)
            answer = upstream.getresponse()
            return answer.status, answer.reason, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        content = b""
        if self.command != "HEAD":
            content = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code></Error>'.encode()
            self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def _kill_owner(address: tuple[str, int]) -> None:
    """SIGKILL the process whose end of a connection this is."""
    for connection in psutil.net_connections("tcp"):
        if connection.laddr == address and connection.pid:
            psutil.Process(connection.pid).kill()
            return
    raise RuntimeError(f"nobody holds {address}")
