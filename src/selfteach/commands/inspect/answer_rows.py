"""What is known of each answer before it is scored: steps, first error, contexts, kinds of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from selfteach.commands.inspect.token_kinds import Kind, Language, kinds
from selfteach.evaluation.token_scores import ScoreRequest
from selfteach.feedback.alignment import first_change
from selfteach.protocols import Context
from selfteach.tasks import segmentation
from selfteach.tasks.segmentation import Span
from selfteach.tasks.task import OracleFn
from selfteach.trainer.build import Built
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, FirstChange

Region = Literal["before", "failing", "after", "right"]
Source = Literal["oracle", "critic", "label"]
"""Who says where the first error is: a program that checks every step, the critic, or the file."""


@dataclass(frozen=True, slots=True)
class Told:
    """A marked answer with its steps and where the first of them is wrong.

    Example: an answer of three steps whose second is wrong: ``first_error=1``, ``located=True``.
    """

    critiqued: CritiquedRollout
    spans: tuple[Span, ...]
    """Steps in characters of the answer's text, the final answer last."""
    first_error: int | None
    """Index of the first wrong step; None when no step is wrong, or nobody says."""
    located: bool
    """True if somebody says where the first error is, or that there is none."""
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class Inspected:
    """An answer, ready to be scored under several contexts."""

    told: Told
    token_spans: tuple[Span, ...]
    contexts: Mapping[str, str | None]
    """What the self-teacher is shown, by the context's name; None where nothing can be."""
    dropped: Mapping[str, str]
    """Why a context cannot be shown, by its name."""
    teacher_prompts: Mapping[str, tuple[int, ...]]
    change: FirstChange | None
    kinds: tuple[Kind, ...]

    @property
    def asked(self) -> ScoreRequest:
        """The answer as `token_scores` wants it."""
        rollout = self.told.critiqued.rollout
        return ScoreRequest(rollout.prompt_ids, rollout.token_ids, self.teacher_prompts)

    def steps(self) -> list[int]:
        """Index of each token's step; −1 outside all steps."""
        count = len(self.told.critiqued.rollout.token_ids)
        inside = [-1] * count
        for index, (start, stop) in enumerate(self.token_spans):
            inside[start:stop] = [index] * (stop - start)
        return inside

    def regions(self) -> list[Region | None]:
        """Each token's region; None outside all steps and where nobody says."""
        return [region(step, self.told) for step in self.steps()]


def region(step: int, told: Told) -> Region | None:
    """Where a step stands to the first error. A right answer whose steps are all right is ``right``;
    an answer that is right in spite of a wrong step has its three regions like a wrong one."""
    if step < 0 or not told.located:
        return None
    if told.first_error is None:
        return "right" if told.critiqued.verdict.correct else None
    if step == told.first_error:
        return "failing"
    return "before" if step < told.first_error else "after"


def tell(built: Built, critiqued: Sequence[CritiquedRollout]) -> list[Told]:
    """Steps and first error of each answer; by the task's oracle if it has one, else its critique.

    A critic may err, and be made to; the regions then still say the truth.
    """
    return [_tell(built, answer) for answer in critiqued]


def _tell(built: Built, critiqued: CritiquedRollout) -> Told:
    spans = tuple(built.components.split_steps(critiqued.rollout.text))
    oracle, critique = built.task.oracle, critiqued.critique
    source: Source = "critic"
    if oracle is not None:
        critique, source = _true_critique(oracle, critiqued), "oracle"
    if not isinstance(critique, Critique):
        return Told(critiqued, spans, None, located=False)
    first = critique.first_error
    if first is None and spans and _ends_wrong(critiqued):
        first = len(spans) - 1  # every step is right and the final answer is not
    if first is not None and first >= len(spans):
        return Told(critiqued, spans, None, located=False)
    return Told(critiqued, spans, first, located=True, source=source)


def _true_critique(oracle: OracleFn, critiqued: CritiquedRollout) -> Critique:
    rollout = critiqued.rollout
    return oracle(
        rollout.problem, rollout.text, finished=rollout.finished, error_rate=0.0,
        rng=np.random.default_rng(0),
    )  # fmt: skip


def _ends_wrong(critiqued: CritiquedRollout) -> bool:
    return critiqued.verdict.parsed is not None and not critiqued.verdict.correct


def prepare(
    built: Built,
    answers: Sequence[Told],
    contexts: Mapping[str, Context],
    *,
    language: Language,
) -> list[Inspected]:
    """What the self-teacher is shown of each answer under each context, and each token's kind."""
    critiqued = [told.critiqued for told in answers]
    shown = {name: context(critiqued) for name, context in contexts.items()}
    return [
        _inspected(built, told, {name: texts[i] for name, texts in shown.items()}, language)
        for i, told in enumerate(answers)
    ]


def _inspected(
    built: Built, told: Told, shown: Mapping[str, str | CritiqueFailure], language: Language
) -> Inspected:
    rollout, renderer = told.critiqued.rollout, built.components.renderer
    ends = renderer.token_ends(rollout.token_ids)
    contexts: dict[str, str | None] = {}
    dropped: dict[str, str] = {}
    prompts: dict[str, tuple[int, ...]] = {}
    for name, text in shown.items():
        if isinstance(text, CritiqueFailure):
            contexts[name], dropped[name] = None, text.reason
            continue
        contexts[name] = text
        prompt = renderer.teacher_prompt(rollout.problem, text)
        if len(prompt) + len(rollout.token_ids) > built.components.max_length:
            dropped[name] = "longer than the context window"
        else:
            prompts[name] = prompt
    return Inspected(
        told=told,
        token_spans=tuple(segmentation.token_spans(told.spans, ends)),
        contexts=contexts,
        dropped=dropped,
        teacher_prompts=prompts,
        change=first_change(told.critiqued, told.spans, ends)
        if _has_steps(told.critiqued)
        else None,
        kinds=tuple(kinds(rollout.text, ends, language)),
    )


def _has_steps(critiqued: CritiquedRollout) -> bool:
    return isinstance(critiqued.critique, Critique) and bool(critiqued.critique.steps)


def verbatim(inspected: Inspected, context: str) -> float | None:
    """Share of the right steps before the first error that stand word for word in a context.

    It tells what a context repeats from what it knows: 1 for a faithful step-aligned critique, 0
    for one that leaves right steps out. None without such steps or without the context.
    """
    told, text = inspected.told, inspected.contexts[context]
    before = told.spans[: told.first_error] if told.first_error is not None else ()
    if text is None or not before:
        return None
    said = told.critiqued.rollout.text
    return float(np.mean([_stands_in(segmentation.content(said, span), text) for span in before]))


def _stands_in(step: str, text: str) -> bool:
    return f" {_spaced(step)} " in f" {_spaced(text)} "


def _spaced(text: str) -> str:
    """With single spaces, also around the brackets of tags."""
    return " ".join(text.replace("<", " < ").replace(">", " > ").split())


def answer_row(inspected: Inspected) -> dict[str, Any]:
    """One line of ``answers.jsonl``; joins ``tokens.parquet`` by problem_id and sample."""
    told = inspected.told
    rollout, verdict, critique = (
        told.critiqued.rollout,
        told.critiqued.verdict,
        told.critiqued.critique,
    )
    token_spans = [list(span) for span in inspected.token_spans]
    return {
        "problem_id": rollout.problem.id,
        "sample": rollout.sample,
        "policy_version": rollout.policy_version,
        "question": rollout.problem.question,
        "gold_answer": rollout.problem.answer,
        "text": rollout.text,
        "correct": verdict.correct,
        "formatted": verdict.formatted,
        "parsed": verdict.parsed,
        "finished": rollout.finished,
        "tokens": len(rollout.token_ids),
        "step_spans": {"tokens": token_spans, "characters": [list(span) for span in told.spans]},
        "first_error": told.first_error,
        "first_error_from": told.source,
        "critique": None if critique is None else asdict(critique),
        "contexts": dict(inspected.contexts),
        "dropped": dict(inspected.dropped),
        "fidelity": None if inspected.change is None else inspected.change.fidelity,
        "verbatim": {name: verbatim(inspected, name) for name in inspected.contexts},
    }
