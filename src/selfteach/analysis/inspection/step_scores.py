"""Score steps with the self-teacher, as an untrained process reward model: which is wrong first?

A step's score is a pooled signal of its tokens, *low where the step is likely wrong*. The signal is the
advantage under a context, or a baseline that needs no context. Scores are evaluated as in ProcessBench
(arXiv:2412.06559): an answer with a first error counts as solved if exactly that step is the first to
be flagged, an answer without one if none is; F1 is the harmonic mean of both accuracies. A step is
flagged if its score lies below a threshold.

Pooling and threshold are chosen on about half of the problems and evaluated on the others. Axes:

    N  tokens    S  steps    A  answers    P  problems    R  resamples
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfteach.analysis.inspection.inspection_data import Inspection
from selfteach.analysis.inspection.localisation import REVEALS, SEED, optional_estimate
from selfteach.evaluation.statistics import Interval, percentile_interval, resampled_counts

RESAMPLES = 1000
FIRST_K = 3
"""Tokens in the pooling ``first_3``."""
BLOCK_ENTRIES = 4_000_000
"""Weights of resampled steps in memory at a time."""

Pooling = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From a signal [N], the starts of steps and their lengths [S] to a score per step [S]."""

POOLINGS: dict[str, Pooling] = {
    "min": lambda x, start, length: np.minimum.reduceat(x, start),
    "mean": lambda x, start, length: np.add.reduceat(x, start) / length,
    "sum": lambda x, start, length: np.add.reduceat(x, start),
    "last": lambda x, start, length: x[start + length - 1],
    f"first_{FIRST_K}": lambda x, start, length: _first(x, start, length),
    "negative": lambda x, start, length: np.add.reduceat(np.minimum(x, 0), start) / length,
}
"""Reductions of a step's tokens to one number; ``negative`` is the mean of min(x, 0)."""

BASELINES = ("student_logp", "student_entropy", "position")
"""Scores without any context: log-probability, negated entropy, and the step's index."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Holds the steps of answers whose first error (or lack of one) is known, answer by answer.

    Example: two answers of two steps, the first wrong in its second step::

        Steps(answer_S=[0, 0, 1, 1], index_S=[0, 1, 0, 1], first_error_A=[1, -1], problem_A=[0, 1])
    """

    answer_S: np.ndarray
    index_S: np.ndarray
    first_error_A: np.ndarray
    """−1 for an answer without an error."""
    problem_A: np.ndarray

    @property
    def failing_S(self) -> np.ndarray:
        """Return whether a step is its answer's first error, [S]."""
        return self.index_S == self.first_error_A[self.answer_S]

    @property
    def counted_S(self) -> np.ndarray:
        """Return which steps count, [S]: failing ones, right ones before, and all of sound answers."""
        first_S = self.first_error_A[self.answer_S]
        return (first_S < 0) | (self.index_S <= first_S)

    def of(self, answers_A: np.ndarray) -> np.ndarray:
        """Return which steps belong to some of the answers, [S]."""
        return answers_A[self.answer_S]


def _first(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    short = np.minimum(length, FIRST_K)
    running = np.concatenate([[0.0], np.cumsum(x, dtype=float)])
    return (running[start + short] - running[start]) / short


def steps_of(inspection: Inspection, context: int) -> tuple[Steps, dict[str, np.ndarray]]:
    """Return steps under a context, and scores by signal and pooling (``"advantage.min"``).

    Steps without a token are left out.
    """
    located_A = (inspection.first_error_A >= 0) | inspection.sound_A
    rows = np.flatnonzero(
        (inspection.context_N == context)
        & (inspection.step_N >= 0)
        & located_A[inspection.answer_N]
    )
    answer, index = inspection.answer_N[rows], inspection.step_N[rows]
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (answer[1:] != answer[:-1]) | (index[1:] != index[:-1])
    start = np.flatnonzero(begins)
    length = np.diff(np.append(start, len(rows)))
    signals = {
        "advantage": inspection.advantage_N[rows].astype(float),
        "student_logp": inspection.student_logp_N[rows].astype(float),
        "student_entropy": -inspection.student_entropy_N[rows].astype(float),
    }
    scores = {
        f"{signal}.{name}": pool(x, start, length)
        for signal, x in signals.items()
        for name, pool in POOLINGS.items()
        if len(rows) and not (name == "negative" and signal != "advantage")
    }
    scores |= {"position.late": -index[start].astype(float), "position.early": index[start] * 1.0}
    steps = Steps(answer[start], index[start], inspection.first_error_A, inspection.problem_A)
    return steps, scores


def auroc(score_S: np.ndarray, failing_S: np.ndarray, weight_RS: np.ndarray) -> np.ndarray:
    """Compute the probability that a failing step scores below a right one, ties half; [R] in 0..1.

    The area under the ROC curve of ``failing`` against the negated score, with a
    weight per step and resample. NaN where one of the two classes is missing.
    """
    order = np.argsort(score_S, kind="stable")
    sorted_S, failing_S, weight_RS = score_S[order], failing_S[order], weight_RS[:, order]
    groups = np.flatnonzero(np.append(True, sorted_S[1:] != sorted_S[:-1]))
    bad_RG = np.add.reduceat(weight_RS * failing_S, groups, axis=1)
    good_RG = np.add.reduceat(weight_RS * ~failing_S, groups, axis=1)
    good_R = good_RG.sum(1)
    above_RG = good_R[:, None] - np.cumsum(good_RG, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (bad_RG * (above_RG + good_RG / 2)).sum(1) / (bad_RG.sum(1) * good_R)


def flagged_first(steps: Steps, score_S: np.ndarray, threshold: float) -> np.ndarray:
    """Return the index of each answer's first step scored below a threshold; −1 if none, [A]."""
    none = np.iinfo(np.int64).max
    first_A = np.full(len(steps.first_error_A), none)
    low = score_S < threshold
    np.minimum.at(first_A, steps.answer_S[low], steps.index_S[low])
    return np.where(first_A == none, -1, first_A)


def lowest(steps: Steps, score_S: np.ndarray) -> np.ndarray:
    """Return the index of each answer's lowest step, the first of equals; −1 without steps, [A]."""
    lowest_A = np.full(len(steps.first_error_A), np.inf)
    np.minimum.at(lowest_A, steps.answer_S, score_S)
    at_S = score_S == lowest_A[steps.answer_S]
    none = np.iinfo(np.int64).max
    first_A = np.full(len(lowest_A), none)
    np.minimum.at(first_A, steps.answer_S[at_S], steps.index_S[at_S])
    return np.where(first_A == none, -1, first_A)


def f1(counts: np.ndarray) -> np.ndarray:
    """Compute ProcessBench's F1 in percent, from [..., 4]: the first four columns of `solved`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        wrong, sound = counts[..., 1] / counts[..., 0], counts[..., 3] / counts[..., 2]
        value = 200 * wrong * sound / (wrong + sound)
    return np.where(wrong + sound == 0, 0.0, value)


def best_threshold(steps: Steps, score_S: np.ndarray, answers_A: np.ndarray) -> float:
    """Return the threshold with the best F1 over some answers, halfway between two scores.

    Exact: an answer with an error is solved for thresholds in (score of the failing step, lowest
    score before it], one without for those up to its lowest score.
    """
    chosen_S = steps.of(answers_A)
    lows, highs, sound = _solved_between(steps, score_S, chosen_S)
    values = np.unique(score_S[chosen_S])
    candidates = np.append(values, np.inf)
    hit_low = np.searchsorted(np.sort(lows), candidates, side="left")
    hit_high = np.searchsorted(np.sort(highs), candidates, side="left")
    hit_sound = len(sound) - np.searchsorted(np.sort(sound), candidates, side="left")
    has_error = np.unique(steps.answer_S[chosen_S & steps.failing_S])
    counts = np.stack(
        np.broadcast_arrays(len(has_error), hit_low - hit_high, len(sound), hit_sound), axis=-1
    )
    best = int(np.argmax(np.nan_to_num(f1(counts))))
    below, above = values[best - 1] if best else -np.inf, candidates[best]
    return float((below + above) / 2) if np.isfinite(below) and np.isfinite(above) else float(above)


def _solved_between(
    steps: Steps, score_S: np.ndarray, chosen_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the bounds of the thresholds that solve each answer.

    Of answers with an error that some threshold solves: the score of the failing step, and the
    lowest before it. Of answers without an error: their lowest score.
    """
    size = len(steps.first_error_A)
    before_A, fails_A, sound_A = (np.full(size, np.inf) for _ in range(3))
    first_S = steps.first_error_A[steps.answer_S]
    for lowest_A, subset_S in (
        (before_A, chosen_S & (first_S >= 0) & (steps.index_S < first_S)),
        (fails_A, chosen_S & steps.failing_S),
        (sound_A, chosen_S & (first_S < 0)),
    ):
        np.minimum.at(lowest_A, steps.answer_S[subset_S], score_S[subset_S])
    solvable = fails_A < before_A
    return fails_A[solvable], before_A[solvable], sound_A[np.isfinite(sound_A)]


@dataclass(frozen=True, slots=True)
class StepScoreResult:
    """Holds a score's results on the held-out problems, with their resampled values."""

    report: dict[str, Any]
    auroc_R: np.ndarray
    f1_R: np.ndarray


def score_steps(inspection: Inspection, *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Evaluate every context and every baseline as a step score, as ``localisation.json`` holds it."""
    chosen_P = choosing(inspection)
    report: dict[str, Any] = {
        "choosing": int(chosen_P.sum()), "judged": int((~chosen_P).sum()),
        "resamples": resamples, "contexts": {}, "baselines": {}, "paired": {},
    }  # fmt: skip
    if report["choosing"] == 0 or report["judged"] == 0:
        return report
    results: dict[str, StepScoreResult] = {}
    widest = int(np.argmax(np.bincount(inspection.context_N, minlength=len(inspection.contexts))))
    for index, name in enumerate(inspection.contexts):
        steps, scores = steps_of(inspection, index)
        pooled = {k: v for k, v in scores.items() if k.startswith("advantage.")}
        if result := _evaluate(steps, pooled, chosen_P, resamples):
            results[name] = result
            report["contexts"][name] = {"tells": REVEALS.get(name, "unknown"), **result.report}
    steps, scores = steps_of(inspection, widest)
    for name in BASELINES:
        pooled = {k: v for k, v in scores.items() if k.startswith(f"{name}.")}
        if result := _evaluate(steps, pooled, chosen_P, resamples):
            results[name] = result
            report["baselines"][name] = result.report
    report["paired"] = _paired(results, report)
    return report


def choosing(inspection: Inspection) -> np.ndarray:
    """Return which problems pooling and threshold are chosen on: about half, by a hash of ids, [P]."""
    ids = dict.fromkeys(row["problem_id"] for row in inspection.answers)
    return np.array([hashlib.blake2b(i.encode(), digest_size=1).digest()[0] % 2 == 0 for i in ids])


def _evaluate(
    steps: Steps, scores: Mapping[str, np.ndarray], chosen_P: np.ndarray, resamples: int
) -> StepScoreResult | None:
    """Choose among poolings on one part of the problems, evaluate on the other; None if neither can."""
    counted = steps.counted_S
    problem_S = steps.problem_A[steps.answer_S]
    splits = [counted & split_P[problem_S] for split_P in (chosen_P, ~chosen_P)]
    areas = {
        name: [_plain_auroc(score, steps.failing_S, split_S) for split_S in splits]
        for name, score in scores.items()
    }
    usable = {name: both for name, both in areas.items() if np.isfinite(both).all()}
    if not usable:
        return None
    pooling = max(usable, key=lambda name: usable[name][0])
    threshold = best_threshold(steps, scores[pooling], chosen_P[steps.problem_A])
    counts_PJ = solved(steps, scores[pooling], threshold)[~chosen_P]
    auroc_R, totals_RJ = _resampled(steps, scores[pooling], chosen_P, counts_PJ, resamples)
    total_J = counts_PJ.sum(0)

    def rate(solved: int, of: int) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            values_R = 100 * totals_RJ[:, solved] / totals_RJ[:, of]
        value = 100 * total_J[solved] / total_J[of] if total_J[of] else float("nan")
        return optional_estimate(percentile_interval(float(value), values_R))

    f1_R = f1(totals_RJ)
    report = {
        "pooling": pooling,
        "threshold": threshold,
        "auroc": optional_estimate(percentile_interval(usable[pooling][1], auroc_R)),
        "locates": rate(4, 0),
        "accuracy_erroneous": rate(1, 0),
        "accuracy_sound": rate(3, 2),
        "f1": optional_estimate(percentile_interval(f1(total_J[None]).item(), f1_R)),
        "erroneous": int(total_J[0]),
        "sound": int(total_J[2]),
        "poolings": {name: {"choosing": a, "judged": b} for name, (a, b) in usable.items()},
    }
    return StepScoreResult(report, auroc_R, f1_R)


def solved(steps: Steps, score_S: np.ndarray, threshold: float) -> np.ndarray:
    """Count by problem, [P, 5].

    Erroneous answers, of these solved, sound answers, of these solved, and erroneous answers whose
    lowest step is the first error.
    """
    present_A = np.zeros(len(steps.first_error_A), dtype=bool)
    present_A[steps.answer_S] = True
    first_A, wrong_A = steps.first_error_A, present_A & (steps.first_error_A >= 0)
    sound_A = present_A & (first_A < 0)
    hit_A = flagged_first(steps, score_S, threshold) == first_A
    columns = (wrong_A, wrong_A & hit_A, sound_A, sound_A & hit_A,
               wrong_A & (lowest(steps, score_S) == first_A))  # fmt: skip
    counts_PJ = np.zeros((int(steps.problem_A.max()) + 1, len(columns)))
    np.add.at(counts_PJ, steps.problem_A, np.stack(columns, axis=-1).astype(float))
    return counts_PJ


def _plain_auroc(score_S: np.ndarray, failing_S: np.ndarray, chosen_S: np.ndarray) -> float:
    if not chosen_S.any():
        return float("nan")
    ones = np.ones((1, int(chosen_S.sum())))
    return float(auroc(score_S[chosen_S], failing_S[chosen_S], ones)[0])


def _resampled(
    steps: Steps, score_S: np.ndarray, chosen_P: np.ndarray, counts_PJ: np.ndarray, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC [R] and totals of `solved` [R, J] over problems drawn with replacement.

    The draws are the same for all scores evaluated on the same problems.
    """
    judged_P = np.flatnonzero(~chosen_P)
    place_P = np.full(len(chosen_P), -1)
    place_P[judged_P] = np.arange(len(judged_P))
    problem_S = steps.problem_A[steps.answer_S]
    judged_S = steps.counted_S & ~chosen_P[problem_S]
    column_S, score_S, failing_S = (
        place_P[problem_S[judged_S]],
        score_S[judged_S],
        steps.failing_S[judged_S],
    )
    rows = max(1, BLOCK_ENTRIES // max(1, len(column_S)))
    areas, totals = [], []
    for counts_RP in resampled_counts(len(judged_P), resamples, SEED):
        totals.append(counts_RP @ counts_PJ)
        for at in range(0, len(counts_RP), rows):
            weight_RS = counts_RP[at : at + rows, column_S].astype(float)
            areas.append(auroc(score_S, failing_S, weight_RS))
    return np.concatenate(areas), np.concatenate(totals)


def _paired(results: Mapping[str, StepScoreResult], report: Mapping[str, Any]) -> dict[str, Any]:
    """Return each context minus each baseline, and minus the contexts before it."""
    names = [*report["baselines"], *report["contexts"]]
    return {
        f"{b}-{a}": {
            "auroc": _minus(results, b, a, "auroc"),
            "f1": _minus(results, b, a, "f1"),
        }
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if b in report["contexts"]
    }


def _minus(results: Mapping[str, StepScoreResult], b: str, a: str, measure: str) -> Any:
    pair = results[b], results[a]
    values = [getattr(result, f"{measure}_R") for result in pair]
    means = [result.report[measure] for result in pair]
    if None in means:
        return None
    interval: Interval | None = percentile_interval(
        means[0]["mean"] - means[1]["mean"], values[0] - values[1]
    )
    return optional_estimate(interval)
