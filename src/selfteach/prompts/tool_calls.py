"""Read and write tool calls in the forms of the model families.

``hermes``: Qwen2.5, Qwen3 and Hermes put each call into a pair of tags::

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "6 * 7"}}
    </tool_call>

``llama3``: Llama 3.1 to 3.3 write a call as the whole turn, several separated by ``;``::

    {"name": "calculator", "parameters": {"expression": "6 * 7"}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from selfteach.episodes import ToolCall, Turn

Role = Literal["tool", "user"]
"""Who an environment's message is from, in the chat template: a tool, or the user."""
Tool = Mapping[str, Any]
"""A tool as chat templates take it: ``{"type": "function", "function": {name, description, …}}``."""

TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
CALL_START = re.compile(r"\s*\{\s*\"(?:type|name|parameters)\"")
MAX_CHARS = 100_000
"""Characters of a turn that is read for calls."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Reads and writes the calls of one family."""

    name: str
    arguments: str
    """The key of a call's arguments."""
    texts: Callable[[str], Iterator[str]]
    """Yields the JSON of each call in a turn."""
    before: str = ""
    after: str = ""
    """What stands around a call."""

    def read(self, text: str) -> Turn:
        """Return a turn with its calls; a turn in which one cannot be read has none, and says why."""
        if len(text) > MAX_CHARS:
            return Turn(text, malformed=f"a turn of {len(text)} characters is too long to be read")
        calls = []
        for written in self.texts(text):
            call = self._call(written)
            if isinstance(call, str):
                return Turn(text, malformed=f"the tool call cannot be read: {call}")
            calls.append(call)
        return Turn(text, tuple(calls))

    def write(self, call: ToolCall) -> str:
        """Return a call as the family's models write it."""
        value = {"name": call.name, self.arguments: dict(call.arguments)}
        return f"{self.before}{json.dumps(value, ensure_ascii=False)}{self.after}"

    def _call(self, written: str) -> ToolCall | str:
        """Return a call, or why it is none."""
        try:
            value = json.loads(written)
            if isinstance(value, dict) and isinstance(value.get(self.arguments), str):
                value = {**value, self.arguments: json.loads(value[self.arguments])}
        except (ValueError, RecursionError) as error:
            return f"it is not valid JSON ({' '.join(str(error).split())[:120]})"
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return 'it is no object with a "name"'
        arguments = value.get(self.arguments, {})
        if not isinstance(arguments, dict):
            return f'its "{self.arguments}" are no object'
        return ToolCall(value["name"], arguments)


def _tagged(text: str) -> Iterator[str]:
    for match in TAGGED.finditer(text):
        yield match[1]


def _whole(text: str) -> Iterator[str]:
    """Yield the JSON objects that a turn consists of; none if it begins with no call."""
    if not CALL_START.match(text):
        return
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        begin = len(text) - len(text[at:].lstrip(" \t\r\n;"))
        if begin >= len(text):
            return
        try:
            _, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            yield text[begin:]
            return
        yield text[begin:end]
        at = end


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat("hermes", "arguments", _tagged, "<tool_call>\n", "\n</tool_call>"),
    "llama3": ToolFormat("llama3", "parameters", _whole),
}
"""The known forms, by name."""


def tool_format(chat_template: str) -> ToolFormat | None:
    """Return the form in which a chat template writes calls; None if it is not known."""
    if "<tool_call>" in chat_template and "<function=" not in chat_template:
        return TOOL_FORMATS["hermes"]
    if "<|start_header_id|>" in chat_template and "ipython" in chat_template:
        return TOOL_FORMATS["llama3"]
    return None
