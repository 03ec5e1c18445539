"""Sends requests to one OpenAI-compatible server, within its limits, and says how a server fails."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai

from selfteach.config.served_model import ServedModelConfig
from selfteach.config.server_address import split_address
from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import NoReply, Reply, Request, as_dicts
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
PROMPT = "Reply with the digit 1 and nothing else."
"""The cheapest prompt: what is tested is whether the server takes the parameters of runs."""
PROBE_TOKENS = 16
"""Longest reply to a probe."""
PROBE_TIMEOUT_S = 30.0
BUSY = (408, 409, 425, 429)
"""Statuses of a server that may accept the same request soon after."""
UNFIT = (401, 403, 404, 405, 410)
"""Statuses that hold for every request: a wrong key, or a model or address that is not there."""

Failing = Literal["down", "slow", "error", "busy", "unfit"]
"""No connection; no reply in time; HTTP 5xx; too many requests; no request of this recipe at all."""


class MemberFailure(Exception):
    """Is raised when a server has no reply to a request, which is not the request's fault."""

    def __init__(self, kind: Failing, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.retry_after_s = kind, reason, retry_after_s


class EndpointMember:
    """Sends the requests of one recipe to one server; ``retries`` are those of the HTTP client.

    Raises `CriticError` if the API key is missing.
    """

    def __init__(self, config: ServedModelConfig, *, retries: int) -> None:
        self._config = config
        self.api = served_api(config, config.timeout_seconds, retries=retries)
        self._requests = RateLimit(config.requests_per_minute)
        self._tokens = RateLimit(config.tokens_per_minute)

    async def admit(self, request: Request) -> float:
        """Wait until the limits allow a request; return the tokens that it reserves."""
        size = sum(len(content.encode(errors="replace")) for _, content in request.messages)
        reserved = size / BYTES_PER_TOKEN + request.max_tokens
        await self._requests.acquire(1)
        await self._tokens.acquire(reserved)
        return reserved

    async def reply(self, request: Request, reserved: float) -> Reply | NoReply:
        """Send a request that was admitted; its tokens are settled when they are known.

        Raises `MemberFailure`.
        """
        try:
            with active_span():  # not while it waits for a free slot
                reply = await self._exchange(request)
        except MemberFailure as failure:
            if failure.kind != "slow":  # a server that is only slow may have written the reply
                self._tokens.settle(-reserved)
            raise
        used = reply.prompt_tokens + reply.completion_tokens if isinstance(reply, Reply) else 0
        self._tokens.settle(used - reserved if used else 0)
        return reply

    async def probe(self) -> None:
        """Send the cheapest request. Raises `MemberFailure` if this server cannot take the run's."""
        request = Request((("user", PROMPT),), self._config.temperature, PROBE_TOKENS)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._exchange(request)
        except TimeoutError:
            raise MemberFailure("slow", f"no reply within {PROBE_TIMEOUT_S:g} s") from None

    async def _exchange(self, request: Request) -> Reply | NoReply:
        reason = ""
        for attempt in range(1 + UNREADABLE_RETRIES):
            try:
                return await self._send(request)
            except openai.APIStatusError as error:
                return self._typed(error)
            except openai.APIConnectionError as error:
                if is_too_slow(error):
                    seconds = self._config.timeout_seconds
                    raise MemberFailure("slow", f"no reply within {seconds:g} s") from None
                words = f"{self._config.address}: {self.api.words(error)}"
                raise MemberFailure("down", words) from None
            except (UnusableBody, openai.OpenAIError, ValueError) as error:
                reason = f"the reply cannot be parsed: {self.api.words(error)}"
            if attempt < UNREADABLE_RETRIES:
                await asyncio.sleep(PAUSE_S * 2**attempt)
        return NoReply(reason)

    def _typed(self, error: openai.APIStatusError) -> NoReply:
        """Return that the server refuses this one request; raises `MemberFailure` for anything else."""
        config, status, words = self._config, error.status_code, self.api.words(error)
        if is_refusal(status, words):
            return NoReply(f"the server refused the request (HTTP {status}): {words}", True)
        if status in UNFIT or 300 <= status < 400:
            keys = f"{config.key('model')}, {config.key('base_url')} and the key"
            raise MemberFailure(
                "unfit",
                f"{config.label}: {config.address} returned HTTP {status} for model {config.model!r} "
                f"({redirected(error) or words}): check {keys}",
            )
        kind = "busy" if status in BUSY else "error"
        reason = f"the server returned HTTP {status}: {words}"
        raise MemberFailure(kind, reason, retry_after_s(error))

    async def _send(self, request: Request) -> Reply | NoReply:
        body = await self.api.call_async(post_completion(self.api, self._config, request))
        if len(body) > MAX_BODY_BYTES:
            text = body[:EXCERPT_BYTES].decode(errors="replace")
            return Reply(redact(text, self.api.key), False, 0, 0)
        reply = read_completion(body)
        if isinstance(reply, NoReply):
            return NoReply(self.api.one_line(reply.reason), reply.permanent)
        return Reply(
            redact(reply.text, self.api.key), reply.finished, reply.prompt_tokens,
            reply.completion_tokens, self.api.one_line(reply.refusal),
        )  # fmt: skip


def served_api(config: ServedModelConfig, timeout_s: float, *, retries: int) -> ServedApi:
    """Return the client of one server. Raises `CriticError` if its key is missing or no key."""
    url, query = split_address(config.address)
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


def retry_after_s(error: openai.APIStatusError) -> float:
    """Return the seconds that a busy server names, at most a minute; 0 if it names none."""
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), 60.0) if seconds == seconds else 0.0
