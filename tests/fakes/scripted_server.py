"""An OpenAI-compatible server with scripted behaviours, good and bad."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from selfteach.feedback.critics.critic_healthcheck import PROMPT

Behaviour = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
"""Responds to one request, given its parsed body."""


class Server:
    """Records requests and runs one behaviour per request; the last one is repeated for ever."""

    def __init__(self, *behaviours: Behaviour, port: int = 0) -> None:
        self.behaviours = list(behaviours)
        self.requests: list[dict[str, Any]] = []
        self.listing: Behaviour = lists("m", "oracle")
        """Responds to the request for its list of models, which is not recorded."""
        self.answers_checks = True
        """Whether the healthcheck's request gets a plain reply; else it is a request like any other."""
        self.checks: list[dict[str, Any]] = []
        """The healthcheck's requests that got one."""
        self.in_flight = self.max_in_flight = 0
        self._lock = threading.Lock()
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                script.listing(self, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                behave = script.begin(
                    {**body, "headers": {k.lower(): v for k, v in self.headers.items()}}
                )
                try:
                    behave(self, body)
                finally:
                    script.end()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # some tests have clients that hang up
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def begin(self, body: dict[str, Any]) -> Behaviour:
        with self._lock:
            if self.answers_checks and body.get("messages", [{}])[-1].get("content") == PROMPT:
                self.checks.append(body)
                self.in_flight += 1
                return says("1")
            self.requests.append(body)
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            return self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]

    def end(self) -> None:
        with self._lock:
            self.in_flight -= 1

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving(*behaviours: Behaviour) -> Iterator[Server]:
    """Run a server for the length of a block."""
    server = Server(*behaviours)
    try:
        yield server
    finally:
        server.stop()


def completion(text: str | None, finish: str = "stop") -> dict[str, Any]:
    """Return the body of a well-formed completion."""
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        ],
        "usage": {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27},
    }  # fmt: skip


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    """Send one whole response."""
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def says(text: str | Callable[[dict[str, Any]], str] | None, finish: str = "stop") -> Behaviour:
    """Respond with a completion of this text, or of what a function returns for the request."""
    return lambda handler, body: send(
        handler,
        200,
        json.dumps(completion(text(body) if callable(text) else text, finish)).encode(),
    )


def refuses(status: int, **headers: str) -> Behaviour:
    """Respond with an error status and headers."""
    return lambda handler, _: send(handler, status, b'{"error": {"message": "no"}}', **headers)


def raw(body: bytes) -> Behaviour:
    """Respond with these bytes and status 200."""
    return lambda handler, _: send(handler, 200, body)


def errs(status: int, message: str, **headers: str) -> Behaviour:
    """Respond with an error status and these words."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()
    return lambda handler, _: send(handler, status, body, **headers)


def says_with(**changes: Any) -> Behaviour:
    """Respond with a completion in which ``content``, ``finish_reason`` or ``usage`` is replaced."""
    whole = completion("")
    choice = whole["choices"][0]
    if "content" in changes:
        choice["message"]["content"] = changes.pop("content")
    if "refusal" in changes:
        choice["message"]["refusal"] = changes.pop("refusal")
    if "finish_reason" in changes:
        choice["finish_reason"] = changes.pop("finish_reason")
    return raw(json.dumps({**whole, **changes}).encode())


def _for_ever(handler: BaseHTTPRequestHandler, data: bytes, pause_s: float) -> None:
    while True:  # until the client hangs up
        handler.wfile.write(data)
        handler.wfile.flush()
        if pause_s:
            time.sleep(pause_s)


def drips_headers(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Send the status and then a header, letter by letter, without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    _for_ever(handler, b"a", 0.05)


def continues(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Send one interim response after the other."""
    _for_ever(handler, b"HTTP/1.1 100 Continue\r\n\r\n", 0.01)


def drips_body(status: int) -> Behaviour:
    """Respond with a status and a body that comes byte by byte, without end."""

    def behave(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        _for_ever(handler, b" ", 0.05)

    return behave


def floods(status: int, sent: list[int], encoding: str | None = None) -> Behaviour:
    """Respond with a status and a gigabyte, compressed if an encoding is named; count its parts."""
    chunk = b" " * 1_000_000

    def behave(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        if encoding:
            handler.send_header("Content-Encoding", encoding)
        handler.end_headers()
        zipped = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16) if encoding else None
        for _ in range(1000):
            handler.wfile.write(zipped.compress(chunk) if zipped else chunk)
            sent.append(1)

    return behave


def lists(*models: str) -> Behaviour:
    """Respond with a list of models."""
    data = [{"id": name, "object": "model", "created": 1, "owned_by": "us"} for name in models]
    return raw(json.dumps({"object": "list", "data": data}).encode())


def stalls(seconds: float) -> Behaviour:
    """Respond after so many seconds."""

    def behave(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        says("late")(handler, body)

    return behave


def trickles(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Send a byte now and then for as long as the client reads."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def cuts(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Announce more than is sent, and close the connection."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", "choi')
    handler.wfile.flush()
    handler.connection.close()
