"""Holds the state of one episode while it is sampled: its tokens, its segments, its environment."""

from __future__ import annotations

from dataclasses import dataclass, field

from selfteach.episodes import (
    LIMITS,
    EnvironmentReply,
    EventKind,
    Segment,
    SegmentKind,
    episode_text,
)
from selfteach.prompts.tool_calls import Role
from selfteach.protocols import Environment
from selfteach.types import Problem, Rollout, Verdict


@dataclass(slots=True)
class RunningEpisode:
    """Holds an episode that is being sampled."""

    problem: Problem
    sample: int
    seed: int
    """Seed of the environment."""
    environment: Environment | None = None
    """None until it is made, and if it cannot be made."""
    observation: str = ""
    prompt_ids: tuple[int, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    version: int = 0
    is_over: bool = False
    broken: tuple[EventKind, str] | None = None
    """Why the environment cannot be used any more; None if it can."""
    verdict: Verdict | None = None

    @property
    def turns(self) -> int:
        """Return the number of turns so far."""
        return sum(segment.kind == "model" for segment in self.segments)

    @property
    def ids(self) -> tuple[int, ...]:
        """Return prompt and tokens so far: the prompt of the next turn."""
        return (*self.prompt_ids, *self.token_ids)

    def add_turn(self, turn: Rollout) -> None:
        """Append a sampled turn, as it was sampled."""
        self.version = turn.policy_version
        self._append("model", turn.token_ids, turn.logps, turn.text, None)

    def add_reply(self, reply: EnvironmentReply, ids: tuple[int, ...]) -> None:
        """Append what the environment replied, as the chat template has rendered it."""
        self._append("environment", ids, (0.0,) * len(ids), "\n".join(reply.texts), reply.event)

    def note(self, event: EventKind, text: str = "") -> None:
        """Append a message that no turn follows, so that nobody reads it as tokens."""
        self._append("environment", (), (), text, event)

    def end(self, event: EventKind | None = None, text: str = "") -> None:
        """End the episode, by an event if it was not the policy's or the environment's wish."""
        if event is not None:
            self.note(event, text)
        self.is_over = True

    def rollout(self) -> Rollout:
        """Return the episode as a rollout."""
        segments = tuple(self.segments)
        return Rollout(
            self.problem, self.sample, self.prompt_ids, tuple(self.token_ids), tuple(self.logps),
            episode_text(segments),
            finished=not any(segment.event in LIMITS for segment in segments),
            policy_version=self.version,
            segments=segments,
            observation=self.observation,
            verdict=self.verdict,
        )  # fmt: skip

    def _append(
        self, kind: SegmentKind, ids: tuple[int, ...], logps: tuple[float, ...], text: str,
        event: EventKind | None,
    ) -> None:  # fmt: skip
        start = len(self.token_ids)
        self.token_ids += ids
        self.logps += logps
        stop = len(self.token_ids)
        self.segments.append(Segment(kind, start, stop, text, event))


def role_of(reply: EnvironmentReply) -> Role:
    """Return who a reply is from in the chat template."""
    return "user" if reply.event == "observation" else "tool"
