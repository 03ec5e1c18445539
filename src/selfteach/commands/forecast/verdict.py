"""Decide from its measures whether an arm can be expected to teach: the rule of ``docs/forecast.md``.

Each check looks at one measure's interval and returns a finding. Distillation teaches if all its checks
pass, GRPO if its groups are mixed; a hybrid objective teaches if one of its terms does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from selfteach.commands.forecast.measures import Estimates
from selfteach.evaluation.statistics import Interval

Outcome = Literal["can", "cannot", "undecided"]

WORDS: dict[Outcome, str] = {
    "can": "can be expected to teach",
    "cannot": "cannot",
    "undecided": "undecided",
}

SMALL_EDGE = 5.0
"""Points: a teacher whose edge is below this has too little to teach."""
FEW_SHOWN = 10.0
"""Percent of rollouts: an arm whose teacher sees a context for fewer has too few to learn from."""
FEW_MIXED = 5.0
"""Percent of groups: GRPO with fewer mixed groups has too few to learn from."""
ENOUGH_MIXED = 20.0
"""Percent of groups: GRPO with more mixed groups has a signal."""
END_ALONE = 75.0
"""Percent of |A|: a context with more of it on the answer and the last step shows no way there."""
NO_DIVERGENCE = 1e-4
"""Nats per token: below this the teacher is the student, up to rounding."""

PREDICTIVE: tuple[str, ...] = (
    "divergence",
    "shown",
    "end_mass",
    "edge_on_wrong",
    "mixed_groups",
)
"""Measures that the verdict uses, in the order of its reasons; ``experiments/forecast`` says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Holds what one measure says about an arm, with the reason in words."""

    outcome: Outcome
    reason: str


def decide(
    measures: Estimates, *, distills: bool, rewards: bool, obstacle: str = ""
) -> tuple[Outcome, list[str]]:
    """Return the verdict on an arm, and the reasons for it.

    ``distills`` and ``rewards`` say which terms its objective has (distillation, GRPO); ``obstacle``
    names the most frequent reason for which a rollout has no context.
    """
    verdicts = []
    if distills:
        verdicts.append(_combine([check(measures, obstacle) for check in _used(DISTILLATION)]))
    if rewards:
        verdicts.append(_combine([check(measures, obstacle) for check in _used(GRPO)]))
    outcomes = [outcome for outcome, _ in verdicts]
    for outcome in ("can", "undecided", "cannot"):
        if outcome in outcomes:
            reasons = [reason for o, texts in verdicts if o == outcome for reason in texts]
            return outcome, reasons
    return "undecided", ["its objective has no term that this rule covers"]


def _combine(findings: Sequence[Finding | None]) -> tuple[Outcome, list[str]]:
    """Return the worst finding, with its reasons; a measure that does not apply is left out."""
    present = [finding for finding in findings if finding is not None]
    for outcome in ("cannot", "undecided", "can"):
        reasons = [f.reason for f in present if f.outcome == outcome and f.reason]
        if any(f.outcome == outcome for f in present):
            return outcome, reasons[:1] if outcome == "cannot" else reasons
    return "undecided", ["nothing could be measured"]


def divergence(measures: Estimates, _obstacle: str) -> Finding | None:
    """Object if the teacher's distribution is the student's."""
    value = measures.get("divergence")
    if value is None or value.high >= NO_DIVERGENCE:
        return None
    return Finding(
        "cannot", "the teacher predicts what the student predicts: the loss and its gradient are 0"
    )


def shown(measures: Estimates, obstacle: str) -> Finding | None:
    """Object if few rollouts have a context."""
    value = measures.get("shown")
    if value is None or value.low >= FEW_SHOWN:
        return None
    outcome: Outcome = "cannot" if value.high < FEW_SHOWN else "undecided"
    why = f" (mostly: {obstacle})" if obstacle else ""
    return Finding(outcome, f"the teacher has a context for {_of_all(value)} rollouts{why}")


def end_mass(measures: Estimates, _obstacle: str) -> Finding | None:
    """Object if the context changes little before the last step and the final answer."""
    value = measures.get("end_mass")
    if value is None or value.high <= END_ALONE:
        return None
    outcome: Outcome = "cannot" if value.low > END_ALONE else "undecided"
    return Finding(
        outcome,
        f"{value.mean:.0f} % of what the context changes is the last step and the final answer, which "
        "the student cannot reach without the steps before",
    )


def edge_on_wrong(measures: Estimates, _obstacle: str) -> Finding:
    """Compare the teacher's own answers with the policy's, where the policy was wrong.

    Without a wrong rollout that has a context it compares them on all rollouts.
    """
    value, where = measures.get("edge_on_wrong"), " where the policy was wrong"
    if value is None:
        value, where = measures.get("edge"), ""
    if value is None:
        return Finding("undecided", "no rollout has a context, so the teacher's edge is not known")
    points = f"{value.mean:+.0f} points [{value.low:.0f}, {value.high:.0f}]"
    if value.high < SMALL_EDGE:
        return Finding(
            "cannot",
            f"with the context in view the teacher is right no more often than the policy{where} "
            f"({points})",
        )
    if value.low > 0:
        return Finding(
            "can",
            f"with the context in view the teacher is right more often than the policy{where} "
            f"({points})",
        )
    return Finding(
        "undecided", f"the teacher's edge{where} may be nothing ({points}): sample more problems"
    )


def mixed_groups(measures: Estimates, _obstacle: str) -> Finding:
    """Count the groups in which GRPO has anything to compare."""
    value = measures.get("mixed_groups")
    if value is None:
        return Finding("undecided", "no group was sampled")
    if value.high < FEW_MIXED:
        return Finding(
            "cannot", "no group has mixed outcomes: GRPO has nothing to learn from"
            if value.mean == 0
            else f"{_of_all(value)} groups have mixed outcomes: GRPO has next to nothing to learn from",
        )  # fmt: skip
    share = (
        f"{value.mean:.0f} % of the groups have mixed outcomes [{value.low:.0f}, {value.high:.0f}]"
    )
    if value.low > ENOUGH_MIXED:
        return Finding("can", f"{share}: GRPO has a signal")
    return Finding("undecided", f"{share}: GRPO's signal is weak or uncertain")


Check = Callable[[Estimates, str], Finding | None]

DISTILLATION: dict[str, Check] = {
    "divergence": divergence,
    "shown": shown,
    "end_mass": end_mass,
    "edge_on_wrong": edge_on_wrong,
}
"""Checks of an arm that distills, by measure."""
GRPO: dict[str, Check] = {"mixed_groups": mixed_groups}
"""Checks of an arm with rewards, by measure."""


def _used(checks: dict[str, Check]) -> list[Check]:
    return [checks[name] for name in PREDICTIVE if name in checks]


def _of_all(value: Interval) -> str:
    """Format a small share as ``1 in 12``."""
    return "none of the" if value.mean == 0 else f"1 in {100 / value.mean:.0f}"
