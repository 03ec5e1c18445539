"""What one step is made of, from the recipe and what is known of model and problems: no hardware."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from selfteach.commands.check.memory import Load
from selfteach.commands.check.sizes import RunSizes, load_of
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
from selfteach.planning.lengths import SHARE, Spread

Marker = Literal["nobody", "program", "own", "served", "latency"]
"""Who marks: no critic; a program; a model in the trainer's process; a served model whose shape is
known; a server of which only the time that a reply takes is known."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of the critic for one answer."""

    marker: Marker
    shape: Shape | None = None
    prompt: float = 0.0
    """Tokens before the answer that is marked."""
    critique: Spread | None = None
    concurrency: int = 1
    """Requests at a time."""
    latency: float = 0.0
    """Seconds of one reply (``latency``), or of one answer (``program``)."""


@dataclass(frozen=True, slots=True)
class Work:
    """One step."""

    load: Load
    """Shape of the solver, and what a trainer holds."""
    steps: int
    problems: int
    samples: int
    """Answers per problem."""
    batch_size: int
    """Answers that are sampled together, and handed on together."""
    prompt: float
    answer: Spread
    teacher_prompt: float
    """Tokens before the answer on the teacher's side; 0 without a teacher."""
    shows_trace: bool
    """True if the teacher's prompt also holds something as long as the answer."""
    teacher_sides: int
    """Forward passes of the teacher per update."""
    updates: int
    micro_batch_tokens: int
    asked: Asked
    staleness: int
    engine: str
    """``transformers`` or ``vllm``: what samples where trainers sample themselves."""

    @property
    def answers(self) -> int:
        """Of one step."""
        return self.problems * self.samples

    @property
    def batches(self) -> int:
        """Batches of answers in a step; they hold whole problems."""
        per_batch = max(1, self.batch_size // self.samples)
        return -(-self.problems // per_batch)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line says in place of the recipe; None: as it is."""

    staleness: int | None = None
    answer_tokens: float | None = None
    critique_tokens: float | None = None
    critic_seconds: float | None = None


def work_of(recipe: Recipe, known: RunSizes, wishes: Wishes = Wishes()) -> Work:
    """A step of a recipe. Raises `RecipeError` for a model of which nothing is known here."""
    load = load_of(recipe, known)
    if load is None:
        raise RecipeError(
            f"model.path = {recipe.model.path!r}: its size is not known here; name a folder or a "
            "model of architectures.json"
        )
    train, cap = recipe.train, recipe.sampling.max_tokens
    prompt = float(known.lengths.mean_prompt or known.lengths.longest_prompt)
    told, rewarded = terms(recipe.objective)
    has_teacher = told is not None or (rewarded is not None and rewarded.kl_coef > 0)
    by_reference = recipe.context.type in ("reference", "aligned_reference")
    reference = known.lengths.mean_reference if by_reference else None
    answer = Spread.around(wishes.answer_tokens or SHARE * cap, cap)
    asked = asked_of(recipe, known, wishes)
    return Work(
        load=dataclasses.replace(load, sampler="trainer"),  # the layout says who else samples
        steps=train.steps,
        problems=train.problems_per_step,
        samples=train.group_size,
        batch_size=recipe.sampling.batch_size,
        prompt=prompt,
        answer=answer,
        teacher_prompt=prompt + (reference or 0.0) if has_teacher else 0.0,
        shows_trace=told is not None and reference is None,
        teacher_sides=(2 if recipe.teacher.type == "trust_region" else 1) if has_teacher else 0,
        updates=train.num_iterations,
        micro_batch_tokens=train.micro_batch_tokens,
        asked=asked,
        staleness=wishes.staleness if wishes.staleness is not None else staleness_of(recipe),
        engine=engine_of(recipe),
    )


def asked_of(recipe: Recipe, known: RunSizes, wishes: Wishes) -> Asked:
    """Who marks, and what is asked. Raises `RecipeError` for a server of which nothing is known."""
    critic = recipe.critic
    if critic is None:
        return Asked("nobody")
    served = isinstance(critic, EndpointConfig)
    concurrency = critic.concurrency if served else getattr(critic, "batch", 1)
    if wishes.critic_seconds is not None:
        return Asked("latency", concurrency=concurrency, latency=wishes.critic_seconds)
    if not isinstance(critic, LlmCriticConfig):
        return Asked("program")
    shape = _critic_shape(critic, known)
    if shape is None:
        name = critic.model if isinstance(critic, EndpointConfig) else "the critic"
        raise RecipeError(
            f"critic {name!r}: its size is not known; say how long a reply takes: --critic-seconds"
        )
    reads = known.lengths.critic_template + float(
        known.lengths.mean_prompt or known.lengths.longest_prompt
    )
    if critic.sees_reference:
        reads += known.lengths.mean_reference or 0.0
    critique = Spread.around(wishes.critique_tokens or SHARE * critic.max_tokens, critic.max_tokens)
    return Asked("served" if served else "own", shape, reads, critique, concurrency)


def longest_teacher(work: Work) -> int:
    """Tokens of the longest teacher's sequence, as far as lengths are assumed: all at the limit."""
    trace = work.answer.cap if work.shows_trace else 0
    return int(work.teacher_prompt + trace + work.answer.cap)


def with_answers(work: Work, answer: Spread, critique: Spread | None) -> Work:
    """The same work with lengths that were measured."""
    asked = work.asked
    if critique is not None and asked.critique is not None:
        asked = dataclasses.replace(asked, critique=critique)
    return dataclasses.replace(work, answer=answer, asked=asked)


def staleness_of(recipe: Recipe) -> int:
    """How many updates old the weights that sampled a step's answers may be; 0 is sequential."""
    return int(_value(recipe.train, "staleness") or 0)


def engine_of(recipe: Recipe) -> str:
    """``vllm``, served or in process, or ``transformers``."""
    kind = str(_value(_value(recipe, "engine"), "type") or "transformers")
    return "vllm" if kind.startswith("vllm") else "transformers"


def _value(section: Any, name: str) -> Any:
    """A field that a recipe may not have yet."""
    return getattr(section, name, None)


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
