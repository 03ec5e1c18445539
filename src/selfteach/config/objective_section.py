"""Defines ``[objective]``: what is minimised, and on which tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import Field, Tag, field_validator, model_validator

from selfteach.config.part_section import CUSTOM, CustomPart, custom_or
from selfteach.config.schema import Section


class DistillationConfig(Section):
    """Moves the student towards the self-teacher, token by token."""

    type: Literal["distillation"] = "distillation"
    """Self-distillation."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """What is minimised per token: ``forward_kl`` is KL(teacher ‖ student), ``reverse_kl`` is
    KL(student ‖ teacher), ``jsd`` the generalised Jensen-Shannon divergence."""
    beta: float = 0.5
    """Teacher's weight β in the mixture of ``divergence = "jsd"``, strictly between 0 and 1."""
    jsd_scaled: bool = False
    """Divide the JSD by β(1−β), so that it approaches the two KLs for β near 0 and 1."""
    support: Literal["full", "top_k", "sampled"] = "full"
    """Vocabulary entries in the divergence: all (``full``), the ``top_k`` likeliest and one bucket for
    the others, or only the sampled token."""
    top_k: int | None = Field(default=None, ge=1)
    """Number of vocabulary entries k of ``support = "top_k"``."""
    top_k_from: Literal["student", "teacher"] = "student"
    """Model whose k likeliest tokens are the entries of ``support = "top_k"``."""
    clip: float | None = Field(default=None, gt=0)
    """Cap, in nats, on each vocabulary entry's term (OPSD: 0.05)."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature that divides the logits of student and teacher in the divergence; the loss is not
    multiplied by its square."""
    control_variate: bool = False
    """Add KL(student ‖ teacher) to the sampled token's reward (``reverse_kl`` with ``support =
    "sampled"``): less variance, the same expected gradient."""
    train_on: Literal["all", "incorrect", "correct"] = "all"
    """Which rollouts are distilled, by their verdict (SDPG: ``correct``)."""
    from_first_error: bool = False
    """Train only on tokens from the first wrong solution step on (ROSD); correct rollouts then have no
    loss."""
    changed_steps_fraction: float | None = Field(default=None, gt=0, le=1)
    """Train only on the solution steps that the critique changes, and there on the earliest tokens, up
    to this share of the rollout's tokens (TRACE: 0.25). A token has to pass all masks."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Loss of a batch: ``token_mean`` is the mean over all its tokens, ``sequence_mean`` the mean over
    rollouts of each rollout's token mean."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Truncated importance weight min(π_train/π_engine, cap) on every token; unset: no weight."""

    @property
    def needs_critique(self) -> bool:
        """Return True if a token mask depends on where the rollout is wrong."""
        return self.from_first_error or self.changed_steps_fraction is not None


LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo"]
LOSS_TYPES: Mapping[str, Mapping[str, str]] = {
    "grpo": {"surrogate": "clipped", "aggregation": "sequence_mean"},
    "bnpo": {"surrogate": "clipped", "aggregation": "token_mean"},
    "dapo": {"surrogate": "clipped", "aggregation": "token_mean"},
    "dr_grpo": {"surrogate": "clipped", "aggregation": "max_tokens"},
    "cispo": {"surrogate": "cispo", "aggregation": "token_mean"},
}
"""What each of TRL's loss types sets. A step is one batch here, so ``bnpo`` is ``dapo``."""


class GrpoConfig(Section):
    """Minimises a surrogate of GRPO; the reward is that of ``[reward]``, or else the binary verdict."""

    type: Literal["grpo"] = "grpo"
    """Group-relative policy optimisation."""
    loss_type: LossType | None = None
    """TRL's name of a ``surrogate`` with an ``aggregation``, which it sets: ``grpo`` is ``clipped``
    with ``sequence_mean``, ``dapo`` (and ``bnpo``) with ``token_mean``, ``dr_grpo`` with
    ``max_tokens``; ``cispo`` is ``cispo`` with ``token_mean``."""
    surrogate: Literal["clipped", "cispo"] = "clipped"
    """Loss of a token: PPO's ``clipped`` surrogate, or ``cispo``: −min(ratio, 1 + ``clip_high``) · A ·
    log π with a constant ratio, so that no token loses its gradient (``clip_low`` has no effect)."""
    importance_level: Literal["token", "sequence"] = "token"
    """Policy ratio that is clipped: each token's, or of a rollout the geometric mean over its tokens
    (``sequence``: GSPO, with ``loss_type = "grpo"`` and clip ranges of about 3e-4)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group's rewards (``group``), of all rewards
    of the step (``batch``), or do not."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """Lower clip range: the policy ratio is clipped at 1 − this."""
    clip_high: float = Field(default=0.2, ge=0)
    """Upper clip range: the policy ratio is clipped at 1 + this."""
    clip_delta: float | None = Field(default=None, gt=1)
    """Largest policy ratio of a token with a negative advantage, above 1 + ``clip_high`` (TRL's
    ``delta``, verl's ``clip_ratio_c``); unset: no bound."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy ‖ initial policy), whatever ``[teacher]`` names."""
    aggregation: Literal["token_mean", "sequence_mean", "max_tokens"] = "token_mean"
    """Loss of a batch: ``token_mean`` is the mean over all its tokens, ``sequence_mean`` the mean over
    rollouts of each rollout's token mean, ``max_tokens`` the sum over tokens divided by the number of
    rollouts times ``sampling.max_tokens`` (Dr. GRPO)."""
    mask_truncated: bool = False
    """Leave rollouts that the token limit cut out of the loss; their rewards still count in the
    advantages of their group."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Truncated importance weight min(π_train/π_engine, cap) on every token; unset: no weight. The
    ``clipped`` surrogate of a whole rollout (``importance_level = "sequence"``) gets their mean."""

    @model_validator(mode="before")
    @classmethod
    def _expand_loss_type(cls, values: Any) -> Any:
        """Set what ``loss_type`` stands for, where the recipe leaves it open."""
        if not isinstance(values, Mapping):
            return values
        return {**LOSS_TYPES.get(str(values.get("loss_type")), {}), **values}

    @model_validator(mode="after")
    def _check_forms(self) -> GrpoConfig:
        for key, value in (LOSS_TYPES[self.loss_type] if self.loss_type else {}).items():
            if getattr(self, key) != value:
                raise ValueError(
                    f'loss_type = "{self.loss_type}" stands for {key} = "{value}", and {key} = '
                    f'"{getattr(self, key)}" is set too: remove one of them'
                )
        if self.clip_delta is not None and self.surrogate == "cispo":
            raise ValueError("clip_delta bounds the clipped surrogate; cispo has clip_high alone")
        if self.clip_delta is not None and self.clip_delta <= 1 + self.clip_high:
            raise ValueError(
                f"clip_delta = {self.clip_delta:g} must be above 1 + clip_high = "
                f"{1 + self.clip_high:g}"
            )
        return self


class WeightConfig(Section):
    """Sets a weight that changes linearly over steps; a plain number stands for a constant."""

    start: float = Field(ge=0)
    """Weight in the first training step."""
    end: float = Field(ge=0)
    """Weight in training step number ``steps`` and after it."""
    steps: int | None = Field(default=None, ge=2)
    """Number of training steps from ``start`` to ``end``; unset: all steps of the run."""


class HybridConfig(Section):
    """Minimises ``weight`` times distillation plus ``grpo_weight`` times GRPO, each a separate mean."""

    type: Literal["hybrid"]
    """Distillation and GRPO together."""
    weight: WeightConfig = WeightConfig(start=0.5, end=0.5)
    """Weight of distillation: a constant, or ``{ start = 1.0, end = 0.0, steps = 40 }``."""
    grpo_weight: float | None = Field(default=None, ge=0)
    """Weight of GRPO; unset: 1 − ``weight``, a mixture of both."""
    grpo_tokens: Literal["all", "others"] = "all"
    """Tokens with a GRPO loss; ``others`` leaves out those that are distilled (TRACE)."""
    distillation: DistillationConfig = DistillationConfig()
    """Settings of the distillation term."""
    grpo: GrpoConfig = GrpoConfig()
    """Settings of the GRPO term; ``kl_coef`` must be 0."""

    @field_validator("weight", mode="before")
    @classmethod
    def _expand_constant(cls, value: object) -> object:
        return {"start": value, "end": value} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _check_weights(self) -> HybridConfig:
        if self.grpo_weight is None and max(self.weight.start, self.weight.end) > 1:
            raise ValueError("weight is above 1: a mixture needs 0 to 1; or set grpo_weight")
        if self.grpo.kl_coef > 0:
            raise ValueError(
                "grpo.kl_coef must be 0 in a hybrid: its one teacher is the one with a context"
            )
        return self


class CustomObjectiveConfig(CustomPart):
    """Minimises what a class of one's own computes, an `Objective` of `selfteach.protocols`."""


ObjectiveConfig = Annotated[
    Union[  # noqa: UP007
        Annotated[DistillationConfig, Tag("distillation")],
        Annotated[GrpoConfig, Tag("grpo")],
        Annotated[HybridConfig, Tag("hybrid")],
        Annotated[CustomObjectiveConfig, Tag(CUSTOM)],
    ],
    custom_or("objective", ("distillation", "grpo", "hybrid")),
]


def terms(objective: ObjectiveConfig) -> tuple[DistillationConfig | None, GrpoConfig | None]:
    """Return the distillation and the GRPO section of an objective; None for one it lacks.

    An objective of one's own has neither.
    """
    match objective:
        case HybridConfig():
            return objective.distillation, objective.grpo
        case DistillationConfig():
            return objective, None
        case GrpoConfig():
            return None, objective
        case CustomObjectiveConfig():
            return None, None
