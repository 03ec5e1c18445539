"""Check a run's logged metrics for the failure modes of self-distillation.

Every threshold is a constant with its reason. A warning is a reason to look, not a proof; no warning
is no proof of health either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selfteach.analysis.run_data import Groups, RunData

WINDOW = 5
"""Steps averaged before a check: one bad batch is no failure."""
COLLAPSED_TO, EXPLODED_TO = 0.5, 2.0
"""Length against the run's first steps. In the paper trained lengths differ by a fifth; halving or
doubling is another behaviour."""
TRUNCATED_ABOVE = 0.2
"""A truncated rollout is almost never right and has no end to learn; one in five biases all metrics."""
HESITATION_LEFT, HESITATION_FLOOR = 0.5, 0.2
"""Share of the first steps' hesitation that should be left, checked where at least every fifth
rollout held a word of it."""
REPETITION_ABOVE, REPETITION_GROWTH = 0.3, 1.5
"""Share of 4-grams seen before in the same rollout. Worked solutions repeat their formulas, up to a
quarter; loops lie far above. Formats that repeat by nature are checked by growth."""
ENTROPY_BELOW, ENTROPY_LEFT = 0.05, 0.25
"""Nats per token. At 0.05 the likeliest token has about 99 %: eight rollouts of a problem are the
same. A model that started there is compared with its first steps."""
END_BELOW = 0.5
"""With fewer than half of the trained rollouts training their end token, the model forgets to stop."""
CLIPPED_ABOVE = 0.3
"""Share of clipped tokens. Clipping is for outliers; above a third it decides the gradient."""
DROPPED_ABOVE = 0.2
"""Rollouts without usable feedback: paid for and lost, and seldom at random: hard problems first."""
FIDELITY_BELOW = 0.1
"""Mean share of the rollout repeated before the first change. With an even spread of first errors it
is near one half; below a tenth the critic writes a new answer, and step-aligned feedback
has no anchor (paper)."""
MISMATCH_ABOVE = 0.05
"""Nats per token between trainer and sampler. bf16 alone gives 0.01 to 0.02; at 0.05 importance
weights of a hundred tokens no longer stay near one."""
GAIN_LEFT, GAIN_FLOOR = 0.6, 0.2
"""Share of the best that should be left at the end, checked where at least a fifth was right once. Five
steps of 32 rollouts of 4 problems each have a standard error of about 6 points there, and the best of
many windows is a lucky one."""

Detector = Callable[[np.ndarray], tuple[int, str] | None]
"""From a run's values, averaged over `WINDOW` steps, to the index and text of a warning, or None."""


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """Describes one failure mode: the metric that shows it, what it is, and when to warn."""

    metric: str
    title: str
    meaning: str
    unit: str
    detect: Detector
    limit: float | None = None
    """Drawn as a line where the threshold is the same for every run."""


@dataclass(frozen=True, slots=True)
class HealthWarning:
    """Describes one failure mode that shows in one run."""

    check: HealthCheck
    arm: str
    seed: int
    step: int
    text: str


def all_checks() -> tuple[HealthCheck, ...]:
    """Return the checks for all failure modes, in the order of the report."""
    return (
        HealthCheck(
            "length", "Length", "Rollouts that shrink stop reasoning; rollouts that grow ramble "
            "or cannot stop.", "tokens", _length_changed),
        HealthCheck(
            "hesitations", "Words of hesitation", "“Wait”, “let me check”: self-correction is the "
            "first habit that training on short, certain feedback takes away.", "per rollout",
            _hesitation_lost),
        HealthCheck(
            "truncated", "Truncated rollouts", "A rollout cut off at the token limit has no end to "
            "learn from and is almost never right.", "share",
            _above(TRUNCATED_ABOVE, "of the rollouts are truncated", "{:.0%}"), TRUNCATED_ABOVE),
        HealthCheck(
            "repetition", "Repetition", "Share of 4-token sequences that occurred before in the same "
            "rollout: loops.", "share", _repetition_grown, REPETITION_ABOVE),
        HealthCheck(
            "entropy", "Entropy", "How uncertain the next token is. At zero all rollouts of a problem "
            "are the same, and nothing more can be learned from sampling.", "nats per token",
            _entropy_lost, ENTROPY_BELOW),
        *_loss_checks(),
        HealthCheck(
            "fidelity", "Fidelity of the critique", "Share of a rollout that the critique repeats "
            "verbatim before its first change: the anchor of step-aligned feedback.", "share",
            _below(FIDELITY_BELOW, "of a rollout is repeated before the first change", "{:.0%}"),
            FIDELITY_BELOW),
        HealthCheck(
            "mismatch_mean", "Trainer against sampler", "Mean difference of trainer's and sampler's "
            "log-probabilities of the sampled tokens. They should be the same model.",
            "nats per token",
            _above(MISMATCH_ABOVE, "nats per token between trainer and sampler", "{:.3f}"),
            MISMATCH_ABOVE),
        HealthCheck(
            "correct", "Correct rollouts", "What was learned can be lost again with the same recipe, a "
            "few steps later.", "share correct while training", _correct_lost),
        HealthCheck(
            "loss", "Finite loss", "A loss that is not finite silently stops all learning.", "loss",
            _not_finite),
    )  # fmt: skip


def _loss_checks() -> tuple[HealthCheck, ...]:
    """Return the checks of which rollouts and tokens count in the loss."""
    return (
        HealthCheck(
            "eos_in_loss", "End token trained", "Share of the trained rollouts whose end token counts "
            "in the loss. A model whose end token is never trained forgets to stop.", "share",
            _below(END_BELOW, "of the trained rollouts train their end token", "{:.0%}"), END_BELOW),
        HealthCheck(
            "clip_fraction", "Clipped tokens", "Tokens whose term in the loss was clipped.", "share",
            _above(CLIPPED_ABOVE, "of the tokens are clipped", "{:.0%}"), CLIPPED_ABOVE),
        HealthCheck(
            "dropped", "Rollouts without usable feedback", "Sampled and dropped: the critic gave "
            "nothing usable, or the sample did not fit.", "share",
            _above(DROPPED_ABOVE, "of the rollouts are dropped for lack of feedback", "{:.0%}"),
            DROPPED_ABOVE),
    )  # fmt: skip


def health_warnings(groups: Groups) -> list[HealthWarning]:
    """Return the warnings of all runs, check by check."""
    return [
        HealthWarning(check, arm, run.seed, step, text)
        for check in all_checks()
        for arm, runs in groups.items()
        for run in runs
        for step, text in _detected(check, run)
    ]


def _detected(check: HealthCheck, run: RunData) -> list[tuple[int, str]]:
    steps_E, values_E = run.series(check.metric)
    if not len(values_E):
        return []
    width = min(WINDOW, len(values_E))
    if (detected := check.detect(smoothed(values_E, width))) is None:
        return []
    at, text = detected
    return [(int(steps_E[at + width - 1]), text)]


def smoothed(values_E: np.ndarray, width: int = WINDOW) -> np.ndarray:
    """Return means over ``width`` adjacent values, [E - width + 1]; over all if there are fewer."""
    width = min(width, len(values_E))
    return np.lib.stride_tricks.sliding_window_view(values_E, width).mean(-1)


def _above(limit: float, what: str, format_spec: str) -> Detector:
    def detect(values: np.ndarray) -> tuple[int, str] | None:
        at = int(np.nanargmax(values)) if np.isfinite(values).any() else 0
        value, threshold = format_spec.format(values[at]), format_spec.format(limit)
        text = f"{value} {what}; a warning from {threshold} on"
        return (at, text) if values[at] > limit else None

    return detect


def _below(limit: float, what: str, format_spec: str) -> Detector:
    def detect(values: np.ndarray) -> tuple[int, str] | None:
        at = int(np.nanargmin(values)) if np.isfinite(values).any() else 0
        value, threshold = format_spec.format(values[at]), format_spec.format(limit)
        text = f"only {value} {what}; a warning below {threshold}"
        return (at, text) if values[at] < limit else None

    return detect


def _length_changed(values: np.ndarray) -> tuple[int, str] | None:
    start, low, high = values[0], int(values.argmin()), int(values.argmax())
    if values[low] < COLLAPSED_TO * start:
        return low, f"rollouts shrank from {start:.0f} to {values[low]:.0f} tokens"
    if values[high] > EXPLODED_TO * start:
        return high, f"rollouts grew from {start:.0f} to {values[high]:.0f} tokens"
    return None


def _hesitation_lost(values: np.ndarray) -> tuple[int, str] | None:
    start, low = values[0], int(values.argmin())
    if start < HESITATION_FLOOR or values[low] >= HESITATION_LEFT * start:
        return None
    return low, f"words of hesitation fell from {start:.2f} to {values[low]:.2f} per rollout"


def _repetition_grown(values: np.ndarray) -> tuple[int, str] | None:
    start, high = values[0], int(values.argmax())
    if values[high] <= max(REPETITION_ABOVE, REPETITION_GROWTH * start):
        return None
    return (
        high,
        f"{values[high]:.0%} of 4-token sequences repeat, from {start:.0%} in the first steps",
    )


def _entropy_lost(values: np.ndarray) -> tuple[int, str] | None:
    start, low = values[0], int(values.argmin())
    if values[low] >= ENTROPY_BELOW or values[low] >= ENTROPY_LEFT * start:
        return None
    return low, f"entropy fell from {start:.2f} to {values[low]:.3f} nats per token"


def _correct_lost(values: np.ndarray) -> tuple[int, str] | None:
    best, end = int(values.argmax()), len(values) - 1
    if values[best] < GAIN_FLOOR or values[end] >= GAIN_LEFT * values[best]:
        return None
    return end, f"correct rollouts fell from {values[best]:.0%} at their best to {values[end]:.0%}"


def _not_finite(values: np.ndarray) -> tuple[int, str] | None:
    at = np.flatnonzero(~np.isfinite(values))
    return (int(at[0]), "the loss is not a finite number") if len(at) else None


def is_logged(groups: Groups, metric: str) -> bool:
    """Return whether any run has logged a metric."""
    return any(len(run.series(metric)[1]) for runs in groups.values() for run in runs)


def warnings_by_check(
    warnings: Sequence[HealthWarning],
) -> list[tuple[HealthCheck, dict[str, list[HealthWarning]]]]:
    """Group warnings by check, then by arm, so that five seeds of one arm are one sentence."""
    by_check: dict[str, tuple[HealthCheck, dict[str, list[HealthWarning]]]] = {}
    for warning in warnings:
        _, by_arm = by_check.setdefault(warning.check.metric, (warning.check, {}))
        by_arm.setdefault(warning.arm, []).append(warning)
    return list(by_check.values())
