"""A critic over answers from a file: what it says of each, as rows like those of a run's samples/."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfteach.config.critic_section import LlmCriticConfig
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import Study
from selfteach.config.schema import merge, parse_setting, validate
from selfteach.errors import DataError, RecipeError
from selfteach.feedback.alignment import first_change
from selfteach.prompts.thinking import split_thinking
from selfteach.rollout.journaled_engine import problems_by_id
from selfteach.runtime.run_folder import sample_row
from selfteach.tasks import segmentation
from selfteach.trainer.build import Marker, build_marker
from selfteach.types import CritiquedRollout, Problem, Rollout, TrainingSample

AT_ONCE = 64
"""Answers that are given to the critic together."""


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer to be marked, and whether it is right where the file says so."""

    rollout: Rollout
    correct: bool | None


@dataclass(frozen=True, slots=True)
class _Known:
    """The recipe's own problems."""

    by_id: Mapping[str, Problem]
    by_question: Mapping[str, Problem]


def review(
    recipe: Recipe, path: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> tuple[list[dict[str, Any]], float]:
    """Mark the answers of a JSONL file with a recipe's critic; rows, and the seconds it took.

    A row is that of ``samples/`` (`run_folder.sample_row`) and holds the answer's steps as well.
    Where no reply is to be had, the row says so, whatever the recipe's policy. Raises `DataError` for
    a file that cannot be read, and what `build_marker` raises.
    """
    marker = build_marker(_never_stopping(recipe))
    answers = read_answers(path, marker)
    began, rows = time.monotonic(), []
    for start in range(0, len(answers), AT_ONCE):
        rows += _mark(marker, answers[start : start + AT_ONCE])
        progress(len(rows), len(answers))
    return rows, time.monotonic() - began


def recipe_beside(path: Path, settings: Sequence[str] | None) -> Recipe:
    """The recipe of the run that a file lies in, with settings. Raises `RecipeError` without one."""
    if not path.exists():
        raise DataError(f"{path}: no such file of answers")
    for folder in (path.parent, path.parent.parent):
        config = folder / "config.json"
        if config.exists():
            values: Mapping[str, Any] = json.loads(config.read_text(encoding="utf-8"))
            for setting in map(parse_setting, settings or ()):
                values = merge(values, setting)
            return _with_critic(validate(Recipe, values, where=str(config)))
    raise RecipeError(f"{path} lies in no run: name a recipe with a critic, --recipe RECIPE")


def recipe_of(study: Study, arm: str | None) -> Recipe:
    """The recipe of an arm, by default the first that has a critic."""
    recipes = [study.recipe(name) for name in ([arm] if arm else study.arms)]
    return _with_critic(next((r for r in recipes if r.critic is not None), recipes[0]))


def read_answers(path: Path, marker: Marker) -> list[Answered]:
    """Answers from JSON lines of three kinds, told apart by their fields.

    One's own file has ``question``, ``text`` (the answer to be marked) and ``answer`` (the right one),
    optionally ``reference``, ``correct``, ``finished``, ``id`` and ``sample``. A run's ``rollouts/`` and
    ``samples/`` refer to the problems of the recipe. Raises `DataError` naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of answers") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    task = marker.task
    problems = [*task.train, *task.validation, *task.test]
    known = _Known(problems_by_id(problems), {problem.question: problem for problem in problems})
    read = [
        _answer(line, f"{path}:{number}", number, known, marker)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not read:
        raise DataError(f"{path}: the file is empty")
    return read


def _mark(marker: Marker, answers: Sequence[Answered]) -> list[dict[str, Any]]:
    judged = []
    for answer in answers:
        verdict = marker.task.verify(answer.rollout.problem, answer.rollout.text)
        if answer.correct is not None:
            verdict = replace(verdict, correct=answer.correct)
        judged.append((answer.rollout, verdict))
    said = marker.critic(judged)
    return [
        _row(marker, CritiquedRollout(rollout, verdict, critique))
        for (rollout, verdict), critique in zip(judged, said, strict=True)
    ]


def _row(marker: Marker, critiqued: CritiquedRollout) -> dict[str, Any]:
    text, ids = critiqued.rollout.text, critiqued.rollout.token_ids
    spans = marker.task.split_steps(text)
    change = first_change(critiqued, spans, marker.renderer.token_ends(ids))
    said = spans[:-1] if critiqued.verdict.parsed is not None else spans
    own = [segmentation.content(text, span) for span in said]
    return {**sample_row(TrainingSample(critiqued, change=change)), "answer_steps": own}


def _answer(line: str, where: str, number: int, known: _Known, marker: Marker) -> Answered:
    try:
        row = json.loads(line)
        correct, finished = row.get("correct"), bool(row.get("finished", True))
        sample = int(row.get("sample", number - 1))
    except (ValueError, TypeError, AttributeError):
        raise DataError(f"{where}: not a JSON object") from None
    of_a_run = "token_ids" in row or "critique" in row
    try:
        text = str(row["answer"] if "critique" in row else row["text"])
        problem = (
            known.by_id[row["problem_id"]] if of_a_run else _problem(row, f"line-{number}", known)
        )
    except KeyError as missing:
        if of_a_run and missing.args[0] == row.get("problem_id"):
            raise DataError(
                f"{where}: problem {missing} is none of the recipe's; name the run's own: --recipe"
            ) from None
        raise DataError(
            f"{where}: no field {missing}; needed: question, text (the answer to be marked), "
            "answer (the right one)"
        ) from None
    text = split_thinking(text)[1]
    ids = tuple(row["token_ids"]) if "token_ids" in row else _ids(marker, text, finished)
    logps = (0.0,) * len(ids)
    rollout = Rollout(problem, sample, (), ids, logps, text, finished, 0)
    return Answered(rollout, None if correct is None else bool(correct))


def _problem(row: Mapping[str, Any], default_id: str, known: _Known) -> Problem:
    question, answer = str(row["question"]), str(row["answer"])
    references = {"reference": str(row["reference"])} if row.get("reference") else {}
    own = known.by_question.get(question)
    if own is not None and own.answer == answer:  # it holds what its oracle or verifier must know
        return replace(own, references={**own.references, **references})
    return Problem(str(row.get("id", default_id)), question, answer, references)


def _ids(marker: Marker, text: str, finished: bool) -> tuple[int, ...]:
    ids = marker.renderer.encode_answer(text)
    return ids if finished else ids[:-1] or ids


def _with_critic(recipe: Recipe) -> Recipe:
    if recipe.critic is None:
        raise RecipeError(
            "the recipe has no critic: name an arm that has one, or --set critic.type=..."
        )
    return recipe


def _never_stopping(recipe: Recipe) -> Recipe:
    critic = recipe.critic
    if not isinstance(critic, LlmCriticConfig) or critic.on_failure.unavailable != "stop":
        return recipe
    on = critic.on_failure.model_copy(update={"unavailable": "drop"})
    return recipe.model_copy(update={"critic": critic.model_copy(update={"on_failure": on})})
