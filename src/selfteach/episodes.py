"""Define the records of an episode: turns of the model, and what an environment replies to them.

A rollout is a sequence of segments. A single answer is the episode of one turn: one model segment over
all of its tokens. Environment tokens are read by the model and never scored: they are in no loss, mean,
length or denominator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

SegmentKind = Literal["model", "environment"]
EventKind = Literal[
    "tool_result", "tool_error", "malformed_call", "observation", "truncated", "budget", "timeout",
    "failed",
]  # fmt: skip
"""What an environment segment is: the result of a tool, or why a tool has none; why a turn that tries
to call a tool calls none; another message of the environment; a turn was cut at its token limit; there
was no turn or no room left; the environment did not reply in time; it raised."""
LIMITS: frozenset[EventKind] = frozenset({"truncated", "budget", "timeout", "failed"})
"""Events that end an episode before the policy or the environment has ended it."""
NOT_ANSWERED: frozenset[EventKind] = LIMITS - {"truncated"}
"""Events after which the last turn is no answer: the policy waited for a reply to it."""
LABELS: Mapping[EventKind, str] = {
    "tool_result": "tool result", "tool_error": "tool error", "malformed_call": "malformed call",
    "observation": "environment", "truncated": "cut off", "budget": "out of budget",
    "timeout": "timed out", "failed": "failed",
}  # fmt: skip
GAP = "\n\n"
"""What stands between two segments in an episode's text."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """Holds a run of tokens that either the model or the environment has written.

    Example: ``Segment("environment", 12, 20, "42", "tool_result")``, eight tokens of a tool's result
    with the control tokens that the chat template puts around it.
    """

    kind: SegmentKind
    start: int
    stop: int
    """Half-open range of the rollout's ``token_ids``; empty for a message that no turn follows."""
    text: str
    """The turn without special tokens and thought, or what the environment wrote."""
    event: EventKind | None = None
    """What kind of message this is; None for a turn of the model."""

    @property
    def shown(self) -> str:
        """Return the segment as it stands in the episode's text."""
        return self.text if self.event is None else f"[{LABELS[self.event]}] {self.text}".rstrip()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Holds one call that the policy wrote: ``calculator(expression="6 * 7")``."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """Holds a turn of the policy as an environment reads it."""

    text: str
    """The decoded turn, without special tokens and thought; calls as they were written."""
    calls: tuple[ToolCall, ...] = ()
    malformed: str | None = None
    """Why what the policy wrote is no call, and how one is written; None if each could be read."""
    before_calls: str = ""
    """What the turn says before its first call; "" for a turn without one."""


@dataclass(frozen=True, slots=True)
class EnvironmentReply:
    """Holds what an environment replies to a turn."""

    texts: tuple[str, ...]
    """One message per call, in order, or one message; none if the episode ends without."""
    event: EventKind = "tool_result"
    done: bool = False
    """True if the episode is over: the policy gets no further turn."""


class Segmented:
    """Adds what follows from segments to a rollout; without any it is one turn of the model."""

    __slots__ = ()

    segments: tuple[Segment, ...]
    token_ids: tuple[int, ...]
    text: str
    finished: bool

    def require_tiling(self) -> None:
        """Check that the segments are the tokens, without a gap, and the text."""
        ends = [0, *(segment.stop for segment in self.segments)]
        starts = [*(segment.start for segment in self.segments), len(self.token_ids)]
        assert not self.segments or ends == starts, "segments do not tile the tokens"

    @property
    def is_episode(self) -> bool:
        """Return True if the rollout was sampled in an environment, be it in one turn."""
        return bool(self.segments)

    @property
    def turns(self) -> tuple[Segment, ...]:
        """Return the model's segments."""
        turns = tuple(segment for segment in self.segments if segment.kind == "model")
        return turns or (Segment("model", 0, len(self.token_ids), self.text),)

    @property
    def is_cut(self) -> bool:
        """Return True if the last turn was cut at its token limit, so that it is no whole step.

        An episode that its budget or its environment has ended has whole turns.
        """
        if not self.segments:
            return not self.finished
        return self.segments[-1].event == "truncated"

    @property
    def is_broken(self) -> bool:
        """Return True if the environment has failed, so that nobody has judged the episode."""
        return bool(self.segments) and self.segments[-1].event in ("timeout", "failed")

    @property
    def model_mask(self) -> list[bool]:
        """Return True for each token of the model, False for each of the environment."""
        mask = [not self.segments] * len(self.token_ids)
        for turn in self.turns:
            mask[turn.start : turn.stop] = [True] * (turn.stop - turn.start)
        return mask

    @property
    def model_positions(self) -> Sequence[int]:
        """Return the indices of the model's tokens."""
        if not self.segments:
            return range(len(self.token_ids))
        return [i for turn in self.turns for i in range(turn.start, turn.stop)]

    @property
    def length(self) -> int:
        """Return the number of tokens that the model has sampled."""
        return sum(turn.stop - turn.start for turn in self.turns)

    @property
    def answer_text(self) -> str:
        """Return the text that is verified: the last turn's; empty if it waited for a reply."""
        last = self.segments[-1] if self.segments else None
        return "" if last is not None and last.event in NOT_ANSWERED else self.turns[-1].text

    @property
    def model_text(self) -> str:
        """Return the text of the model's turns, without what the environment wrote."""
        return GAP.join(turn.text for turn in self.turns)

    @property
    def text_spans(self) -> tuple[Span, ...]:
        """Return each segment's range of characters of the text."""
        if not self.segments:
            return ((0, len(self.text)),)
        return spans_in_text(self.segments)

    @property
    def turn_spans(self) -> list[Span]:
        """Return each turn's range of characters of the text."""
        kinds = [segment.kind for segment in self.segments] or ["model"]
        return [span for span, kind in zip(self.text_spans, kinds, strict=True) if kind == "model"]

    @property
    def environment_spans(self) -> list[Span]:
        """Return the ranges of characters of what the environment wrote."""
        rows = zip(self.text_spans, self.segments, strict=False)
        return [span for span, segment in rows if segment.kind == "environment"]


def episode_text(segments: Sequence[Segment]) -> str:
    """Return the text of an episode: turns, and the environment's messages with what they are."""
    return GAP.join(segment.shown for segment in segments)


def spans_in_text(segments: Sequence[Segment]) -> tuple[Span, ...]:
    """Return the range of characters of each segment in `episode_text`."""

    def after(spans: list[Span], segment: Segment) -> list[Span]:
        begin = spans[-1][1] + len(GAP) if spans else 0
        return [*spans, (begin, begin + len(segment.shown))]

    return tuple(reduce(after, segments, []))
