"""Serve replies that take a given time: what a fleet's client needs of vLLM and of a critic's server.

    python benchmarks/rollout/timed_server.py --slots 4 --seconds 0.2 --prefill 0.2

Processes ``--slots`` requests at a time, each for ``--seconds``, and ``--prefill`` more if it has not
seen the prompt. Prints its port. Needs the standard library alone, so that it starts at once.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VOCABULARY = 32
"""Tokens of the model, all equally likely."""
END = "|"
"""Ends the part of a critic's prompt that requests about one problem share."""


class TimedServer:
    """Replies after a time; counts requests and prompts that it had not seen."""

    def __init__(self, slots: int, seconds: float, prefill: float) -> None:
        self._slots = threading.Semaphore(slots)
        self._seconds, self._prefill = seconds, prefill
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        self.counts = {"requests": 0, "unseen": 0}
        self.label = "default"

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a request for an address."""
        match path:
            case "/v1/completions" if body["max_tokens"] > 1:
                self._work(str(body["prompt"]))
                return self._completion(body)
            case "/v1/completions":
                return self._completion(body)
            case "/v1/chat/completions":
                self._work(body["messages"][-1]["content"].partition(END)[0])
                message = {"role": "assistant", "content": "fine"}
                usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                return {
                    "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                    "choices": [choice], "usage": usage,
                }  # fmt: skip
            case "/update_weight_version":
                self.label = body["new_version"]
        return {
            "data": [{"id": "m"}], "weight_version": self.label, "success": True, **self.counts
        }  # fmt: skip

    def _work(self, prompt: str) -> None:
        with self._slots:
            with self._lock:
                unseen = prompt not in self._seen
                self._seen.add(prompt)
                self.counts["requests"] += 1
                self.counts["unseen"] += unseen
            time.sleep(self._seconds + self._prefill * unseen)

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        logp = -math.log(VOCABULARY)
        token = body["seed"] % VOCABULARY
        top = {f"token_id:{i}": logp for i in range(20)}
        choice = {
            "index": 0, "text": "", "token_ids": [token], "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [logp], "top_logprobs": [top]},
        }  # fmt: skip
        return {"model": body["model"], "choices": [choice]}


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--prefill", type=float, default=0.2)
    args = parser.parse_args()
    server = TimedServer(args.slots, args.seconds, args.prefill)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send({})

        def do_POST(self) -> None:
            self._send(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _send(self, body: dict[str, Any]) -> None:
            content = json.dumps(server.reply(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(http.server_address[1], flush=True)
    http.serve_forever()


if __name__ == "__main__":
    main()
