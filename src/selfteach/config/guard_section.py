"""Defines the recipe's ``[guard]`` section: when a run stops itself, and bounds that it watches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from selfteach.config.schema import Section

Range = tuple[float, float]
NO_GRADIENT = 1e-5
"""Norm of a gradient that is rounding errors: a teacher that says what the student says gives up to
1e-6. AdamW would make whole steps of it."""


class GuardConfig(Section):
    """Sets when a run stops by itself, and bounds on its metrics with what happens beyond them.

    A bound holds for the mean of ``window`` steps. ``length`` and ``entropy`` are factors of the mean
    of the run's first ``window`` steps. After ``reduce_lr`` and ``stop`` the next ``window`` steps are
    awaited before the guard acts again.
    """

    idle_steps: int = Field(default=5, ge=0)
    """Steps in a row in which nothing could be learned after which a run stops: no token in the loss,
    or no gradient, although not nearly all rollouts are right. 0: it never stops for that."""
    action: Literal["warn", "reduce_lr", "stop"] = "warn"
    """What happens beyond a bound: a line in the terminal (``warn``), which the others print too;
    the learning rate times ``lr_factor`` from the next update on; or the run stops, its checkpoint
    saved."""
    lr_factor: float = Field(default=0.5, gt=0, lt=1)
    """Factor of the learning rate under ``reduce_lr``."""
    window: int = Field(default=3, ge=1)
    """Steps whose mean is compared with a bound."""
    length: Range | None = None
    """Smallest and largest length of rollouts, as factors of the first steps': ``[0.5, 2.0]``."""
    entropy: Range | None = None
    """Smallest and largest entropy per token, as factors of the first steps': ``[0.25, 4.0]``."""
    truncated: float | None = Field(default=None, ge=0, le=1)
    """Largest share of rollouts that the token limit cuts."""
    repetition: float | None = Field(default=None, ge=0, le=1)
    """Largest share of 4-token sequences that occurred before in the same rollout."""
    kl_initial: float | None = Field(default=None, gt=0)
    """Largest KL of the policy from the initial one, in nats per sampled token; costs a forward pass
    per step, and needs adapters, ``teacher.type = "initial"`` or GRPO's ``kl_coef``."""
    reward: float | None = Field(default=None, ge=0, le=1)
    """Smallest share of correct rollouts, as a factor of the best ``window`` steps so far, once those
    have a fifth: ``0.6`` allows a loss of 40 %."""

    @model_validator(mode="after")
    def _check_ranges(self) -> GuardConfig:
        for name in ("length", "entropy"):
            bounds: Range | None = getattr(self, name)
            if bounds is not None and not 0 <= bounds[0] < 1 < bounds[1]:
                raise ValueError(
                    f"{name} is two factors of the first steps' value, like [0.5, 2.0]"
                )
        return self
