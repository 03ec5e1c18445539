"""Read rollouts with labelled steps from JSON lines in the schema of ProcessBench.

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

from selfteach.commands.inspect.answer_rows import LocatedRollout
from selfteach.config.recipe import CRITIC_CONTEXTS
from selfteach.errors import DataError, RecipeError
from selfteach.tasks.segmentation import Span
from selfteach.tasks.sources.text_files import numbered_lines
from selfteach.trainer.build import Built
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, Problem, Rollout, Verdict

STEP_SEPARATOR = "\n\n"
"""Text between steps when they are joined to one completion."""

ANSWER_ONLY_CONTEXTS = frozenset({"answer_only", "holistic"})
"""Contexts built from the gold answer alone, without a trace."""


@dataclass(frozen=True, slots=True)
class LabelledRollout:
    """Holds one line of a file with labelled steps."""

    problem: Problem
    sample: int
    """Index among the file's rollouts of this problem, from 0."""
    steps: tuple[str, ...]
    first_error: int | None
    correct: bool


def read_labelled(path: Path) -> list[LabelledRollout]:
    """Read all lines of a file. Rollouts of the same problem share the id of the first of them.

    Raises `DataError` naming the line that is malformed.
    """
    problems: dict[str, Problem] = {}
    last_sample: dict[str, int] = {}
    rollouts = []
    for number, line in numbered_lines(path, "file of labelled steps"):
        row = _row(line, f"{path}:{number}")
        name = str(row.get("id", f"{path.stem}-{number}"))
        problem = problems.setdefault(row["problem"], _problem(row, name))
        sample = last_sample.get(problem.id, -1) + 1
        last_sample[problem.id] = sample
        rollouts.append(_labelled(row, problem, sample, f"{path}:{number}"))
    if not rollouts:
        raise DataError(f"{path}: holds no labelled rollout")
    return rollouts


def require_critic(contexts: Sequence[str], has_critic: bool) -> None:
    """Raise `RecipeError` for contexts that only a critic can provide."""
    needs_critic = [name for name in contexts if name in CRITIC_CONTEXTS - ANSWER_ONLY_CONTEXTS]
    if needs_critic and not has_critic:
        raise RecipeError(
            f"context {needs_critic[0]!r} needs a critique, and a file of labelled steps has none: "
            "name a critic (--recipe, or --set critic.type=…), or choose among reference, "
            "aligned_reference, holistic, answer_only"
        )


def located_rollouts(
    built: Built, labelled: Sequence[LabelledRollout]
) -> tuple[list[LocatedRollout], dict[str, int]]:
    """Tokenize and critique labelled rollouts; also return how many were lost, by reason.

    The token ids come from encoding the text, steps joined by a blank line: they were not sampled.
    """
    rollouts = [_rollout(built, line) for line in labelled]
    spans = [
        _spans(rollout.text, line.steps) for rollout, line in zip(rollouts, labelled, strict=True)
    ]
    usable = [i for i, steps in enumerate(spans) if steps is not None]
    verdicts = [_verdict(built, rollouts[i], labelled[i]) for i in usable]
    critiques: Sequence[Critique | CritiqueFailure]
    if built.components.critic is not None:
        judged = [(rollouts[i], verdict) for i, verdict in zip(usable, verdicts, strict=True)]
        critiques = built.components.critic(judged)
    else:
        critiques = [_critique_of_answer(labelled[i]) for i in usable]
    located = [
        LocatedRollout(
            CritiquedRollout(rollouts[i], verdict, critique),
            tuple(spans[i] or ()), labelled[i].first_error, located=True, source="label",
        )
        for i, verdict, critique in zip(usable, verdicts, critiques, strict=True)
    ]  # fmt: skip
    lost = len(labelled) - len(usable)
    return located, {"steps do not survive the tokenizer": lost} if lost else {}


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise DataError(f"{where}: not valid JSON") from None
    needed = ("problem", "steps", "label")
    if not isinstance(row, dict) or any(name not in row for name in needed):
        raise DataError(f"{where}: needs the fields {', '.join(needed)} (ProcessBench's schema)")
    return row


def _problem(row: Mapping[str, Any], name: str) -> Problem:
    references = {k: str(row[k]) for k in ("reference", "aligned_reference") if row.get(k)}
    return Problem(name, str(row["problem"]), str(row.get("answer") or ""), references)


def _labelled(row: Mapping[str, Any], problem: Problem, sample: int, where: str) -> LabelledRollout:
    steps, label = row["steps"], row["label"]
    if not isinstance(steps, list) or not all(isinstance(s, str) and s.strip() for s in steps):
        raise DataError(f"{where}: steps must be a list of non-empty strings")
    if not isinstance(label, int) or not -1 <= label < len(steps):
        raise DataError(
            f"{where}: label {label!r} is neither an index of its {len(steps)} steps nor -1"
        )
    correct = bool(row.get("final_answer_correct", label < 0))
    first_error = label if label >= 0 else None
    return LabelledRollout(problem, sample, tuple(steps), first_error, correct)


def _rollout(built: Built, line: LabelledRollout) -> Rollout:
    renderer = built.components.renderer
    ids = renderer.encode_answer(STEP_SEPARATOR.join(step.strip() for step in line.steps))
    return Rollout(
        problem=line.problem,
        sample=line.sample,
        prompt_ids=renderer.solver_prompt(line.problem),
        token_ids=ids,
        logps=(float("nan"),) * len(ids),  # they were not sampled
        text=renderer.decode(ids),
        finished=True,
        policy_version=0,
    )


def _spans(text: str, steps: Sequence[str]) -> list[Span] | None:
    """Find the steps in the decoded text; None where the tokenizer changed them."""
    spans, at = [], 0
    for step in steps:
        start = text.find(step.strip(), at)
        if start < 0:
            return None
        at = start + len(step.strip())
        spans.append((start, at))
    return spans


def _verdict(built: Built, rollout: Rollout, line: LabelledRollout) -> Verdict:
    verdict = built.task.verify(rollout.problem, rollout.text)
    return Verdict(line.correct, verdict.formatted, verdict.parsed)


def _critique_of_answer(line: LabelledRollout) -> Critique | CritiqueFailure:
    """Return a critique without steps: enough for `ANSWER_ONLY_CONTEXTS` if the file has the answer."""
    if not line.problem.answer:
        return CritiqueFailure("the file has no answer")
    case = "A" if line.first_error is None and line.correct else "D"
    return Critique(case, (), line.problem.answer, line.first_error)
