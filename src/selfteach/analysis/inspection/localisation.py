"""Measure where a context moves the self-teacher: advantages by region and kind, with intervals.

Every measure is a function of sums over tokens, so that resampling problems (with all their answers)
is resampling rows of a table. Regions and kinds: ``docs/inspection.md``. Axis letters:

    N  tokens     A  answers     C  contexts     P  problems     J  sums     R  resamples
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from selfteach.analysis.inspection.inspection_data import KINDS, REGIONS, Inspection
from selfteach.analysis.results_table import as_estimate
from selfteach.evaluation.statistics import Interval, percentile_interval, resampled_totals

RESAMPLES = 2000
SEED = 0
DENIED = -1.0
"""Nats: a token with an advantage below this counts as denied."""
WINDOW = 24
"""Tokens before and after the first error in `aligned`."""

REVEALS = {
    "step_aligned": "where",
    "full_repetition": "where",
    "omission": "where",
    "shuffled_lines": "where",
    "holistic": "whether",
    "answer_only": "answer",
    "reference": "solution",
    "aligned_reference": "solution",
    "peer": "solution",
    "environment": "whether",
    "other_answer": "nothing",
    "other_reference": "nothing",
}
"""What a context reveals of an answer's errors: ``where`` the first one is, ``whether`` there is one
(from an oracle that is the label itself), or only the right ``answer`` or ``solution``."""

Estimate = dict[str, Any] | None
"""``{"mean": 35.8, "ci95": [31.2, 40.1]}``; None where there is nothing to measure."""

Sums = np.ndarray
"""[R, J]: sums of tokens in the order of `_AT`, a row per resample (one row: the estimate itself)."""

QUANTITIES = ("tokens", "sum", "abs", "denied")
_AT = {
    name: index
    for index, name in enumerate(
        [f"{region}.{quantity}" for region in REGIONS for quantity in QUANTITIES]
        + [f"{kind}.{where}.{quantity}" for kind in KINDS for where in ("all", "correct")
           for quantity in ("tokens", "abs")]
    )
}  # fmt: skip
"""Index of each sum on axis J."""


def _of(sums: Sums, *names: str) -> np.ndarray:
    return sum((sums[..., _AT[name]] for name in names), np.zeros(sums.shape[:-1]))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


def mean_abs(sums: Sums, region: str) -> np.ndarray:
    """Return mean |A| of a region's tokens (nats)."""
    return _ratio(_of(sums, f"{region}.abs"), _of(sums, f"{region}.tokens"))


def mean_advantage(sums: Sums, region: str) -> np.ndarray:
    """Return mean A of a region's tokens (nats)."""
    return _ratio(_of(sums, f"{region}.sum"), _of(sums, f"{region}.tokens"))


def mass(sums: Sums, region: str) -> np.ndarray:
    """Return a region's share of all |A| in answers with a first error (percent)."""
    whole = _of(sums, "before.abs", "failing.abs", "after.abs")
    return 100 * _ratio(_of(sums, f"{region}.abs"), whole)


def concentration(sums: Sums) -> np.ndarray:
    """Return mean |A| of the failing step over that of the right steps before it; 1 means none."""
    return _ratio(mean_abs(sums, "failing"), mean_abs(sums, "before"))


def collateral(sums: Sums) -> np.ndarray:
    """Return the share of denied tokens on right steps: before an error or in a right answer (%)."""
    return 100 * _ratio(
        _of(sums, "before.denied", "right.denied"), _of(sums, "before.tokens", "right.tokens")
    )


def hits(sums: Sums) -> np.ndarray:
    """Return the share of denied tokens on the failing step (percent)."""
    return 100 * _ratio(_of(sums, "failing.denied"), _of(sums, "failing.tokens"))


def style_leak(sums: Sums, where: str = "all") -> np.ndarray:
    """Return mean |A| of style tokens over that of task tokens, on ``all`` or ``correct`` steps."""
    style, task = (
        _ratio(_of(sums, f"{kind}.{where}.abs"), _of(sums, f"{kind}.{where}.tokens"))
        for kind in ("style", "task")
    )
    return _ratio(style, task)


MEASURES: dict[str, Callable[[Sums], np.ndarray]] = {
    **{f"mass.{r}": lambda sums, r=r: mass(sums, r) for r in REGIONS[:3]},
    **{f"advantage.{r}": lambda sums, r=r: mean_advantage(sums, r) for r in REGIONS},
    **{f"teacher_logratio_abs.{r}": lambda sums, r=r: mean_abs(sums, r) for r in REGIONS},
    "concentration": concentration,
    "collateral": collateral,
    "hits": hits,
    "style_leak": style_leak,
    "style_leak_correct_steps": lambda sums: style_leak(sums, "correct"),
}
UNITS = {
    "mass": "percent of |A|",
    "advantage": "nats",
    "teacher_logratio_abs": "nats",
    "concentration": "ratio",
    "collateral": "percent of tokens",
    "hits": "percent of tokens",
    "style_leak": "ratio",
    "style_leak_correct_steps": "ratio",
}


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Holds sums over tokens per context and answer."""

    contexts: tuple[str, ...]
    sums_CAJ: np.ndarray
    scored_CA: np.ndarray
    """Whether an answer was scored under a context."""
    problem_A: np.ndarray

    def by_problem(self, context: int, answers_A: np.ndarray) -> np.ndarray:
        """Return the sums of some answers by problem, [P, J]."""
        sums_PJ = np.zeros((int(self.problem_A.max()) + 1, self.sums_CAJ.shape[2]))
        np.add.at(sums_PJ, self.problem_A[answers_A], self.sums_CAJ[context, answers_A])
        return sums_PJ


def sum_tokens(inspection: Inspection) -> TokenSums:
    """Add up tokens by context, answer, region and kind."""
    shape = (len(inspection.contexts), len(inspection.answers))
    cell_N = inspection.context_N * shape[1] + inspection.answer_N
    advantage_N = inspection.advantage_N.astype(float)
    of_token = {
        "tokens": np.ones(len(cell_N)),
        "sum": advantage_N,
        "abs": np.abs(advantage_N),
        "denied": (advantage_N < DENIED).astype(float),
    }
    correct_N = np.isin(inspection.region_N, [REGIONS.index("before"), REGIONS.index("right")])
    sums = np.zeros((shape[0] * shape[1], len(_AT)))
    for name, column in _AT.items():
        group, *where, quantity = name.split(".")
        if group in REGIONS:
            chosen_N = inspection.region_N == REGIONS.index(group)
        else:
            chosen_N = inspection.kind_N == KINDS.index(group)
            chosen_N = chosen_N & correct_N if where == ["correct"] else chosen_N
        sums[:, column] = np.bincount(
            cell_N[chosen_N], of_token[quantity][chosen_N], minlength=len(sums)
        )
    scored = np.bincount(cell_N, minlength=len(sums)) > 0
    return TokenSums(
        inspection.contexts, sums.reshape(*shape, -1), scored.reshape(shape), inspection.problem_A
    )


def localise(inspection: Inspection, *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Compute all measures per context, and their differences between every two contexts.

    Intervals: percentiles over problems drawn with replacement, the same draws for all contexts. A
    difference is over the answers that both contexts have.
    """
    table = sum_tokens(inspection)
    contexts = {
        name: {
            "tells": REVEALS.get(name, "unknown"),
            "answers": int(table.scored_CA[index].sum()),
            **_nested(_measured(table, index, resamples)),
            "verbatim": _verbatim(inspection, table, index, resamples),
            "aligned": aligned(inspection, index, resamples=resamples),
        }
        for index, name in enumerate(table.contexts)
        if table.scored_CA[index].any()
    }
    return {
        "units": UNITS,
        "denied_below": DENIED,
        "resamples": resamples,
        "problems": inspection.num_problems,
        "answers": len(inspection.answers),
        "with_first_error": int((inspection.first_error_A >= 0).sum()),
        "without_error": int(inspection.sound_A.sum()),
        "contexts": contexts,
        "paired": _paired(table, resamples),
    }


def optional_estimate(interval: Interval | None) -> Estimate:
    """Return an interval in the form of results.json; None without one."""
    return None if interval is None else as_estimate(interval)


def _measured(table: TokenSums, context: int, resamples: int) -> dict[str, Estimate]:
    sums_PJ = table.by_problem(context, table.scored_CA[context])
    totals_RJ = resampled_totals(sums_PJ, resamples=resamples, seed=SEED)
    return {
        name: optional_estimate(_interval(measure, sums_PJ, totals_RJ))
        for name, measure in MEASURES.items()
    }


def _paired(table: TokenSums, resamples: int) -> dict[str, Any]:
    shown = [i for i in range(len(table.contexts)) if table.scored_CA[i].any()]
    return {
        f"{table.contexts[b]}-{table.contexts[a]}": _nested(_difference(table, b, a, resamples))
        for a, b in combinations(shown, 2)
    }


def _difference(table: TokenSums, b: int, a: int, resamples: int) -> dict[str, Estimate]:
    """Return each measure of context b minus that of context a, over the answers that both have."""
    shared_A = table.scored_CA[a] & table.scored_CA[b]
    sums = [table.by_problem(context, shared_A) for context in (b, a)]
    totals = [resampled_totals(sums_PJ, resamples=resamples, seed=SEED) for sums_PJ in sums]
    differences = {}
    for name, measure in MEASURES.items():
        value_b, value_a = (measure(sums_PJ.sum(0, keepdims=True)) for sums_PJ in sums)
        resampled_R = measure(totals[0]) - measure(totals[1])
        interval = percentile_interval((value_b - value_a).item(), resampled_R)
        differences[name] = optional_estimate(interval)
    return differences


def _nested(flat: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return ``mass.before`` as ``{"mass": {"before": …}}``."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    return nested


def aligned(
    inspection: Inspection, context: int, *, resamples: int, window: int = WINDOW
) -> dict[str, Any]:
    """Compute mean A (nats) by distance to the first token of the failing step, with intervals.

    ``offsets`` from −window to window, ``answers`` how many have a token there, and the estimates.
    """
    start_A = _error_tokens(inspection)
    chosen_N = (inspection.context_N == context) & (start_A[inspection.answer_N] >= 0)
    offset_N = inspection.position_N[chosen_N] - start_A[inspection.answer_N[chosen_N]]
    near = np.abs(offset_N) <= window
    column = offset_N[near] + window
    problem = inspection.problem_A[inspection.answer_N[chosen_N][near]]
    sums_PJ = np.zeros((inspection.num_problems, 2 * (2 * window + 1)))
    np.add.at(sums_PJ, (problem, column), 1)
    np.add.at(sums_PJ, (problem, column + 2 * window + 1), inspection.advantage_N[chosen_N][near])
    count_J, total_J = np.split(sums_PJ.sum(0), 2)
    count_RJ, total_RJ = np.split(
        resampled_totals(sums_PJ, resamples=resamples, seed=SEED), 2, axis=1
    )
    mean_J, mean_RJ = _ratio(total_J, count_J), _ratio(total_RJ, count_RJ)
    present = np.flatnonzero(count_J > 0)
    intervals = [percentile_interval(float(mean_J[j]), mean_RJ[:, j]) for j in present]
    return {
        "offsets": (present - window).tolist(),
        "answers": count_J[present].astype(int).tolist(),
        "advantage": [optional_estimate(interval) for interval in intervals],
    }


def _error_tokens(inspection: Inspection) -> np.ndarray:
    """Return the position of the first token of each answer's failing step; −1 without one, [A]."""
    starts = (
        row["step_spans"]["tokens"][row["first_error"]][0] if row["first_error"] is not None else -1
        for row in inspection.answers
    )
    return np.array(list(starts))


def _verbatim(
    inspection: Inspection, table: TokenSums, context: int, resamples: int
) -> dict[str, Any]:
    """Measure whether a context that repeats the right steps verbatim concentrates on the failing one.

    ``mean``: share of the right steps before the first error that are verbatim in the context
    (percent). ``spearman``: rank correlation, over answers, of that share with the answer's
    concentration; None where the share is the same for all. ``concentration``: pooled over answers
    of which none, some or all of the right steps are repeated.
    """
    share_A = np.array(
        [_or_nan(row["verbatim"].get(table.contexts[context])) for row in inspection.answers]
    )
    concentration_A = concentration(table.sums_CAJ[context])
    measured_A = table.scored_CA[context] & np.isfinite(share_A) & np.isfinite(concentration_A)
    bins = {"none": share_A == 0, "some": (share_A > 0) & (share_A < 1), "all": share_A == 1}
    pooled = {}
    for name, inside_A in bins.items():
        sums_PJ = table.by_problem(context, measured_A & inside_A)
        totals_RJ = resampled_totals(sums_PJ, resamples=resamples, seed=SEED)
        value = _interval(concentration, sums_PJ, totals_RJ)
        pooled[name] = {
            "answers": int((measured_A & inside_A).sum()),
            "concentration": optional_estimate(value),
        }
    problem = inspection.problem_A[measured_A]
    x, y = share_A[measured_A], concentration_A[measured_A]
    percent, both = np.stack([np.ones_like(x), 100 * x], axis=-1), _moments(ranks(x), ranks(y))
    return {
        "mean": optional_estimate(
            _clustered(percent, problem, inspection.num_problems, _mean, resamples)
        ),
        "spearman": optional_estimate(
            _clustered(both, problem, inspection.num_problems, _pearson, resamples)
        ),
        "by_share": pooled,
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the sums that a correlation needs, per answer: 1, x, y, xx, yy, xy, about the means."""
    x, y = (v - v.mean() if len(v) else v for v in (x, y))
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)


def _pearson(m: Sums) -> np.ndarray:
    n, x, y, xx, yy, xy = (m[..., i] for i in range(6))
    spread = np.maximum((n * xx - x * x) * (n * yy - y * y), 0)
    return np.where(spread > 1e-9, _ratio(n * xy - x * y, np.sqrt(spread)), np.nan)


def _mean(m: Sums) -> np.ndarray:
    return _ratio(m[..., 1], m[..., 0])


def _clustered(
    rows: np.ndarray,
    problem: np.ndarray,
    problems: int,
    statistic: Callable[[Sums], np.ndarray],
    resamples: int,
) -> Interval | None:
    sums_PJ = np.zeros((problems, rows.shape[1]))
    np.add.at(sums_PJ, problem, rows)
    totals_RJ = resampled_totals(sums_PJ, resamples=resamples, seed=SEED)
    return _interval(statistic, sums_PJ, totals_RJ)


def _interval(
    statistic: Callable[[Sums], np.ndarray], sums_PJ: np.ndarray, totals_RJ: np.ndarray
) -> Interval | None:
    here = statistic(sums_PJ.sum(0, keepdims=True)).item()
    return percentile_interval(here, statistic(totals_RJ))


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
