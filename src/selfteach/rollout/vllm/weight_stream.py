"""Sends weights to the worker extension of a server: buckets over HTTP, or this machine's memory."""

from __future__ import annotations

import binascii
import json
from typing import Any

from selfteach.errors import EngineError
from selfteach.rollout.vllm.http_client import HttpClient, NotFound
from selfteach.rollout.vllm.packed_weights import PackedWeights
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable
from selfteach.rollout.vllm.worker_extension import DAMAGED, LOST, PROTOCOL

EXTENSION = "selfteach.rollout.vllm.worker_extension.StreamedWeights"
START_WITH = (
    f"start it with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls {EXTENSION} (selfteach installed "
    "in its environment)"
)
RPC = "/collective_rpc"


class StreamTransfer:
    """Implements `WeightTransfer` with the worker extension."""

    name = "stream"

    def stage(self, http: HttpClient, weights: PackedWeights) -> None:
        """Bring the weights to the server, beside those in use."""
        replies = call_workers(
            http, "selfteach_open", label=weights.label, manifest=weights.manifest, size=weights.size,
            bucket=weights.bucket, path=weights.path,
        )  # fmt: skip
        if all(reply.get("shared") for reply in replies):
            return
        for index in range(weights.buckets):
            http_reply = http.post_json(RPC, _bucket_body(weights, index))
            worker_replies(http, http_reply)

    def apply(self, http: HttpClient, weights: PackedWeights) -> None:
        """Have the server use the weights, once it has all of them."""
        call_workers(http, "selfteach_commit", label=weights.label, digest=weights.digest)

    def adapter_path(self, http: HttpClient, weights: PackedWeights, config: str) -> str:
        """Bring an adapter to the server; return its path there."""
        self.stage(http, weights)
        replies = call_workers(
            http, "selfteach_commit_adapter", label=weights.label, digest=weights.digest,
            config=config,
        )  # fmt: skip
        return str(replies[0].get("path"))


def accepts_stream(http: HttpClient) -> bool:
    """Return True if a server has the worker extension. Raises `EngineUnavailable`, or `EngineError`
    if it has that of another version."""
    try:
        reply = http.post(RPC, {"method": "selfteach_probe"})
    except NotFound:
        return False  # no developer mode
    except EngineError as error:
        if "(engine.api_key_env)" in str(error):
            raise
        return False  # vLLM replies that its worker has no such method
    (first, *_) = worker_replies(http, reply)
    if first.get("protocol") != PROTOCOL:
        raise EngineError(
            f"engine: {http.url} has the worker extension of another version of selfteach: install "
            "the same version there"
        )
    return True


def call_workers(http: HttpClient, method: str, **kwargs: Any) -> list[dict[str, Any]]:
    """Call a method of the extension on all workers; raises what `worker_replies` raises."""
    return worker_replies(http, http.post(RPC, {"method": method, "kwargs": kwargs}))


def worker_replies(http: HttpClient, reply: Any) -> list[dict[str, Any]]:
    """Return the workers' replies.

    Raises `EngineUnavailable` if the server was restarted in between, or if bytes were damaged on their
    way: the whole transfer is made again. Raises `EngineError` if it refuses the weights.
    """
    results = reply.get("results") if isinstance(reply, dict) else None
    if (
        not isinstance(results, list)
        or not results
        or not all(isinstance(r, dict) for r in results)
    ):
        raise EngineUnavailable(f"a reply that is not the worker extension's: {str(reply)[:100]}")
    for result in results:
        error, kind = result.get("error"), result.get("kind")
        if error is not None and kind in (LOST, DAMAGED):
            raise EngineUnavailable(f"the transfer of weights was cut off: {error}")
        if error is not None:
            raise EngineError(
                f"engine: {http.url} refuses the weights: {' '.join(str(error).split())[:300]}"
            )
    return results


def _bucket_body(weights: PackedWeights, index: int) -> bytes:
    """Return a request as bytes; base64 needs no escapes, so no JSON encoder has to read it."""
    kwargs = {"label": weights.label, "index": index, "digest": weights.digests[index].hex()}
    head = json.dumps({"method": "selfteach_receive", "kwargs": {**kwargs, "data": ""}})
    before, after = head[: -len('"}}')], '"}}'
    buffer: Any = weights.slice(index).numpy()
    data = binascii.b2a_base64(buffer, newline=False)
    return b"".join((before.encode(), data, after.encode()))
