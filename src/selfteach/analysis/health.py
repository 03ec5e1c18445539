"""The failure modes of self-distillation, looked for in what a run logs, in plain words.

Every threshold is a constant with its reason. A warning is a reason to look, not a proof; no warning
is no proof of health either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selfteach.analysis.run_data import Groups, Run

WINDOW = 5
"""Steps that are averaged before they are judged: one bad batch is no failure."""
COLLAPSED_TO, EXPLODED_TO = 0.5, 2.0
"""Length against the run's first steps. In the paper trained lengths differ by a fifth; halving or
doubling is another behaviour."""
TRUNCATED_ABOVE = 0.2
"""A cut answer is neither right nor an example of ending; one in five biases every other number."""
HESITATION_LEFT, HESITATION_FLOOR = 0.5, 0.2
"""Share of the first steps' doubt that should be left, judged where there was at least one word of
it in five answers."""
REPETITION_ABOVE, REPETITION_GROWTH = 0.3, 1.5
"""Share of 4-grams seen before in the same answer. Worked solutions repeat their formulas, up to a
quarter; loops lie far above. Formats that repeat by nature are judged by growth."""
ENTROPY_BELOW, ENTROPY_LEFT = 0.05, 0.25
"""Nats per token. At 0.05 the likeliest token has about 99 %: eight answers to a question are one
answer. A model that began there is judged by what is left of its own start."""
END_BELOW = 0.5
"""Where fewer than half of the taught answers teach their end, stopping is mostly unlearned."""
CLIPPED_ABOVE = 0.3
"""Share of clipped tokens. Clipping is for outliers; above a third it decides the gradient."""
DROPPED_ABOVE = 0.2
"""Rollouts without usable feedback: bought and lost, and seldom at random: hard problems go first."""
FIDELITY_BELOW = 0.1
"""Mean share of the answer repeated before the first change. With an even spread of first errors it
is near a half; below a tenth the critic writes an answer of its own (the paper's anchor is gone)."""
MISMATCH_ABOVE = 0.05
"""Nats per token between trainer and sampler. bf16 alone gives 0.01 to 0.02; at 0.05 importance
weights of a hundred tokens no longer stay near one."""
GAIN_LEFT, GAIN_FLOOR = 0.6, 0.2
"""Share of the best that should be left at the end, judged where at least a fifth was right once. Five
steps of 32 answers to 4 questions each have a standard error of about 6 points there, and the best of
many windows is a lucky one."""

Judge = Callable[[np.ndarray], tuple[int, str] | None]
"""From a run's values, averaged over `WINDOW` steps, to where it shows and what, or None."""


@dataclass(frozen=True, slots=True)
class Check:
    """One failure mode: the metric that shows it, what it is, and when to warn."""

    metric: str
    title: str
    meaning: str
    unit: str
    judge: Judge
    limit: float | None = None
    """Drawn as a line where the threshold is the same for every run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One failure mode that shows in one run."""

    check: Check
    arm: str
    seed: int
    step: int
    text: str


def checks() -> tuple[Check, ...]:
    """Every failure mode that is looked for, in the order of the page."""
    return (
        Check("length", "Length", "Answers that shrink stop reasoning; answers that grow ramble or "
              "cannot stop.", "tokens", _length),
        Check("hesitations", "Words of hesitation", "“Wait”, “let me check”: self-correction is the "
              "first habit that training on short, certain feedback takes away.", "per answer", _doubt),
        Check("truncated", "Answers cut at the token limit", "A cut answer has no end to learn from "
              "and is almost never right.", "share", _above(TRUNCATED_ABOVE, "of the answers are cut",
              "{:.0%}"), TRUNCATED_ABOVE),
        Check("repetition", "Repetition", "Share of 4-token runs that stood before in the same "
              "answer: loops.", "share", _repetition, REPETITION_ABOVE),
        Check("entropy", "Entropy", "How open the next token still is. At zero all answers to a "
              "question are one answer, and nothing more can be learned from sampling.",
              "nats per token", _entropy, ENTROPY_BELOW),
        Check("eos_in_loss", "End token taught", "Share of the taught answers whose end token "
              "counts in the loss. A model that is never taught its end forgets to stop.", "share",
              _below(END_BELOW, "of the taught answers teach their end token", "{:.0%}"), END_BELOW),
        Check("clip_fraction", "Clipped tokens", "Tokens whose term in the loss was capped.", "share",
              _above(CLIPPED_ABOVE, "of the tokens are clipped", "{:.0%}"), CLIPPED_ABOVE),
        Check("dropped", "Answers without usable feedback", "Sampled and dropped: the critic gave "
              "nothing usable, or the sample did not fit.", "share",
              _above(DROPPED_ABOVE, "of the answers teach nothing for want of feedback", "{:.0%}"),
              DROPPED_ABOVE),
        Check("fidelity", "Fidelity of the critique", "Share of an answer that the critique repeats "
              "word for word before its first change: the anchor of step-aligned feedback.", "share",
              _below(FIDELITY_BELOW, "of an answer is repeated before the first change", "{:.0%}"),
              FIDELITY_BELOW),
        Check("mismatch_mean", "Trainer against sampler", "Mean difference of the two "
              "log-probabilities of the sampled tokens. They should be the same model.",
              "nats per token", _above(MISMATCH_ABOVE, "nats per token lie between trainer and "
              "sampler", "{:.3f}"), MISMATCH_ABOVE),
        Check("correct", "Right answers", "What was learned can be lost again with the same recipe, a "
              "few steps on.", "share right while training", _lost),
        Check("loss", "Finite loss", "A loss that is no number ends all learning, silently.", "loss",
              _finite),
    )  # fmt: skip


def findings_of(groups: Groups) -> list[Finding]:
    """What shows in any run, check by check."""
    return [
        Finding(check, arm, run.seed, step, text)
        for check in checks()
        for arm, runs in groups.items()
        for run in runs
        for step, text in _shown(check, run)
    ]


def _shown(check: Check, run: Run) -> list[tuple[int, str]]:
    steps_E, values_E = run.series(check.metric)
    if not len(values_E):
        return []
    width = min(WINDOW, len(values_E))
    found = check.judge(smoothed(values_E, width))
    return [] if found is None else [(int(steps_E[found[0] + width - 1]), found[1])]


def smoothed(values_E: np.ndarray, width: int = WINDOW) -> np.ndarray:
    """Means over ``width`` neighbouring values, [E - width + 1]; all of them if there are fewer."""
    width = min(width, len(values_E))
    return np.lib.stride_tricks.sliding_window_view(values_E, width).mean(-1)


def _above(limit: float, says: str, form: str) -> Judge:
    def judge(values: np.ndarray) -> tuple[int, str] | None:
        at = int(np.nanargmax(values)) if np.isfinite(values).any() else 0
        found = f"{form.format(values[at])} {says}; a warning from {form.format(limit)} on"
        return (at, found) if values[at] > limit else None

    return judge


def _below(limit: float, says: str, form: str) -> Judge:
    def judge(values: np.ndarray) -> tuple[int, str] | None:
        at = int(np.nanargmin(values)) if np.isfinite(values).any() else 0
        found = f"only {form.format(values[at])} {says}; a warning below {form.format(limit)}"
        return (at, found) if values[at] < limit else None

    return judge


def _length(values: np.ndarray) -> tuple[int, str] | None:
    start, low, high = values[0], int(values.argmin()), int(values.argmax())
    if values[low] < COLLAPSED_TO * start:
        return low, f"answers shrank from {start:.0f} to {values[low]:.0f} tokens"
    if values[high] > EXPLODED_TO * start:
        return high, f"answers grew from {start:.0f} to {values[high]:.0f} tokens"
    return None


def _doubt(values: np.ndarray) -> tuple[int, str] | None:
    start, low = values[0], int(values.argmin())
    if start < HESITATION_FLOOR or values[low] >= HESITATION_LEFT * start:
        return None
    return low, f"words of hesitation fell from {start:.2f} to {values[low]:.2f} per answer"


def _repetition(values: np.ndarray) -> tuple[int, str] | None:
    start, high = values[0], int(values.argmax())
    if values[high] <= max(REPETITION_ABOVE, REPETITION_GROWTH * start):
        return None
    return high, f"{values[high]:.0%} of 4-token runs repeat, from {start:.0%} in the first steps"


def _entropy(values: np.ndarray) -> tuple[int, str] | None:
    start, low = values[0], int(values.argmin())
    if values[low] >= ENTROPY_BELOW or values[low] >= ENTROPY_LEFT * start:
        return None
    return low, f"entropy fell from {start:.2f} to {values[low]:.3f} nats per token"


def _lost(values: np.ndarray) -> tuple[int, str] | None:
    best, end = int(values.argmax()), len(values) - 1
    if values[best] < GAIN_FLOOR or values[end] >= GAIN_LEFT * values[best]:
        return None
    return end, f"right answers fell from {values[best]:.0%} at their best to {values[end]:.0%}"


def _finite(values: np.ndarray) -> tuple[int, str] | None:
    broken = np.flatnonzero(~np.isfinite(values))
    return (int(broken[0]), "the loss is not a finite number") if len(broken) else None


def logged(groups: Groups, metric: str) -> bool:
    """Whether any run has written a metric down."""
    return any(len(run.series(metric)[1]) for runs in groups.values() for run in runs)


def summary(findings: Sequence[Finding]) -> list[tuple[Check, dict[str, list[Finding]]]]:
    """Findings by check, then by arm, so that five seeds of one arm are one sentence."""
    by_check: dict[str, tuple[Check, dict[str, list[Finding]]]] = {}
    for finding in findings:
        entry = by_check.setdefault(finding.check.metric, (finding.check, {}))
        entry[1].setdefault(finding.arm, []).append(finding)
    return list(by_check.values())
