"""Measure how much an arm can teach: pure functions of rollouts' outcomes and token scores.

All shares are in percent, edges in points of percent, divergences in nats per token. Intervals are 95 %
over problems, drawn with replacement with all their rollouts. Axis letters:

    P  problems     K  rollouts of one problem     N  scored tokens     J  sums     R  resamples
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from selfteach.analysis.inspection.inspection_data import Inspection
from selfteach.analysis.inspection.localisation import (
    Sums,
    concentration,
    mass,
    style_leak,
    sum_tokens,
)
from selfteach.evaluation.statistics import Interval, percentile_interval, resampled_totals

RESAMPLES = 2000
SEED = 0
MIN_STEPS = 3
"""Steps before the final answer without which a rollout has no end that differs from the whole."""
TAIL = 0.025
"""Probability outside a 95 % interval, on each side."""

Estimates = Mapping[str, Interval | None]
"""Measures by name; None where there is nothing to measure."""

UNITS = {
    "right": "percent of rollouts",
    "sound": "percent of rollouts",
    "mixed_groups": "percent of groups",
    "shown": "percent of rollouts",
    "usable_critiques": "percent of rollouts",
    "edge": "points",
    "edge_on_wrong": "points",
    "divergence": "nats per token",
    "contrast": "ratio",
    "failing_mass": "percent of |A|",
    "end_mass": "percent of |A|",
    "style_leak": "ratio",
}
"""The unit of each measure; `docs/forecast.md` defines them."""


def share(counted_PK: np.ndarray, among_PK: np.ndarray | None = None) -> Interval | None:
    """Return the share of rollouts that count, among all or some of them (percent)."""
    among_PK = np.ones_like(counted_PK, dtype=bool) if among_PK is None else among_PK
    hits_P = (counted_PK & among_PK).sum(axis=1)
    return _percent(_pooled(hits_P, among_PK.sum(axis=1), 0.0, 1.0))


def mixed_groups(correct_PK: np.ndarray, group_size: int) -> Interval | None:
    """Return the share of groups of ``group_size`` rollouts with right and wrong ones (percent).

    Of a problem with c right ones of k rollouts and G = group_size: with k ≥ G the share of all
    subsets of G that are mixed, 1 − (C(c, G) + C(k−c, G)) / C(k, G), which is unbiased; with k < G
    the chance of G draws at the problem's rate, 1 − (c/k)^G − (1 − c/k)^G, which errs low.
    """
    problems, k = correct_PK.shape
    right_P = correct_PK.sum(axis=1)
    if k >= group_size:
        mixed_P = 1 - _all_drawn(right_P, k, group_size) - _all_drawn(k - right_P, k, group_size)
    else:
        mixed_P = _mixed_at(right_P / k, group_size)
    result = _pooled(mixed_P, np.ones(problems), 0.0, 1.0)
    if result is not None and right_P.sum() in (0, problems * k):
        # No rollout differs: the rate may still be as far from 0 (or 1) as so many draws allow.
        rate = np.array([_exact_bound(problems * k)])
        result = Interval(0.0, 0.0, max(result.high, float(_mixed_at(rate, group_size)[0])))
    return _percent(result)


def is_unbiased(k: int, group_size: int) -> bool:
    """Return whether `mixed_groups` counts subsets of the rollouts, rather than draws at their rate."""
    return k >= group_size


def edge(
    teacher_PK: np.ndarray, correct_PK: np.ndarray, *, wrong_only: bool = False
) -> Interval | None:
    """Return how much more often the teacher's answer is right than the policy's (points).

    ``teacher_PK`` is the share of right ones among the answers that the teacher samples with the
    context of this rollout in view; NaN where it has none. Each is paired with the policy's *other*
    rollouts of the same problem, so that the choice of wrong rollouts does not lower the policy's
    side. Needs k ≥ 2.
    """
    k = correct_PK.shape[1]
    others_PK = (correct_PK.sum(axis=1, keepdims=True) - correct_PK) / (k - 1)
    counted_PK = np.isfinite(teacher_PK) & (~correct_PK if wrong_only else True)
    gain_PK = np.where(counted_PK, teacher_PK - others_PK, 0.0)
    return _percent(_pooled(gain_PK.sum(axis=1), counted_PK.sum(axis=1), -1.0, 1.0))


def token_measures(inspection: Inspection, reverse_kl_N: np.ndarray, context: str) -> Estimates:
    """Return what a context changes, token by token, in the rollouts that have it.

    ``divergence`` is the mean KL(student ‖ teacher); ``end_mass`` the share of all |A| on the final
    answer and the step before it, of rollouts that end in an answer after at least `MIN_STEPS`
    steps; the others are those of `analysis.inspection`.
    """
    index = inspection.contexts.index(context)
    table = sum_tokens(inspection)
    sums_PJ = table.by_problem(index, table.scored_CA[index])
    divergence_PJ, end_PJ = _divergence_and_end(inspection, reverse_kl_N, index)
    return {
        "divergence": _of_sums(divergence_PJ, _first_over_second),
        "contrast": _of_sums(sums_PJ, concentration),
        "failing_mass": _of_sums(sums_PJ, lambda sums: mass(sums, "failing")),
        "end_mass": _percent(_pooled(end_PJ[:, 0], end_PJ[:, 1], 0.0, 1.0)),
        "style_leak": _of_sums(sums_PJ, style_leak),
    }


def _divergence_and_end(
    inspection: Inspection, reverse_kl_N: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return sums by problem: (KL, tokens), and |A| of (the rollouts' ends, all their tokens)."""
    chosen_N = inspection.context_N == context
    answer_N = inspection.answer_N[chosen_N]
    last_A = np.array([len(row["step_spans"]["tokens"]) - 1 for row in inspection.answers])
    is_parsed_A = np.array([row["parsed"] is not None for row in inspection.answers])
    counted_A = is_parsed_A & (last_A >= MIN_STEPS)
    abs_N = np.abs(inspection.advantage_N[chosen_N].astype(float)) * counted_A[answer_N]
    is_end_N = inspection.step_N[chosen_N] >= last_A[answer_N] - 1

    def by_problem(values_N: np.ndarray) -> np.ndarray:
        problem_N = inspection.problem_A[answer_N]
        return np.bincount(problem_N, values_N, minlength=inspection.num_problems)

    kl_N = reverse_kl_N[chosen_N].astype(float)
    return (
        np.stack([by_problem(kl_N), by_problem(np.ones_like(kl_N))], axis=1),
        np.stack([by_problem(abs_N * is_end_N), by_problem(abs_N)], axis=1),
    )


def _first_over_second(sums: Sums) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _of_sums(sums_PJ: np.ndarray, statistic: Callable[[Sums], np.ndarray]) -> Interval | None:
    estimate = statistic(sums_PJ.sum(0, keepdims=True)).item()
    totals_RJ = resampled_totals(sums_PJ, resamples=RESAMPLES, seed=SEED)
    return percentile_interval(estimate, statistic(totals_RJ))


def _pooled(
    total_P: np.ndarray, count_P: np.ndarray, lowest: float, highest: float
) -> Interval | None:
    """Return the mean over all that is counted, with its interval over problems.

    Where all problems have the same value, resampling them shows no spread, however few they are: the
    interval is then as wide as a value that none of so many problems has shown allows.
    """
    counted = count_P > 0
    if not counted.any():
        return None
    value_P = total_P[counted] / count_P[counted]
    if np.ptp(value_P) == 0:
        value, width = float(value_P[0]), _exact_bound(len(value_P))
        return Interval(value, max(lowest, value - width), min(highest, value + width))
    return _of_sums(np.stack([total_P, count_P], axis=1).astype(float), _first_over_second)


def _exact_bound(draws: int) -> float:
    """Return the largest rate at which an event is missed in all draws with probability `TAIL`."""
    return 1 - TAIL ** (1 / draws)


def _mixed_at(rate_P: np.ndarray, group_size: int) -> np.ndarray:
    return 1 - rate_P**group_size - (1 - rate_P) ** group_size


def _all_drawn(members_P: np.ndarray, k: int, group_size: int) -> np.ndarray:
    """Return C(members, G) / C(k, G): the chance that G of k rollouts are all among the members."""
    drawn = np.arange(group_size)
    return (np.maximum(members_P[:, None] - drawn, 0) / (k - drawn)).prod(axis=1)


def _percent(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    return Interval(100 * interval.mean, 100 * interval.low, 100 * interval.high)
