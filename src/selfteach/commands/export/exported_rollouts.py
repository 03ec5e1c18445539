"""Reads critiqued rollouts with their teacher contexts, from a run folder or a file of critiques."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from selfteach.config.migrations import migrate_recipe, run_subfolder
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, parse_setting, validate
from selfteach.errors import CheckpointError, DataError
from selfteach.models.loading import resolve
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Context
from selfteach.rollout.journaled_engine import problems_by_id
from selfteach.runtime.checksums import Checksums
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.stored_files import Row, read_bytes, read_lines, reading
from selfteach.runtime.stored_records import critique_from, problem_digest, rollouts_from
from selfteach.tasks.task import Task, default_templates, load_task
from selfteach.tasks.verifiers import verify_rollouts
from selfteach.trainer.build import build_arm_context, build_context
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, Problem, Rollout, Verdict

NO_CRITIC = "no critic"
"""The reason of a rollout that was not critiqued."""


@dataclass(frozen=True, slots=True)
class ExportedRollout:
    """Holds a critiqued rollout with what its teacher is shown, or why it is shown nothing."""

    critiqued: CritiquedRollout
    context: str | None
    reason: str | None
    """Why there is no context; None with one."""
    step: int | None
    """The training step that sampled it; None in a file of critiques."""


class ContextSource:
    """Renders contexts with the recipe's templates, and its problems where they are needed."""

    def __init__(self, recipe: Recipe, *, again: bool = False) -> None:
        """Store the recipe; with ``again`` stored contexts are rendered again."""
        self.recipe, self.again = recipe, again

    @cached_property
    def task(self) -> Task:
        """The recipe's task, loaded when it is first needed."""
        return load_task(
            self.recipe.data, resolve(self.recipe.model.path), allow_empty=True,
            reward=self.recipe.reward, episodes=self.recipe.runs_hub_episodes,
        )  # fmt: skip

    @cached_property
    def templates(self) -> Templates:
        """The recipe's template set; only data of an unusual kind must be loaded for it."""
        named = self.recipe.model.templates or default_templates(self.recipe.data)
        return Templates(named or self.task.templates)

    @cached_property
    def problems(self) -> dict[str, Problem]:
        """The recipe's problems by id."""
        return problems_by_id([*self.task.train, *self.task.validation, *self.task.test])

    def render(self, critiqued: Sequence[CritiquedRollout]) -> list[str | CritiqueFailure | None]:
        """Return the context of each rollout of one step, or why there is none."""
        return list(self._context(critiqued))

    @cached_property
    def _context(self) -> Context:
        recipe, named = self.recipe, self.recipe.context
        return build_arm_context(recipe, self.task, self.templates) or build_context(
            named.type, self.task, self.templates, seed=recipe.seed, alignment=named.alignment
        )


def run_recipe(run: Path, settings: Sequence[str]) -> Recipe:
    """Return the recipe of a run folder with settings applied. Raises one of `selfteach.errors`."""
    if (run / "study.json").exists():
        raise CheckpointError(
            f"{run} is a study: name the folder of one of its runs, an arm and a seed in it"
        )
    values: Mapping[str, Any] = RunFolder(run).config()
    if "select" in values or "forecast" in values:
        raise CheckpointError(f"{run} is no run of training: it has no samples to export")
    for setting in map(parse_setting, settings):
        values = merge(values, migrate_recipe(setting, "--set"))
    return validate(Recipe, values, where=str(run))


def rollouts_of_run(run: Path, source: ContextSource) -> Iterator[list[ExportedRollout]]:
    """Yield a run's training rollouts, step by step; those of evaluations are not among them.

    They are in ``samples/``. A step that was sampled and not trained on yet has none: its rollouts are
    verified, and those of its critiques that are stored are shown in the recipe's context.
    """
    samples, rollouts = run_subfolder(run, "samples"), run_subfolder(run, "rollouts")
    names = {path.stem for path in samples.glob("step_*.jsonl")}
    names |= {path.name.partition(".")[0] for path in rollouts.glob("step_*.jsonl")}
    for name in sorted(names):
        rows = _whole_rows(run, samples / f"{name}.jsonl")
        step = int(name.removeprefix("step_"))
        if rows is not None:
            with reading(samples / f"{name}.jsonl"):
                stored = [(_critiqued(row, source), row) for row in rows]
            yield _with_contexts(stored, source, step)
        else:
            critiqued = _unsampled(run, name, sorted(rollouts.glob(f"{name}.*.jsonl")), source)
            yield _with_contexts([(one, {}) for one in critiqued], source, step)


def rollouts_of_file(file: Path, source: ContextSource) -> Iterator[list[ExportedRollout]]:
    """Yield the rollouts of a file that `selfteach critique` has written. Raises `DataError`."""
    content = read_bytes(file)
    if content is None:
        raise DataError(f"{file}: no such file of critiques")
    try:
        rows, cut_off = read_lines(content, file)
    except CheckpointError as error:
        raise DataError(f"{error}: it must hold the JSON lines of selfteach critique") from None
    if cut_off:
        raise DataError(f"{file}: the last line is cut off")
    if not rows:
        raise DataError(f"{file}: the file is empty")
    stored = []
    for number, row in enumerate(rows, 1):
        missing = {"question", "answer", "gold", "critique"} - row.keys()
        if missing:
            raise DataError(
                f"{file}:{number}: no field {min(missing)!r}: it must hold critiques, as selfteach "
                "critique FILE --out CRITIQUES writes them"
            )
        try:
            stored.append((_critiqued(row, source), row))
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(f"{file}:{number}: not a row of critiques ({reason})") from None
    yield _with_contexts(stored, source, None)


def _with_contexts(
    stored: Sequence[tuple[CritiquedRollout, Row]], source: ContextSource, step: int | None
) -> list[ExportedRollout]:
    """Add the stored context of each rollout, or render it where none is stored, or ``again``."""
    critiqued = [one for one, _ in stored]
    unknown = [_without_context(row, source) for _, row in stored]
    rendered: list[str | CritiqueFailure | None] = []
    if source.again or any(unknown):
        rendered = source.render(critiqued)
    exported = []
    for index, (one, row) in enumerate(stored):
        context: str | CritiqueFailure | None = row.get("context")
        if source.again or unknown[index]:
            context = rendered[index]
        reason = row.get("dropped")
        if isinstance(context, CritiqueFailure):
            reason = context.reason if one.critique is not None else NO_CRITIC
        elif context is None:
            reason = reason or "the question alone is shown"
        text = context if isinstance(context, str) else None
        exported.append(ExportedRollout(one, text, None if text is not None else reason, step))
    return exported


def _without_context(row: Mapping[str, Any], source: ContextSource) -> bool:
    """Return True for a row whose context is to be rendered: none is stored, nor why there is none."""
    stored = row.get("context") is not None or row.get("dropped") is not None
    return not stored and source.recipe.context.type != "none"


def _critiqued(row: Mapping[str, Any], source: ContextSource) -> CritiquedRollout:
    """Return the record of a row of ``samples/`` or of `selfteach critique`."""
    turns = tuple((turn["role"], turn["content"]) for turn in row.get("history", ()))
    id_, question, gold = str(row["problem_id"]), row["question"], row["gold"]
    if not all(isinstance(value, str) for value in (question, gold, row["answer"])):
        raise TypeError("question, answer and gold are strings")
    problem = Problem(id_, question, gold, history=turns)
    if source.again or _without_context(row, source):
        listed = source.problems.get(id_)
        if listed is not None and problem_digest(listed) == problem_digest(problem):
            problem = listed  # with its references
    finished = bool(row["finished"])
    rollout = Rollout(problem, int(row["sample"]), (), (0,), (0.0,), row["answer"], finished, 0)
    verdict = Verdict(
        bool(row["correct"]),
        bool(row["formatted"]),
        row["parsed"],
        row.get("feedback"),
        bool(row.get("timed_out", False)),
    )
    return CritiquedRollout(rollout, verdict, critique_from(row["critique"]))


def _unsampled(
    run: Path, name: str, paths: Iterable[Path], source: ContextSource
) -> list[CritiquedRollout]:
    """Return the rollouts of a step that has no samples yet, verified, with stored critiques."""
    critiques: dict[tuple[str, int], Critique | CritiqueFailure | None] = {}
    for path in sorted((run / "critiques").glob(f"{name}.*.jsonl")):
        with reading(path):
            for row in _whole_rows(run, path) or []:
                critiques[row["problem_id"], row["sample"]] = critique_from(row["critique"])
    rollouts: list[Rollout] = []
    for path in paths:
        rollouts += rollouts_from(_whole_rows(run, path) or [], source.problems, path)
    verdicts = verify_rollouts(source.task.verify, rollouts)
    return [
        CritiquedRollout(one, verdict, critiques.get(one.key))
        for one, verdict in zip(rollouts, verdicts, strict=True)
    ]


def _whole_rows(run: Path, path: Path) -> list[Row] | None:
    """Read a file of a run without changing it; None if there is none, or it is not finished.

    Raises `CheckpointError` if it is damaged.
    """
    content = read_bytes(path)
    if content is None or not Checksums(run).verify(path, content):
        return None
    rows, cut_off = read_lines(content, path)
    return None if cut_off else rows
