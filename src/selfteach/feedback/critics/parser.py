"""Parses a critic's text into a `Critique`, or into a typed failure."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from selfteach.feedback.alignment import lines_of_turn, words_of
from selfteach.prompts.thinking import split_thinking
from selfteach.protocols import Verifier
from selfteach.tasks.code.answer_parts import lines_of
from selfteach.tasks.code.code_steps import code_steps
from selfteach.tasks.segmentation import (
    Splitter,
    content,
    judged_by_environment,
    tags,
    without_final,
)
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

CASE = re.compile(r"<case>[^<]*</case>")
"""The letter that the prompt requests; it is ignored, since the case follows from the steps."""
NUMBERED = re.compile(r"<step_(\d+)>")
NUMBERED_TURN = re.compile(r"<turn_(\d+)>")
TURN = re.compile(r"<turn_(\d{1,9})>(.*?)(?:</turn_\1>|(?=<turn_\d{1,9}>)|\Z)", re.DOTALL)
MAX_COMPARED_WORDS = 200
"""Words of each of two steps that are compared; the time grows with the third power of it."""
StepParts = Callable[[str], Sequence[str]]
"""Returns what is compared of a step: its words, or the lines of a turn or of code."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Holds the steps of a text in the policy's format, and its final answer in canonical form."""

    steps: tuple[str, ...]
    answer: str | None


@dataclass(frozen=True, slots=True)
class CritiqueParser:
    """Parses critiques of rollouts of one kind of problem.

    A critique is a text in the format of a rollout, so the task's splitter and verifier parse it (or
    its numbered tags, where it has some).
    """

    split_steps: Splitter
    verify: Verifier
    min_similarity: float = 0.3
    """A critique that repeats no step is ``misaligned`` if its first step is less similar than this to
    the rollout's first step (ratio of `difflib.SequenceMatcher` over words)."""

    def __call__(
        self, text: str, rollout: Rollout, verdict: Verdict, *, finished: bool = True
    ) -> Critique | CritiqueFailure:
        """Parse a critic's whole reply about a rollout; ``finished`` is False if it was truncated.

        A thought before the trace is stripped. The four cases are the paper's: A all right, B right
        but a justification is missing, C ended by a limit, D wrong.
        """
        critique = without_thought(text, finished=finished)
        if isinstance(critique, CritiqueFailure):
            return critique
        attempt, corrected, final = self._traces(rollout, verdict, critique)
        if corrected.answer is None:
            return failure("malformed", "no final answer in the critique")
        if not corrected.steps and not rollout.is_episode:
            return failure("malformed", "no step in the critique")
        numbers = NUMBERED_TURN if rollout.is_episode else NUMBERED
        if (detail := _misnumbered(critique, numbers)) is not None:
            return failure("malformed", detail)
        parts_of = self._parts_of(rollout)
        repeated = count_repeated(attempt.steps, corrected.steps, parts_of)
        written = (*corrected.steps, final)
        detail = unlike(attempt.steps, written, repeated, self.min_similarity)
        if detail is not None:
            return failure("misaligned", detail, corrected.answer)
        if (detail := self._ends_wrong(rollout, verdict, attempt, corrected, final)) is not None:
            return failure("wrong_answer", detail, corrected.answer)
        parsed = critique_of(attempt, corrected, repeated, rollout, verdict, parts_of)
        judged = judged_by_environment(rollout)
        return replace(parsed, answer=parsed.steps[-1].text) if judged else parsed

    def _parts_of(self, rollout: Rollout) -> StepParts:
        if rollout.is_episode:
            return lines_of_turn
        return lines_of if self.split_steps is code_steps else words_of

    def _ends_wrong(
        self, rollout: Rollout, verdict: Verdict, attempt: Trace, corrected: Trace, final: str
    ) -> str | None:
        """Return why a critique does not end right; None if it does.

        The answer is verified, but where an environment alone can judge turns: of such an episode it is
        only known that a failed one fails again.
        """
        if not judged_by_environment(rollout):
            right = self.verify(rollout.problem, final).correct
            return (
                None
                if right
                else f"the critique's final answer is {_shortened(corrected.answer or '')}"
            )
        written, turns = [[*map(lines_of_turn, one.steps)] for one in (corrected, attempt)]
        if verdict.correct or written != turns:
            return None
        return "the critique repeats all turns of an episode that was no success"

    def _traces(
        self, rollout: Rollout, verdict: Verdict, critique: str
    ) -> tuple[Trace, Trace, str]:
        """Return the rollout's trace and the critique's, and the text that states its final answer.

        An episode's steps are its turns, and so are the critique's; the last of these has the answer,
        or is a step as the others are, where the environment has judged the episode.
        """
        problem = rollout.problem
        if not rollout.is_episode:
            return self.trace(problem, rollout.text), self.trace(problem, critique), critique
        turns = [content(turn.text, (0, len(turn.text))) for turn in rollout.turns]
        written = [match[2].strip() for match in TURN.finditer(critique)] or [critique.strip()]
        if judged_by_environment(rollout):
            steps = tuple(content(text, (0, len(text))) for text in written)
            return Trace(tuple(turns), None), Trace(steps, steps[-1]), written[-1]
        attempt = turns[:-1] if verdict.parsed is not None else turns
        answer = self.verify(problem, written[-1]).parsed
        steps = tuple(content(text, (0, len(text))) for text in written[:-1])
        return Trace(tuple(attempt), verdict.parsed), Trace(steps, answer), written[-1]

    def trace(self, problem: Problem, text: str) -> Trace:
        """Return steps and final answer of a text in the policy's format, or in numbered tags.

        The template set ``free`` shows a rollout without tags to the critic in numbered ones, and the
        critique comes back in them.
        """
        parsed = self.verify(problem, text).parsed
        spans = (tags if NUMBERED.search(text) else self.split_steps)(text)
        steps = [content(text, span) for span in without_final(spans, parsed)]
        return Trace(tuple(steps), parsed)


def without_thought(text: str, *, finished: bool) -> str | CritiqueFailure:
    """Return a critic's reply without its thought and the letter of its case, or why it is no use."""
    critique = CASE.sub("", split_thinking(text)[1], count=1)
    # Checked first: a server may strip an unfinished thought and leave nothing.
    if not finished:
        return failure("truncated", "the critic's reply was truncated")
    if not text.strip():
        return failure("empty", "the critic returned no text")
    if not critique.strip():
        return failure("empty", "the critic returned a thought and no text after it")
    return critique


def critique_of(
    attempt: Trace,
    corrected: Trace,
    repeated: int,
    rollout: Rollout,
    verdict: Verdict,
    parts_of: StepParts,
) -> Critique:
    """Return a critique, given how many leading steps of the attempt are repeated verbatim.

    Two steps are equal if ``parts_of`` returns the same for both.
    """
    assert corrected.answer is not None
    changed = repeated < len(attempt.steps)
    if changed:
        parts = parts_of(attempt.steps[repeated])
        changed = all(parts_of(step) != parts for step in corrected.steps[repeated:])
    case: Case
    if not rollout.finished:
        case = "C"
        # A step that is cut is no error; one before it that was changed is.
        ends_cut = rollout.is_cut and attempt.answer is None
        whole = len(attempt.steps) - ends_cut
        first_error = repeated if changed and repeated < whole else None
    elif verdict.correct:
        untouched = repeated == len(attempt.steps) == len(corrected.steps)
        case, first_error = ("A" if untouched else "B"), (repeated if changed else None)
    else:
        case, first_error = "D", repeated
    steps = tuple(_statuses(attempt.steps, corrected.steps, repeated, changed, parts_of))
    return Critique(case, steps, corrected.answer, first_error)


def _statuses(
    attempt: Sequence[str],
    corrected: Sequence[str],
    repeated: int,
    changed: bool,
    parts_of: StepParts,
) -> list[CritiqueStep]:
    """Return the corrected steps with what became of each; repeated ones in the attempt's words."""
    steps = [CritiqueStep(text, "kept", text) for text in attempt[:repeated]]
    remaining = deque(parts_of(step) for step in attempt[repeated + changed :])
    originals = iter(attempt[repeated + changed :])
    for index, text in enumerate(corrected[repeated:]):
        status: StepStatus = "fixed" if index == 0 and changed else "new"
        original = attempt[repeated] if index == 0 and changed else None
        if status == "new" and remaining and remaining[0] == parts_of(text):
            remaining.popleft()
            status, text = "kept", next(originals)
            original = text
        steps.append(CritiqueStep(text, status, original))
    return steps


def count_repeated(attempt: Sequence[str], corrected: Sequence[str], parts_of: StepParts) -> int:
    """Count the leading steps that are repeated verbatim, as ``parts_of`` compares them."""
    pairs = enumerate(zip(attempt, corrected, strict=False))
    shorter = min(len(attempt), len(corrected))
    return next((i for i, (a, b) in pairs if parts_of(a) != parts_of(b)), shorter)


def unlike(
    attempt: Sequence[str], corrected: Sequence[str], repeated: int, min_similarity: float
) -> str | None:
    """Return why a critique is about something else; None if it repeats a step, or nearly does."""
    if repeated or not attempt:
        return None
    similarity = _similarity(attempt[0], corrected[0])
    if similarity >= min_similarity:
        return None
    return f"the first steps share {similarity:.0%} of their words"


def _similarity(a: str, b: str) -> float:
    words = [text.split(maxsplit=MAX_COMPARED_WORDS)[:MAX_COMPARED_WORDS] for text in (a, b)]
    return SequenceMatcher(None, *words, autojunk=False).ratio()


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


def _misnumbered(text: str, numbered: re.Pattern[str]) -> str | None:
    """Return what is wrong with the numbers of tagged steps; None without tags or errors."""
    written = numbered.findall(text)
    # Python converts no number of more than 4,300 digits, and no trace has a billion steps.
    numbers = [int(number) if len(number) < 10 else -1 for number in written]
    if numbers == list(range(1, len(numbers) + 1)):
        return None
    what = "turns" if numbered is NUMBERED_TURN else "steps"
    return f"{what} are numbered {', '.join(map(_shortened, written[:12]))}"


def failure(kind: CritiqueFailureKind, detail: str, answer: str | None = None) -> CritiqueFailure:
    """Return a failure of a kind, with the critic's answer shortened."""
    return CritiqueFailure(kind, detail, answer=None if answer is None else _shortened(answer))
