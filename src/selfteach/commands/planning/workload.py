"""Describe the work of one step, from recipe, model shape and problems; independent of hardware."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from selfteach.commands.check.sizes import RunSizes, device_load
from selfteach.commands.check.tokens import EVIDENCE_TOKENS, Lengths
from selfteach.commands.planning.lengths import ASSUMED_MEAN_SHARE, LengthDistribution
from selfteach.config.critic_section import (
    EndpointConfig,
    LlmCriticConfig,
    LocalCriticConfig,
    PolicyCriticConfig,
)
from selfteach.config.objective_section import terms
from selfteach.config.recipe import Recipe
from selfteach.errors import RecipeError
from selfteach.models.architectures import Shape, known_shapes
from selfteach.models.prefix_cache import MIN_SHARED
from selfteach.trainer.device_memory import DeviceLoad

ASSUMED_MIXED_SHARE = 0.5
"""Share of groups with both right and wrong rollouts, unless it is given."""

CriticKind = Literal["none", "program", "in_process", "served", "latency"]
"""What writes critiques: no critic; a program; a model in the trainer's process; a served model of
known shape; a server of which only the seconds per reply are known."""


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """Holds how many tokens at the front of prompts are the same, and can be computed once."""

    of_all: float = 0.0
    """Of all prompts of a step: worked examples, a system prompt."""
    of_group: float = 0.0
    """Of the prompts of one group; at least those of all."""

    @property
    def prefix(self) -> float:
        """Return the tokens that all share if they are worth a pass of their own, else 0."""
        return self.of_all if self.of_all >= MIN_SHARED else 0.0


@dataclass(frozen=True, slots=True)
class CriticWork:
    """Describes what the critic does for one rollout."""

    kind: CriticKind
    shape: Shape | None = None
    prompt: float = 0.0
    """Tokens before the rollout in the critic's prompt."""
    critique_lengths: LengthDistribution | None = None
    concurrency: int = 1
    """Requests in flight at most."""
    latency: float = 0.0
    """Seconds per reply (``latency``) or per rollout (``program``)."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """Describes the work of one step."""

    load: DeviceLoad
    """Shape of the policy, and what a trainer holds in memory."""
    steps: int
    problems: int
    group_size: int
    """Rollouts per problem."""
    batch_size: int
    """Rollouts that are sampled together, and passed on together."""
    prompt: float
    rollout_lengths: LengthDistribution
    teacher_prompt: float
    """Tokens before the rollout in the teacher's sequence; 0 without a teacher."""
    context_has_trace: bool
    """True if the teacher's prompt also holds a critique as long as the rollout."""
    teacher_passes: int
    """Forward passes of the teacher per update."""
    updates: int
    critic: CriticWork
    staleness: int
    engine: str
    """``transformers`` or ``vllm``: the engine where trainers also sample."""
    rounds: int = 0
    """Most further rounds of dynamic sampling."""
    mixed_share: float = 1.0
    """Share of groups with both right and wrong rollouts, where there are rounds."""
    shared: SharedTokens = SharedTokens()
    """Of ``prompt``: what the student's prompts share."""
    teacher_shared: SharedTokens = SharedTokens()
    """Of ``teacher_prompt``: what the teacher's prompts share."""

    @property
    def rollouts(self) -> int:
        """Return the number of rollouts in a step."""
        return self.problems * self.group_size

    @property
    def sampled_share(self) -> float:
        """Return the expected rollouts of a step, all rounds together, as a multiple of the first."""
        missing, sampled = 1.0, 0.0
        for _ in range(1 + self.rounds):
            sampled += missing
            missing *= 1 - self.mixed_share
        return sampled

    @property
    def trained_share(self) -> float:
        """Return the expected rollouts that are trained on, as a multiple of the first round's."""
        return self.sampled_share * self.mixed_share if self.rounds else 1.0

    @property
    def batches(self) -> int:
        """Return the number of sampling batches in a step; a batch holds whole groups."""
        per_batch = max(1, self.batch_size // self.group_size)
        return -(-self.problems // per_batch)


@dataclass(frozen=True, slots=True)
class Overrides:
    """Holds what the command line sets in place of the recipe; None keeps the recipe's value."""

    staleness: int | None = None
    rollout_tokens: float | None = None
    critique_tokens: float | None = None
    critic_seconds: float | None = None
    mixed_groups: float | None = None


def work_of(recipe: Recipe, known: RunSizes, overrides: Overrides = Overrides()) -> StepWork:
    """Return the work of one step. Raises `RecipeError` for a model of unknown size."""
    load = device_load(recipe, known)
    if load is None:
        raise RecipeError(
            f"model.path = {recipe.model.path!r}: its size is not known here; name a folder or a "
            "model of architectures.json"
        )
    train, cap = recipe.train, recipe.most_sampled
    prompt = float(known.lengths.mean_prompt or known.lengths.longest_prompt)
    distilled, rewarded = terms(recipe.objective)
    distils = distilled is not None or recipe.shows_context
    has_teacher = distils or (rewarded is not None and rewarded.kl_coef > 0)
    by_reference = recipe.context.type in ("reference", "aligned_reference")
    reference = known.lengths.mean_reference if by_reference else None
    mean_rollout = overrides.rollout_tokens or ASSUMED_MEAN_SHARE * cap
    teacher = _teacher_prompt(known.lengths, prompt, reference, distils=distils)
    return StepWork(
        load=dataclasses.replace(load, sampler="trainer"),  # the layout adds other samplers
        steps=train.steps,
        problems=train.problems_per_step,
        group_size=train.group_size,
        batch_size=recipe.sampling.batch_size,
        prompt=prompt,
        rollout_lengths=LengthDistribution.with_mean(mean_rollout, cap),
        teacher_prompt=teacher[0] if has_teacher else 0.0,
        context_has_trace=distils and reference is None and recipe.context.type != "none",
        teacher_passes=has_teacher * (2 if recipe.scoring_teacher.type == "trust_region" else 1),
        updates=train.num_iterations,
        critic=critic_work_of(recipe, known, overrides),
        staleness=train.staleness if overrides.staleness is None else overrides.staleness,
        engine=engine_of(recipe),
        rounds=recipe.sampling.dynamic_rounds,
        mixed_share=_mixed_share(recipe, overrides),
        shared=_shared(prompt, known.lengths.shared_prompt, prompt),
        teacher_shared=teacher[1],
    )


def _shared(prompt: float, of_all: float, of_group: float) -> SharedTokens:
    """Return what prompts of a mean length share: at most all of it."""
    of_all = min(of_all, prompt)
    return SharedTokens(of_all, max(of_all, min(of_group, prompt)))


def _teacher_prompt(
    lengths: Lengths, prompt: float, reference: float | None, *, distils: bool
) -> tuple[float, SharedTokens]:
    """Return the teacher's prompt and what it shares: nothing where a context's were not counted."""
    counted = lengths.teacher
    if distils and counted is not None:
        shared = _shared(counted.mean, counted.shared_by_all, counted.shared_by_group)
        return counted.mean, shared
    shared = SharedTokens() if distils else _shared(prompt, lengths.shared_prompt, prompt)
    return prompt + (reference or 0.0), shared


def _mixed_share(recipe: Recipe, overrides: Overrides) -> float:
    """Return the share of mixed groups: as given, or assumed. Raises `RecipeError` without rounds."""
    if not recipe.sampling.dynamic_rounds:
        if overrides.mixed_groups is not None:
            raise RecipeError("--mixed-groups is for sampling.dynamic_rounds, which is 0")
        return 1.0
    return ASSUMED_MIXED_SHARE if overrides.mixed_groups is None else overrides.mixed_groups


def critic_work_of(recipe: Recipe, known: RunSizes, overrides: Overrides) -> CriticWork:
    """Return the critic's work per rollout. Raises `RecipeError` for a server of unknown size."""
    critic = recipe.critic
    if critic is None:
        return CriticWork("none")
    served = isinstance(critic, EndpointConfig)
    concurrency = critic.concurrency if served else getattr(critic, "batch_size", 1)
    if overrides.critic_seconds is not None:
        return CriticWork("latency", concurrency=concurrency, latency=overrides.critic_seconds)
    if not isinstance(critic, LlmCriticConfig):
        return CriticWork("program")
    shape = _critic_shape(critic, known)
    if shape is None:
        name = critic.model if isinstance(critic, EndpointConfig) else "the critic"
        raise RecipeError(
            f"critic {name!r}: its size is not known; pass the seconds of a reply: --critic-seconds"
        )
    prompt = known.lengths.critic_template + float(
        known.lengths.mean_prompt or known.lengths.longest_prompt
    )
    if critic.sees_reference:
        prompt += known.lengths.mean_reference or 0.0
    if critic.sees_evidence:
        prompt += EVIDENCE_TOKENS[0]
    mean_critique = overrides.critique_tokens or ASSUMED_MEAN_SHARE * critic.max_tokens
    if critic.solves_first:  # its solutions are requested once per problem and are left out
        prompt += mean_critique
    lengths = LengthDistribution.with_mean(mean_critique, critic.max_tokens)
    return CriticWork("served" if served else "in_process", shape, prompt, lengths, concurrency)


def longest_teacher_sequence(work: StepWork) -> int:
    """Return the tokens of the longest teacher sequence: rollout and critique at their limits."""
    trace = work.rollout_lengths.cap if work.context_has_trace else 0
    return int(work.teacher_prompt + trace + work.rollout_lengths.cap)


def with_lengths(
    work: StepWork,
    rollout_lengths: LengthDistribution,
    critique_lengths: LengthDistribution | None,
) -> StepWork:
    """Return the same work with measured lengths."""
    critic = work.critic
    if critique_lengths is not None and critic.critique_lengths is not None:
        critic = dataclasses.replace(critic, critique_lengths=critique_lengths)
    return dataclasses.replace(work, rollout_lengths=rollout_lengths, critic=critic)


def engine_of(recipe: Recipe) -> str:
    """Return ``vllm`` for a served or in-process vLLM engine, else ``transformers``."""
    return "vllm" if recipe.engine.type.startswith("vllm") else "transformers"


def _critic_shape(critic: LlmCriticConfig, known: RunSizes) -> Shape | None:
    match critic:
        case PolicyCriticConfig():
            return known.shape
        case LocalCriticConfig():
            return known_shapes().get(critic.path)
        case EndpointConfig():
            return known_shapes().get(critic.model)
        case _:
            return None
