"""The self-teacher as a process reward model that nobody trained: which step is the first wrong one?

A step's score is a pooled signal of its tokens, *low where the step is suspicious*. The signal is the
advantage under a context, or a baseline that needs no context. Judged as in ProcessBench
(arXiv:2412.06559): an answer with a first error counts as solved if exactly that step is the first to
be flagged, an answer without one if none is; F1 is the harmonic mean of both accuracies. A step is
flagged if its score lies below a threshold.

Pooling and threshold are chosen on one half of the problems and judged on the other. Axis letters:

    N  tokens    S  steps    A  answers    P  problems    R  resamples
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfteach.analysis.inspection.inspection_data import Inspection
from selfteach.analysis.inspection.localisation import SEED, TELLS, plain
from selfteach.evaluation.statistics import Interval, percentile_interval, resampled_counts

RESAMPLES = 1000
FIRST_K = 3
"""Tokens that the pooling ``first`` looks at."""
BLOCK_ENTRIES = 4_000_000
"""Weights of resampled steps that exist at a time."""

Pooled = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From a signal [N], the starts of steps and their lengths [S] to a score per step [S]."""

POOLINGS: dict[str, Pooled] = {
    "min": lambda x, start, length: np.minimum.reduceat(x, start),
    "mean": lambda x, start, length: np.add.reduceat(x, start) / length,
    "sum": lambda x, start, length: np.add.reduceat(x, start),
    "last": lambda x, start, length: x[start + length - 1],
    f"first_{FIRST_K}": lambda x, start, length: _first(x, start, length),
    "negative": lambda x, start, length: np.add.reduceat(np.minimum(x, 0), start) / length,
}
"""How a step's tokens become one number; ``negative`` is the mean of min(x, 0)."""

BASELINES = ("student_logp", "student_entropy", "position")
"""Scores without any context: log-probability, entropy with its sign changed, and the step's index."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of answers of which somebody says where the first error is, in order, answer by answer.

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
        """Whether a step is its answer's first error."""
        return self.index_S == self.first_error_A[self.answer_S]

    @property
    def counted_S(self) -> np.ndarray:
        """Failing steps, right ones before them, and those of answers without an error."""
        first_S = self.first_error_A[self.answer_S]
        return (first_S < 0) | (self.index_S <= first_S)

    def of(self, answers_A: np.ndarray) -> np.ndarray:
        """Which steps belong to some of the answers, [S]."""
        return answers_A[self.answer_S]


def _first(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    short = np.minimum(length, FIRST_K)
    running = np.concatenate([[0.0], np.cumsum(x, dtype=float)])
    return (running[start + short] - running[start]) / short


def steps_of(found: Inspection, context: int) -> tuple[Steps, dict[str, np.ndarray]]:
    """Steps under a context, and the scores of every signal and pooling, ``"advantage.min"`` say.

    Steps without a token of their own are left out.
    """
    located_A = (found.first_error_A >= 0) | found.sound_A
    rows = np.flatnonzero(
        (found.context_N == context) & (found.step_N >= 0) & located_A[found.answer_N]
    )
    answer, index = found.answer_N[rows], found.step_N[rows]
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (answer[1:] != answer[:-1]) | (index[1:] != index[:-1])
    start = np.flatnonzero(begins)
    length = np.diff(np.append(start, len(rows)))
    signals = {
        "advantage": found.advantage_N[rows].astype(float),
        "student_logp": found.student_logp_N[rows].astype(float),
        "student_entropy": -found.student_entropy_N[rows].astype(float),
    }
    scores = {
        f"{signal}.{name}": pool(x, start, length)
        for signal, x in signals.items()
        for name, pool in POOLINGS.items()
        if len(rows) and not (name == "negative" and signal != "advantage")
    }
    scores |= {"position.late": -index[start].astype(float), "position.early": index[start] * 1.0}
    steps = Steps(answer[start], index[start], found.first_error_A, found.problem_A)
    return steps, scores


def auroc(score_S: np.ndarray, failing_S: np.ndarray, weight_RS: np.ndarray) -> np.ndarray:
    """Chance that a failing step scores lower than a right one, ties counting half; [R] in 0..1.

    The area under the ROC curve of ``failing`` against the score with its sign changed, with a
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
    """Index of the first step of each answer whose score lies below a threshold; −1 if none, [A]."""
    none = np.iinfo(np.int64).max
    first_A = np.full(len(steps.first_error_A), none)
    low = score_S < threshold
    np.minimum.at(first_A, steps.answer_S[low], steps.index_S[low])
    return np.where(first_A == none, -1, first_A)


def lowest(steps: Steps, score_S: np.ndarray) -> np.ndarray:
    """Index of each answer's step with the lowest score, the first of equals; −1 without steps, [A]."""
    lowest_A = np.full(len(steps.first_error_A), np.inf)
    np.minimum.at(lowest_A, steps.answer_S, score_S)
    at_S = score_S == lowest_A[steps.answer_S]
    none = np.iinfo(np.int64).max
    first_A = np.full(len(lowest_A), none)
    np.minimum.at(first_A, steps.answer_S[at_S], steps.index_S[at_S])
    return np.where(first_A == none, -1, first_A)


def f1(counts: np.ndarray) -> np.ndarray:
    """ProcessBench's F1 in percent, from [..., 4]: the first four columns of `solved`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        wrong, sound = counts[..., 1] / counts[..., 0], counts[..., 3] / counts[..., 2]
        value = 200 * wrong * sound / (wrong + sound)
    return np.where(wrong + sound == 0, 0.0, value)


def best_threshold(steps: Steps, score_S: np.ndarray, answers_A: np.ndarray) -> float:
    """The threshold with the best F1 over some answers; halfway to the next score above.

    Exact: an answer with an error is solved for thresholds in (score of the failing step, lowest
    score before it], one without for those up to its lowest score.
    """
    own_S = steps.of(answers_A)
    lows, highs, sound = _solved_between(steps, score_S, own_S)
    values = np.unique(score_S[own_S])
    candidates = np.append(values, np.inf)
    hit_low = np.searchsorted(np.sort(lows), candidates, side="left")
    hit_high = np.searchsorted(np.sort(highs), candidates, side="left")
    kept = len(sound) - np.searchsorted(np.sort(sound), candidates, side="left")
    has_error = np.unique(steps.answer_S[own_S & steps.failing_S])
    counts = np.stack(
        np.broadcast_arrays(len(has_error), hit_low - hit_high, len(sound), kept), axis=-1
    )
    best = int(np.argmax(np.nan_to_num(f1(counts))))
    below, above = values[best - 1] if best else -np.inf, candidates[best]
    return float((below + above) / 2) if np.isfinite(below) and np.isfinite(above) else float(above)


def _solved_between(
    steps: Steps, score_S: np.ndarray, own_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of answers with an error that can be solved: the score of the failing step and the lowest
    before it; of the others: their lowest score."""
    size = len(steps.first_error_A)
    before_A, fails_A, sound_A = (np.full(size, np.inf) for _ in range(3))
    first_S = steps.first_error_A[steps.answer_S]
    for target, chosen in (
        (before_A, own_S & (first_S >= 0) & (steps.index_S < first_S)),
        (fails_A, own_S & steps.failing_S),
        (sound_A, own_S & (first_S < 0)),
    ):
        np.minimum.at(target, steps.answer_S[chosen], score_S[chosen])
    solvable = fails_A < before_A
    return fails_A[solvable], before_A[solvable], sound_A[np.isfinite(sound_A)]


@dataclass(frozen=True, slots=True)
class Judged:
    """A score on the problems that it was not chosen on, with its resampled values."""

    report: dict[str, Any]
    auroc_R: np.ndarray
    f1_R: np.ndarray


def score_steps(found: Inspection, *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Every context and every baseline as a judge of steps; what stands in ``localisation.json``."""
    chosen_P = choosing(found)
    told: dict[str, Any] = {
        "choosing": int(chosen_P.sum()), "judged": int((~chosen_P).sum()),
        "resamples": resamples, "contexts": {}, "baselines": {}, "paired": {},
    }  # fmt: skip
    if told["choosing"] == 0 or told["judged"] == 0:
        return told
    judges: dict[str, Judged] = {}
    widest = int(np.argmax(np.bincount(found.context_N, minlength=len(found.contexts))))
    for index, name in enumerate(found.contexts):
        steps, scores = steps_of(found, index)
        own = {k: v for k, v in scores.items() if k.startswith("advantage.")}
        if judge := _judge(steps, own, chosen_P, resamples):
            judges[name] = judge
            told["contexts"][name] = {"tells": TELLS.get(name, "unknown"), **judge.report}
    steps, scores = steps_of(found, widest)
    for name in BASELINES:
        own = {k: v for k, v in scores.items() if k.startswith(f"{name}.")}
        if judge := _judge(steps, own, chosen_P, resamples):
            judges[name] = judge
            told["baselines"][name] = judge.report
    told["paired"] = _paired(judges, told)
    return told


def choosing(found: Inspection) -> np.ndarray:
    """Which problems pooling and threshold are chosen on: about half, by a hash of their ids, [P]."""
    ids = dict.fromkeys(row["problem_id"] for row in found.answers)
    return np.array([hashlib.blake2b(i.encode(), digest_size=1).digest()[0] % 2 == 0 for i in ids])


def _judge(
    steps: Steps, scores: Mapping[str, np.ndarray], chosen_P: np.ndarray, resamples: int
) -> Judged | None:
    """Choose among poolings on one half of the problems, judge on the other."""
    counted = steps.counted_S
    halves = [counted & half[steps.problem_A[steps.answer_S]] for half in (chosen_P, ~chosen_P)]
    areas = {
        name: [_plain_auroc(score, steps.failing_S, half) for half in halves]
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
        here = 100 * total_J[solved] / total_J[of] if total_J[of] else float("nan")
        return plain(percentile_interval(float(here), values_R))

    f1_R = f1(totals_RJ)
    report = {
        "pooling": pooling,
        "threshold": threshold,
        "auroc": plain(percentile_interval(usable[pooling][1], auroc_R)),
        "locates": rate(4, 0),
        "accuracy_erroneous": rate(1, 0),
        "accuracy_sound": rate(3, 2),
        "f1": plain(percentile_interval(f1(total_J[None]).item(), f1_R)),
        "erroneous": int(total_J[0]),
        "sound": int(total_J[2]),
        "poolings": {name: {"choosing": a, "judged": b} for name, (a, b) in usable.items()},
    }
    return Judged(report, auroc_R, f1_R)


def solved(steps: Steps, score_S: np.ndarray, threshold: float) -> np.ndarray:
    """Per problem: erroneous answers, of these solved, sound answers, of these solved, and erroneous
    answers whose lowest step is the first error; [P, 5]."""
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
    """AUROC [R] and totals of `solved` [R, J] over problems drawn with replacement: the same draws
    for whatever is judged on the same problems."""
    judged_P = np.flatnonzero(~chosen_P)
    place_P = np.full(len(chosen_P), -1)
    place_P[judged_P] = np.arange(len(judged_P))
    problem_S = steps.problem_A[steps.answer_S]
    own_S = steps.counted_S & ~chosen_P[problem_S]
    column_S, score_S, failing_S = place_P[problem_S[own_S]], score_S[own_S], steps.failing_S[own_S]
    rows = max(1, BLOCK_ENTRIES // max(1, len(column_S)))
    areas, totals = [], []
    for counts_RP in resampled_counts(len(judged_P), resamples, SEED):
        totals.append(counts_RP @ counts_PJ)
        for at in range(0, len(counts_RP), rows):
            weight_RS = counts_RP[at : at + rows, column_S].astype(float)
            areas.append(auroc(score_S, failing_S, weight_RS))
    return np.concatenate(areas), np.concatenate(totals)


def _paired(judges: Mapping[str, Judged], told: Mapping[str, Any]) -> dict[str, Any]:
    """Each context minus each baseline, and minus the contexts before it."""
    names = [*told["baselines"], *told["contexts"]]
    return {
        f"{b}-{a}": {
            "auroc": _minus(judges, b, a, "auroc"),
            "f1": _minus(judges, b, a, "f1"),
        }
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if b in told["contexts"]
    }


def _minus(judges: Mapping[str, Judged], b: str, a: str, measure: str) -> Any:
    ours, theirs = judges[b], judges[a]
    values = [getattr(judge, f"{measure}_R") for judge in (ours, theirs)]
    means = [judge.report[measure] for judge in (ours, theirs)]
    if None in means:
        return None
    interval: Interval | None = percentile_interval(
        means[0]["mean"] - means[1]["mean"], values[0] - values[1]
    )
    return plain(interval)
