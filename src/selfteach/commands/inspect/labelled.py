"""Answers whose steps somebody has labelled, from JSON lines in the schema of ProcessBench.

    {"id": "gsm8k-0", "problem": "…", "steps": ["…", "…"], "label": 1, "final_answer_correct": false}

``label`` is the index of the first wrong step, −1 if there is none (ProcessBench, arXiv:2412.06559).
``answer`` (the right final answer), ``reference`` and ``aligned_reference`` (worked solutions) are
read where a line has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfteach.commands.inspect.answer_rows import Told
from selfteach.config.recipe import CRITIC_CONTEXTS
from selfteach.errors import DataError, RecipeError
from selfteach.tasks.segmentation import Span
from selfteach.trainer.build import Built
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, Problem, Rollout, Verdict

BETWEEN_STEPS = "\n\n"
"""What stands between steps when a model reads them as one answer."""

BARE = frozenset({"answer_only", "holistic"})
"""Contexts that are made from the right answer alone, without anybody's trace."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One line of such a file."""

    problem: Problem
    sample: int
    """Which of the file's answers to this problem, from 0."""
    steps: tuple[str, ...]
    first_error: int | None
    correct: bool


def read_labelled(path: Path) -> list[Labelled]:
    """All lines of a file. Answers to the same problem share the id of the first of them.

    Raises `DataError` naming the line that is not of this form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of labelled steps") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    known: dict[str, Problem] = {}
    counted: dict[str, int] = {}
    read = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            row = _row(line, f"{path}:{number}")
            name = str(row.get("id", f"{path.stem}-{number}"))
            problem = known.setdefault(row["problem"], _problem(row, name))
            counted[problem.id] = counted.get(problem.id, -1) + 1
            read.append(_labelled(row, problem, counted[problem.id], f"{path}:{number}"))
    if not read:
        raise DataError(f"{path}: holds no labelled answer")
    return read


def require_critic(contexts: Sequence[str], has_critic: bool) -> None:
    """Raises `RecipeError` for contexts that only a critic could make."""
    needing = [name for name in contexts if name in CRITIC_CONTEXTS - BARE]
    if needing and not has_critic:
        raise RecipeError(
            f"context {needing[0]!r} needs a critique, and a file of labelled steps has none: name "
            "a critic (--recipe, or --set critic.type=…), or choose among reference, "
            "aligned_reference, holistic, answer_only"
        )


def as_answers(built: Built, labelled: Sequence[Labelled]) -> tuple[list[Told], dict[str, int]]:
    """The answers as token ids, marked; and how many could not be spelled, by reason.

    The ids are made by encoding the text, steps joined by a blank line: they were not sampled.
    """
    rollouts = [_rollout(built, one) for one in labelled]
    spans = [
        _spans(rollout.text, one.steps) for rollout, one in zip(rollouts, labelled, strict=True)
    ]
    kept = [i for i, own in enumerate(spans) if own is not None]
    verdicts = [_verdict(built, rollouts[i], labelled[i]) for i in kept]
    critiques: Sequence[Critique | CritiqueFailure]
    if built.components.critic is not None:
        judged = [(rollouts[i], verdict) for i, verdict in zip(kept, verdicts, strict=True)]
        critiques = built.components.critic(judged)
    else:
        critiques = [_answer_alone(labelled[i]) for i in kept]
    told = [
        Told(
            CritiquedRollout(rollouts[i], verdict, critique), tuple(spans[i] or ()), labelled[i].first_error,
            located=True, source="label",
        )
        for i, verdict, critique in zip(kept, verdicts, critiques, strict=True)
    ]  # fmt: skip
    lost = len(labelled) - len(kept)
    return told, {"steps do not survive the tokenizer": lost} if lost else {}


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise DataError(f"{where}: not valid JSON") from None
    needed = ("problem", "steps", "label")
    if not isinstance(row, dict) or any(name not in row for name in needed):
        raise DataError(f"{where}: needed: {', '.join(needed)} (the schema of ProcessBench)")
    return row


def _problem(row: Mapping[str, Any], name: str) -> Problem:
    references = {k: str(row[k]) for k in ("reference", "aligned_reference") if row.get(k)}
    return Problem(name, str(row["problem"]), str(row.get("answer") or ""), references)


def _labelled(row: Mapping[str, Any], problem: Problem, sample: int, where: str) -> Labelled:
    steps, label = row["steps"], row["label"]
    if not isinstance(steps, list) or not all(isinstance(s, str) and s.strip() for s in steps):
        raise DataError(f"{where}: steps must be a list of strings that are not empty")
    if not isinstance(label, int) or not -1 <= label < len(steps):
        raise DataError(f"{where}: label {label!r} is no index of its {len(steps)} steps, nor -1")
    right = bool(row.get("final_answer_correct", label < 0))
    return Labelled(problem, sample, tuple(steps), label if label >= 0 else None, right)


def _rollout(built: Built, one: Labelled) -> Rollout:
    renderer = built.components.renderer
    ids = renderer.encode_answer(BETWEEN_STEPS.join(step.strip() for step in one.steps))
    return Rollout(
        problem=one.problem,
        sample=one.sample,
        prompt_ids=renderer.solver_prompt(one.problem),
        token_ids=ids,
        logps=(float("nan"),) * len(ids),  # nobody sampled them
        text=renderer.decode(ids),
        finished=True,
        policy_version=0,
    )


def _spans(text: str, steps: Sequence[str]) -> list[Span] | None:
    """Where the steps stand in the decoded text; None where the tokenizer has changed them."""
    spans, at = [], 0
    for step in steps:
        start = text.find(step.strip(), at)
        if start < 0:
            return None
        at = start + len(step.strip())
        spans.append((start, at))
    return spans


def _verdict(built: Built, rollout: Rollout, one: Labelled) -> Verdict:
    read = built.task.verify(rollout.problem, rollout.text)
    return Verdict(one.correct, read.formatted, read.parsed)


def _answer_alone(one: Labelled) -> Critique | CritiqueFailure:
    """What suffices for `BARE` contexts, where the file has the right answer."""
    if not one.problem.answer:
        return CritiqueFailure("the file has no answer")
    case = "A" if one.first_error is None and one.correct else "D"
    return Critique(case, (), one.problem.answer, one.first_error)
