"""Reads prompts that are conversations: lists of messages, as in TRL's conversational format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selfteach.tasks.sources.source_row import UnreadableValue

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles that a message may have, and the roles that chat templates know."""

Messages = tuple[tuple[str, str], ...]
"""Messages as (role, content)."""


def is_conversation(value: Any) -> bool:
    """Return True for a list of messages with roles, also for a table of lists of `datasets`."""
    if isinstance(value, Mapping):
        return isinstance(value.get("role"), list) and isinstance(value.get("content"), list)
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0
    return is_list and all(isinstance(item, Mapping) and "role" in item for item in value)


def read_messages(value: Any) -> Messages:
    """Return the messages of a conversation, a system message first and once.

    Raises `UnreadableValue` for a role, a content or an order that no prompt of text has.
    """
    if isinstance(value, Mapping):
        pairs = zip(value["role"], value["content"], strict=False)
        value = [{"role": role, "content": content} for role, content in pairs]
    messages = [(_role(message), _content(message)) for message in value]
    first = next((i for i, (role, _) in enumerate(messages) if role != "system"), len(messages))
    system, turns = messages[:first], messages[first:]
    if any(role == "system" for role, _ in turns):
        raise UnreadableValue("has a system message after the first turn")
    if system:
        turns.insert(0, ("system", "\n\n".join(content for _, content in system)))
    return tuple(turns)


def read_prompt(value: Any) -> tuple[Messages, str]:
    """Return a prompt's last message, the user's, and the messages before it.

    Raises `UnreadableValue`.
    """
    messages = read_messages(value)
    role, question = messages[-1]
    if role != "user":
        raise UnreadableValue(
            f"ends in a message of the {role}: a prompt ends in the user's, and what follows it is "
            "what the policy writes"
        )
    return messages[:-1], question


def _role(message: Mapping[str, Any]) -> str:
    role = message["role"]
    if role not in ROLES:
        raise UnreadableValue(
            f"has a message of the role {role!r}; roles: {', '.join(ROLES)} (no tools)"
        )
    if message.get("tool_calls"):
        raise UnreadableValue("has a message that calls a tool: prompts are text alone")
    return ROLES[role]


def _content(message: Mapping[str, Any]) -> str:
    """Return a message's text: a string, or parts of type text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise UnreadableValue(
        "has a message whose content is no text: prompts are text alone, without images"
    )
