"""Reads the body of a chat completion: whatever a server sends is data and ends as a typed result.

Servers differ in what they put where. Text is a string or a list of parts; a provider that fails says
so in the body of a reply with status 200, or in its ``finish_reason``; token counts may be anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from selfteach.feedback.critics.chat_model import NoReply, Reply

FINISHED = {
    "", "stop", "eos", "eos_token", "end", "end_turn", "complete", "stop_sequence", "tool_calls",
    "function_call", "tool_use",
}  # fmt: skip
"""Reasons of a reply that the model ended."""
CUT = {"length", "max_tokens", "max_output_tokens", "model_length", "max_length"}
"""Reasons of a reply that was cut at a limit."""
WITHHELD = {
    "content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content",
    "spii", "refusal", "guardrail_intervened", "sensitive", "language",
}  # fmt: skip
"""Reasons of a provider that will not give this reply, now or later."""
REFUSAL_WORDS = re.compile(
    r"context.{0,3}(?:length|window|size)|maximum.{0,9}(?:context|length)"
    r"|too (?:long|large|many tokens)|content.{0,3}(?:policy|filter|management)|moderat|flagged"
    r"|safety.{0,3}(?:system|filter|setting|polic)|prohibited.{0,3}content",
    re.IGNORECASE,
)
"""Words about one request, whatever the status; errors of the server as a whole have others."""
MAX_TOKEN_COUNT = 10**9
"""A larger count of tokens is no count."""
SURROGATES = re.compile("[\ud800-\udfff]")


class UnusableBody(Exception):
    """Is raised for a body that holds no reply; another try may give one."""


def read_completion(body: bytes) -> Reply | NoReply:
    """Read the first choice of a chat completion; `NoReply` if the request is refused for good.

    Raises `UnusableBody` if the body is no completion, or says that the provider failed.
    """
    try:
        # Not strict: some servers do not escape line breaks and other control characters.
        completion = json.loads(body, parse_int=_integer, strict=False)
        if not isinstance(completion, Mapping):
            raise UnusableBody("not a chat completion: no object")
        if completion.get("error") and not completion.get("choices"):
            return _refusal_or_failure(completion["error"])
        choice = completion["choices"][0]
        message, usage = choice["message"], completion.get("usage")
        text = text_of(message.get("content"))
        prompt, written = (_count(usage, f"{name}_tokens") for name in ("prompt", "completion"))
        reason = str(choice.get("finish_reason") or "").strip().lower()
        refusal = message.get("refusal") or _refusal_of(message.get("content"))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UnusableBody(f"not a chat completion: {type(error).__name__}: {error}") from None
    if reason in WITHHELD:
        return Reply(text, False, prompt, written, f"the provider withheld the reply: {reason}")
    if not text and refusal:
        return Reply("", True, prompt, written, f"the model refused: {text_of(refusal)}")
    if reason not in FINISHED | CUT or choice.get("error"):
        words = choice.get("error") or f"finish_reason {reason!r}"
        raise UnusableBody(f"the provider failed: {clean(str(words))}")
    return Reply(text, reason in FINISHED, prompt, written)


def is_refusal(status: int, words: str) -> bool:
    """Return True if an HTTP error is a permanent refusal of this one request.

    A status of 401, 404, or of a server that is busy or down, is not, unless its words speak of the
    request: some servers return 403 for a content policy, and 500 for a prompt that is too long.
    """
    if status == 429:  # a request larger than a limit per minute is refused for ever
        return "request too large" in words.lower()
    if status in (401, 402, 404, 405, 407, 408, 409, 410, 421, 423, 425, 426):
        return False
    if status == 403 or status >= 500:
        return REFUSAL_WORDS.search(words) is not None
    return 400 <= status < 500


def text_of(content: object) -> str:
    """Return the text of a message's content: a string, or the texts of its parts.

    Parts of other kinds (thoughts, images) are left out. Content of an unknown form is returned as
    JSON, which is no critique.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return clean(content)
    if isinstance(content, list) and all(isinstance(part, str | Mapping) for part in content):
        return "".join(_text_of_part(part) for part in content)
    if isinstance(content, Mapping) and isinstance(content.get("text"), str):
        return clean(content["text"])
    return clean(json.dumps(content, ensure_ascii=False))


def clean(text: str) -> str:
    """Return a text that can be encoded: lone surrogates become U+FFFD, pairs their character."""
    if SURROGATES.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _refusal_of(content: object) -> object:
    """Return what a part of the content refuses, or None."""
    parts = content if isinstance(content, list) else []
    refusals = (p.get("refusal") for p in parts if isinstance(p, Mapping))
    return next((refusal for refusal in refusals if refusal), None)


def _text_of_part(part: str | Mapping[str, Any]) -> str:
    if isinstance(part, str):
        return clean(part)
    if part.get("type", "text") not in ("text", "output_text"):
        return ""
    text = part.get("text", part.get("content"))
    text = text.get("value") if isinstance(text, Mapping) else text
    return clean(text) if isinstance(text, str) else ""


def _refusal_or_failure(error: object) -> NoReply:
    """Return the refusal that a body with status 200 holds; raises `UnusableBody` for other errors."""
    details: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    code = str(details.get("code", details.get("status", "")))
    words = clean(str(details.get("message") or error))
    status = int(code) if re.fullmatch("[1-5][0-9][0-9]", code) else 0
    if is_refusal(status, words) or REFUSAL_WORDS.search(f"{code} {words}"):
        return NoReply(f"the server refused the request: {words}", permanent=True)
    raise UnusableBody(f"the provider failed: {words}")


def _count(usage: object, name: str) -> int:
    """Return a count of tokens; 0 if there is none, or something else in its place."""
    value = usage.get(name) if isinstance(usage, Mapping) else None
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return int(value) if 0 <= value <= MAX_TOKEN_COUNT else 0


def _integer(digits: str) -> int | float:
    """Parse an integer of JSON; one of more digits than Python reads is as good as infinite."""
    return int(digits) if len(digits) < 400 else float("inf")
