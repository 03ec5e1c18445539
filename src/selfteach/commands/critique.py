"""Critique rollouts from a file and return rows like those of a run's samples/."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfteach.config.critic_section import LlmCriticConfig
from selfteach.config.migrations import migrate_recipe, migrate_rollout
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import Study
from selfteach.config.schema import merge, parse_setting, validate
from selfteach.episodes import LABELS, Segment
from selfteach.errors import DataError, RecipeError
from selfteach.feedback.alignment import first_change
from selfteach.prompts.episode_tokens import token_ends
from selfteach.prompts.thinking import split_thinking
from selfteach.rollout.journaled_engine import problems_by_id
from selfteach.runtime.part_sources import with_copies
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.stored_files import reading
from selfteach.runtime.stored_records import episode_fields, sample_row
from selfteach.tasks import segmentation
from selfteach.tasks.sources.conversations import is_conversation, read_messages
from selfteach.tasks.sources.source_row import UnreadableValue
from selfteach.tasks.sources.text_files import numbered_lines
from selfteach.tasks.task import Oracle, true_critique
from selfteach.tasks.verifiers import verify_rollouts
from selfteach.trainer.build import CritiqueSetup, build_critique_setup
from selfteach.types import (
    Critique,
    CritiquedRollout,
    Problem,
    Rollout,
    TrainingSample,
    Verdict,
)

BATCH_SIZE = 64
"""Rollouts given to the critic in one call."""


@dataclass(frozen=True, slots=True)
class RolloutFromFile:
    """Holds a rollout to critique, and whether it is correct where the file says so."""

    rollout: Rollout
    correct: bool | None


@dataclass(frozen=True, slots=True)
class _Problems:
    """Indexes the problems of the recipe."""

    by_id: Mapping[str, Problem]
    by_transcript: Mapping[str, Problem]


def critique_file(
    recipe: Recipe, path: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[dict[str, Any]], float]:
    """Critique the rollouts of a JSONL file with a recipe's critic; return rows and seconds taken.

    A row is that of ``samples/`` (`run_folder.sample_row`) with the solution steps of the rollout and,
    where a program can check them, the index of the first wrong one (``true_first_error``). A
    critic that gives no reply is recorded in the row, even if the recipe would stop a run. Raises
    `DataError` for a file that cannot be read, and what `build_critique_setup` raises.
    """
    setup = build_critique_setup(_never_stopping(recipe))
    rollouts = read_rollouts(path, setup)
    started, rows = time.monotonic(), []
    for start in range(0, len(rollouts), BATCH_SIZE):
        rows += _critique(setup, rollouts[start : start + BATCH_SIZE])
        progress(len(rows), len(rollouts))
    return rows, time.monotonic() - started


def recipe_beside(path: Path, settings: Sequence[str] | None) -> Recipe:
    """Return the recipe of the run that contains a file. Raises `RecipeError` if none does."""
    if not path.exists():
        raise DataError(f"{path}: no such file of rollouts")
    for folder in (path.parent, path.parent.parent):
        config = folder / "config.json"
        if config.exists():
            values: Mapping[str, Any] = RunFolder(folder).config()
            for setting in map(parse_setting, settings or ()):
                values = merge(values, migrate_recipe(setting, "--set"))
            chosen = with_copies(validate(Recipe, values, where=str(config)), folder)
            return _with_critic(chosen)
    raise RecipeError(
        f"{path} is not in a run folder: name a recipe with a critic, --recipe RECIPE"
    )


def recipe_of(study: Study, arm: str | None) -> Recipe:
    """Return the recipe of an arm, by default of the first that has a critic."""
    recipes = [study.recipe(name) for name in ([arm] if arm else study.arms)]
    return _with_critic(next((r for r in recipes if r.critic is not None), recipes[0]))


def read_rollouts(path: Path, setup: CritiqueSetup) -> list[RolloutFromFile]:
    """Read rollouts from JSON lines of three kinds, recognised by their fields.

    A file of a user has ``question``, ``text`` (the completion to critique) and ``answer`` (the correct
    final answer), optionally ``history``, ``reference``, ``correct``, ``finished``, ``id`` and
    ``sample``. A run's ``rollouts/`` and ``samples/`` refer to the problems of the recipe by id. Raises
    `DataError` naming the line.
    """
    task = setup.task
    listed = [*task.train, *task.validation, *task.test]
    problems = _Problems(
        problems_by_id(listed), {problem.transcript: problem for problem in listed}
    )
    rollouts = [
        _rollout(line, f"{path}:{number}", number, problems, setup)
        for number, line in numbered_lines(path, "file of rollouts")
    ]
    if not rollouts:
        raise DataError(f"{path}: the file is empty")
    return rollouts


def _critique(setup: CritiqueSetup, rollouts: Sequence[RolloutFromFile]) -> list[dict[str, Any]]:
    verified = []
    for from_file in rollouts:
        (verdict,) = verify_rollouts(setup.task.verify, [from_file.rollout])
        if from_file.correct is not None:
            verdict = replace(verdict, correct=from_file.correct)
        verified.append((from_file.rollout, verdict))
    critiques = setup.critic(verified)
    return [
        _row(setup, CritiquedRollout(rollout, verdict, critique))
        for (rollout, verdict), critique in zip(verified, critiques, strict=True)
    ]


def _row(setup: CritiqueSetup, critiqued: CritiquedRollout) -> dict[str, Any]:
    text = critiqued.rollout.text
    spans = segmentation.step_spans(critiqued.rollout, setup.task.split_steps)
    change = first_change(critiqued, spans, token_ends(setup.renderer, critiqued.rollout))
    step_spans = segmentation.before_answer(critiqued.rollout, critiqued.verdict, spans)
    steps = [segmentation.content(text, span) for span in step_spans]
    row = {**sample_row(TrainingSample(critiqued, change=change)), "answer_steps": steps}
    if setup.task.oracle is None:
        return row
    truth = _true_critique(setup.task.oracle, critiqued.rollout)
    return row if truth is None else {**row, "true_first_error": truth.first_error}


def _true_critique(oracle: Oracle, rollout: Rollout) -> Critique | None:
    """Return the critique of the program that checks every step; None where it cannot check them."""
    rng = np.random.default_rng(0)  # not used by a program that does not err
    critique = true_critique(oracle, rollout, rng=rng)
    return critique if isinstance(critique, Critique) else None


def _rollout(
    line: str, where: str, number: int, problems: _Problems, setup: CritiqueSetup
) -> RolloutFromFile:
    try:
        row = json.loads(line)
        correct, finished = row.get("correct"), bool(row.get("finished", True))
        sample = int(row.get("sample", number - 1))
    except (ValueError, TypeError, AttributeError):
        raise DataError(f"{where}: not a JSON object") from None
    row = migrate_rollout(row)
    from_run = "token_ids" in row or "critique" in row
    try:
        text = str(row["answer"] if "critique" in row else row["text"])
        problem = (
            problems.by_id[row["problem_id"]]
            if from_run
            else _problem(row, f"line-{number}", problems)
        )
    except KeyError as missing:
        if from_run and missing.args[0] == row.get("problem_id"):
            raise DataError(
                f"{where}: the recipe has no problem {missing}; name the recipe of the run: --recipe"
            ) from None
        raise DataError(
            f"{where}: no field {missing}; needed: question, text (the completion to critique), "
            "answer (the correct final answer)"
        ) from None
    except UnreadableValue as unreadable:
        raise DataError(f"{where}: the history {unreadable}") from None
    text = text if "segments" in row else split_thinking(text)[1]
    ids, episode = _tokens(row, text, finished, where, setup)
    rollout = Rollout(problem, sample, (), ids, (0.0,) * len(ids), text, finished, 0, **episode)
    return RolloutFromFile(rollout, None if correct is None else bool(correct))


def _tokens(
    row: Mapping[str, Any], text: str, finished: bool, where: str, setup: CritiqueSetup
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return a rollout's ids, and what an episode has besides, with its environment's verdict."""
    if "token_ids" in row:
        return tuple(row["token_ids"]), episode_fields(row)
    if "segments" not in row:
        return _token_ids(setup, text, finished), {}
    with reading(Path(where)):
        ids, segments = _episode(setup, row["segments"], text)
    if not row.get("judged"):
        return ids, {"segments": segments}
    columns = row["correct"], row["formatted"], row["parsed"], row.get("feedback")
    return ids, {"segments": segments, "verdict": Verdict(*columns)}


def _problem(row: Mapping[str, Any], default_id: str, problems: _Problems) -> Problem:
    question, answer = str(row["question"]), str(row["answer"])
    references = {"reference": str(row["reference"])} if row.get("reference") else {}
    history = read_messages(row["history"]) if is_conversation(row.get("history")) else ()
    id_ = str(row.get("id", default_id))
    problem = Problem(id_, question, answer, references, history=history)
    listed = problems.by_transcript.get(problem.transcript)
    if listed is not None and listed.answer == answer:  # has what its oracle or verifier needs
        return replace(listed, references={**listed.references, **references})
    return problem


def _token_ids(setup: CritiqueSetup, text: str, finished: bool) -> tuple[int, ...]:
    ids = setup.renderer.encode_answer(text)
    return ids if finished else ids[:-1] or ids


def _episode(
    setup: CritiqueSetup, rows: Sequence[Mapping[str, Any]], text: str
) -> tuple[tuple[int, ...], tuple[Segment, ...]]:
    """Return an episode of ``samples/``, which has no token ids: its turns encoded, no replies."""
    ids: tuple[int, ...] = ()
    segments = []
    for row in rows:
        written, event = text[slice(*row["span"])], row["event"]
        added = setup.renderer.encode_answer(written) if event is None else ()
        if event is not None:
            written = written.removeprefix(f"[{LABELS[event]}]").strip()
        segments.append(Segment(row["kind"], len(ids), len(ids) + len(added), written, event))
        ids += added
    return ids, tuple(segments)


def _with_critic(recipe: Recipe) -> Recipe:
    if recipe.critic is None:
        raise RecipeError(
            "the recipe has no critic: name an arm that has one, or --set critic.type=..."
        )
    return recipe


def _never_stopping(recipe: Recipe) -> Recipe:
    """Return the recipe with ``drop`` in place of every policy ``stop`` of the critic."""
    critic = recipe.critic
    if not isinstance(critic, LlmCriticConfig):
        return recipe
    stopping = [kind for kind, policy in critic.on_failure.model_dump().items() if policy == "stop"]
    policies = critic.on_failure.model_copy(update=dict.fromkeys(stopping, "drop"))
    changed = critic.model_copy(update={"on_failure": policies})
    return recipe.model_copy(update={"critic": changed})
