"""Count critics' critiques, failures and cost, from the samples of runs.

A row is one line of ``samples/step_*.jsonl``: a rollout with its verdict, its critique (or the reason
why there is none) and where the two diverge (`run_folder.sample_row`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from selfteach.config.migrations import migrate_metrics, migrate_usage, run_subfolder
from selfteach.runtime.stored_files import read_bytes, read_lines

Row = Mapping[str, Any]

CASES = {
    "A": "all right",
    "B": "right, something was missing",
    "C": "cut off",
    "D": "wrong",
}
"""What a critique finds in a rollout (paper, the four cases)."""

FAILURES = {
    "empty": "the reply was empty",
    "truncated": "the critique was cut off",
    "malformed": "not in the required format",
    "misaligned": "does not follow the rollout's steps",
    "wrong_answer": "the critic's final answer is wrong",
    "refused": "the server refused this request",
    "unavailable": "no reply",
}
"""Why there can be no critique (`types.CritiqueFailureKind`)."""

USAGE = ("requests", "cached", "prompt_tokens", "completion_tokens", "cost")
"""Entries of `CriticSummary.usage`."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BINS = 10


@dataclass(frozen=True, slots=True)
class CriticSummary:
    """Holds counts over the rollouts that were sent to a critic."""

    rollouts: int
    correct: int
    """Correct rollouts, by the verifier."""
    cases: Mapping[str, int]
    """Critiques, by case."""
    failures: Mapping[str, int]
    """Rollouts without a critique, by reason."""
    dropped: Mapping[str, int]
    """Rollouts left out of training, by reason."""
    fidelity: tuple[float, ...]
    """Per critique, ascending: share of the rollout's tokens repeated before the first change."""
    changed_at: Mapping[int, int]
    """Critiques by the first solution step (from 0) not repeated; -1 where all are."""
    false_alarms: int
    """Correct rollouts of which a step was replaced."""
    added: int
    """Correct rollouts to which steps were added, with no step replaced."""
    misses: int
    """Incorrect rollouts whose wrong final answer the critic repeats."""
    usage: Mapping[str, float]
    """Sums of `types.Usage`: requests, cached, prompt_tokens, completion_tokens, cost."""

    @property
    def critiques(self) -> int:
        """Return how many rollouts have a critique; a critic model's final answer was right in each."""
        return sum(self.cases.values())

    @property
    def is_model(self) -> bool:
        """Return whether the critic is a model: it received requests, or its replies were cached."""
        return self.usage["requests"] + self.usage["cached"] > 0

    @property
    def mean_fidelity(self) -> float:
        """Return the mean over critiques; nan without any."""
        return fmean(self.fidelity) if self.fidelity else float("nan")

    def quantile(self, share: float) -> float:
        """Return the fidelity that this share of critiques does not exceed; nan without any.

        It is interpolated linearly between two critiques.
        """
        if not self.fidelity:
            return float("nan")
        at = share * (len(self.fidelity) - 1)
        low = int(at)
        high = min(low + 1, len(self.fidelity) - 1)
        return self.fidelity[low] + (at - low) * (self.fidelity[high] - self.fidelity[low])

    def histogram(self) -> list[int]:
        """Count critiques by fidelity in tenths: [0, 0.1), …, [0.9, 1]."""
        bins = Counter(min(int(value * BINS), BINS - 1) for value in self.fidelity)
        return [bins[i] for i in range(BINS)]


WITHOUT_CRITIC = '"critique": null'
"""Text in the line of a sample that was not sent to a critic: most of a study's; they are skipped."""


@dataclass(frozen=True, slots=True)
class ArmCritic:
    """Holds the summary of one arm's critic over all its runs."""

    total: CriticSummary
    by_step: Mapping[int, CriticSummary]
    """By training step, all runs together."""
    seconds: float
    """Time of the critique phase as far as training waited for it, all runs together."""


def count_critiques(rows: Iterable[Row]) -> CriticSummary:
    """Count rows; those that were not sent to a critic are left out."""
    sent = [row for row in rows if row["critique"] is not None]
    critiqued = [row for row in sent if "reason" not in row["critique"]]
    failed = [row for row in sent if "reason" in row["critique"]]
    changes = [row["first_change"] for row in critiqued if row["first_change"] is not None]
    right = [row["critique"] for row in critiqued if row["correct"]]
    steps = Counter(-1 if c["step"] is None else int(c["step"]) for c in changes)
    usages = [migrate_usage(row["critique"].get("usage", {})) for row in sent]
    return CriticSummary(
        rollouts=len(sent),
        correct=sum(bool(row["correct"]) for row in sent),
        cases={case: sum(row["critique"]["case"] == case for row in critiqued) for case in CASES},
        failures=_count_reasons(row["critique"]["reason"] for row in failed),
        dropped=_count_reasons(row["dropped"] for row in sent if row["dropped"]),
        fidelity=tuple(sorted(float(change["fidelity"]) for change in changes)),
        changed_at=dict(sorted(steps.items())),
        false_alarms=sum(c["first_error"] is not None for c in right),
        added=sum(c["first_error"] is None and c["case"] == "B" for c in right),
        misses=sum(map(_is_miss, sent)),
        usage={name: float(sum(usage.get(name, 0) for usage in usages)) for name in USAGE},
    )


def read_study_critics(folder: str | Path) -> dict[str, ArmCritic]:
    """Summarize the critic of every arm of a study's main setting; arms without one are left out."""
    arms = sorted((Path(folder) / "runs").glob("*/"))
    return read_critics({arm.name: sorted(arm.glob("seed_*/")) for arm in arms})


def read_critics(groups: Mapping[str, Sequence[Path]]) -> dict[str, ArmCritic]:
    """Summarize the critic of every arm, from its runs' folders; arms without one are left out."""
    critics = {name: read_arm_critic(folders) for name, folders in groups.items()}
    return {name: critic for name, critic in critics.items() if critic.total.rollouts}


def read_arm_critic(folders: Sequence[Path]) -> ArmCritic:
    """Summarize one arm's critic from the folders of its runs."""
    by_step: dict[int, list[Row]] = {}
    for folder in folders:
        for path in sorted(run_subfolder(folder, "samples").glob("step_*.jsonl")):
            step = int(path.stem.removeprefix("step_"))
            by_step.setdefault(step, []).extend(_lines(path, without=WITHOUT_CRITIC))
    metrics = [
        migrate_metrics(row) for folder in folders for row in _lines(folder / "metrics.jsonl")
    ]
    return ArmCritic(
        count_critiques(row for step in sorted(by_step) for row in by_step[step]),
        {step: count_critiques(rows) for step, rows in sorted(by_step.items())},
        sum((row.get("time/critique", 0.0) for row in metrics), 0.0),
    )


def summary_line(summary: CriticSummary) -> str:
    """Describe a summary in one line: critiques and failures, fidelity, cost."""
    items = [f"{summary.rollouts:,} rollouts, {summary.critiques:,} critiques"]
    if cases := [f"{name} {n:,}" for name, n in summary.cases.items() if n]:
        items[0] += f" ({', '.join(cases)})"
    items += [f"{reason} {n:,}" for reason, n in summary.failures.items()]
    if summary.fidelity:
        items.append(f"fidelity {summary.mean_fidelity:.2f}")
    usage = summary.usage
    if summary.is_model:
        tokens = usage["prompt_tokens"] + usage["completion_tokens"]
        items.append(f"{usage['requests']:,.0f} requests, {usage['cached']:,.0f} cached")
        items.append(
            f"{tokens:,.0f} tokens" + (f", cost {usage['cost']:.2f}" if usage["cost"] else "")
        )
    return "; ".join(items)


def _is_miss(row: Row) -> bool:
    critic_answer = row["critique"].get("answer")
    return not row["correct"] and critic_answer is not None and critic_answer == row["parsed"]


def _count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Count reasons, in the order of `FAILURES`, others last."""
    names = [*FAILURES]
    counts = Counter(reasons)
    order = sorted(counts, key=lambda r: (names.index(r) if r in names else len(names), r))
    return {reason: counts[reason] for reason in order}


def _lines(path: Path, without: str | None = None) -> list[dict[str, Any]]:
    """Read the whole lines of a JSONL file that do not hold some text; none if it is missing."""
    *lines, _ = (read_bytes(path) or b"").split(b"\n")  # a kill may have cut off the last one
    if without is not None:
        lines = [line for line in lines if without.encode() not in line]
    return read_lines(b"".join(line + b"\n" for line in lines), path)[0]
