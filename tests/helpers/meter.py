"""Reads a vLLM server's counters from its /metrics page."""

from __future__ import annotations

import re
import urllib.request

SAMPLE = re.compile(r"^vllm:(\w+)(?:\{[^}]*\})? ([\d.e+-]+)$", re.MULTILINE)


class Meter:
    """Reads counters since this meter was made, or since the server was started."""

    def __init__(self, address: str, *, since_start: bool = False) -> None:
        self._address = address
        self._before = {} if since_start else self._read()

    def count(self, name: str) -> int:
        """Return how much a counter has grown."""
        return round(self.now(name) - self._before.get(name, 0.0))

    def now(self, name: str) -> float:
        """Return the present value of a gauge or counter."""
        return self._read()[name]

    @property
    def completed(self) -> int:
        """Requests that got a complete reply, cut at the token limit or not."""
        return self.count("request_success_total")

    def _read(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self._address}/metrics", timeout=30) as page:
            text = page.read().decode()
        total: dict[str, float] = {}
        for name, value in SAMPLE.findall(text):
            total[name] = total.get(name, 0.0) + float(value)
        return total
