"""Builds critics, contexts, objectives and teachers of a user's own, and checks what they return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor

from selfteach.config.part_section import CustomPart
from selfteach.errors import PartError
from selfteach.models.lm_head import Scores
from selfteach.models.policy import Policy
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Context, Critic, Objective, Teacher
from selfteach.runtime.part_calls import Checks
from selfteach.runtime.parts import build_part, shown
from selfteach.tasks.task import Task
from selfteach.types import (
    Batch,
    Case,
    Critique,
    CritiqueFailure,
    CritiqueStep,
    StepStatus,
    TokenWeights,
    TrainingSample,
)

METHODS: Mapping[str, tuple[str, ...]] = {
    "objective": ("denominators", "token_weights", "per_token", "loss"),
    "teacher": ("score", "update", "state", "load_state"),
}
"""Methods without which an object is no objective, or no teacher."""


def build_custom_critic(part: CustomPart, task: Task, templates: Templates, *, seed: int) -> Critic:
    """Build a critic; it may ask for ``task``, ``templates``, ``seed``, ``verify``, ``split_steps``."""
    offered = {
        "task": task, "templates": templates, "seed": seed, "verify": task.verify,
        "split_steps": task.split_steps,
    }  # fmt: skip
    return build_part("critic", part, offered, CRITIC_CHECKS)


def build_custom_context(
    part: CustomPart, task: Task, templates: Templates, *, seed: int
) -> Context:
    """Build a context; it may ask for ``task``, ``templates`` and ``seed``."""
    offered = {"task": task, "templates": templates, "seed": seed}
    return build_part("context", part, offered, CONTEXT_CHECKS)


def build_custom_objective(
    part: CustomPart, *, sampling_temperature: float, seed: int
) -> Objective:
    """Build an objective; it may ask for ``sampling_temperature`` and ``seed``."""
    offered = {"sampling_temperature": sampling_temperature, "seed": seed}
    return _with_methods(
        "objective", part, build_part("objective", part, offered, OBJECTIVE_CHECKS)
    )


def build_custom_teacher(part: CustomPart, policy: Policy) -> Teacher:
    """Build a teacher; it may ask for ``policy``, which has its initial weights now."""
    return _with_methods(
        "teacher", part, build_part("teacher", part, {"policy": policy}, TEACHER_CHECKS)
    )


def _with_methods(kind: str, part: CustomPart, built: Any) -> Any:
    missing = [name for name in METHODS[kind] if not callable(getattr(built, name, None))]
    if kind == "objective" and not hasattr(built, "needs_teacher"):
        missing.append("needs_teacher")
    if missing:
        raise PartError(
            f"{kind} {shown(part.type)}: has no {', '.join(missing)}: see "
            f"selfteach.protocols.{kind.capitalize()}"
        )
    return built


# -- what is broken about a result ----------------------------------------------------------------


def broken_critiques(result: object, judged: Sequence[object]) -> str | None:
    """Return what is broken about a critic's result; None if nothing is."""
    if (broken := _not_one_each(result, judged, "critique")) is not None:
        return broken
    return next(filter(None, map(broken_critique, result)), None)  # type: ignore[call-overload]


def broken_critique(critique: object) -> str | None:
    """Return what is broken about one critique; None if nothing is."""
    if isinstance(critique, CritiqueFailure):
        return (
            None
            if isinstance(critique.reason, str)
            else "returned a CritiqueFailure without a reason"
        )
    if not isinstance(critique, Critique):
        return f"returned {_named(critique)} among its critiques, not a Critique or CritiqueFailure"
    if critique.case not in get_args(Case):
        return f"returned a Critique of case {critique.case!r}: it is A, B, C or D"
    if not isinstance(critique.answer, str):
        return f"returned a Critique whose answer is {_named(critique.answer)} and not a text"
    for step in critique.steps:
        if not isinstance(step, CritiqueStep) or not isinstance(step.text, str):
            return "returned a Critique with a step that is no CritiqueStep with a text"
        if step.status not in get_args(StepStatus):
            return f"returned a step of status {step.status!r}: it is kept, fixed or new"
    first = critique.first_error
    if first is not None and (not isinstance(first, int) or first < 0):
        return (
            f"returned first_error = {first!r}: it is the index of a step of the rollout, or None"
        )
    return None


def broken_contexts(result: object, critiqued: Sequence[object]) -> str | None:
    """Return what is broken about a context's result; None if nothing is."""
    if (broken := _not_one_each(result, critiqued, "context")) is not None:
        return broken
    for one in result:  # type: ignore[attr-defined]
        if not isinstance(one, str | CritiqueFailure | None):
            return f"returned {_named(one)} among its contexts, not a text, CritiqueFailure or None"
    return None


def broken_scores(result: object, *_: object) -> str | None:
    """Return what is broken about a teacher's result; None if nothing is."""
    if isinstance(result, Scores):
        return None
    return f"returned {_named(result)} and not Scores: policy.score(sequences) returns them"


def broken_state(result: object) -> str | None:
    """Return what is broken about a teacher's state; None if nothing is."""
    if not isinstance(result, Mapping) or not all(isinstance(v, Tensor) for v in result.values()):
        return "returned what is no table of tensors by name: {} for a teacher without a state"
    return None


def broken_denominators(result: object, *_: object) -> str | None:
    """Return what is broken about an objective's denominators; None if nothing is."""
    numbers = list(result) if isinstance(result, Sequence) else None
    if numbers is None or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return f"returned {result!r} and not a tuple of finite numbers"
    return None


def broken_weights(result: object, samples: Sequence[TrainingSample], *_: object) -> str | None:
    """Return what is broken about an objective's token weights; None if nothing is."""
    if (broken := _not_one_each(result, samples, "TokenWeights")) is not None:
        return broken
    for sample, weights in zip(samples, result, strict=True):  # type: ignore[call-overload]
        tokens = len(sample.rollout.token_ids)
        if not isinstance(weights, TokenWeights):
            return f"returned {_named(weights)} among its weights: each is TokenWeights"
        if len(weights.weights) != tokens:
            return f"returned {len(weights.weights)} weights for a rollout of {tokens} tokens"
        if not all(map(math.isfinite, (*weights.weights, weights.advantage))):
            return "returned weights that are not all finite"
    return None


def broken_loss(
    result: object, student: object, teacher: object, batch: Batch, *_: object
) -> str | None:
    """Return what is broken about an objective's loss of a micro-batch; None if nothing is."""
    if not isinstance(result, tuple) or len(result) != 2:
        return "returned what is no pair of the loss and the values of its tokens"
    total, values = result
    if not isinstance(total, Tensor) or total.ndim != 0:
        return "returned a loss that is no scalar tensor"
    return _broken_values(values, len(batch.ids_N))


def broken_token_values(result: object, logits_CV: Tensor, *_: object) -> str | None:
    """Return what is broken about an objective's values of some tokens; None if nothing is."""
    return _broken_values(result, len(logits_CV))


def _broken_values(values: object, tokens: int) -> str | None:
    if not isinstance(values, Mapping):
        return f"returned {_named(values)} and not a table of tensors by name"
    for name in ("loss", "logp"):
        if name not in values:
            return f"returned no {name!r} among its values: loss and logp are needed"
    for name, value in values.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != (tokens,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else _named(value)
            return f"returned {name} of shape {shape}: it is [{tokens}], one number per token"
    return None


def _not_one_each(result: object, items: Sequence[object], what: str) -> str | None:
    if not isinstance(result, Sequence) or isinstance(result, str):
        return f"returned {_named(result)} and not a list with one {what} per rollout"
    if len(result) != len(items):
        return f"returned {len(result)} for {len(items)} rollouts: one {what} each, in order"
    return None


def _named(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


CRITIC_CHECKS: Checks = {"__call__": broken_critiques}
CONTEXT_CHECKS: Checks = {"__call__": broken_contexts}
TEACHER_CHECKS: Checks = {"score": broken_scores, "state": broken_state}
OBJECTIVE_CHECKS: Checks = {
    "denominators": broken_denominators, "token_weights": broken_weights, "loss": broken_loss,
    "per_token": broken_token_values,
}  # fmt: skip
