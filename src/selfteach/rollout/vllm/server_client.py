"""A vLLM server as a sampler: ids in, ids out, and weights through what vLLM has for them.

Adapters are loaded by name (``/v1/load_lora_adapter``), and the name is the label: each request asks
for it, each reply repeats it. Full weights are reloaded from a folder (developer mode:
``/collective_rpc`` with ``reload_weights``), and the label is vLLM's own ``weight_version``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from torch import Tensor

from selfteach.config.engine_section import VllmServerConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm.http_client import Http, Missing
from selfteach.rollout.vllm.vllm_engine import AGAIN, Answer, Ask, EngineUnavailable
from selfteach.rollout.vllm.weight_sync import Handover

LIKELIEST = 20
"""vLLM gives no more unless its server was told to."""
UNLABELLED = "default"
"""vLLM's label of the weights that it was started with."""
RESETS = 3
"""How often to ask for an empty cache: it is refused while a request is just ending."""
WHOLE: Mapping[str, Any] = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True,
}  # fmt: skip
"""The whole distribution, whatever the model's own settings say; and answers end where ours do."""


class VllmServer:
    """A server at an address. Raises `EngineError` when built without the key that is named."""

    def __init__(self, config: VllmServerConfig, handover: Handover) -> None:
        self._config, self._handover, self._http = config, handover, Http(config)

    @property
    def where(self) -> str:
        """The address."""
        return self._config.url

    @property
    def patience_s(self) -> float:
        """As the recipe says."""
        return self._config.patience_seconds

    def load(self, named_weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Leave the weights on disk and have the server take them from there."""
        self._handover.write(named_weights, label)
        self.reload_weights(label)

    def reload_weights(self, label: str) -> None:
        """Have the server take what lies on disk."""
        path = str(self._handover.path(label))
        if self._handover.adapters:
            self._load_adapter(path, label)
            return
        self._set_weight_version(
            _loading(label)
        )  # whoever else samples here sees it before the weights change
        reload = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        self._http.post("/collective_rpc", reload)
        if not any(self._http.post("/reset_prefix_cache", {})["success"] for _ in range(RESETS)):
            raise EngineError(
                f"engine: {self.where} does not empty its prefix cache, which the old weights filled: "
                "another run uses it; give each run an engine of its own"
            )
        self._set_weight_version(f"{label}{AGAIN}{uuid.uuid4().hex[:8]}")

    def label(self, ours: str) -> str | None:
        """With adapters: ours if the server knows it. Else what it says of its weights."""
        if self._handover.adapters:
            return ours if ours in self._names() else None
        label = str(self._http.get("/weight_info")["weight_version"])
        return None if label in (UNLABELLED, _loading(ours)) else label

    def answers(self, asks: Sequence[Ask], label: str) -> Iterator[tuple[int, Answer]]:
        """As many at a time as the recipe allows."""
        with ThreadPoolExecutor(self._config.concurrency, "engine") as pool:
            waiting = {pool.submit(self._answer, ask, label): i for i, ask in enumerate(asks)}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def likeliest(self, ask: Ask, label: str) -> Mapping[int, float]:
        """Twenty tokens, by id."""
        extra = {"logprobs": LIKELIEST, "return_tokens_as_token_ids": True}
        choice = self._complete(ask, label, extra)
        said: Mapping[str, float] = choice["logprobs"]["top_logprobs"][0]
        return {int(token.removeprefix("token_id:")): logp for token, logp in said.items()}

    def _answer(self, ask: Ask, label: str) -> Answer:
        choice = self._complete(ask, label, {"logprobs": 0})
        return Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))

    def _complete(self, ask: Ask, label: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        name = label if self._handover.adapters else self._config.model
        asked = {
            "model": name, "prompt": list(ask.prompt_ids), "max_tokens": ask.max_tokens,
            "temperature": ask.temperature, "seed": ask.seed, "return_token_ids": True,
            "stop_token_ids": list(ask.end_ids), **WHOLE, **extra,
        }  # fmt: skip
        try:
            reply = self._http.post("/v1/completions", asked, passing=True)
        except Missing as missing:
            if self._handover.adapters:  # it was there a moment ago
                raise EngineUnavailable(str(missing)) from None
            raise
        try:
            (choice,), answered = reply["choices"], reply["model"]
        except (KeyError, TypeError, ValueError):
            raise EngineUnavailable("a reply that is no completion") from None
        if choice.get("finish_reason") == "abort":
            raise EngineUnavailable("it has given up what it was asked")
        if answered != name:
            raise EngineError(
                f"engine: {self.where} is stale: {answered!r} answered where {name!r} was asked"
            )
        if not choice.get("token_ids") or choice.get("prompt_token_ids") != list(ask.prompt_ids):
            raise EngineError(
                f"engine: {self.where} gives no token ids back: it needs a recent vLLM (docs/vllm.md)"
            )
        return choice

    def _load_adapter(self, path: str, label: str) -> None:
        of_this_run = "-".join(label.split("-")[:2])
        for name in self._names():
            if name.startswith(of_this_run):
                self._http.post("/v1/unload_lora_adapter", {"lora_name": name})
        self._http.post("/v1/load_lora_adapter", {"lora_name": label, "lora_path": path})

    def _names(self) -> list[str]:
        return [str(card["id"]) for card in self._http.get("/v1/models")["data"]]

    def _set_weight_version(self, label: str) -> None:
        self._http.post("/update_weight_version", {"new_version": label})


def _loading(label: str) -> str:
    """The label while its weights are on their way, or when they got stuck there."""
    return f"{label}-loading"
