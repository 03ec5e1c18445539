"""Sections of a recipe that say what is minimised, and on which tokens."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, field_validator, model_validator

from selfteach.config.schema import Section


class DistillationConfig(Section):
    """Move the student towards the self-teacher."""

    type: Literal["distillation"] = "distillation"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """forward_kl = KL(teacher‖student), reverse_kl = KL(student‖teacher)."""
    beta: float = 0.5
    jsd_scaled: bool = False
    """Divide the JSD by β(1−β): the convention whose ends are the two KLs."""
    support: Literal["full", "top_k", "sampled"] = "full"
    top_k: int | None = Field(default=None, ge=1)
    top_k_from: Literal["student", "teacher"] = "student"
    clip: float | None = Field(default=None, gt=0)
    """Upper cap of each vocabulary entry's term (OPSD: 0.05)."""
    temperature: float = Field(default=1.0, gt=0)
    control_variate: bool = False
    train_on: Literal["all", "incorrect", "correct"] = "all"
    """Rollouts that are distilled, by their verdict (SDPG: ``correct``)."""
    from_first_error: bool = False
    """Only tokens from the first wrong step on (ROSD); right answers then teach nothing."""
    changed_steps_fraction: float | None = Field(default=None, gt=0, le=1)
    """Only steps that the critique changes, and of their tokens the earliest, up to this share of the
    answer's (TRACE: 0.25). A token has to pass all gates."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    importance_cap: float | None = Field(default=None, gt=0)
    """Truncated importance weight min(π_train/π_engine, cap) on every token."""

    @property
    def needs_critique(self) -> bool:
        """True if a gate asks where the answer is wrong."""
        return self.from_first_error or self.changed_steps_fraction is not None


class GrpoConfig(Section):
    """Group-relative policy optimisation on the binary verdict."""

    type: Literal["grpo"] = "grpo"
    scale_rewards: Literal["group", "none"] = "group"
    """Divide a group's advantages by its standard deviation (``group``), or do not."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.2, ge=0)
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy‖initial policy)."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    importance_cap: float | None = Field(default=None, gt=0)


class WeightConfig(Section):
    """A weight that changes in a straight line over steps; a plain number stays as it is."""

    start: float = Field(ge=0)
    """In the first step."""
    end: float = Field(ge=0)
    """In step number ``steps``, and after it."""
    steps: int | None = Field(default=None, ge=2)
    """By default all of the run's."""


class HybridConfig(Section):
    """``weight`` times distillation plus ``grpo_weight`` times GRPO, each a mean of its own."""

    type: Literal["hybrid"]
    weight: WeightConfig = WeightConfig(start=0.5, end=0.5)
    """Of distillation: a number, or ``{ start = 1.0, end = 0.0, steps = 40 }``."""
    grpo_weight: float | None = Field(default=None, ge=0)
    """By default 1 − ``weight``: a mixture of both."""
    grpo_tokens: Literal["all", "others"] = "all"
    """``others``: GRPO leaves out the tokens that distillation has (TRACE)."""
    distillation: DistillationConfig = DistillationConfig()
    grpo: GrpoConfig = GrpoConfig()

    @field_validator("weight", mode="before")
    @classmethod
    def _constant(cls, value: object) -> object:
        return {"start": value, "end": value} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _sensible(self) -> HybridConfig:
        if self.grpo_weight is None and max(self.weight.start, self.weight.end) > 1:
            raise ValueError("weight is above 1: a mixture goes from 0 to 1; or name a grpo_weight")
        if self.grpo.kl_coef > 0:
            raise ValueError(
                "grpo.kl_coef must be 0 in a hybrid: its one teacher is the one with a context"
            )
        return self


ObjectiveConfig = Annotated[
    Union[DistillationConfig, GrpoConfig, HybridConfig],  # noqa: UP007
    Field(discriminator="type"),
]


def terms(objective: ObjectiveConfig) -> tuple[DistillationConfig | None, GrpoConfig | None]:
    """What an objective holds of distillation and of GRPO."""
    match objective:
        case HybridConfig():
            return objective.distillation, objective.grpo
        case DistillationConfig():
            return objective, None
        case GrpoConfig():
            return None, objective
