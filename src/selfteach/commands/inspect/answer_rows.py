"""Prepare rollouts for scoring: steps, first error, contexts, token kinds; and answers.jsonl's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from selfteach.commands.inspect.token_kinds import Language, TokenKind, token_kinds
from selfteach.evaluation.token_scores import ScoreRequest
from selfteach.feedback.alignment import first_change
from selfteach.prompts.episode_tokens import shown_problem, token_ends
from selfteach.protocols import Context
from selfteach.runtime.stored_records import history_column, segment_columns
from selfteach.tasks import segmentation
from selfteach.tasks.segmentation import Span
from selfteach.tasks.task import true_critique
from selfteach.trainer.build import Built
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, FirstChange, Rollout

Region = Literal["before", "failing", "after", "right"]
Source = Literal["oracle", "critic", "label"]
"""What locates the first error: a program that checks every step, the critic, or the file's label."""


@dataclass(frozen=True, slots=True)
class LocatedRollout:
    """Holds a critiqued rollout, its solution steps, and the index of the first wrong one.

    Example: three steps of which the second is wrong: ``first_error=1``, ``located=True``.
    """

    critiqued: CritiquedRollout
    spans: tuple[Span, ...]
    """Solution steps as character ranges of the rollout's text, the final answer last."""
    first_error: int | None
    """Index of the first wrong step; None if no step is wrong or the first error is unknown."""
    located: bool
    """True if the first error is known, or is known not to exist."""
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class PreparedRollout:
    """Holds a rollout with everything needed to score it under several contexts."""

    located: LocatedRollout
    token_spans: tuple[Span, ...]
    contexts: Mapping[str, str | None]
    """What the teacher is shown, by context name; None where the context cannot be built."""
    dropped: Mapping[str, str]
    """Why a context cannot be shown, by context name."""
    teacher_prompts: Mapping[str, tuple[int, ...]]
    change: FirstChange | None
    kinds: tuple[TokenKind, ...]
    prompt: str
    """The student's prompt as text, control tokens included."""

    @property
    def score_request(self) -> ScoreRequest:
        """Return the token ids that `token_scores.score_rollouts` takes."""
        rollout = self.located.critiqued.rollout
        return ScoreRequest(
            rollout.prompt_ids, rollout.token_ids, self.teacher_prompts, rollout.model_positions
        )

    def steps(self) -> list[int]:
        """Return the index of the step of each of the model's tokens; −1 outside all steps."""
        rollout = self.located.critiqued.rollout
        indices = [-1] * len(rollout.token_ids)
        for index, (start, stop) in enumerate(self.token_spans):
            indices[start:stop] = [index] * (stop - start)
        return [indices[i] for i in rollout.model_positions]

    def regions(self) -> list[Region | None]:
        """Return each token's region; None outside all steps and where the first error is unknown."""
        return [region(step, self.located) for step in self.steps()]


def region(step: int, rollout: LocatedRollout) -> Region | None:
    """Return where a step lies relative to the first error; None if that is unknown.

    All steps of a correct rollout without a wrong step are ``right``; a rollout whose final answer is
    correct in spite of a wrong step has the three regions of an incorrect one.
    """
    if step < 0 or not rollout.located:
        return None
    if rollout.first_error is None:
        return "right" if rollout.critiqued.verdict.correct else None
    if step == rollout.first_error:
        return "failing"
    return "before" if step < rollout.first_error else "after"


def locate_errors(built: Built, rollouts: Sequence[CritiquedRollout]) -> list[LocatedRollout]:
    """Find steps and first error of each rollout: by the task's oracle if any, else the critic.

    The oracle is exact even where the recipe's critic errs (``critic.error_rate``). Where it cannot
    check a rollout (code that goes another way than all worked solutions), the critic's is used.
    """
    return [_locate_error(built, critiqued) for critiqued in rollouts]


def _locate_error(built: Built, critiqued: CritiquedRollout) -> LocatedRollout:
    spans = tuple(segmentation.step_spans(critiqued.rollout, built.components.split_steps))
    oracle, critique = built.task.oracle, critiqued.critique
    source: Source = "critic"
    checked = None
    if oracle is not None:
        checked = true_critique(oracle, critiqued.rollout, rng=np.random.default_rng(0))
    if isinstance(checked, Critique):
        critique, source = checked, "oracle"
    if not isinstance(critique, Critique):
        return LocatedRollout(critiqued, spans, None, located=False)
    first = critique.first_error
    has_final = bool(spans) and spans[-1][0] < spans[-1][1]  # a program is its own final answer
    if first is None and has_final and _ends_wrong(critiqued):
        first = len(spans) - 1  # every step is right and the final answer is not
    if first is not None and first >= len(spans):
        return LocatedRollout(critiqued, spans, None, located=False)
    return LocatedRollout(critiqued, spans, first, located=True, source=source)


def _ends_wrong(critiqued: CritiquedRollout) -> bool:
    if segmentation.judged_by_environment(critiqued.rollout):
        return False
    return critiqued.verdict.parsed is not None and not critiqued.verdict.correct


def prepare(
    built: Built,
    rollouts: Sequence[LocatedRollout],
    contexts: Mapping[str, Context],
    *,
    language: Language,
) -> list[PreparedRollout]:
    """Build every context of every rollout, the teacher prompts, and the kind of each token."""
    critiqued = [rollout.critiqued for rollout in rollouts]
    shown = {name: context(critiqued) for name, context in contexts.items()}
    return [
        _prepare(built, rollout, {name: texts[i] for name, texts in shown.items()}, language)
        for i, rollout in enumerate(rollouts)
    ]


def _prepare(
    built: Built,
    located: LocatedRollout,
    shown: Mapping[str, str | CritiqueFailure | None],
    language: Language,
) -> PreparedRollout:
    rollout, renderer = located.critiqued.rollout, built.components.renderer
    ends = token_ends(renderer, rollout)
    contexts: dict[str, str | None] = {}
    dropped: dict[str, str] = {}
    prompts: dict[str, tuple[int, ...]] = {}
    for name, text in shown.items():
        if isinstance(text, CritiqueFailure):
            contexts[name], dropped[name] = None, text.reason
            continue
        contexts[name] = text
        prompt = renderer.teacher_prompt(shown_problem(rollout), text)
        if len(prompt) + len(rollout.token_ids) > built.components.max_length:
            dropped[name] = "longer than the context window"
        else:
            prompts[name] = prompt
    return PreparedRollout(
        located=located,
        token_spans=tuple(segmentation.token_spans(located.spans, ends)),
        contexts=contexts,
        dropped=dropped,
        teacher_prompts=prompts,
        change=first_change(located.critiqued, located.spans, ends)
        if _has_steps(located.critiqued)
        else None,
        kinds=_kinds(rollout, ends, language),
        prompt=renderer.shown(rollout.prompt_ids),
    )


def _kinds(rollout: Rollout, ends: Sequence[int], language: Language) -> tuple[TokenKind, ...]:
    """Return the kind of each of the model's tokens."""
    kinds = list(token_kinds(rollout.text, ends, language))
    return tuple(kinds[i] for i in rollout.model_positions)


def _has_steps(critiqued: CritiquedRollout) -> bool:
    return isinstance(critiqued.critique, Critique) and bool(critiqued.critique.steps)


def verbatim(prepared: PreparedRollout, context: str) -> float | None:
    """Return the fraction of the correct steps before the first error that a context repeats verbatim.

    1 for a step-aligned critique that copies every correct step, 0 for one that leaves them out. None
    without correct steps before an error, or without the context.
    """
    located, shown = prepared.located, prepared.contexts[context]
    before = located.spans[: located.first_error] if located.first_error is not None else ()
    if shown is None or not before:
        return None
    text = located.critiqued.rollout.text
    return float(np.mean([_contains(segmentation.content(text, span), shown) for span in before]))


def _contains(step: str, text: str) -> bool:
    return f" {_spaced(step)} " in f" {_spaced(text)} "


def _spaced(text: str) -> str:
    """Collapse whitespace to single spaces, and put spaces around the brackets of tags."""
    return " ".join(text.replace("<", " < ").replace(">", " > ").split())


def answer_row(prepared: PreparedRollout) -> dict[str, Any]:
    """Return a row of ``answers.jsonl``; it joins ``tokens.parquet`` by problem_id and sample."""
    located, critiqued = prepared.located, prepared.located.critiqued
    rollout, verdict, critique = critiqued.rollout, critiqued.verdict, critiqued.critique
    token_spans = [list(span) for span in prepared.token_spans]
    return {
        "problem_id": rollout.problem.id,
        "sample": rollout.sample,
        "policy_version": rollout.policy_version,
        **history_column(rollout.problem),
        "question": rollout.problem.question,
        "prompt": prepared.prompt,
        "gold_answer": rollout.problem.answer,
        "text": rollout.text,
        "correct": verdict.correct,
        "formatted": verdict.formatted,
        "parsed": verdict.parsed,
        "finished": rollout.finished,
        "tokens": rollout.length,
        **segment_columns(rollout),
        "step_spans": {"tokens": token_spans, "characters": [list(span) for span in located.spans]},
        "first_error": located.first_error,
        "first_error_from": located.source,
        "critique": None if critique is None else asdict(critique),
        "contexts": dict(prepared.contexts),
        "dropped": dict(prepared.dropped),
        "fidelity": None if prepared.change is None else prepared.change.fidelity,
        "verbatim": {name: verbatim(prepared, name) for name in prepared.contexts},
    }
