"""Requests replies from an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, hosted APIs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import openai

from selfteach.config.served_model import ServedModelConfig
from selfteach.config.server_address import split_address
from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import NoReply, OnReply, Reply, Request, as_dicts
from selfteach.feedback.critics.completion_reader import (
    UnusableBody,
    clean,
    is_refusal,
    read_completion,
)
from selfteach.feedback.critics.rate_limit import RateLimit
from selfteach.runtime.api_keys import read_key, redact
from selfteach.runtime.bounded_http import ServedApi, is_too_slow
from selfteach.runtime.futures import active_span

MAX_BODY_BYTES = 2_000_000
"""A longer response is no critique: the connection is closed, and the reply counts as truncated, of
unknown length."""
EXCERPT_BYTES = 2_000
"""Bytes of such a response that are saved, for a person to see what it was."""
UNREADABLE_RETRIES = 2
"""Retries of a request whose reply is no JSON, not a completion, or a provider's failure."""
PAUSE_S = 0.2
"""Pause before the first of these retries; each pause is twice the one before."""
BYTES_PER_TOKEN = 4
"""Of a prompt, to estimate its tokens before the server counts them."""


class EndpointModel:
    """Requests replies from a served chat model through OpenAI's client.

    Raises `CriticError` if the API key is missing.
    """

    remote = True

    def __init__(self, config: ServedModelConfig) -> None:
        self._config = config
        self._api = served_api(config, config.timeout_seconds, retries=config.http_retries)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._requests = RateLimit(config.requests_per_minute)
        self._tokens = RateLimit(config.tokens_per_minute)

    @property
    def identity(self) -> str:
        """Return model name and request parameters that change replies; not the address."""
        extra = json.dumps(self._config.request_extras, sort_keys=True)
        names = self._config.parameters
        left_out = [name for name in type(names).model_fields if getattr(names, name) is False]
        return f"endpoint:{self._config.model}:{extra}" + (f":-{left_out}" if left_out else "")

    def complete(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply | NoReply]:
        """Send all requests concurrently, within the limits; may be called from any thread.

        If one raises, those in flight end and their replies are stored before the error is raised.
        """
        return self._api.call(self._complete(requests, on_reply))

    async def _complete(
        self, requests: Sequence[Request], on_reply: OnReply
    ) -> list[Reply | NoReply]:
        errors: list[BaseException] = []

        async def one(index: int, request: Request) -> Reply | NoReply:
            async with self._slots:
                if errors:
                    return NoReply("not sent, since another request failed")
                try:
                    reply = await self._within_limits(request)
                    if isinstance(reply, Reply):  # on disk before the next request is sent
                        await asyncio.to_thread(on_reply, index, reply)
                    return reply
                except Exception as error:
                    errors.append(error)
                    return NoReply("an error")

        replies = await asyncio.gather(*(one(i, r) for i, r in enumerate(requests)))
        if errors:
            raise errors[0]
        return list(replies)

    async def _within_limits(self, request: Request) -> Reply | NoReply:
        """Send one request when the limits allow it; its tokens are settled when they are known."""
        size = sum(len(content.encode(errors="replace")) for _, content in request.messages)
        estimated = size / BYTES_PER_TOKEN + request.max_tokens
        await self._requests.acquire(1)
        await self._tokens.acquire(estimated)
        with active_span():  # not while it waits for a free slot
            reply = await self._request(request)
        used = reply.prompt_tokens + reply.completion_tokens if isinstance(reply, Reply) else 0
        self._tokens.settle(used - estimated if used else 0)
        return reply

    async def _request(self, request: Request) -> Reply | NoReply:
        reason = ""
        for attempt in range(1 + UNREADABLE_RETRIES):
            try:
                return await self._send(request)
            except openai.APIStatusError as error:
                return self._typed(error)
            except openai.APIConnectionError as error:
                if is_too_slow(error):
                    return NoReply(f"no reply within {self._config.timeout_seconds:g} s")
                return NoReply(f"{self._config.base_url}: {self._api.words(error)}")
            except (UnusableBody, openai.OpenAIError, ValueError) as error:
                reason = f"the reply cannot be parsed: {self._api.words(error)}"
            if attempt < UNREADABLE_RETRIES:
                await asyncio.sleep(PAUSE_S * 2**attempt)
        return NoReply(reason)

    def _typed(self, error: openai.APIStatusError) -> NoReply:
        """Return what an HTTP error means; raises `CriticError` if it holds for every request."""
        config, status, words = self._config, error.status_code, self._api.words(error)
        if is_refusal(status, words):
            return NoReply(f"the server refused the request (HTTP {status}): {words}", True)
        if status in (401, 403, 404, 405, 410) or 300 <= status < 400:
            keys = f"{config.key('model')}, {config.key('base_url')} and the key"
            raise CriticError(
                f"{config.label}: {config.base_url} returned HTTP {status} for model {config.model!r} "
                f"({redirected(error) or words}): check {keys}"
            )
        return NoReply(f"the server returned HTTP {status}: {words}")

    async def _send(self, request: Request) -> Reply | NoReply:
        body = await post_completion(self._api, self._config, request)
        if len(body) > MAX_BODY_BYTES:
            text = body[:EXCERPT_BYTES].decode(errors="replace")
            return Reply(redact(text, self._api.key), False, 0, 0)
        reply = read_completion(body)
        if isinstance(reply, NoReply):
            return NoReply(self._api.one_line(reply.reason), reply.permanent)
        return Reply(
            redact(reply.text, self._api.key), reply.finished, reply.prompt_tokens,
            reply.completion_tokens, self._api.one_line(reply.refusal),
        )  # fmt: skip


def served_api(config: ServedModelConfig, timeout_s: float, *, retries: int) -> ServedApi:
    """Return the client of a critic's server. Raises `CriticError` if its key is missing or no key."""
    url, query = split_address(config.base_url)
    key = read_key(config.api_key_env, config.key("api_key_env"), CriticError)
    return ServedApi(
        url, key, timeout_s=timeout_s, max_bytes=MAX_BODY_BYTES, retries=retries,
        key_header=config.api_key_header, query=query,
    )  # fmt: skip


async def post_completion(api: ServedApi, config: ServedModelConfig, request: Request) -> bytes:
    """Send one request, as all requests of this critic are sent; return the body of its reply.

    Raises the errors of OpenAI's client.
    """
    body = request_body(config, request)
    response = await api.client.chat.completions.with_raw_response.create(
        model=body.pop("model"), messages=body.pop("messages"), extra_body=body
    )
    return response.content


def request_body(config: ServedModelConfig, request: Request) -> dict[str, Any]:
    """Return the body of a request, its parameters named as the server knows them."""
    names, values = config.parameters, {}
    for name, value in (
        ("temperature", request.temperature),
        ("max_tokens", request.max_tokens),
        ("seed", request.attempt),
    ):
        if (parameter := getattr(names, name)) is not False:
            values[parameter] = value
    messages = [{**m, "content": clean(m["content"])} for m in as_dicts(request.messages)]
    return {"model": config.model, "messages": messages, **values, **config.request_extras}


def redirected(error: openai.APIStatusError) -> str:
    """Return where a server sends its clients; empty if it does not."""
    if not 300 <= error.status_code < 400:
        return ""
    return f"it redirects to {error.response.headers.get('location', 'nowhere')[:200]}"
