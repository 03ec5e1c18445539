"""Contexts: what the self-teacher is shown of an answer. The one thing the paper varies."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from selfteach.config.recipe import CRITIC_CONTEXTS
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Context
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, ReplaceSteps

SHARED_TEMPLATE = {
    "shuffled_lines": "step_aligned",
    "other_answer": "step_aligned",
    "partly_aligned": "step_aligned",
}
"""Contexts that are another context with something done to its critique."""


class TemplateContext:
    """A context that a template renders from the critique, the references or the verdict.

    ``reference``, ``aligned_reference``: worked solutions that come with the problem.
    ``step_aligned``: the critic's corrected trace of this answer. ``full_repetition`` also quotes the
    wrong step, ``omission`` says that steps are right without repeating them, ``holistic`` gives the
    verdict and the right answer, ``answer_only`` the answer alone. ``shuffled_lines`` is the trace in
    random order; ``other_answer`` the trace of an answer to another question of the same step (the
    null control). ``peer`` is another answer of the model to the same question that the verifier
    accepts, ``environment`` the verifier's own feedback on this answer (SDPO, arXiv:2601.20802; the
    answer itself is not shown with either, since that was found to hurt).
    """

    def __init__(self, name: str, templates: Templates, *, seed: int) -> None:
        self._name, self._templates, self._seed = name, templates, seed
        self._template = SHARED_TEMPLATE.get(name, name)

    def __call__(self, critiqued: Sequence[CritiquedRollout]) -> list[str | CritiqueFailure]:
        """One context, or the reason for none, per answer."""
        if self._name == "peer":
            return [self._peer(answer, critiqued) for answer in critiqued]
        if self._name == "environment":
            return [self._environment(answer) for answer in critiqued]
        subjects = self._others(critiqued) if self._name == "other_answer" else critiqued
        return [
            self._render(answer, about) for answer, about in zip(critiqued, subjects, strict=True)
        ]

    def _peer(
        self, answer: CritiquedRollout, critiqued: Sequence[CritiquedRollout]
    ) -> str | CritiqueFailure:
        """One of the accepted answers to the same question, drawn by (seed, question, sample).

        Never the answer itself, nor one that is the same to the letter.
        """
        own = answer.rollout
        peers = [
            other.rollout.text
            for other in critiqued
            if other.verdict.correct
            and other.rollout.problem.id == own.problem.id
            and other.rollout.text != own.text
        ]
        if not peers:
            return CritiqueFailure("no other answer is right")
        peer = peers[stream(self._seed, answer).integers(len(peers))]
        return self._show(answer, correct=answer.verdict.correct, peer=peer)

    def _environment(self, answer: CritiquedRollout) -> str | CritiqueFailure:
        feedback = answer.verdict.feedback
        if feedback is None:
            return CritiqueFailure("the environment says nothing")
        return self._show(answer, feedback=feedback)

    def _show(
        self,
        answer: CritiquedRollout,
        *,
        critique: Critique | None = None,
        correct: bool = False,
        **said: str,
    ) -> str:
        return self._templates.context(
            self._template,
            critique=critique,
            references=answer.rollout.problem.references,
            correct=correct,
            attempt=answer.rollout.text,
            **said,
        )

    def _render(
        self, answer: CritiquedRollout, about: CritiquedRollout | None
    ) -> str | CritiqueFailure:
        if about is None:
            return CritiqueFailure("no other question in this step")
        critique = about.critique
        if self._name in CRITIC_CONTEXTS:
            if not isinstance(critique, Critique):
                return critique or CritiqueFailure("no critic was asked")
        else:
            critique = None
            if self._name not in answer.rollout.problem.references:
                return CritiqueFailure(f"the problem has no {self._name}")
        if self._name == "shuffled_lines" and critique is not None:
            critique = self._shuffled(critique, about)
        return self._show(answer, critique=critique, correct=about.verdict.correct)

    def _shuffled(self, critique: Critique, about: CritiquedRollout) -> Critique:
        order = stream(self._seed, about).permutation(len(critique.steps))
        return dataclasses.replace(critique, steps=tuple(critique.steps[i] for i in order))

    @staticmethod
    def _others(critiqued: Sequence[CritiquedRollout]) -> list[CritiquedRollout | None]:
        """For each answer, the same sample of the next question in the step."""
        by_key = {(m.rollout.problem.id, m.rollout.sample): m for m in critiqued}
        ids = list(dict.fromkeys(m.rollout.problem.id for m in critiqued))
        following = dict(zip(ids, [*ids[1:], ids[0]], strict=True)) if len(ids) > 1 else {}
        return [
            by_key.get((following.get(m.rollout.problem.id, ""), m.rollout.sample))
            for m in critiqued
        ]


class PartlyAligned:
    """A critique of which a share of the steps gives way to the reference's: the dial of alignment.

    ``alignment`` is the share that is kept, to the nearest step. Which steps is drawn once per answer:
    what is kept at one position is kept at all higher ones.
    """

    def __init__(
        self, context: Context, blend: ReplaceSteps, alignment: float, *, seed: int
    ) -> None:
        self._context, self._blend, self._alignment, self._seed = context, blend, alignment, seed

    def __call__(self, critiqued: Sequence[CritiquedRollout]) -> list[str | CritiqueFailure]:
        """What ``context`` makes of each answer's blended critique, or the reason for none."""
        return self._context([self._blended(answer) for answer in critiqued])

    def _blended(self, answer: CritiquedRollout) -> CritiquedRollout:
        critique, references = answer.critique, answer.rollout.problem.references
        if not isinstance(critique, Critique):
            return answer
        if "reference" not in references:
            missing = CritiqueFailure("the problem has no reference")
            return dataclasses.replace(answer, critique=missing)
        count = len(critique.steps)
        kept = stream(self._seed, answer).permutation(count) < round(self._alignment * count)
        blended = self._blend(critique, references["reference"], kept.tolist())
        return dataclasses.replace(answer, critique=blended)


def stream(seed: int, about: CritiquedRollout) -> np.random.Generator:
    """The random stream of an answer: the same for the same seed, question and sample."""
    key = repr((seed, about.rollout.problem.id, about.rollout.sample))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


class FallbackContext:
    """Another context for answers that have none of the first kind, for one of some reasons.

    Where the other has none either, the first's reason counts.
    """

    def __init__(
        self, context: Context, other: Context, reasons: frozenset[str] | None = None
    ) -> None:
        self._context, self._other, self._reasons = context, other, reasons

    def __call__(self, critiqued: Sequence[CritiquedRollout]) -> list[str | CritiqueFailure]:
        """The first context of each answer, or the other where the first is missing for a reason
        that counts (by default any)."""
        shown, instead = self._context(critiqued), self._other(critiqued)
        return [
            a if isinstance(b, CritiqueFailure) or not self._falls(a) else b
            for a, b in zip(shown, instead, strict=True)
        ]

    def _falls(self, shown: str | CritiqueFailure) -> bool:
        return isinstance(shown, CritiqueFailure) and (
            self._reasons is None or shown.reason in self._reasons
        )
