"""From a critic's text to a `Critique`, or to the typed reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from selfteach.feedback.alignment import same_words
from selfteach.prompts.thinking import split_thinking
from selfteach.protocols import Verifier
from selfteach.tasks.segmentation import Splitter, content, tags
from selfteach.types import (
    Case,
    Critique,
    CritiqueFailure,
    CritiqueFailureKind,
    CritiqueStep,
    Problem,
    Rollout,
    StepStatus,
    Verdict,
)

CASE = re.compile(r"\s*<case>[^<]*</case>\s*")
"""The letter that a critic is asked for; what counts is what it then writes."""
NUMBERED = re.compile(r"<step_(\d+)>")
COMPARED = 1_000
"""Words of two steps that are compared, at most."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a text in the solver's format says: its steps, and its final answer in canonical form."""

    steps: tuple[str, ...]
    answer: str | None


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads critiques of answers to one kind of problem.

    A critique is a text in the format of an answer, so the task's own splitter and verifier read it
    (or its tags, where it has some).
    """

    split_steps: Splitter
    verify: Verifier
    min_similarity: float = 0.3
    """A critique that keeps no step must share this much of the words of the first step with the
    answer's first step (ratio of `difflib.SequenceMatcher`); else it is about something else."""

    def __call__(
        self, text: str, rollout: Rollout, verdict: Verdict, *, finished: bool = True
    ) -> Critique | CritiqueFailure:
        """A critic's whole reply about an answer; ``finished`` is False if the reply was cut.

        A thought before the trace is stripped. The four cases are the paper's: A all right, B right
        but something was missing, C cut at the token limit, D wrong.
        """
        said = CASE.sub("", split_thinking(text)[1], count=1)
        if not finished:  # also where a server keeps the thought to itself and nothing is left
            return _none("truncated", "the critic's reply was cut off before its end")
        if not text.strip():
            return _none("empty", "the critic wrote nothing")
        if not said.strip():
            return _none("empty", "the critic wrote a thought and nothing after it")
        problem = rollout.problem
        own = self.trace(problem, rollout.text)
        told = self.trace(problem, said)
        if told.answer is None:
            return _none("malformed", "no final answer in the critique")
        if not told.steps:
            return _none("malformed", "no step in the critique")
        if (wrong := _misnumbered(said)) is not None:
            return _none("malformed", wrong)
        kept = _kept(own.steps, told.steps)
        if kept == 0 and own.steps:
            likeness = _likeness(own.steps[0], told.steps[0])
            if likeness < self.min_similarity:
                why = f"the first steps share {likeness:.0%} of their words"
                return _none("misaligned", why, told.answer)
        if not self.verify(problem, said).correct:
            why = f"the critic's own answer is {_shown(told.answer)}"
            return _none("wrong_answer", why, told.answer)
        return _critique(own, told, kept, rollout, verdict)

    def trace(self, problem: Problem, text: str) -> Trace:
        """Steps and final answer of a text in the solver's format, or in the tags of ``free``.

        An answer without tags is shown to the critic in numbered ones, and comes back in them.
        """
        parsed = self.verify(problem, text).parsed
        spans = (tags if NUMBERED.search(text) else self.split_steps)(text)
        steps = [content(text, span) for span in (spans[:-1] if parsed is not None else spans)]
        return Trace(tuple(steps), parsed)


def _critique(own: Trace, told: Trace, kept: int, rollout: Rollout, verdict: Verdict) -> Critique:
    assert told.answer is not None
    repeated_later = kept < len(own.steps) and any(
        same_words(own.steps[kept], step) for step in told.steps[kept:]
    )
    changed = kept < len(own.steps) and not repeated_later
    case: Case
    if not rollout.finished:
        case = "C"
        # The step that was cut off is no error; one before it that was changed is.
        first_error = kept if changed and kept < len(own.steps) - 1 else None
    elif verdict.correct:
        untouched = kept == len(own.steps) == len(told.steps)
        case, first_error = ("A" if untouched else "B"), (kept if changed else None)
    else:
        case, first_error = "D", kept
    steps = tuple(_statuses(own.steps, told.steps, kept, changed))
    return Critique(case, steps, told.answer, first_error)


def _statuses(
    own: Sequence[str], told: Sequence[str], kept: int, changed: bool
) -> list[CritiqueStep]:
    steps = [CritiqueStep(text, "kept", text) for text in told[:kept]]
    left = list(own[kept + changed :])
    for index, text in enumerate(told[kept:]):
        status: StepStatus = "fixed" if index == 0 and changed else "new"
        original = own[kept] if index == 0 and changed else None
        if status == "new" and left and same_words(left[0], text):
            status, original = "kept", left.pop(0)
        steps.append(CritiqueStep(text, status, original))
    return steps


def _kept(own: Sequence[str], told: Sequence[str]) -> int:
    """How many leading steps are repeated verbatim, white space apart."""
    pairs = enumerate(zip(own, told, strict=False))
    return next((i for i, (a, b) in pairs if not same_words(a, b)), min(len(own), len(told)))


def _likeness(a: str, b: str) -> float:
    # Beyond these words nothing changes the verdict but the time it takes, which is quadratic.
    begin = [text.split(maxsplit=COMPARED)[:COMPARED] for text in (a, b)]
    return SequenceMatcher(None, *begin, autojunk=False).ratio()


def _shown(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


def _misnumbered(text: str) -> str | None:
    """What is wrong with the numbers of tagged steps; None if nothing is, or if there are no tags."""
    found = [int(number) for number in NUMBERED.findall(text)]
    if found == list(range(1, len(found) + 1)):
        return None
    return f"steps are numbered {', '.join(map(str, found[:12]))}"


def _none(outcome: CritiqueFailureKind, detail: str, answer: str | None = None) -> CritiqueFailure:
    return CritiqueFailure(outcome, detail, answer=None if answer is None else _shown(answer))
