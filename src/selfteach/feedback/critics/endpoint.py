"""Requests replies from an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, hosted APIs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

import openai
from aiolimiter import AsyncLimiter

from selfteach.config.critic_section import EndpointConfig
from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import NoReply, OnReply, Reply, Request, as_dicts
from selfteach.runtime.futures import active_span

MAX_BODY_BYTES = 2_000_000
"""A longer response is no critique: the connection is closed, and the reply counts as truncated, of
unknown length."""
EXCERPT_BYTES = 2_000
"""Bytes of such a response that are saved, for a person to see what it was."""
UNREADABLE_RETRIES = 2
"""Retries of a request whose reply is no JSON, not a completion, or cut off."""
PAUSE_S = 0.2
"""Pause before the first of these retries; each pause is twice the one before."""


class _CutOff(Exception):
    """Is raised when the connection ends before the reply does."""


class EndpointModel:
    """Requests replies from a served chat model through OpenAI's client.

    Raises `CriticError` if the API key is missing, or if the URL is malformed or holds credentials.
    """

    remote = True

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        key = api_key(config)
        # One thread awaits the requests of all callers, so that connections are reused.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), name="endpoint", daemon=True).start()
        self._slots = asyncio.Semaphore(config.concurrency)
        rate = config.requests_per_minute
        self._rate_limit = AsyncLimiter(1, 60 / rate) if rate else None
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=key,
            timeout=config.timeout_seconds,
            max_retries=config.http_retries,
        )
        weakref.finalize(self, _shut_down, self._loop, self._client).atexit = False

    @property
    def identity(self) -> str:
        """Return model name and extra request parameters; not the address, which may change."""
        extra = json.dumps(self._config.request_extras, sort_keys=True)
        return f"endpoint:{self._config.model}:{extra}"

    def complete(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply | NoReply]:
        """Send all requests concurrently, within the limits; may be called from any thread."""
        replies = self._complete(requests, on_reply)
        return asyncio.run_coroutine_threadsafe(replies, self._loop).result()

    async def _complete(
        self, requests: Sequence[Request], on_reply: OnReply
    ) -> list[Reply | NoReply]:
        async def one(index: int, request: Request) -> Reply | NoReply:
            async with self._slots, self._rate_limit or contextlib.nullcontext():
                with active_span():  # not while it waits for a free slot
                    reply = await self._request(request)
                if isinstance(reply, Reply):  # on disk before the next request is sent
                    await asyncio.to_thread(on_reply, index, reply)
            return reply

        return await asyncio.gather(*(one(i, r) for i, r in enumerate(requests)))

    async def _request(self, request: Request) -> Reply | NoReply:
        config, reason = self._config, ""
        for attempt in range(1 + UNREADABLE_RETRIES):
            try:
                return await self._send(request)
            except openai.APIStatusError as error:
                if error.status_code in (401, 403, 404):
                    raise CriticError(
                        f"critic: {config.base_url} returned HTTP {error.status_code} for model "
                        f"{config.model!r}: check critic.model, critic.base_url and the key"
                    ) from None
                return NoReply(f"the server returned HTTP {error.status_code}")
            except (openai.APITimeoutError, TimeoutError):
                return NoReply(f"no reply within {config.timeout_seconds:g} s")
            except openai.APIConnectionError as error:
                return NoReply(_one_line(f"{config.base_url}: {error.__cause__ or error}"))
            except _CutOff as error:
                reason = f"the connection was cut in the middle of a reply: {error.__cause__}"
            except (openai.OpenAIError, ValueError) as error:
                reason = f"the reply cannot be parsed: {error}"
            if attempt < UNREADABLE_RETRIES:
                await asyncio.sleep(PAUSE_S * 2**attempt)
        return NoReply(_one_line(reason))

    async def _send(self, request: Request) -> Reply:
        config = self._config
        create = self._client.chat.completions.with_streaming_response.create
        async with create(
            model=config.model,
            messages=as_dicts(request.messages),  # type: ignore[arg-type]
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            seed=request.attempt,
            extra_body=config.request_extras or None,
        ) as response:
            # The client's timeout is per chunk: without this one a slow reply never times out.
            async with asyncio.timeout(config.timeout_seconds):
                body = await _read(response.iter_bytes())
        if len(body) > MAX_BODY_BYTES:
            return Reply(body[:EXCERPT_BYTES].decode(errors="replace"), False, 0, 0)
        return _reply(body)


def api_key(config: EndpointConfig) -> str:
    """Return the server's API key from the environment; "none" if the recipe names no variable.

    Raises `CriticError` if the URL is malformed or holds credentials, or if the variable is not set.
    """
    url = urlsplit(config.base_url)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise CriticError(
            f"critic.base_url = {config.base_url!r}: write it like http://localhost:8000/v1"
        )
    if url.username or url.password or url.query:
        raise CriticError(
            "critic.base_url holds credentials, which would be written into the run: "
            "put the key into an environment variable and name it in critic.api_key_env"
        )
    if config.api_key_env is None:
        return "none"
    if not (key := os.environ.get(config.api_key_env, "")):
        raise CriticError(
            f"critic.api_key_env: the environment variable {config.api_key_env} is not set"
        )
    return key


async def _read(chunks: AsyncIterator[bytes]) -> bytes:
    """Read a whole body, or a little more than `MAX_BODY_BYTES` of it. Raises `_CutOff`."""
    body = bytearray()
    try:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                break
    except Exception as error:  # the type depends on the client's transport and its version
        raise _CutOff from error
    return bytes(body)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run a thread's event loop until it is stopped, then once more to run the callbacks of closing."""
    loop.run_forever()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def _shut_down(loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI) -> None:
    """Close the connections and end the thread of a model that was garbage-collected."""

    async def close() -> None:
        await client.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)


def _reply(body: bytes) -> Reply:
    """Parse the first choice of a chat completion. Raises ValueError if the body is none."""
    try:
        completion = json.loads(body)
        choice, usage = completion["choices"][0], completion.get("usage") or {}
        text, finished = choice["message"].get("content"), choice.get("finish_reason") != "length"
        prompt_tokens, completion_tokens = (
            int(usage.get(f"{name}_tokens") or 0) for name in ("prompt", "completion")
        )
        text = "" if text is None else str(text)
        return Reply(text, finished, prompt_tokens, completion_tokens)
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a chat completion: {error!r}") from None


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:200]
