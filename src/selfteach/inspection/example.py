"""What feedback changes: the self-teacher's per-token advantages over the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from selfteach import steps
from selfteach.build import Built
from selfteach.collate import sequences
from selfteach.contexts import TemplateContext
from selfteach.policy_gradient import token_logp
from selfteach.scores import Scores
from selfteach.step import mark
from selfteach.template_sets import Templates
from selfteach.types import Critique, Marked, NoCritique, Rollout


@torch.no_grad()
def advantages(built: Built, rollout: Rollout, teacher_prompt: Sequence[int]) -> list[float]:
    """A_t = log π(y_t | x, c, y_<t) − log π(y_t | x, y_<t) of each answer token, in nats.

    Both under the teacher's weights as built: the same model with and without the context, so that
    the difference is the context's alone (paper, per-token advantage).
    """
    parts = built.parts

    def logp(prompt: Sequence[int]) -> torch.Tensor:
        side = sequences([prompt], [rollout.answer_ids], parts.pad_id)
        scores: Scores = parts.policy.score(side)
        ids_N = torch.tensor(rollout.answer_ids, device=parts.policy.device)
        return token_logp(scores.logits(slice(None)), ids_N, 1.0)

    return (logp(teacher_prompt) - logp(rollout.prompt_ids)).tolist()


def advantages_by_context(
    built: Built, templates: Templates, rollouts: Sequence[Rollout], contexts: Sequence[str]
) -> dict[str, Any] | None:
    """One wrong answer under each context, as the report's per-token figure wants it.

    The answer is the first of ``rollouts`` whose first error is neither in its first nor in its last
    step, so that there is something before and after it; None if there is no such answer.
    """
    marked = next((m for m in mark(built.parts, rollouts) if _tells(m)), None)
    if marked is None:
        return None
    rollout, critique = marked.rollout, marked.critique
    assert isinstance(critique, Critique) and critique.first_error is not None
    renderer = built.parts.renderer
    ends = renderer.token_ends(rollout.answer_ids)
    spans = steps.token_spans(built.parts.split_steps(rollout.text), ends)
    shown: dict[str, Any] = {}
    for name in contexts:
        (text,) = TemplateContext(name, templates, seed=0)([marked])
        if isinstance(text, NoCritique):
            continue
        prompt = renderer.teacher_prompt(rollout.problem, text)
        shown[name] = {"text": text, "advantage": advantages(built, rollout, prompt)}
    return {
        "problem": rollout.problem.id,
        "question": rollout.problem.question,
        "answer": rollout.text,
        "correct": marked.verdict.correct,
        "first_error_token": spans[critique.first_error][0],
        "tokens": [renderer.token_text(token) for token in rollout.answer_ids],
        "steps": [
            next((i for i, (a, b) in enumerate(spans) if a <= t < b), -1)
            for t in range(len(rollout.answer_ids))
        ],
        "contexts": shown,
    }


def _tells(marked: Marked) -> bool:
    critique = marked.critique
    return (
        not marked.verdict.correct
        and isinstance(critique, Critique)
        and critique.first_error is not None
        and 0 < critique.first_error < len(critique.steps) - 1
    )
