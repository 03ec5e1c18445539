"""Defines requests to a language model and its replies: the interface between critics and servers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

Message = tuple[str, str]
"""Role and content."""


@dataclass(frozen=True, slots=True)
class Request:
    """Holds one request to a chat model."""

    # Field names and order are part of the reply cache's keys: a change invalidates every cached reply.
    messages: tuple[Message, ...]
    temperature: float
    """0 is greedy."""
    max_tokens: int
    attempt: int = 0
    """Counts repetitions of a request whose reply was of no use: another attempt is another request
    (and another seed, where the model takes one)."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Holds a chat model's reply."""

    text: str
    finished: bool
    """False if the text was cut at the token limit."""
    prompt_tokens: int
    completion_tokens: int
    refusal: str = ""
    """Why the provider withheld a reply, or a part of it, that was paid for."""
    hedge_prompt_tokens: int = 0
    """Prompt tokens of the same request at a second server, whose reply was not used."""
    hedge_completion_tokens: int = 0
    """Its completion tokens: at most as many as this reply's if it was cancelled."""


@dataclass(frozen=True, slots=True)
class NoReply:
    """Describes why there is no reply, after all retries."""

    reason: str
    permanent: bool = False
    """True if the server refuses this one request for good, and would do so again."""


OnReply = Callable[[int, Reply], None]
"""Called with a request's index when its reply arrives."""


@runtime_checkable
class ChatModel(Protocol):
    """Replies to requests: a server, or a model in this process."""

    @property
    def identity(self) -> str:
        """Return a name for the model and everything about it that can change a reply."""
        ...

    @property
    def remote(self) -> bool:
        """Return True if waiting for replies leaves this process free for other work."""
        ...

    def complete(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply | NoReply]:
        """Return a reply per request, or why there is none, in order of the requests."""
        ...


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as chat templates and servers take them."""
    return [{"role": role, "content": content} for role, content in messages]


def request_key(identity: str, request: Request) -> str:
    """Return the key of a reply in the reply cache: a hash of model, prompt and sampling parameters."""
    plain = json.dumps([identity, asdict(request)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(plain.encode(errors="surrogatepass")).hexdigest()
