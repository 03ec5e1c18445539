"""Sends HTTP requests to a vLLM server and turns its failures into our errors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import openai

from selfteach.config.engine_section import VllmServerConfig
from selfteach.config.server_address import split_address
from selfteach.errors import EngineError
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable
from selfteach.runtime.api_keys import read_key
from selfteach.runtime.bounded_http import ServedApi, is_too_slow

T = TypeVar("T")

BUSY = (408, 409, 429)
"""Statuses of a server that may accept the same request soon after."""
MAX_BODY_BYTES = 64_000_000
"""A longer response is no completion: one of 500,000 tokens with their log-probabilities is shorter."""
TAKES_BYTES = "content" in inspect.signature(openai.AsyncOpenAI.post).parameters
"""False for older versions of the client, which encode a body themselves."""


class HttpClient:
    """Wraps OpenAI's client, for addresses beyond OpenAI's API too.

    Raises `EngineError` when built if the environment variable of the API key holds none.
    """

    def __init__(self, config: VllmServerConfig, timeout_s: float | None = None) -> None:
        self.url, self._key_env = config.address, config.api_key_env
        self._timeout_s = timeout_s or config.timeout_seconds
        key = read_key(config.api_key_env, "engine.api_key_env", EngineError)
        address, query = split_address(config.address)
        self._api = ServedApi(
            address, key, timeout_s=self._timeout_s, max_bytes=MAX_BODY_BYTES, query=query
        )

    def get(self, path: str) -> Any:
        """Return the parsed reply. Raises what `post` raises, server errors as transient."""
        return self.call(self.send(path, None, transient_5xx=True))

    def post(self, path: str, body: Mapping[str, Any], *, transient_5xx: bool = False) -> Any:
        """Return the parsed reply to this body. Raises what `send` raises."""
        return self.call(self.send(path, body, transient_5xx=transient_5xx))

    def start_post(self, path: str, body: Mapping[str, Any]) -> Future[Any]:
        """Start a request; the future has what `post` returns or raises."""
        return self.start(self.send(path, body, transient_5xx=False))

    def post_command(self, path: str, body: Mapping[str, Any]) -> None:
        """Send a body whose reply is a sentence, not JSON. Raises what `send` raises."""
        self.call(self._send(path, dict(body), transient_5xx=False, parse=False))

    def post_json(self, path: str, body: bytes) -> Any:
        """Return the parsed reply to a body that is JSON already. Raises what `post` raises."""
        return self.call(self._send(path, body, transient_5xx=False))

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine that uses `send`."""
        return self._api.call(work)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine that uses `send`; the future has its result, and cancels it."""
        return self._api.start(work)

    async def send(self, path: str, body: Mapping[str, Any] | None, *, transient_5xx: bool) -> Any:
        """Return the parsed reply to a body, or without one to a request for an address.

        Raises `EngineUnavailable` if there is no reply in time, if the server is busy and, with
        ``transient_5xx``, for server errors; `NotFound` for a missing address or model; `EngineError`
        for anything else.
        """
        return await self._send(
            path, None if body is None else dict(body), transient_5xx=transient_5xx
        )

    async def _send(
        self, path: str, body: dict[str, Any] | bytes | None, *, transient_5xx: bool,
        parse: bool = True,
    ) -> Any:  # fmt: skip
        try:
            reply = await self._exchange(path, body)
            return json.loads(reply) if parse else reply
        except openai.APIConnectionError as error:
            if is_too_slow(error):
                raise EngineUnavailable(f"no reply within {self._timeout_s:g} s") from None
            raise EngineUnavailable(self._api.words(error)) from None
        except openai.APIStatusError as error:
            raise self._typed(error, path, transient_5xx=transient_5xx) from None
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            reason = f"the reply cannot be parsed: {self._api.words(error)}"
            raise EngineUnavailable(reason) from None

    async def _exchange(self, path: str, body: dict[str, Any] | bytes | None) -> str:
        client = self._api.client
        if body is None:
            return await client.get(path, cast_to=str)
        if isinstance(body, bytes) and not TAKES_BYTES:
            body = json.loads(body)
        if isinstance(body, bytes):
            options: Any = {"headers": {"Content-Type": "application/json"}}
            return await client.post(path, cast_to=str, content=body, options=options)
        return await client.post(path, cast_to=str, body=body)

    def _typed(
        self, error: openai.APIStatusError, path: str, *, transient_5xx: bool
    ) -> EngineError | EngineUnavailable:
        """Return the error of ours that a status means, with the server's words."""
        status = error.status_code
        message = f"{status}, {self._api.words(error) or 'no message'}"
        if status in (401, 403):
            key_env = self._key_env
            fix = f"the key in {key_env} is wrong" if key_env else "an API key is needed"
            return EngineError(f"engine: {self.url}: {fix} (engine.api_key_env)")
        if status == 404:
            return NotFound(f"engine: {self.url}{path}: {message}")
        if status in BUSY or (transient_5xx and status >= 500):
            return EngineUnavailable(message)
        return EngineError(f"engine: {self.url}{path} rejected the request: {message}")


class NotFound(EngineError):
    """Is raised when the server does not have this address, model or adapter."""
