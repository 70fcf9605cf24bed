"""OpenAI-compatible servers for tests: one whose faults are told to it, and one in front of another."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextlib.contextmanager
def proxy(
    url: str,
    change: Callable[[str, dict[str, Any]], tuple[int, dict[str, str], Any] | None],
    alter: Callable[[Any], None] = lambda answer: None,
) -> Iterator[str]:
    """In front of a server: its base URL.

    change: is given each call's path and body, which it may alter; what it returns (status, headers, body) is answered
    instead of asking the server. alter: may change what the server answers.
    """

    class Front(FaultyServer):
        def _take(self, body, headers, path=""):
            told = change(path, body)
            if told is not None:
                return told
            request = urllib.request.Request(url + path.removeprefix("/v1"), json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    found = json.loads(answer.read())
                    alter(found)
                    return answer.status, {}, found
            except urllib.error.HTTPError as error:
                return error.code, {}, error.read().decode()

    with Front(None).serve() as front:
        yield front


class FaultyServer:
    """Answers the n-th request as told: (status, headers, body), or None to hang up; then `answer` for good.

    A body that is not a string is sent as JSON.
    """

    def __init__(self, answer: Any, faults: list[tuple[int, dict[str, str], Any] | None] | None = None) -> None:
        self.answer, self.faults = answer, list(faults or [])
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.seconds = 0.0
        """How long each answer takes."""
        self._lock = threading.Lock()

    def _take(
        self, body: dict[str, Any], headers: dict[str, str], path: str = ""
    ) -> tuple[int, dict[str, str], Any] | None:
        with self._lock:
            self.asked.append(body)
            self.headers.append(headers)
            return self.faults.pop(0) if self.faults else (200, {}, self.answer)

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """Its base URL, while it serves."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with outer._lock:
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = outer._take(body, dict(self.headers), self.path)
                time.sleep(outer.seconds)
                with outer._lock:
                    outer.at_once -= 1
                if answer is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, headers, content = answer
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            server.server_close()
