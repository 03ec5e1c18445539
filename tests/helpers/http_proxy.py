"""Stands in front of a server: delays its replies, swallows requests, and counts them."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit


class Proxy:
    """Passes HTTP requests on to a server at an address."""

    def __init__(self, address: str) -> None:
        self.delay_s = 0.0
        """Before each completion."""
        self.swallows: Callable[[str, bytes], bytes | None] = lambda path, body: None
        """Returns a reply for requests that the server does not get."""
        self.bodies: list[tuple[str, bytes]] = []
        target, proxy = urlsplit(address).netloc, self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._pass("GET", b"")

            def do_POST(self) -> None:
                self._pass("POST", self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, format: str, *args: object) -> None:
                pass

            def _pass(self, method: str, body: bytes) -> None:
                proxy.bodies.append((self.path, body))
                if self.path.endswith("/completions"):
                    time.sleep(proxy.delay_s)
                reply, status = proxy.swallows(self.path, body), 200
                if reply is None:
                    status, reply = self._reply(method, body)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def _reply(self, method: str, body: bytes) -> tuple[int, bytes]:
                connection = http.client.HTTPConnection(target, timeout=600)
                try:
                    headers = {"Content-Type": "application/json"} if body else {}
                    connection.request(method, self.path, body or None, headers)
                    response = connection.getresponse()
                    return response.status, response.read()
                finally:
                    connection.close()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a killed server closes connections
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def rollouts(self) -> int:
        """Return how many completions of more than one token were requested."""
        pairs = [(path, body) for path, body in self.bodies if path == "/v1/completions"]
        return sum(b'"max_tokens":1,' not in body.replace(b" ", b"") for _, body in pairs)


@contextmanager
def proxied(address: str) -> Iterator[Proxy]:
    """Run a proxy within a block."""
    proxy = Proxy(address)
    Thread(target=proxy.http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.http.shutdown()
        proxy.http.server_close()
