"""Run the contract of each part of a user's own on a few real items, for `selfteach check`.

Shapes and types of what a part returns are checked at every call, in training too
(`runtime.part_calls`). Here is added what a run relies on and would notice late: the same result for
the same items (a critic is called once: it may cost money, and its critiques are kept), finite numbers,
records that can be written as JSON and sent to other processes, and a loss that does not depend on how
a step is split.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from selfteach.commands.check.environment_contract import check_environment
from selfteach.config.critic_section import LlmCriticConfig
from selfteach.config.data_section import CustomData
from selfteach.config.part_section import named_parts
from selfteach.config.recipe import Recipe
from selfteach.errors import PartError
from selfteach.feedback.rewards.combined_reward import CombinedReward
from selfteach.runtime.part_sources import source_of
from selfteach.runtime.parts import shown
from selfteach.tasks.custom_tasks import custom_problems
from selfteach.trainer.batching import collate
from selfteach.trainer.build import Built
from selfteach.trainer.step import Components, build_samples, verify_and_critique
from selfteach.types import (
    Batch,
    Critique,
    CritiquedRollout,
    CritiqueStep,
    Problem,
    Rollout,
    TrainingSample,
)

PROBLEMS = 2
"""Problems whose made-up rollouts the parts are called with."""
TOLERANCE = 1e-3
"""Relative difference of two losses of the same step that rounding explains."""


Critiqued = dict[str, list[CritiquedRollout]]
"""Critiqued rollouts by what they depend on, so that arms with the same critic call it once."""


def check_parts(recipe: Recipe, built: Built, cache: Critiqued) -> list[str]:
    """Return a line for each part whose contract holds. Raises `PartError` for the first that breaks.

    ``cache`` holds the critiques that were made for other arms, and gets those of this one.
    """
    parts = named_parts(recipe)
    if not parts:
        return []
    rollouts = list(made_up_rollouts(built))
    depends_on = recipe.model_dump_json(include={"model", "data", "critic", "seed"})
    if depends_on not in cache:
        cache[depends_on] = _critiqued(recipe, built, rollouts)
    critiqued = cache[depends_on]
    lines = []
    for key, (kind, part) in parts.items():
        label = f"{kind} {shown(part.type)}"
        match kind:
            case "problems":
                _check_problems(label, recipe)
            case "verifier":
                _check_verifier(label, built, rollouts)
            case "splitter":
                _check_splitter(label, built, rollouts)
            case "critic":
                _check_records(label, [one.critique for one in critiqued])
            case "context":
                _check_context(label, built.components, critiqued)
            case "objective":
                _check_objective(label, built.components, critiqued)
            case "teacher":
                _check_teacher(label, built.components, critiqued)
            case "reward":
                _check_reward(recipe, built, key, critiqued)
            case "hub_environment":
                pass  # `check_environment_rewards` tries its rewards, those of a package too
            case "environment":
                check_environment(label, recipe, rollouts)
        digest = source_of(kind, part).digest[:12]
        lines.append(
            f"{key}: {part.label}, source {digest}: its contract holds on {len(rollouts)} "
            f"made-up rollouts of {PROBLEMS} problems"
        )
    return lines


def made_up_rollouts(built: Built) -> Iterator[Rollout]:
    """Yield rollouts of real problems that no model wrote: the answer, the reference, a part of it.

    What a rollout consists of is what the tokenizer and the problems have, so a part meets no text that
    it would not meet in a run.
    """
    task, renderer = built.task, built.components.renderer
    problems = (*task.train, *task.validation, *task.test)[:PROBLEMS]
    for problem in problems:
        answer = task.answer_format.write(problem.answer)
        worked = problem.references.get("reference", answer)
        for sample, text in enumerate((answer, worked, worked[: len(worked) // 2].rstrip())):
            ids = renderer.encode_answer(text)
            prompt, logps = renderer.solver_prompt(problem), (-1.0,) * len(ids)
            yield Rollout(problem, sample, prompt, ids, logps, text, True, 0)


def _critiqued(recipe: Recipe, built: Built, rollouts: Sequence[Rollout]) -> list[CritiquedRollout]:
    """Critique the rollouts; in the place of a language model with a made-up critique."""
    components = replace(built.components, reward=None)  # a judge may cost money
    if isinstance(recipe.critic, LlmCriticConfig):
        components = replace(components, critic=_made_up_critiques)
    return verify_and_critique(components, rollouts)


def _made_up_critiques(judged: Sequence[tuple[Rollout, Any]]) -> list[Any]:
    return [_made_up_critique(rollout.problem, rollout.text) for rollout, _ in judged]


def _made_up_critique(problem: Problem, text: str) -> Critique:
    worked = problem.references.get("reference", text)
    return Critique("D", (CritiqueStep(worked, "new", None),), problem.answer, 0)


def _check_problems(label: str, recipe: Recipe) -> None:
    assert isinstance(recipe.data, CustomData)
    first, second = (custom_problems(recipe.data)[0] for _ in range(2))
    for split, problems in first.items():
        if problems != second[split]:
            raise PartError(
                f"{label}: its {split} problems are others at the second call: no resume takes them"
            )
        _require_picklable(label, problems[:PROBLEMS])


def _check_verifier(label: str, built: Built, rollouts: Sequence[Rollout]) -> None:
    for rollout in rollouts:
        first, second = (built.components.verify(rollout.problem, rollout.text) for _ in range(2))
        if first != second:
            raise PartError(
                f"{label}: two calls with problem {rollout.problem.label!r} and the same text returned "
                f"{first} and {second}"
            )
        _check_records(label, [first])


def _check_splitter(label: str, built: Built, rollouts: Sequence[Rollout]) -> None:
    for rollout in rollouts:
        first, second = (list(built.components.split_steps(rollout.text)) for _ in range(2))
        if first != second:
            raise PartError(f"{label}: two calls with the same text returned {first} and {second}")


def _check_context(
    label: str, components: Components, critiqued: Sequence[CritiquedRollout]
) -> None:
    if components.context is None:
        return
    first, second = (list(components.context(critiqued)) for _ in range(2))
    if first != second:
        raise PartError(f"{label}: two calls with the same rollouts returned different contexts")
    for one, context in zip(critiqued, first, strict=True):
        if isinstance(context, str):
            components.renderer.teacher_prompt(one.rollout.problem, context)


def _check_reward(
    recipe: Recipe, built: Built, key: str, critiqued: Sequence[CritiquedRollout]
) -> None:
    """Call a reward function once: it may cost money, and may return others the next time."""
    reward = built.components.reward
    assert isinstance(reward, CombinedReward)
    assert recipe.reward is not None
    name = recipe.reward.functions[int(key.rpartition(".")[2])].name
    source = next(one for one in reward.sources if one.name == name)
    alone = replace(reward, sources=[source], success=None)
    judged = [(one.rollout, replace(one.verdict, rewards=None)) for one in critiqued]
    alone(judged)


def _check_objective(
    label: str, components: Components, critiqued: Sequence[CritiquedRollout]
) -> None:
    samples = build_samples(components, critiqued)
    whole, again, split = (
        _loss(label, components, samples, size)
        for size in (components.micro_batch_tokens, components.micro_batch_tokens, 1)
    )
    if whole != again:
        raise PartError(
            f"{label}: two passes over the same samples have the losses {whole} and {again}"
        )
    if abs(whole - split) > TOLERANCE * max(1.0, abs(whole)):
        raise PartError(
            f"{label}: the loss of the same step is {whole:.6g} in one micro-batch and {split:.6g} in "
            "several: put all denominators into token_weights"
        )


def _loss(
    label: str, components: Components, samples: Sequence[TrainingSample], micro_batch_tokens: int
) -> float:
    """Return the loss of a step, computed and differentiated as in training, without an update."""
    objective, total = components.objective, 0.0
    counts = objective.denominators(samples)
    weights = objective.token_weights(samples, counts, components.policy.version)
    for batch in _batches(components, samples, weights, micro_batch_tokens):
        torch.manual_seed(0)  # adapters may have dropout
        teacher = components.teacher.score(batch.teacher) if batch.teacher is not None else None
        loss, values = objective.loss(
            components.policy.score(batch.student), teacher, batch, components.chunk_tokens
        )
        for name, value in {"its loss": loss, **values}.items():
            _require_finite(label, name, value)
        if not loss.requires_grad:
            raise PartError(f"{label}: its loss has no gradient: it is detached from the logits")
        loss.backward()
        for parameter in components.policy.trainable.values():
            parameter.grad = None
        total += loss.item()
    return total


def _check_teacher(
    label: str, components: Components, critiqued: Sequence[CritiquedRollout]
) -> None:
    samples = build_samples(components, critiqued)
    counts = components.objective.denominators(samples)
    weights = components.objective.token_weights(samples, counts, components.policy.version)
    batches = _batches(components, samples, weights, components.micro_batch_tokens)
    batch = next((batch for batch in batches if batch.teacher is not None), None)
    if batch is None:
        return
    first, second = _logits(components, batch), _logits(components, batch)
    _require_finite(label, "its logits", first)
    if not torch.equal(first, second):
        raise PartError(
            f"{label}: two calls of score with the same sequences returned different logits"
        )
    state = {name: value.detach().clone() for name, value in components.teacher.state().items()}
    components.teacher.load_state(state)
    if not torch.equal(first, _logits(components, batch)):
        raise PartError(
            f"{label}: load_state(state()) changes its logits: a resume would train otherwise"
        )
    components.teacher.update()
    _require_finite(label, "its logits after update", _logits(components, batch))


def _batches(
    components: Components, samples: Sequence[TrainingSample], weights: Any, micro_batch_tokens: int
) -> list[Batch]:
    batches = collate(
        samples, weights, pad_id=components.pad_id, micro_batch_tokens=micro_batch_tokens,
        layout=components.policy.layout, ranks=components.ranks,
    )  # fmt: skip
    return [batch.to(components.policy.device) for batch in batches]


def _logits(components: Components, batch: Batch) -> Tensor:
    assert batch.teacher is not None
    torch.manual_seed(0)
    with torch.no_grad():
        return components.teacher.score(batch.teacher).logits(slice(0, len(batch.ids_N))).clone()


def _require_finite(label: str, name: str, value: Tensor) -> None:
    if not torch.isfinite(value).all():
        raise PartError(f"{label}: {name} is not finite on made-up rollouts")


def _check_records(label: str, records: Sequence[Any]) -> None:
    """Require records that can be written as JSON, and that other processes can be sent."""
    for record in records:
        try:
            json.dumps(None if record is None else asdict(record))
        except (TypeError, ValueError) as error:
            raise PartError(
                f"{label}: its {type(record).__name__} cannot be written as JSON: {error}"
            ) from None
    _require_picklable(label, records)


def _require_picklable(label: str, records: Sequence[Any]) -> None:
    try:
        same = pickle.loads(pickle.dumps(list(records))) == list(records)
    except Exception as error:
        raise PartError(
            f"{label}: its results cannot be sent to other processes: {error}"
        ) from None
    if not same:
        raise PartError(f"{label}: its results change when they are sent to other processes")
