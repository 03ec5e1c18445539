"""What critics said and what it took, from the samples of runs; nothing else is read.

A row is one line of ``samples/step_*.jsonl``: an answer with its verdict, its critique (or the reason
why there is none) and where the two part (`run_folder.sample_row`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from selfteach.config.migrations import migrate_metrics, migrate_usage, run_subfolder

Row = Mapping[str, Any]

CASES = {
    "A": "all right",
    "B": "right, something was missing",
    "C": "cut off",
    "D": "wrong",
}
"""What a critique says of an answer (paper, the four cases)."""

OUTCOMES = {
    "empty": "nothing was written",
    "truncated": "the critique was cut off",
    "malformed": "not in the form of an answer",
    "misaligned": "about something else",
    "wrong_answer": "its own final answer is wrong",
    "unavailable": "no reply",
}
"""What can come back instead of a critique (`types.CritiqueFailureKind`)."""

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BINS = 10


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts over the answers that a critic was asked about."""

    answers: int
    right: int
    """By the verifier."""
    cases: Mapping[str, int]
    """Critiques, by case."""
    failures: Mapping[str, int]
    """Answers without a critique, by reason."""
    dropped: Mapping[str, int]
    """Answers that taught nothing, by reason."""
    fidelity: tuple[float, ...]
    """Share of each answer's tokens that its critique repeats before the first change, ascending."""
    changed_at: Mapping[int, int]
    """Critiques by the step (from 0) that is the first not to be repeated; -1 where all are."""
    false_alarms: int
    """Right answers of which a step was replaced."""
    added: int
    """Right answers that were added to, with no step replaced."""
    misses: int
    """Wrong answers whose own final answer the critic gave as well."""
    usage: Mapping[str, float]
    """Sums of `types.Usage`: asked, reused, prompt_tokens, completion_tokens, cost."""

    @property
    def critiques(self) -> int:
        """Answers that have a critique; a critic that writes got each of them right."""
        return sum(self.cases.values())

    @property
    def writes(self) -> bool:
        """True if the critic is a model that was asked, or whose reply was in the store."""
        return self.usage["requests"] + self.usage["cached"] > 0

    @property
    def mean_fidelity(self) -> float:
        """The mean over critiques; nan without any."""
        return fmean(self.fidelity) if self.fidelity else float("nan")

    def quantile(self, share: float) -> float:
        """The fidelity that this share of critiques does not exceed; nan without any.

        Between two critiques it is interpolated linearly.
        """
        if not self.fidelity:
            return float("nan")
        at = share * (len(self.fidelity) - 1)
        low = int(at)
        high = min(low + 1, len(self.fidelity) - 1)
        return self.fidelity[low] + (at - low) * (self.fidelity[high] - self.fidelity[low])

    def histogram(self) -> list[int]:
        """Critiques by fidelity in tenths: [0, 0.1), …, [0.9, 1]."""
        bins = Counter(min(int(value * BINS), BINS - 1) for value in self.fidelity)
        return [bins[i] for i in range(BINS)]


UNMARKED = '"critique": null'
"""In a sample that no critic was asked about: most of a study's, of which nothing is wanted here."""


@dataclass(frozen=True, slots=True)
class Record:
    """One arm's critic over all its runs."""

    total: Summary
    by_step: Mapping[int, Summary]
    """Of each training step, all runs together."""
    seconds: float
    """What marking took, as far as learning had to wait for it, all runs together."""


def summarise(rows: Iterable[Row]) -> Summary:
    """Count rows; those without a word of a critic are left out."""
    asked = [row for row in rows if row["critique"] is not None]
    said = [row for row in asked if "reason" not in row["critique"]]
    failed = [row for row in asked if "reason" in row["critique"]]
    changes = [row["first_change"] for row in said if row["first_change"] is not None]
    right = [row["critique"] for row in said if row["correct"]]
    steps = Counter(-1 if c["step"] is None else int(c["step"]) for c in changes)
    names = ("requests", "cached", "prompt_tokens", "completion_tokens", "cost")
    return Summary(
        answers=len(asked),
        right=sum(bool(row["correct"]) for row in asked),
        cases={case: sum(row["critique"]["case"] == case for row in said) for case in CASES},
        failures=_counted(row["critique"]["reason"] for row in failed),
        dropped=_counted(row["dropped"] for row in asked if row["dropped"]),
        fidelity=tuple(sorted(float(change["fidelity"]) for change in changes)),
        changed_at=dict(sorted(steps.items())),
        false_alarms=sum(c["first_error"] is not None for c in right),
        added=sum(c["first_error"] is None and c["case"] == "B" for c in right),
        misses=sum(map(_missed, asked)),
        usage={
            n: float(
                sum(migrate_usage(row["critique"].get("usage", {})).get(n, 0) for row in asked)
            )
            for n in names
        },
    )


def read_study(folder: Path) -> dict[str, Record]:
    """The critic of every arm of a study's main setting, by arm; arms without one are left out."""
    arms = sorted((folder / "runs").glob("*/"))
    return read_groups({arm.name: sorted(arm.glob("seed_*/")) for arm in arms})


def read_groups(groups: Mapping[str, Sequence[Path]]) -> dict[str, Record]:
    """The critic of every arm, from its runs' folders; arms without one are left out."""
    found = {name: read_runs(folders) for name, folders in groups.items()}
    return {name: record for name, record in found.items() if record.total.answers}


def read_runs(folders: Sequence[Path]) -> Record:
    """One arm's runs together."""
    by_step: dict[int, list[Row]] = {}
    for folder in folders:
        for path in sorted(run_subfolder(folder, "samples").glob("step_*.jsonl")):
            step = int(path.stem.removeprefix("step_"))
            by_step.setdefault(step, []).extend(_lines(path, without=UNMARKED))
    metrics = [
        migrate_metrics(row) for folder in folders for row in _lines(folder / "metrics.jsonl")
    ]
    return Record(
        summarise(row for step in sorted(by_step) for row in by_step[step]),
        {step: summarise(rows) for step, rows in sorted(by_step.items())},
        sum((row.get("time/critique", 0.0) for row in metrics), 0.0),
    )


def in_words(summary: Summary) -> str:
    """A summary in one line: what came back, how verbatim it is, what it cost."""
    parts = [f"{summary.answers:,} answers, {summary.critiques:,} critiques"]
    if cases := [f"{name} {n:,}" for name, n in summary.cases.items() if n]:
        parts[0] += f" ({', '.join(cases)})"
    parts += [f"{reason} {n:,}" for reason, n in summary.failures.items()]
    if summary.fidelity:
        parts.append(f"fidelity {summary.mean_fidelity:.2f}")
    used = summary.usage
    if summary.writes:
        tokens = used["prompt_tokens"] + used["completion_tokens"]
        parts.append(f"{used['asked']:,.0f} asked, {used['reused']:,.0f} from the store")
        parts.append(
            f"{tokens:,.0f} tokens" + (f", cost {used['cost']:.2f}" if used["cost"] else "")
        )
    return "; ".join(parts)


def _missed(row: Row) -> bool:
    own = row["critique"].get("answer")
    return not row["correct"] and own is not None and own == row["parsed"]


def _counted(names: Iterable[str]) -> dict[str, int]:
    known = [*OUTCOMES]
    counts = Counter(names)
    order = sorted(counts, key=lambda n: (known.index(n) if n in known else len(known), n))
    return {name: counts[name] for name in order}


def _lines(path: Path, without: str | None = None) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that do not hold some text; none if it is not there."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if without is not None and without in line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that a kill cut off
    return rows
