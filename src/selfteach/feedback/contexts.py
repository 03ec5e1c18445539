"""Build contexts: what the self-teacher is shown besides the question, the paper's one variable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from selfteach.config.recipe import CRITIC_CONTEXTS
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Context
from selfteach.runtime.seeds import hashed_rng
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, ReplaceSteps

SHARED_TEMPLATE = {
    "shuffled_lines": "step_aligned",
    "other_answer": "step_aligned",
    "other_reference": "reference",
    "partly_aligned": "step_aligned",
}
"""Contexts that render another context's template from a modified critique."""


class NoContext:
    """Shows the teacher the question alone: a control for what distillation teaches without feedback.

    What such a teacher knows beyond the student comes from its weights (EMA), its thinking or its
    system prompt; without any of these the loss and its gradient are 0 at the first step.
    """

    def __call__(self, critiqued: Sequence[CritiquedRollout]) -> list[None]:
        """Return no context for each rollout."""
        return [None] * len(critiqued)


class TemplateContext:
    """Renders a template from the critique, the references or the verdict of each rollout.

    ``reference``, ``aligned_reference``: worked solutions that come with the problem.
    ``step_aligned``: the critic's corrected trace of this rollout. ``full_repetition`` also quotes the
    wrong step, ``omission`` says that steps are right without repeating them, ``holistic`` gives the
    verdict and the right answer, ``answer_only`` the answer alone. ``shuffled_lines`` is the trace in
    random order. Null controls: ``other_answer``, the trace of a rollout of another question of the
    same step, and ``other_reference``, the reference of another problem of the same step. ``peer`` is
    another rollout of the same question that the verifier accepts, ``environment`` the verifier's
    feedback on this rollout (SDPO, arXiv:2601.20802; the rollout itself is not shown with either, since
    the paper reports that this hurts).
    """

    def __init__(self, name: str, templates: Templates, *, seed: int) -> None:
        self._name, self._templates, self._seed = name, templates, seed
        self._template = SHARED_TEMPLATE.get(name, name)

    def __call__(self, critiqued: Sequence[CritiquedRollout]) -> list[str | CritiqueFailure]:
        """Return the context of each rollout, or why it has none."""
        if self._name == "peer":
            return [self._peer(one, critiqued) for one in critiqued]
        if self._name == "environment":
            return [self._environment(one) for one in critiqued]
        if self._name == "other_reference":
            return [self._other_reference(one, critiqued) for one in critiqued]
        subjects = self._others(critiqued) if self._name == "other_answer" else critiqued
        return [
            self._from_critique(one, subject)
            for one, subject in zip(critiqued, subjects, strict=True)
        ]

    def _peer(
        self, critiqued: CritiquedRollout, step: Sequence[CritiquedRollout]
    ) -> str | CritiqueFailure:
        """Return a context with an accepted rollout of the question, drawn by (seed, question, sample).

        Never the rollout itself, nor one with the same text.
        """
        rollout = critiqued.rollout
        peers = [
            other.rollout.text
            for other in step
            if other.verdict.correct
            and other.rollout.problem.id == rollout.problem.id
            and other.rollout.text != rollout.text
        ]
        if not peers:
            return CritiqueFailure("no other answer is right")
        peer = peers[_rng(self._seed, critiqued).integers(len(peers))]
        return self._render(critiqued, correct=critiqued.verdict.correct, peer=peer)

    def _environment(self, critiqued: CritiquedRollout) -> str | CritiqueFailure:
        feedback = critiqued.verdict.feedback
        if feedback is None:
            return CritiqueFailure("the environment says nothing")
        return self._render(critiqued, feedback=feedback)

    def _other_reference(
        self, critiqued: CritiquedRollout, step: Sequence[CritiquedRollout]
    ) -> str | CritiqueFailure:
        """Return a context with the reference of another problem of the step, drawn by (seed, question,
        sample) among those that differ from this problem's."""
        problem = critiqued.rollout.problem
        others = {one.rollout.problem.id: one.rollout.problem.references for one in step}
        texts = {
            id_: others[id_]["reference"] for id_ in sorted(others) if "reference" in others[id_]
        }
        this = problem.references.get("reference")
        candidates = [text for id_, text in texts.items() if id_ != problem.id and text != this]
        if not candidates:
            return CritiqueFailure("no other problem of the step has a reference")
        drawn = candidates[_rng(self._seed, critiqued).integers(len(candidates))]
        return self._render(critiqued, references={"reference": drawn})

    def _from_critique(
        self, critiqued: CritiquedRollout, subject: CritiquedRollout | None
    ) -> str | CritiqueFailure:
        """Return a context for ``critiqued`` from the critique and verdict of ``subject``."""
        if subject is None:
            return CritiqueFailure("no other question in this step")
        critique = subject.critique
        if self._name in CRITIC_CONTEXTS:
            if not isinstance(critique, Critique):
                return critique or CritiqueFailure("no critic was asked")
        else:
            critique = None
            if self._name not in critiqued.rollout.problem.references:
                return CritiqueFailure(f"the problem has no {self._name}")
        if self._name == "shuffled_lines" and critique is not None:
            critique = self._shuffled(critique, subject)
        return self._render(critiqued, critique=critique, correct=subject.verdict.correct)

    def _render(
        self,
        critiqued: CritiquedRollout,
        *,
        critique: Critique | None = None,
        correct: bool = False,
        references: Mapping[str, str] | None = None,
        **variables: str,
    ) -> str:
        return self._templates.context(
            self._template,
            critique=critique,
            references=references or critiqued.rollout.problem.references,
            correct=correct,
            attempt=critiqued.rollout.text,
            **variables,
        )

    def _shuffled(self, critique: Critique, subject: CritiquedRollout) -> Critique:
        order = _rng(self._seed, subject).permutation(len(critique.steps))
        return dataclasses.replace(critique, steps=tuple(critique.steps[i] for i in order))

    @staticmethod
    def _others(critiqued: Sequence[CritiquedRollout]) -> list[CritiquedRollout | None]:
        """Return, for each rollout, the same sample of the next question in the step."""
        by_key = {(one.rollout.problem.id, one.rollout.sample): one for one in critiqued}
        ids = list(dict.fromkeys(one.rollout.problem.id for one in critiqued))
        following = dict(zip(ids, [*ids[1:], ids[0]], strict=True)) if len(ids) > 1 else {}
        return [
            by_key.get((following.get(one.rollout.problem.id, ""), one.rollout.sample))
            for one in critiqued
        ]


class PartlyAlignedContext:
    """Replaces a share of a critique's steps by the reference's, before another context renders it.

    ``alignment`` is the share of steps that stay the critique's, rounded to whole steps. Which steps is
    drawn once per rollout: a step that stays at one alignment stays at all higher ones.
    """

    def __init__(
        self, context: Context, replace_steps: ReplaceSteps, alignment: float, *, seed: int
    ) -> None:
        self._context, self._replace_steps, self._alignment, self._seed = (
            context,
            replace_steps,
            alignment,
            seed,
        )

    def __call__(
        self, critiqued: Sequence[CritiquedRollout]
    ) -> Sequence[str | CritiqueFailure | None]:
        """Return the context of each rollout with its blended critique, or why it has none."""
        return self._context([self._blended(one) for one in critiqued])

    def _blended(self, critiqued: CritiquedRollout) -> CritiquedRollout:
        critique, references = critiqued.critique, critiqued.rollout.problem.references
        if not isinstance(critique, Critique):
            return critiqued
        if "reference" not in references:
            missing = CritiqueFailure("the problem has no reference")
            return dataclasses.replace(critiqued, critique=missing)
        count = len(critique.steps)
        order = _rng(self._seed, critiqued).permutation(count)
        stays = order < round(self._alignment * count)
        blended = self._replace_steps(critique, references["reference"], stays.tolist())
        return dataclasses.replace(critiqued, critique=blended)


class FallbackContext:
    """Uses a second context for rollouts that have none of the first kind.

    Where the second is missing too, the first one's reason is returned.
    """

    def __init__(
        self, context: Context, fallback: Context, reasons: frozenset[str] | None = None
    ) -> None:
        """Store both contexts; ``reasons`` select when the second is used, None for any reason."""
        self._context, self._fallback, self._reasons = context, fallback, reasons

    def __call__(
        self, critiqued: Sequence[CritiquedRollout]
    ) -> Sequence[str | CritiqueFailure | None]:
        """Return the first context of each rollout, or the second where that is missing."""
        firsts, seconds = self._context(critiqued), self._fallback(critiqued)
        return [
            first if isinstance(second, CritiqueFailure) or not self._falls_back(first) else second
            for first, second in zip(firsts, seconds, strict=True)
        ]

    def _falls_back(self, context: str | CritiqueFailure | None) -> bool:
        return isinstance(context, CritiqueFailure) and (
            self._reasons is None or context.reason in self._reasons
        )


def _rng(seed: int, critiqued: CritiquedRollout) -> np.random.Generator:
    """Return a generator that depends on seed, question and sample alone."""
    return hashed_rng(seed, critiqued.rollout.problem.id, critiqued.rollout.sample)
