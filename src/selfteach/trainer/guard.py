"""Watch a run's metrics step by step: stop where nothing is learned, act beyond the recipe's bounds.

A guard is a function of the rows that it has seen, in order. A resumed run shows it the rows before its
checkpoint, and it is in the state in which it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from selfteach.config.guard_section import NO_GRADIENT, GuardConfig, Range

Row = Mapping[str, Any]

NEARLY_ALL_RIGHT = 0.95
"""Share of correct rollouts from which a step with nothing in the loss is no fault: all is learned."""
REWARD_FLOOR = 0.2
"""Share of correct rollouts that was reached once, before a loss of it means something."""


@dataclass(frozen=True, slots=True)
class GuardEvent:
    """Describes what a guard saw after a step, and what it does."""

    step: int
    action: Literal["warn", "reduce_lr", "stop"]
    text: str


class Guard:
    """Decides after each step whether the run goes on, and at what factor of its learning rate."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._first: list[Row] = []
        self._recent: list[Row] = []
        self._idle: list[Row] = []
        self._warned: set[str] = set()
        self._best = 0.0
        self.lr_factor = 1.0
        """Factor of the learning rate from the next update on."""

    def observe(self, row: Row) -> list[GuardEvent]:
        """Take a step's row of metrics; return what is to be said and done."""
        if row["kind"] != "step":
            return []
        config, step = self._config, row["step"]
        if len(self._first) < config.window:
            self._first.append(row)
        self._recent = [*self._recent, row][-config.window :]
        self._idle = [*self._idle, row] if is_idle(row) else []
        if config.idle_steps and len(self._idle) >= config.idle_steps:
            text = f"nothing could be learned in {len(self._idle)} steps: {why_idle(self._idle)}"
            self._idle = []
            return [GuardEvent(step, "stop", text)]
        events: list[GuardEvent] = []
        for name, text in self._beyond():
            if config.action == "warn" and name in self._warned:
                continue
            self._warned.add(name)
            events.append(GuardEvent(step, config.action, text))
        if events and config.action != "warn":
            self._recent = []
        if events and config.action == "reduce_lr":
            self.lr_factor *= config.lr_factor
        return events

    def _beyond(self) -> Iterator[tuple[str, str]]:
        """Yield the metrics that are beyond a bound, each with a sentence."""
        config = self._config
        if len(self._recent) < config.window:
            return
        relative: dict[str, Range | None] = {"length": config.length, "entropy": config.entropy}
        for name, factors in relative.items():
            if factors is None:
                continue
            start, now = _mean(self._first, name), _mean(self._recent, name)
            if not factors[0] * start <= now <= factors[1] * start:
                low, high = factors
                yield (
                    name,
                    (
                        f"{name} went from {start:.3g} to {now:.3g}, beyond guard.{name} = "
                        f"[{low:g}, {high:g}] of the first steps"
                    ),
                )
        limits = {
            "truncated": config.truncated,
            "repetition": config.repetition,
            "kl_initial": config.kl_initial,
        }
        for name, limit in limits.items():
            if limit is not None and not _mean(self._recent, name) <= limit:
                now = _mean(self._recent, name)
                yield name, f"{name} is {now:.3g}, above guard.{name} = {limit:g}"
        if config.reward is not None:
            now = _mean(self._recent, "correct")
            self._best = max(self._best, now)
            if self._best >= REWARD_FLOOR and now < config.reward * self._best:
                text = f"correct rollouts fell from {self._best:.0%} at their best to {now:.0%}"
                yield "reward", f"{text}, below guard.reward = {config.reward:g} of it"


def is_idle(row: Row) -> bool:
    """Return whether a step could learn nothing although there was something to learn."""
    took_nothing = row["optimizer_steps"] == 0 or row.get("grad_norm", 1.0) <= NO_GRADIENT
    return took_nothing and row["correct"] < NEARLY_ALL_RIGHT


def why_idle(rows: list[Row]) -> str:
    """Explain from their metrics why steps learned nothing."""
    reasons: list[str] = []
    dropped: dict[str, float] = {}
    for row in rows:
        for name, share in row.items():
            if name.startswith("dropped/"):
                reason = name.removeprefix("dropped/")
                dropped[reason] = dropped.get(reason, 0.0) + share / len(rows)
    reasons += [
        f"{share:.0%} of the rollouts had no usable feedback ({reason})"
        for reason, share in sorted(dropped.items(), key=lambda item: -item[1])
    ]
    truncated = _mean(rows, "truncated")
    if truncated >= 0.5:
        reasons.append(f"{truncated:.0%} of the rollouts were cut at sampling.max_tokens")
    formatted = _mean(rows, "formatted")
    if formatted <= 0.5:
        reasons.append(f"{formatted:.0%} of the rollouts had the form of an answer")
    if not dropped:
        correct = _mean(rows, "correct")
        if all(row["optimizer_steps"] == 0 for row in rows):
            rewarded = any("reward" in row for row in rows)
            groups = "whose rewards differ" if rewarded else "with both right and wrong ones"
            reasons.append(
                f"no token was in the loss ({correct:.0%} of the rollouts are right; GRPO learns from "
                f"groups {groups})"
            )
        else:
            reasons.append("the gradient is 0: the teacher says what the student says")
    return "; ".join(reasons)


def learned_nothing(rows: list[Row]) -> bool:
    """Return whether a run took steps and none of them could learn."""
    steps = [row for row in rows if row["kind"] == "step"]
    return bool(steps) and all(is_idle(row) for row in steps)


def _mean(rows: list[Row], name: str) -> float:
    """Return the mean of a metric over the steps that logged a number of it; 0 where none did."""
    return fmean([row[name] for row in rows if isinstance(row.get(name), int | float)] or [0.0])
