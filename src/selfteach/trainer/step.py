"""Take one training step, in the paper's order: sample, critique, build samples, learn, publish.

`trainer.loop` calls `train_step` for every step, also when sampling is ahead of
training (`trainer.async_training`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from selfteach.feedback.alignment import changed_steps, first_change, first_error_token
from selfteach.losses.sampled_kl import sampled_kl
from selfteach.models.policy import Policy
from selfteach.prompts.episode_tokens import shown_problem, token_ends, unscored_thoughts
from selfteach.prompts.renderer import Renderer
from selfteach.protocols import (
    Context,
    Critic,
    Engine,
    Objective,
    Reward,
    Teacher,
    Verifier,
)
from selfteach.runtime.dispatcher import Dispatcher
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.torch_setup import seed_update
from selfteach.tasks import segmentation
from selfteach.tasks.verifiers import verdicts_of
from selfteach.trainer.batching import collate
from selfteach.trainer.metrics import Metrics, loss_coverage, summarize_samples, summarize_tokens
from selfteach.trainer.nonfinite import require_finite
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
    """Holds everything a step uses; `trainer.build.build` makes it from a recipe."""

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
    critic_threads: int
    """Number of batches critiqued at a time in the background; 0 for a critic in this process."""
    samples_in_background: bool
    """True for an engine with a copy of the weights, which may sample while the policy trains."""
    num_iterations: int
    """Optimizer updates per step."""
    micro_batch_tokens: int
    chunk_tokens: int
    max_length: int
    pad_id: int
    initial: Teacher | None = None
    """Scores with the initial policy, to log how far the policy is from it; None: not logged."""
    reward: Reward | None = None
    """Says what rollouts are worth; None: their verdicts."""
    fleets: Mapping[str, Dispatcher] = field(default_factory=dict)
    """Dispatchers of components with several servers, by the prefix of their metrics."""
    ranks: Ranks = SINGLE_PROCESS
    """The processes that take this step together; each trains on its share of the samples."""


def train_step(
    components: Components, problems: Sequence[Problem]
) -> tuple[list[TrainingSample], Metrics]:
    """Take one step: sample rollouts, critique them, and distill what the teacher makes of it."""
    rollouts = components.engine.generate(problems, components.sampling)
    critiqued = verify_and_critique(components, rollouts)
    samples = build_samples(components, critiqued)
    metrics = learn(components, samples)
    publish_weights(components)
    return samples, metrics


def verify_and_critique(
    components: Components, rollouts: Sequence[Rollout]
) -> list[CritiquedRollout]:
    """Verify and reward each rollout, then have the critic write a critique of it."""
    verdicts = verdicts_of(rollouts, components.verify, components.reward)
    critiques: Sequence[Critique | CritiqueFailure | None] = [None] * len(rollouts)
    if components.critic is not None:
        critiques = components.critic(list(zip(rollouts, verdicts, strict=True)))
    return [CritiquedRollout(*row) for row in zip(rollouts, verdicts, critiques, strict=True)]


def build_samples(
    components: Components, critiqued: Sequence[CritiquedRollout]
) -> list[TrainingSample]:
    """Build each rollout's teacher prompt. One that does not fit is dropped, never truncated."""
    # Contexts and denominators depend on all of the step's rollouts, so each rank has them all.
    critiqued = components.ranks.gather(list(critiqued))
    if components.context is None:
        return [_without_context(components, rollout) for rollout in critiqued]
    contexts = components.context(critiqued)
    return [
        _with_context(components, rollout, context)
        for rollout, context in zip(critiqued, contexts, strict=True)
    ]


def learn(components: Components, samples: Sequence[TrainingSample]) -> Metrics:
    """Train the policy on the step's samples, ``num_iterations`` optimizer updates; return metrics.

    A step without a token in the loss (GRPO: every group scores alike) takes no update: weights,
    AdamW's moments and an EMA teacher stay as they are, and the schedule goes on.
    """
    # One denominator for all micro-batches and ranks: how a step is split changes nothing.
    denominators = components.objective.denominators(samples)
    weights = components.objective.token_weights(samples, denominators, components.policy.version)
    batches = collate(
        samples, weights, pad_id=components.pad_id,
        micro_batch_tokens=components.micro_batch_tokens,
        layout=components.policy.layout, ranks=components.ranks,
    )  # fmt: skip
    batches = [batch.to(components.policy.device) for batch in batches]
    metrics = {**summarize_samples(samples), **loss_coverage(samples, weights)}
    for iteration in range(components.num_iterations):
        seed_update(components.sampling.seed, components.policy.version, components.ranks.rank)
        stats = [_backward(components, batch) for batch in batches]
        require_finite(stats, batches)
        optimizer_metrics = components.policy.optimizer_step()
        if batches:  # on every rank, or on none
            components.teacher.update()
        if iteration == 0:
            metrics |= summarize_tokens(stats, components.ranks)
            batches = [  # ratios of later iterations are relative to the policy of the first
                dataclasses.replace(batch, old_logp_N=batch_stats["logp"])
                for batch, batch_stats in zip(batches, stats, strict=True)
            ]
        metrics |= optimizer_metrics
    tokens = [len(batch.ids_N) * components.num_iterations for batch in batches]
    teacher_tokens = [n for n, batch in zip(tokens, batches, strict=True) if batch.teacher]
    return {
        **metrics,
        "tokens_trained": components.ranks.sum(sum(tokens)),
        "teacher_tokens": components.ranks.sum(sum(teacher_tokens)),
        "optimizer_steps": components.num_iterations if batches else 0,
    }


def publish_weights(components: Components) -> None:
    """Send the updated weights to the engine, which samples the next step with them."""
    policy = components.policy
    components.engine.load_weights(policy.trainable.items(), policy.version)


def _backward(components: Components, batch: Batch) -> dict[str, Tensor]:
    """Add one micro-batch's gradient of the step's loss; return statistics of its tokens, each [N]."""
    teacher = components.teacher.score(batch.teacher) if batch.teacher is not None else None
    student = components.policy.score(batch.student)
    loss, measured = components.objective.loss(student, teacher, batch, components.chunk_tokens)
    loss.backward()
    stats = dict(measured)
    if components.initial is not None:
        initial, temperature = (
            components.initial.score(batch.student),
            components.sampling.temperature,
        )
        stats["kl"] = sampled_kl(
            initial, stats["logp"], batch.ids_N, temperature=temperature,
            chunk_tokens=components.chunk_tokens,
        )  # fmt: skip
    if not components.sampling.is_cut:  # else the engine's are of a distribution that is cut
        stats["mismatch"] = stats["logp"] - batch.sampled_logp_N
    return {**stats, "total": loss.detach()[None]}


def _without_context(components: Components, critiqued: CritiquedRollout) -> TrainingSample:
    """Return the sample of an arm without distillation: GRPO's KL penalty uses the student's prompt."""
    rollout = critiqued.rollout
    needs_teacher = components.objective.needs_teacher
    return TrainingSample(
        critiqued,
        teacher_prompt_ids=rollout.prompt_ids if needs_teacher else None,
        **unscored_thoughts(components.renderer, rollout),
        steps=tuple(segmentation.step_spans(rollout, components.split_steps)),
    )


def _with_context(
    components: Components, critiqued: CritiquedRollout, context: str | CritiqueFailure | None
) -> TrainingSample:
    """Return a sample with its teacher prompt, or with the reason why it has none."""
    rollout = critiqued.rollout
    spans = tuple(segmentation.step_spans(rollout, components.split_steps))
    thoughts = unscored_thoughts(components.renderer, rollout)
    sample = TrainingSample(critiqued, **thoughts, steps=spans)
    if isinstance(context, CritiqueFailure):
        return dataclasses.replace(sample, dropped=context.reason)
    prompt = components.renderer.teacher_prompt(shown_problem(rollout), context)
    if len(prompt) + len(rollout.token_ids) > components.max_length:
        return dataclasses.replace(
            sample, context=context, dropped="longer than the context window"
        )
    ends = token_ends(components.renderer, rollout)
    token_spans = segmentation.token_spans(spans, ends)
    return dataclasses.replace(
        sample,
        context=context,
        teacher_prompt_ids=prompt,
        first_error_token=first_error_token(critiqued.critique, token_spans),
        change=first_change(critiqued, spans, ends),
        changed_spans=tuple(token_spans[index] for index, _ in changed_steps(critiqued, spans)),
    )
