"""One training step: sample, mark, teach, learn, publish. The whole method, in the paper's order.

`pipeline` takes the same stages and lets those of several steps overlap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from selfteach.feedback.alignment import changed_steps, first_change, first_error_token
from selfteach.losses.objectives import summed
from selfteach.models.policy import Policy
from selfteach.prompts.renderer import Renderer
from selfteach.protocols import Context, Critic, Engine, Objective, Teacher, Verifier
from selfteach.rollout.rollouts import sample_batches, signed
from selfteach.runtime.distributed import ALONE, Ranks
from selfteach.runtime.futures import Later, later
from selfteach.runtime.run_folder import RunFolder
from selfteach.tasks import segmentation
from selfteach.trainer.batching import collate
from selfteach.trainer.metrics import Metrics, describe, summarize
from selfteach.trainer.nonfinite import kept_if_not_finite, require_finite
from selfteach.types import (
    Batch,
    Critique,
    Lesson,
    Marked,
    NoCritique,
    Problem,
    Rollout,
    Sampling,
)


@dataclass(frozen=True, slots=True)
class Parts:
    """All that a step is made of; `build.build_parts` makes one from a recipe."""

    engine: Engine
    verify: Verifier
    critic: Critic | None
    context: Context | None
    teacher: Teacher
    objective: Objective
    policy: Policy
    renderer: Renderer
    split_steps: segmentation.Splitter
    sampling: Sampling
    batch_answers: int
    critic_threads: int
    """Batches that are marked beside other work; 0 for a critic that needs this machine."""
    samples_beside: bool
    """The engine has weights of its own: it may sample while the policy learns."""
    updates_per_batch: int
    micro_batch_tokens: int
    chunk_tokens: int
    max_length: int
    pad_id: int
    ranks: Ranks = ALONE
    """Who else takes this step; each rank knows all lessons and learns from its share."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The problems of a step, and whose answers it learns from."""

    step: int
    problems: Sequence[Problem]
    version: int
    """Updates behind the weights that answer."""
    over: bool = False
    """True if these weights are no more: a run was taken up, whose journal holds the answers."""


def train_step(
    parts: Parts, problems: Sequence[Problem], *, step: int = 0, journal: RunFolder | None = None
) -> tuple[list[Lesson], Metrics]:
    """Answer, be marked, re-read with the marks in view, and learn what one would now say."""
    with later(parts.critic_threads) as soon:  # a server marks one batch while the next is sampled
        marking = ask(parts, Turn(step, problems, parts.policy.version), soon, journal)
        marked = [answer for batch in marking for answer in batch()]
    lessons, metrics = take_in(parts, marked, step=step, journal=journal)
    parts.engine.load_weights(parts.policy.trainable.items(), parts.policy.version)
    return lessons, metrics


def ask(
    parts: Parts, turn: Turn, soon: Later, journal: RunFolder | None = None
) -> list[Callable[[], list[Marked]]]:
    """Answer every problem, and hand each batch of answers over to be marked."""
    known = journal.load_critiques(turn.step) if journal else {}
    sampled = sample_batches(
        None if turn.over else parts.engine, turn.problems, parts.sampling,
        batch_answers=parts.batch_answers, journal=journal, name=f"step_{turn.step:06d}",
        ranks=parts.ranks,
    )  # fmt: skip
    return [soon(mark, parts, signed(batch, turn.version), known) for batch in sampled]


def take_in(
    parts: Parts, marked: list[Marked], *, step: int = 0, journal: RunFolder | None = None
) -> tuple[list[Lesson], Metrics]:
    """Re-read the answers with their marks in view, and learn."""
    lessons = teach(parts, parts.ranks.gather(marked))
    if journal and parts.ranks.leads:
        journal.save_lessons(step, lessons)
    with kept_if_not_finite(journal, step):
        learned = learn(parts, lessons)
    return lessons, {**describe(lessons), **learned}


def mark(
    parts: Parts,
    rollouts: Sequence[Rollout],
    known: Mapping[tuple[str, int], Critique | NoCritique | None] | None = None,
) -> list[Marked]:
    """Verdict and critique of each answer; critiques that are known are not asked for again."""
    verdicts = [parts.verify(rollout.problem, rollout.text) for rollout in rollouts]
    critiques: Sequence[Critique | NoCritique | None]
    if known and all(rollout.key in known for rollout in rollouts):
        critiques = [known[rollout.key] for rollout in rollouts]
    elif parts.critic is not None:
        critiques = parts.critic(list(zip(rollouts, verdicts, strict=True)))
    else:
        critiques = [None] * len(rollouts)
    return [Marked(*said) for said in zip(rollouts, verdicts, critiques, strict=True)]


def teach(parts: Parts, marked: Sequence[Marked]) -> list[Lesson]:
    """What the self-teacher will be shown of each answer; what cannot be shown is dropped, not cut."""
    if parts.context is None:
        own_prompt = parts.objective.needs_teacher
        return [
            Lesson(
                m,
                teacher_prompt_ids=m.rollout.prompt_ids if own_prompt else None,
                scored_from=parts.renderer.scored_from(m.rollout.answer_ids),
                steps=tuple(parts.split_steps(m.rollout.text)),
            )
            for m in marked
        ]
    shown = parts.context(marked)
    return [_lesson(parts, m, context) for m, context in zip(marked, shown, strict=True)]


def learn(parts: Parts, lessons: Sequence[Lesson]) -> Metrics:
    """Move the policy, which sees only the question, towards what its teacher says."""
    # One denominator for every micro-batch and rank: no split of the step changes loss or gradient.
    counts = parts.objective.count(lessons)
    signals = parts.objective.weigh(lessons, counts, parts.policy.version)
    batches = collate(
        lessons, signals, pad_id=parts.pad_id,
        micro_batch_tokens=parts.micro_batch_tokens, ranks=parts.ranks,
    )  # fmt: skip
    batches = [batch.to(parts.policy.device) for batch in batches]
    metrics: Metrics = {}
    for update in range(parts.updates_per_batch):
        said = [_backward(parts, batch) for batch in batches]
        require_finite(said, batches)
        stepped = parts.policy.optimizer_step()
        parts.teacher.update()
        if update == 0:
            metrics = summarize(said, parts.ranks)
            batches = [  # later updates are measured from where the first one began
                dataclasses.replace(batch, old_logp_N=own["logp"])
                for batch, own in zip(batches, said, strict=True)
            ]
        metrics |= stepped
    scored = [len(batch.ids_N) * parts.updates_per_batch for batch in batches]
    told = [number for number, batch in zip(scored, batches, strict=True) if batch.teacher]
    return {
        **metrics,
        "tokens_trained": parts.ranks.sum(sum(scored)),
        "teacher_tokens": parts.ranks.sum(sum(told)),
        "optimizer_steps": parts.updates_per_batch,
    }


def _backward(parts: Parts, batch: Batch) -> dict[str, Tensor]:
    """Add one micro-batch's gradient of the whole step's loss; what was said of its tokens."""
    teacher = parts.teacher.score(batch.teacher) if batch.teacher is not None else None
    student = parts.policy.score(batch.student)
    loss, said = summed(parts.objective, student, teacher, batch, parts.chunk_tokens)
    loss.backward()
    return {**said, "total": loss.detach()[None], "mismatch": said["logp"] - batch.sampled_logp_N}


def _lesson(parts: Parts, marked: Marked, context: str | NoCritique) -> Lesson:
    rollout = marked.rollout
    spans = tuple(parts.split_steps(rollout.text))
    scored_from = parts.renderer.scored_from(rollout.answer_ids)
    told = Lesson(marked, scored_from=scored_from, steps=spans)
    if isinstance(context, NoCritique):
        return dataclasses.replace(told, dropped=context.reason)
    prompt = parts.renderer.teacher_prompt(rollout.problem, context)
    if len(prompt) + len(rollout.answer_ids) > parts.max_length:
        return dataclasses.replace(told, context=context, dropped="longer than the context window")
    ends = parts.renderer.token_ends(rollout.answer_ids)
    in_tokens = segmentation.token_spans(spans, ends)
    return dataclasses.replace(
        told,
        context=context,
        teacher_prompt_ids=prompt,
        first_error_token=first_error_token(marked.critique, in_tokens),
        change=first_change(marked, spans, ends),
        changed_spans=tuple(in_tokens[index] for index, _ in changed_steps(marked, spans)),
    )
