"""Sends HTTP requests with OpenAI's client; every exchange has one deadline and one size limit.

An exchange is all of one request and its response: connection, headers, interim responses and body,
whatever its status. The client's own timeout is per chunk, so a server that drips would never reach it,
and it reads bodies of any size.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
import zlib
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import openai

from selfteach.runtime.api_keys import redact
from selfteach.runtime.event_loop import run_until_stopped

T = TypeVar("T")

MAX_ERROR_BYTES = 200_000
"""Bytes of a response with an error status that are read: its words, for a person."""
MAX_WORDS = 300
"""Characters of a server's words in a message."""
HEADERS = ("retry-after", "retry-after-ms", "x-should-retry", "x-request-id", "location")
"""Headers of a response that are read."""

_BASE: Any = next(c for c in openai.DefaultAsyncHttpxClient.__mro__ if c.__name__ == "AsyncClient")
_HTTP: Any = sys.modules[_BASE.__module__.partition(".")[0]]
"""httpx, or the package that took its place in later versions of the client."""


class BoundedClient(openai.DefaultAsyncHttpxClient):  # type: ignore[misc, valid-type]
    """Reads each response whole, within a time and a size; follows no redirects.

    A response that is longer than the limit is cut one byte behind it, and its connection closed.
    """

    def __init__(self, *, timeout_s: float, max_bytes: int, key_header: str) -> None:
        super().__init__(timeout=timeout_s, follow_redirects=False)
        self._timeout_s, self._max_bytes, self._key_header = timeout_s, max_bytes, key_header
        self.headers["Accept-Encoding"] = "identity"  # a compressed body can be of any size

    async def send(self, request: Any, *, stream: bool = False, **settings: Any) -> Any:
        """Return the whole response. Raises the client's time-out at the deadline."""
        if self._key_header.lower() != "authorization":
            bearer = request.headers.pop("Authorization", "")
            request.headers[self._key_header] = bearer.removeprefix("Bearer ")
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await super().send(request, stream=True, **settings)
                try:
                    body = await self._read(response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise _HTTP.ReadTimeout(f"no whole reply within {self._timeout_s:g} s") from error
        headers = {
            name: response.headers[name].encode("ascii", "replace").decode()
            for name in HEADERS
            if name in response.headers
        }
        # Whatever type and encoding the server claims: readers expect JSON in UTF-8.
        headers["content-type"] = "application/json; charset=utf-8"
        return _HTTP.Response(response.status_code, headers=headers, content=body, request=request)

    async def _read(self, response: Any) -> bytes:
        is_error = response.status_code >= 300
        limit = min(MAX_ERROR_BYTES, self._max_bytes) if is_error else self._max_bytes
        decoder = _decoder(response.headers.get("content-encoding", ""))
        body = bytearray()
        async for chunk in response.aiter_raw():
            room = limit + 1 - len(body)
            try:
                body += chunk if decoder is None else decoder.decompress(chunk, room)
            except zlib.error as error:
                raise _HTTP.DecodingError(str(error)) from None
            if len(body) > limit or (decoder is not None and decoder.eof):
                break
        return bytes(body[: limit + 1])


class ServedApi:
    """Holds OpenAI's client of one server and the thread that awaits its requests.

    One thread awaits the requests of all callers, so that connections are reused. It ends when this
    object is garbage-collected.
    """

    def __init__(
        self, url: str, key: str, *, timeout_s: float, max_bytes: int, retries: int = 0,
        key_header: str = "Authorization", query: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.key, self.timeout_s = key, timeout_s
        self._loop = asyncio.new_event_loop()
        threading.Thread(
            target=run_until_stopped, args=(self._loop,), name="endpoint", daemon=True
        ).start()
        self.client = openai.AsyncOpenAI(
            base_url=url, api_key=key, timeout=timeout_s, max_retries=retries,
            default_query=dict(query or {}),
            http_client=BoundedClient(
                timeout_s=timeout_s, max_bytes=max_bytes, key_header=key_header
            ),
        )  # fmt: skip
        weakref.finalize(self, _shut_down, self._loop, self.client).atexit = False

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work in this server's thread, from any other thread."""
        result = self.start(work)
        try:
            return result.result()
        except BaseException:
            result.cancel()  # a caller that is interrupted leaves nothing behind
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start work in this server's thread; the future returned has its result, and cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def call_async(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work in this server's thread, from an event loop of another thread, or from its."""
        return await asyncio.wrap_future(self.start(work))

    def words(self, error: BaseException) -> str:
        """Return what a server or the connection says about an error: one line, without the key."""
        if isinstance(error, openai.APIStatusError):
            return self.one_line(_message(error.body) or error.response.text)
        if isinstance(error, openai.APIConnectionError):
            return self.one_line(str(error.__cause__ or error))
        return self.one_line(str(error))

    def one_line(self, text: str) -> str:
        """Return the beginning of a text that a server sent, as one line without the key."""
        # Before the cut, which could leave a part of the key.
        whole = redact(text[:MAX_ERROR_BYTES], self.key)
        printable = "".join(c if c.isprintable() else " " for c in whole[: 8 * MAX_WORDS])
        return " ".join(printable.split())[:MAX_WORDS]


def is_too_slow(error: BaseException) -> bool:
    """Return True if an error of the client is that of the deadline."""
    return isinstance(error, openai.APITimeoutError | TimeoutError)


def _message(body: object) -> str:
    """Return the message of an error's body; OpenAI's client has taken it out of ``error``."""
    if isinstance(body, Mapping):
        for name in ("message", "detail", "error"):
            if body.get(name):
                return _message(body[name]) if isinstance(body[name], Mapping) else str(body[name])
    return str(body) if isinstance(body, str) else ""


def _decoder(encoding: str) -> Any:
    """Return a decoder of bounded steps; None where there is nothing to decode."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    raise _HTTP.DecodingError(f"the reply is encoded as {name[:20]!r}, which was not requested")


def _shut_down(loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI) -> None:
    """Close the connections and end the thread of a server that is used no more."""

    async def close() -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # nobody waits for its result
        await client.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)
