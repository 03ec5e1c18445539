"""Requests to a language model and its replies: the seam between critics and what serves them."""

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
    """One question to a chat model."""

    messages: tuple[Message, ...]
    temperature: float
    """0 is greedy."""
    max_tokens: int
    attempt: int = 0
    """Counts repetitions of a request whose reply was of no use: another attempt is another request
    (and another seed, where the model takes one)."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    text: str
    finished: bool
    """False if the text was cut at the token limit."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class NoReply:
    """Why nothing came back, after all retries."""

    reason: str


Keep = Callable[[int, Reply], None]
"""Called with a request's index the moment its reply is there."""


@runtime_checkable
class ChatModel(Protocol):
    """Something that answers requests: a server, or a model in this process."""

    @property
    def identity(self) -> str:
        """Names the model and everything about it that can change a reply."""
        ...

    @property
    def remote(self) -> bool:
        """True if waiting for it leaves this process free for other work."""
        ...

    def complete(self, requests: Sequence[Request], keep: Keep) -> list[Reply | NoReply]:
        """One reply, or the reason for none, per request, in order; each is kept as it arrives."""
        ...


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates and servers take them."""
    return [{"role": role, "content": content} for role, content in messages]


def key_of(identity: str, request: Request) -> str:
    """The name under which a reply is stored: model, prompt and sampling parameters, hashed."""
    plain = json.dumps([identity, asdict(request)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(plain.encode()).hexdigest()
