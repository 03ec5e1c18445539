"""Drives a vLLM server: token ids in, token ids out, and new weights through vLLM's endpoints.

Adapters are loaded by name (``/v1/load_lora_adapter``), and the name is the label: each request
names it, each reply repeats it. Full weights travel as a `WeightChannel` brings them (in developer
mode), and the label is vLLM's ``weight_version``.
"""

from __future__ import annotations

import math
import operator
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from selfteach.config.engine_section import VllmServerConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm.http_client import HttpClient, NotFound
from selfteach.rollout.vllm.vllm_engine import (
    RELOAD_SEPARATOR,
    Completion,
    CompletionRequest,
    EngineUnavailable,
)
from selfteach.rollout.vllm.weight_channel import WeightChannel

TOP_LOGPROBS = 20
"""vLLM returns no more unless its server was started with a higher limit."""
INITIAL_WEIGHT_VERSION = "default"
"""vLLM's label of the weights that it was started with."""
FAILED = ("abort", "error")
"""Values of ``finish_reason`` of a request that the server did not finish."""
CACHE_RESET_ATTEMPTS = 3
"""A reset of the prefix cache is refused while a request is just ending."""


class VllmServer:
    """Drives a vLLM server at an address.

    Raises `EngineError` when built if the environment variable of the API key is not set.
    """

    def __init__(self, config: VllmServerConfig, channel: WeightChannel) -> None:
        self._config, self._channel = config, channel
        self._http = HttpClient(config)

    @property
    def name(self) -> str:
        """Return the server's address."""
        return self._config.address

    @property
    def patience_s(self) -> float:
        """Return how long the server may be unavailable, in seconds: engine.patience_seconds."""
        return self._config.patience_seconds

    @property
    def holds_adapters(self) -> bool:
        """Return True if the weights are those of a LoRA adapter."""
        return self._channel.holds_adapters

    @property
    def main_reloads(self) -> bool:
        """Return True if only rank 0 can load the newest weights into a server again."""
        return self._channel.main_sends

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Send new weights and have the server use them."""
        with self._channel.publishing(list(named_weights), label):
            self.reload_weights(label)

    def reload_weights(self, label: str) -> None:
        """Have the server use the newest weights, which the channel holds."""
        if self._channel.holds_adapters:
            self._load_adapter(self._channel.adapter_path(self._http, label), label)
            return
        self._channel.stage(self._http, label)
        # Other runs that sample here must see a new label before the weights change.
        self._set_weight_version(_loading(label))
        self._channel.apply(self._http, label)
        with _well_formed():
            emptied = any(
                self._http.post("/reset_prefix_cache", {})["success"]
                for _ in range(CACHE_RESET_ATTEMPTS)
            )
        if not emptied:
            raise EngineError(
                f"engine: {self.name} does not empty its prefix cache, which the old weights filled: "
                "another run uses it; give each run its own engine"
            )
        self._set_weight_version(f"{label}{RELOAD_SEPARATOR}{uuid.uuid4().hex[:8]}")

    def current_label(self, expected: str) -> str | None:
        """Return ``expected`` if it is a loaded adapter; with full weights, their version."""
        return self._http.call(self._label(expected))

    def start_label(self, expected: str) -> Future[str | None]:
        """Start to read the label; the future has what `current_label` returns or raises."""
        return self._http.start(self._label(expected))

    def start_completion(self, request: CompletionRequest, label: str) -> Future[Completion]:
        """Start one request; the future has its completion, or raises what `HttpClient` raises."""
        return self._http.start(self._completion(request, label))

    def complete(
        self, requests: Sequence[CompletionRequest], label: str
    ) -> Iterator[tuple[int, Completion]]:
        """Send as many requests at a time as engine.concurrency allows."""
        waiting = deque(enumerate(requests))
        running: dict[Future[Completion], int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._config.concurrency:
                    index, request = waiting.popleft()
                    running[self.start_completion(request, label)] = index
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        finally:
            for future in running:
                future.cancel()

    def top_logprobs(self, request: CompletionRequest, label: str) -> Mapping[int, float]:
        """Return the log-probabilities of the twenty most likely first tokens, by id."""
        extra = {"logprobs": TOP_LOGPROBS, "return_tokens_as_token_ids": True}
        choice = self._http.call(self._choice(request, label, extra))
        with _well_formed():
            logprobs: Mapping[str, float] = choice["logprobs"]["top_logprobs"][0]
            return {int(name.removeprefix("token_id:")): float(p) for name, p in logprobs.items()}

    async def _label(self, expected: str) -> str | None:
        if self._channel.holds_adapters:
            reply = await self._http.send("/v1/models", None, transient_5xx=True)
            return expected if expected in _model_names(reply) else None
        reply = await self._http.send("/weight_info", None, transient_5xx=True)
        with _well_formed():
            label = str(reply["weight_version"])
        return None if label in (INITIAL_WEIGHT_VERSION, _loading(expected)) else label

    async def _completion(self, request: CompletionRequest, label: str) -> Completion:
        choice = await self._choice(request, label, {"logprobs": 0})
        with _well_formed():
            ids = tuple(operator.index(i) for i in choice["token_ids"])
            logps = tuple(float(logp) for logp in choice["logprobs"]["token_logprobs"])
            if len(ids) != len(logps) or not all(map(math.isfinite, logps)) or min(ids) < 0:
                raise ValueError("token ids and log-probabilities that do not match")
            return Completion(ids, logps)

    async def _choice(
        self, request: CompletionRequest, label: str, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the one choice of a completion, after checking that the right model wrote it."""
        model = label if self._channel.holds_adapters else self._config.model
        body = {
            "model": model, "prompt": list(request.prompt_ids), "return_token_ids": True,
            **request.parameters(), **extra,
        }  # fmt: skip
        try:
            reply = await self._http.send("/v1/completions", body, transient_5xx=True)
        except NotFound as error:
            if self._channel.holds_adapters:  # it was loaded a moment ago
                raise EngineUnavailable(str(error)) from None
            raise
        with _well_formed():
            (choice,), replying_model = reply["choices"], reply["model"]
            finish = choice.get("finish_reason")
        if finish in FAILED:
            raise EngineUnavailable(f"it ended a request with finish_reason {finish!r}")
        if replying_model != model:
            raise EngineError(
                f"engine: {self.name} is stale: {replying_model!r} replied to a request for {model!r}"
            )
        if not choice.get("token_ids") or choice.get("prompt_token_ids") != list(
            request.prompt_ids
        ):
            raise EngineError(
                f"engine: {self.name} returns no token ids: it needs a recent vLLM (docs/vllm.md)"
            )
        return choice

    def _load_adapter(self, path: str, label: str) -> None:
        run_prefix = "-".join(label.split("-")[:2])
        for name in _model_names(self._http.get("/v1/models")):
            if name.startswith(run_prefix):
                self._http.post_command("/v1/unload_lora_adapter", {"lora_name": name})
        self._http.post_command("/v1/load_lora_adapter", {"lora_name": label, "lora_path": path})

    def _set_weight_version(self, label: str) -> None:
        self._http.post("/update_weight_version", {"new_version": label})


@contextmanager
def _well_formed() -> Iterator[None]:
    """Raise `EngineUnavailable`, after which it is asked again, for a reply of another form."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        name = type(error).__name__
        raise EngineUnavailable(f"a reply that is not vLLM's ({name}: {error})"[:200]) from None


def _model_names(reply: Any) -> list[str]:
    """Return the names in a server's list of models."""
    with _well_formed():
        return [str(card["id"]) for card in reply["data"]]


def _loading(label: str) -> str:
    """Return the label while its weights are being loaded, or when that was cut off."""
    return f"{label}-loading"
