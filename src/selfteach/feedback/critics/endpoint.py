"""Any OpenAI-compatible server as a chat model: vLLM, SGLang, llama.cpp, Ollama, hosted APIs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import openai
from aiolimiter import AsyncLimiter

from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import Keep, NoReply, Reply, Request, as_dicts
from selfteach.runtime.futures import active

LONGEST_BODY = 2_000_000
"""Bytes of a response that are read. What is longer is no critique: the connection is closed, and the
reply counts as truncated, of unknown length."""
SHOWN = 2_000
"""Bytes of such a response that are kept, for a person to see what it was."""
UNREADABLE_RETRIES = 2
"""How often a reply that is no JSON, not a completion, or cut off half-way is asked for again."""
PAUSE_S = 0.2
"""Before the first of these; each pause is twice the one before."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is and how it is treated."""

    base_url: str
    model: str
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is written nowhere."""
    concurrency: int = 16
    timeout_s: float = 600.0
    """Of one request."""
    http_retries: int = 16
    """After a refusal, a time-out, 408, 409, 429 or 5xx, with growing pauses (half a second to eight
    seconds, with jitter) or as long as the server's Retry-After says, up to two minutes."""
    requests_per_minute: float | None = None
    extra_body: Mapping[str, object] = field(default_factory=dict)
    """What a server takes beyond OpenAI's own parameters."""


class _CutOff(Exception):
    """The connection ended before the reply did."""


class EndpointModel:
    """A served chat model, through OpenAI's client.

    Raises `CriticError` when it is built without its key or with a URL that holds one.
    """

    remote = True

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        key = key_of_server(endpoint)
        # Requests are awaited in a thread of their own, whoever asks; connections are kept.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), name="endpoint", daemon=True).start()
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        rate = endpoint.requests_per_minute
        self._pace = AsyncLimiter(1, 60 / rate) if rate else None
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=key,
            timeout=endpoint.timeout_s,
            max_retries=endpoint.http_retries,
        )
        weakref.finalize(self, _shut_down, self._loop, self._client).atexit = False

    @property
    def identity(self) -> str:
        """The model's name and what else the request body holds; not the address, which may move."""
        extra = json.dumps(self._endpoint.extra_body, sort_keys=True)
        return f"endpoint:{self._endpoint.model}:{extra}"

    def complete(self, requests: Sequence[Request], keep: Keep) -> list[Reply | NoReply]:
        """All requests side by side, as far as the limits allow; may be called from any thread."""
        all_of_them = self._complete(requests, keep)
        return asyncio.run_coroutine_threadsafe(all_of_them, self._loop).result()

    async def _complete(self, requests: Sequence[Request], keep: Keep) -> list[Reply | NoReply]:
        async def one(index: int, request: Request) -> Reply | NoReply:
            async with self._slots, self._pace or contextlib.nullcontext():
                with active():  # not while others hold all places
                    reply = await self._ask(request)
                if isinstance(reply, Reply):  # on disk before the next request is sent
                    await asyncio.to_thread(keep, index, reply)
            return reply

        return await asyncio.gather(*(one(i, r) for i, r in enumerate(requests)))

    async def _ask(self, request: Request) -> Reply | NoReply:
        reason = ""
        for attempt in range(1 + UNREADABLE_RETRIES):
            try:
                return await self._send(request)
            except openai.APIStatusError as error:
                if error.status_code in (401, 403, 404):
                    raise CriticError(
                        f"critic: {self._endpoint.base_url} says {error.status_code} for model "
                        f"{self._endpoint.model!r}: check critic.model, critic.base_url and the key"
                    ) from None
                return NoReply(f"the server says {error.status_code}")
            except (openai.APITimeoutError, TimeoutError):
                return NoReply(f"no reply within {self._endpoint.timeout_s:g} s")
            except openai.APIConnectionError as error:
                return NoReply(_one_line(f"{self._endpoint.base_url}: {error.__cause__ or error}"))
            except _CutOff as error:
                reason = f"the connection was cut in the middle of a reply: {error.__cause__}"
            except (openai.OpenAIError, ValueError) as error:
                reason = f"a reply that cannot be read: {error}"
            if attempt < UNREADABLE_RETRIES:
                await asyncio.sleep(PAUSE_S * 2**attempt)
        return NoReply(_one_line(reason))

    async def _send(self, request: Request) -> Reply:
        endpoint = self._endpoint
        create = self._client.chat.completions.with_streaming_response.create
        async with create(
            model=endpoint.model,
            messages=as_dicts(request.messages),  # type: ignore[arg-type]
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            seed=request.attempt,
            extra_body=dict(endpoint.extra_body) or None,
        ) as response:
            # The client's own time-out is for each piece: a reply may not trickle in for ever.
            async with asyncio.timeout(endpoint.timeout_s):
                body = await _read(response.iter_bytes())
        if len(body) > LONGEST_BODY:
            return Reply(body[:SHOWN].decode(errors="replace"), False, 0, 0)
        return _reply(body)


def key_of_server(endpoint: Endpoint) -> str:
    """The key to show the server; "none" where none is named.

    Raises `CriticError` for an address that cannot be one or holds a key, and for a key that is named
    and not there.
    """
    parts = urlsplit(endpoint.base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise CriticError(
            f"critic.base_url = {endpoint.base_url!r}: write it like http://localhost:8000/v1"
        )
    if parts.username or parts.password or parts.query:
        raise CriticError(
            "critic.base_url holds credentials, which would be written into the run: "
            "put the key into an environment variable and name it in critic.api_key_env"
        )
    if endpoint.api_key_env is None:
        return "none"
    if not (key := os.environ.get(endpoint.api_key_env, "")):
        raise CriticError(
            f"critic.api_key_env: the environment variable {endpoint.api_key_env} is not set"
        )
    return key


async def _read(pieces: AsyncIterator[bytes]) -> bytes:
    """A whole body, or a little more than `LONGEST_BODY` of it. Raises `_CutOff`."""
    body = bytearray()
    try:
        async for piece in pieces:
            body += piece
            if len(body) > LONGEST_BODY:
                break
    except Exception as error:  # the client's transport has a type of its own, which changes
        raise _CutOff from error
    return bytes(body)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """A thread's life: the loop until it is stopped, and once more for what closes behind it."""
    loop.run_forever()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def _shut_down(loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI) -> None:
    """Close the connections and end the thread of a model that nobody holds any more."""

    async def close() -> None:
        await client.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)


def _reply(body: bytes) -> Reply:
    """The first choice of a completion. Raises ValueError if it is not what a server should send."""
    try:
        completion = json.loads(body)
        choice, usage = completion["choices"][0], completion.get("usage") or {}
        text, finished = choice["message"].get("content"), choice.get("finish_reason") != "length"
        prompt, written = (
            int(usage.get(f"{name}_tokens") or 0) for name in ("prompt", "completion")
        )
        return Reply("" if text is None else str(text), finished, prompt, written)
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a chat completion: {error!r}") from None


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:200]
