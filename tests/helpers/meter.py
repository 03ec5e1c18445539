"""What a vLLM server counts, read from its own page of metrics."""

from __future__ import annotations

import re
import urllib.request

SAMPLE = re.compile(r"^vllm:(\w+)(?:\{[^}]*\})? ([\d.e+-]+)$", re.MULTILINE)


class Meter:
    """Counters since this meter was made, or since the server was started."""

    def __init__(self, address: str, *, since_start: bool = False) -> None:
        self._address = address
        self._before = {} if since_start else self._read()

    def count(self, name: str) -> int:
        """How much a counter has grown."""
        return round(self.now(name) - self._before.get(name, 0.0))

    def now(self, name: str) -> float:
        """A gauge or counter as it stands."""
        return self._read()[name]

    @property
    def answered(self) -> int:
        """Requests that got a whole reply, cut at their token limit or not."""
        return self.count("request_success_total")

    def _read(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self._address}/metrics", timeout=30) as page:
            text = page.read().decode()
        total: dict[str, float] = {}
        for name, value in SAMPLE.findall(text):
            total[name] = total.get(name, 0.0) + float(value)
        return total
