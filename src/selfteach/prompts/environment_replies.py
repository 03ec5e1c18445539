"""Encodes what an environment replies to a turn, without a change to the tokens before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfteach.errors import EngineError
from selfteach.prompts.control_tokens import ControlTokens
from selfteach.prompts.template_set import Message
from selfteach.prompts.tool_calls import TOOL_FORMATS, Role, Tool, ToolFormat

TURN_MARK = "\ufdd2"
"""Stands for a turn whose tokens are known; it is removed from data."""
PROBE = "probe"


@dataclass(frozen=True, slots=True)
class ReplyEncoder:
    """Encodes replies by the chat template: the difference that they make to a rendered chat."""

    chat: Callable[[list[Message], bool], str]
    """Renders messages, with or without the header of the next turn."""
    control: ControlTokens
    end_id: int
    """The token that ends a turn, which the policy has sampled."""
    name: str
    """The tokenizer's name, for errors."""
    tags: tuple[str, str]
    """What stands around a thought."""

    def encode(self, texts: Sequence[str], role: Role, turn: str = TURN_MARK) -> tuple[int, ...]:
        """Return the ids that follow a turn's end token, up to the header of the next turn.

        The texts are escaped. Raises `EngineError` for a chat template that changes the earlier turns.
        """
        turns: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": turn},
        ]
        messages: list[Message] = [{"role": role, "content": text} for text in texts]
        body, whole = self.chat(turns, False), self.chat([*turns, *messages], True)
        added = self.control.encode(whole.partition(TURN_MARK)[2])
        # Some templates write an empty thought into the last turn alone: it says nothing.
        empty = re.compile(r"\s*".join(map(re.escape, self.tags)) + r"\s*")
        before, after = (empty.sub("", text) for text in (body, whole))
        if TURN_MARK in before and after.startswith(before) and added[:1] == (self.end_id,):
            return added[1:]
        thought = " (the thoughts of earlier turns)" if turn != TURN_MARK else ""
        raise EngineError(
            f"the chat template of {self.name!r} rewrites earlier turns{thought} when a message of the "
            f"role {role!r} follows, so an episode cannot go on from the tokens that were sampled: use "
            "another model, or a chat template that leaves history as it is"
        )

    def require(self, role: Role, *, thoughts: bool) -> None:
        """Check that messages of a role can follow a turn as it was sampled, with a thought or without.

        Raises `EngineError`.
        """
        turns = [TURN_MARK]
        if thoughts:
            turns.append(f"{self.tags[0]}\n{PROBE}\n{self.tags[1]}\n\n{TURN_MARK}")
        for turn in turns:
            self.encode([PROBE, PROBE], role, turn)


def require_tools(
    name: str, tools: Sequence[Tool], tool_format: ToolFormat | None, prompt: str
) -> None:
    """Raise `EngineError` for a family whose tool calls cannot be read, or that shows no tools."""
    if tools and tool_format is None:
        raise EngineError(
            f"the chat template of {name!r} writes tool calls in no known form: "
            f"{', '.join(TOOL_FORMATS)} are known; use a model of such a family, or set "
            'model.tool_calls = "json"'
        )
    for tool in tools:
        if tool["function"]["name"] not in prompt:
            raise EngineError(f"the chat template of {name!r} does not show tools to the model")
