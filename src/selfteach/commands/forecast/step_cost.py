"""Measure seconds of sampling, critique and training, and scale them to a step of an arm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from selfteach.config.recipe import Recipe
from selfteach.losses.objectives import Grpo
from selfteach.protocols import Critic, Engine
from selfteach.runtime.atomic_files import write_json
from selfteach.runtime.stored_files import read_json
from selfteach.trainer.batching import collate
from selfteach.trainer.step import Components
from selfteach.types import (
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    Problem,
    Rollout,
    Sampling,
    TokenWeights,
    TrainingSample,
    Verdict,
)

TRAINING_TOKENS = 2048
"""Tokens (prompts and rollouts) of the learning pass that is measured: a minute for 0.5 B on a core."""


@dataclass(slots=True)
class Meter:
    """Adds up seconds and the units (tokens, rollouts) that were processed in them."""

    seconds: float = 0.0
    units: float = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Add the seconds spent inside."""
        started = time.monotonic()
        yield
        self.seconds += time.monotonic() - started

    @property
    def rate(self) -> float | None:
        """Return seconds per unit; None if nothing was measured."""
        return self.seconds / self.units if self.units else None


class RateFile:
    """Keeps measured rates (seconds per unit) in a file: what is read from disk later costs nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rates: dict[str, float] = read_json(path) if path.exists() else {}

    def save(self, name: str, meter: Meter) -> None:
        """Keep a rate, if anything was measured."""
        if meter.rate is not None:
            self._rates[name] = meter.rate
            write_json(self._path, self._rates)

    def get(self, name: str) -> float | None:
        """Return a rate that was measured now or earlier."""
        return self._rates.get(name)


class MeteredEngine:
    """Samples through another engine and counts seconds and sampled tokens."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine, self._meter = engine, meter

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Sample the rollouts."""
        with self._meter.measuring():
            rollouts = self._engine.generate(problems, sampling)
        self._meter.units += sum(rollout.length for rollout in rollouts)
        return rollouts

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights into the engine."""
        self._engine.load_weights(named_weights, version)


class MeteredCritic:
    """Critiques through another critic and counts seconds and rollouts.

    The critic is built when it is first called, so that saved critiques load no model. Nothing is
    counted if a reply was cached: those seconds are not what new critiques take.
    """

    def __init__(self, build_critic: Callable[[], Critic], meter: Meter) -> None:
        self._build_critic, self._meter = build_critic, meter

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """Return the critiques."""
        critic, meter = self._build_critic(), Meter()
        with meter.measuring():
            critiques = critic(judged)
        if not any(critique.usage.cached for critique in critiques):
            self._meter.seconds += meter.seconds
            self._meter.units += len(judged)
        return critiques


def measure_training(components: Components, critiqued: Sequence[CritiquedRollout]) -> Meter:
    """Measure forward and backward passes of the student over some rollouts, per token.

    No weight changes: the gradients are dropped. The optimizer's update is not measured.
    """
    _pass_over(components, critiqued[:1])  # the first pass sets up what later ones reuse
    chosen, tokens = [], 0
    for one in critiqued:
        tokens += len(one.rollout.prompt_ids) + len(one.rollout.token_ids)
        if chosen and tokens > TRAINING_TOKENS:
            break
        chosen.append(one)
    meter = Meter()
    with meter.measuring():
        _pass_over(components, chosen)
    meter.units = sum(len(c.rollout.prompt_ids) + len(c.rollout.token_ids) for c in chosen)
    return meter


def _pass_over(components: Components, critiqued: Sequence[CritiquedRollout]) -> None:
    samples = [TrainingSample(one) for one in critiqued]
    weights = [TokenWeights((1.0,) * len(s.rollout.token_ids), advantage=1.0) for s in samples]
    objective = Grpo(components.sampling.temperature)
    for batch in collate(
        samples, weights, pad_id=components.pad_id,
        micro_batch_tokens=components.micro_batch_tokens,
        layout=components.policy.layout,
    ):  # fmt: skip
        batch = batch.to(components.policy.device)
        student = components.policy.score(batch.student)
        loss, _ = objective.loss(student, None, batch, components.chunk_tokens)
        loss.backward()
    components.policy.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True, slots=True)
class MeanLengths:
    """Holds mean lengths of the rollouts that were sampled, in tokens."""

    prompt: float
    completion: float
    teacher_prompt: float | None
    """None without a teacher."""
    sampled: float | None = None
    """Tokens of ``completion`` that the model samples, and no environment writes; None: all."""


def step_cost(
    recipe: Recipe,
    lengths: MeanLengths,
    rates: Mapping[str, float | None],
    share_shown: float,
) -> dict[str, float | None]:
    """Return what one step of an arm takes: rollouts, tokens, and seconds where they are known.

    ``rates`` are seconds per sampled token (``sampling``), per critique (``critique``), and per token
    forward and backward (``training``) or forward alone (``scoring``). Every rollout is assumed to be
    trained on, with a teacher on the share ``share_shown`` of them.
    """
    train = recipe.train
    rollouts = train.problems_per_step * train.group_size
    sampled = rollouts * (lengths.completion if lengths.sampled is None else lengths.sampled)
    student = rollouts * (lengths.prompt + lengths.completion)
    teacher = 0.0
    if lengths.teacher_prompt is not None:
        teacher = rollouts * share_shown * (lengths.teacher_prompt + lengths.completion)
    training = _times(rates["training"], student)
    scoring = _times(rates["scoring"], teacher) if teacher else 0.0
    learning = None if training is None or scoring is None else training + scoring
    seconds = {
        "seconds_sampling": _times(rates["sampling"], sampled),
        "seconds_critique": _times(rates["critique"], rollouts) if recipe.critic else 0.0,
        "seconds_learning": _times(learning, train.num_iterations),
    }
    parts = list(seconds.values())
    total = None if None in parts else sum(part for part in parts if part is not None)
    return {
        "rollouts": rollouts,
        "tokens_sampled": sampled,
        "tokens_student": student * train.num_iterations,
        "tokens_teacher": teacher * train.num_iterations,
        **seconds,
        "seconds": total,
        "steps": train.steps,
    }


def _times(rate: float | None, units: float) -> float | None:
    return None if rate is None else rate * units
