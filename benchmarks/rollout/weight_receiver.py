"""Take weights in place of a vLLM server: its worker extension behind HTTP, and copies to a device.

    python benchmarks/rollout/weight_receiver.py DEVICE

A process of its own, as a server is. It prints its port, and ends with its parent.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from selfteach.rollout.vllm.worker_extension import StreamedWeights


class Receiver(StreamedWeights):
    """Does with new weights what vLLM's worker does: copies them over those in use."""

    def __init__(self, device: str) -> None:
        self._device, self._in_use = device, dict[str, torch.Tensor]()

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Copy weights to the device; the first time it also makes room for them."""
        for name, value in weights_iterator:
            if name not in self._in_use:
                self._in_use[name] = torch.empty_like(value, device=self._device)
            self._in_use[name].copy_(value)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


@contextmanager
def receiving(device: str) -> Iterator[Any]:
    """Start a receiver; yields a function that waits for it and returns its address."""
    command = [sys.executable, __file__, device]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # its end of the pipe closes with this process, however that ends
    assert process.stdout is not None
    lines = process.stdout

    def address() -> str:
        return f"http://127.0.0.1:{int(lines.readline())}"

    try:
        yield address
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Serve until the parent's end of the pipe closes."""
    worker = Receiver(sys.argv[1])

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # else a reply waits 40 ms between its header and its body

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            method = getattr(worker, body["method"])
            reply = json.dumps({"results": [method(**body.get("kwargs", {}))]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    main()
