"""One training step: sample, mark, teach, learn, publish. The whole method, in the paper's order.

`pipeline` takes the same stages and lets those of several steps overlap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from selfteach.feedback.alignment import changed_steps, first_change, first_error_token
from selfteach.losses.objectives import weighted_loss
from selfteach.models.policy import Policy
from selfteach.prompts.renderer import Renderer
from selfteach.protocols import Context, Critic, Engine, Objective, Teacher, Verifier
from selfteach.rollout.rollouts import sample_batches, signed
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.futures import Later, later
from selfteach.runtime.run_folder import RunFolder
from selfteach.tasks import segmentation
from selfteach.trainer.batching import collate
from selfteach.trainer.metrics import Metrics, describe, summarize
from selfteach.trainer.nonfinite import kept_if_not_finite, require_finite
from selfteach.types import (
    Batch,
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    Problem,
    Rollout,
    Sampling,
    TrainingSample,
)


@dataclass(frozen=True, slots=True)
class Components:
    """All that a step is made of; `build.build_components` makes one from a recipe."""

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
    batch_size: int
    critic_threads: int
    """Batches that are marked beside other work; 0 for a critic that needs this machine."""
    samples_beside: bool
    """The engine has weights of its own: it may sample while the policy learns."""
    num_iterations: int
    micro_batch_tokens: int
    chunk_tokens: int
    max_length: int
    pad_id: int
    ranks: Ranks = SINGLE_PROCESS
    """Who else takes this step; each rank knows all samples and learns from its share."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """The problems of a step, and whose answers it learns from."""

    step: int
    problems: Sequence[Problem]
    version: int
    """Updates behind the weights that answer."""
    over: bool = False
    """True if these weights are no more: a run was taken up, whose journal holds the answers."""


def train_step(
    components: Components,
    problems: Sequence[Problem],
    *,
    step: int = 0,
    journal: RunFolder | None = None,
) -> tuple[list[TrainingSample], Metrics]:
    """Answer, be marked, re-read with the marks in view, and learn what one would now say."""
    with later(
        components.critic_threads
    ) as soon:  # a server marks one batch while the next is sampled
        marking = ask(
            components, RolloutRequest(step, problems, components.policy.version), soon, journal
        )
        critiqued = [answer for batch in marking for answer in batch()]
    samples, metrics = take_in(components, critiqued, step=step, journal=journal)
    components.engine.load_weights(components.policy.trainable.items(), components.policy.version)
    return samples, metrics


def ask(
    components: Components, turn: RolloutRequest, soon: Later, journal: RunFolder | None = None
) -> list[Callable[[], list[CritiquedRollout]]]:
    """Answer every problem, and hand each batch of answers over to be marked."""
    known = journal.load_critiques(turn.step) if journal else {}
    sampled = sample_batches(
        None if turn.over else components.engine, turn.problems, components.sampling,
        batch_size=components.batch_size, journal=journal, name=f"step_{turn.step:06d}",
        ranks=components.ranks,
    )  # fmt: skip
    return [soon(mark, components, signed(batch, turn.version), known) for batch in sampled]


def take_in(
    components: Components,
    critiqued: list[CritiquedRollout],
    *,
    step: int = 0,
    journal: RunFolder | None = None,
) -> tuple[list[TrainingSample], Metrics]:
    """Re-read the answers with their marks in view, and learn."""
    samples = teach(components, components.ranks.gather(critiqued))
    if journal and components.ranks.is_main:
        journal.save_samples(step, samples)
    with kept_if_not_finite(journal, step):
        learned = learn(components, samples)
    return samples, {**describe(samples), **learned}


def mark(
    components: Components,
    rollouts: Sequence[Rollout],
    known: Mapping[tuple[str, int], Critique | CritiqueFailure | None] | None = None,
) -> list[CritiquedRollout]:
    """Verdict and critique of each answer; critiques that are known are not asked for again."""
    verdicts = [components.verify(rollout.problem, rollout.text) for rollout in rollouts]
    critiques: Sequence[Critique | CritiqueFailure | None]
    if known and all(rollout.key in known for rollout in rollouts):
        critiques = [known[rollout.key] for rollout in rollouts]
    elif components.critic is not None:
        critiques = components.critic(list(zip(rollouts, verdicts, strict=True)))
    else:
        critiques = [None] * len(rollouts)
    return [CritiquedRollout(*said) for said in zip(rollouts, verdicts, critiques, strict=True)]


def teach(components: Components, critiqued: Sequence[CritiquedRollout]) -> list[TrainingSample]:
    """What the self-teacher will be shown of each answer; what cannot be shown is dropped, not cut."""
    if components.context is None:
        own_prompt = components.objective.needs_teacher
        return [
            TrainingSample(
                m,
                teacher_prompt_ids=m.rollout.prompt_ids if own_prompt else None,
                scored_from=components.renderer.scored_from(m.rollout.token_ids),
                steps=tuple(components.split_steps(m.rollout.text)),
            )
            for m in critiqued
        ]
    shown = components.context(critiqued)
    return [
        _training_sample(components, m, context)
        for m, context in zip(critiqued, shown, strict=True)
    ]


def learn(components: Components, samples: Sequence[TrainingSample]) -> Metrics:
    """Move the policy, which sees only the question, towards what its teacher says."""
    # One denominator for every micro-batch and rank: no split of the step changes loss or gradient.
    counts = components.objective.denominators(samples)
    token_weights = components.objective.token_weights(samples, counts, components.policy.version)
    batches = collate(
        samples, token_weights, pad_id=components.pad_id,
        micro_batch_tokens=components.micro_batch_tokens, ranks=components.ranks,
    )  # fmt: skip
    batches = [batch.to(components.policy.device) for batch in batches]
    metrics: Metrics = {}
    for update in range(components.num_iterations):
        said = [_backward(components, batch) for batch in batches]
        require_finite(said, batches)
        stepped = components.policy.optimizer_step()
        components.teacher.update()
        if update == 0:
            metrics = summarize(said, components.ranks)
            batches = [  # later updates are measured from where the first one began
                dataclasses.replace(batch, old_logp_N=own["logp"])
                for batch, own in zip(batches, said, strict=True)
            ]
        metrics |= stepped
    scored = [len(batch.ids_N) * components.num_iterations for batch in batches]
    told = [number for number, batch in zip(scored, batches, strict=True) if batch.teacher]
    return {
        **metrics,
        "tokens_trained": components.ranks.sum(sum(scored)),
        "teacher_tokens": components.ranks.sum(sum(told)),
        "optimizer_steps": components.num_iterations,
    }


def _backward(components: Components, batch: Batch) -> dict[str, Tensor]:
    """Add one micro-batch's gradient of the whole step's loss; what was said of its tokens."""
    teacher = components.teacher.score(batch.teacher) if batch.teacher is not None else None
    student = components.policy.score(batch.student)
    loss, said = weighted_loss(
        components.objective, student, teacher, batch, components.chunk_tokens
    )
    loss.backward()
    return {**said, "total": loss.detach()[None], "mismatch": said["logp"] - batch.sampled_logp_N}


def _training_sample(
    components: Components, critiqued: CritiquedRollout, context: str | CritiqueFailure
) -> TrainingSample:
    rollout = critiqued.rollout
    spans = tuple(components.split_steps(rollout.text))
    scored_from = components.renderer.scored_from(rollout.token_ids)
    told = TrainingSample(critiqued, scored_from=scored_from, steps=spans)
    if isinstance(context, CritiqueFailure):
        return dataclasses.replace(told, dropped=context.reason)
    prompt = components.renderer.teacher_prompt(rollout.problem, context)
    if len(prompt) + len(rollout.token_ids) > components.max_length:
        return dataclasses.replace(told, context=context, dropped="longer than the context window")
    ends = components.renderer.token_ends(rollout.token_ids)
    in_tokens = segmentation.token_spans(spans, ends)
    return dataclasses.replace(
        told,
        context=context,
        teacher_prompt_ids=prompt,
        first_error_token=first_error_token(critiqued.critique, in_tokens),
        change=first_change(critiqued, spans, ends),
        changed_spans=tuple(in_tokens[index] for index, _ in changed_steps(critiqued, spans)),
    )
