"""Read and write tool calls in the forms of the model families.

``hermes``: Qwen2.5, Qwen3 and Hermes put each call into a pair of tags::

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "6 * 7"}}
    </tool_call>

``llama3``: Llama 3.1 to 3.3 write a call as the whole turn, several separated by ``;``::

    {"name": "calculator", "parameters": {"expression": "6 * 7"}}

``json``, for models that write no tags: such an object, with ``arguments``, on lines of its own
anywhere in the turn, in a code fence or not.

A turn without a call in its family's form is a *malformed call*, and no answer, if a line of it begins
an object that names a known tool, with arguments::

    {"name": "calculator", "arguments":

In front of it on its line there may be a tag, a code fence, a quote or a list's bracket. Such an object
in the middle of a sentence, one with another name and one without arguments are text, as all JSON is
that is the answer to a question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from selfteach.episodes import ToolCall, Turn

Role = Literal["tool", "user"]
"""Who an environment's message is from, in the chat template: a tool, or the user."""
Tool = Mapping[str, Any]
"""A tool as chat templates take it: ``{"type": "function", "function": {name, description, …}}``."""

TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
CALL_START = re.compile(r"\s*\{\s*\"(?:type|name|parameters)\"")
ARGUMENTS = ("arguments", "parameters")
"""Keys of a call's arguments, of any family."""
_PAIRS = ('"type"', ":", '"function"', ","), ('"name"', ":", r'"([^"\\\n]{1,200}+)"', ",")
_TYPE, _NAME = (r"\s*+".join((*pair, "")).replace('"', r'\\?"') for pair in _PAIRS)
_KEY = rf'\\?"(?:{"|".join(ARGUMENTS)})\\?"\s*+:'
NAMED_CALL = re.compile(rf"\{{\s*+(?:{_TYPE})?{_NAME}{_KEY}")
"""Matches what begins a call in JSON, with its name; its quotes may be escaped."""
CALL_LINE = re.compile(
    rf"^[ \t>]*+(?:<[\w/|-]{{1,40}}+>[ \t]*+)*+(?:`{{1,3}}\w*+[ \t]*+)?[\[ \t]*+{NAMED_CALL.pattern}",
    re.MULTILINE,
)
"""Matches a line that begins with a call, behind tags, a fence or a bracket."""
MAX_CHARS = 100_000
"""Characters of a turn that is read for calls."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Reads and writes the calls of one family."""

    name: str
    arguments: str
    """The key of a call's arguments."""
    texts: Callable[[str, Collection[str]], Iterator[str]]
    """Yields the JSON of each call in a turn, given the names of the tools."""
    before: str = ""
    after: str = ""
    """What stands around a call."""
    place: str = ""
    """Where in a turn a call stands, to follow its form in a sentence."""
    tools: Sequence[Tool] = field(default=(), compare=False)
    """The tools that are offered: a turn that names one in another form is no answer."""

    def offering(self, tools: Sequence[Tool]) -> ToolFormat:
        """Return the format of the same family for these tools."""
        return replace(self, tools=tuple(tools))

    def read(self, text: str) -> Turn:
        """Return a turn with its calls; a turn in which one cannot be read has none, and says why."""
        if len(text) > MAX_CHARS:
            return Turn(text, malformed=f"a turn of {len(text)} characters is too long to be read")
        names = {tool["function"]["name"]: tool for tool in self.tools}
        calls = []
        for written in self.texts(text, names):
            call = self._call(written)
            if isinstance(call, str):
                return Turn(text, malformed=f"the tool call cannot be read: {call}{self._hint()}")
            calls.append(call)
        attempts = () if calls else (match[1] for match in CALL_LINE.finditer(text))
        attempt = next((name for name in attempts if name in names), None)
        if attempt is not None:
            reason = f"{attempt} was not called: the call is not in its form"
            return Turn(text, malformed=f"{reason}{self._hint(attempt)}")
        return Turn(text, tuple(calls), before_calls=self._before_calls(text) if calls else "")

    def write(self, call: ToolCall) -> str:
        """Return a call as the family's models write it."""
        value = {"name": call.name, self.arguments: dict(call.arguments)}
        return f"{self.before}{json.dumps(value, ensure_ascii=False)}{self.after}"

    def form(self, tool: Tool) -> str:
        """Return a call of a tool with … for each argument that it needs."""
        function = tool["function"]
        schema = function.get("parameters", {})
        names = schema.get("required") or list(schema.get("properties", {}))
        return self.write(ToolCall(function["name"], dict.fromkeys(names, "…")))

    def _hint(self, name: str | None = None) -> str:
        """Return how a call is written, to stand behind a reason: that of one tool, or of the first."""
        named = (tool for tool in self.tools if name in (None, tool["function"]["name"]))
        if (tool := next(named, None)) is None:
            return ""
        return f"; a call is written {' '.join(self.form(tool).split())}{self.place}"

    def _before_calls(self, text: str) -> str:
        return text.partition(self.before.strip())[0].strip() if self.before else ""

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
        other = next(
            (key for key in ARGUMENTS if key in value and self.arguments not in value), None
        )
        if other is not None:
            return f'it has "{other}" in place of "{self.arguments}"'
        arguments = value.get(self.arguments, {})
        if not isinstance(arguments, dict):
            return f'its "{self.arguments}" are no object'
        return ToolCall(value["name"], arguments)


def _tagged(text: str, names: Collection[str]) -> Iterator[str]:
    for match in TAGGED.finditer(text):
        yield match[1]


def _whole(text: str, names: Collection[str]) -> Iterator[str]:
    """Yield the JSON objects that a turn consists of; none if it begins with no call."""
    if not CALL_START.match(text) or not _begins_call(text, names):
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


def _begins_call(text: str, names: Collection[str]) -> bool:
    """Return True if a turn's first object is a call: it has arguments, or a known tool's name."""
    bare = text.lstrip()
    try:
        value, _ = json.JSONDecoder().raw_decode(bare)
    except (ValueError, RecursionError):
        return NAMED_CALL.match(bare) is not None
    return isinstance(value.get("name"), str) and (
        any(key in value for key in ARGUMENTS) or value["name"] in names
    )


def _on_lines(text: str, names: Collection[str]) -> Iterator[str]:
    """Yield the JSON objects that begin a line and name a known tool, wherever they are."""
    decoder, end = json.JSONDecoder(), 0
    for match in CALL_LINE.finditer(text):
        begin = text.index("{", match.start())
        if match[1] not in names or begin < end:
            continue
        try:
            _, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            end = len(text)
        yield text[begin:end]


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat("hermes", "arguments", _tagged, "<tool_call>\n", "\n</tool_call>"),
    "llama3": ToolFormat("llama3", "parameters", _whole, place=", and nothing else in the turn"),
}
"""The known forms of families, by name."""
JSON_CALLS = ToolFormat("json", "arguments", _on_lines, place=", on a line of its own")
"""The form for models that do not write that of their family."""


def tool_format(chat_template: str) -> ToolFormat | None:
    """Return the form in which a chat template writes calls; None if it is not known."""
    if "<tool_call>" in chat_template and "<function=" not in chat_template:
        return TOOL_FORMATS["hermes"]
    if "<|start_header_id|>" in chat_template and "ipython" in chat_template:
        return TOOL_FORMATS["llama3"]
    return None
