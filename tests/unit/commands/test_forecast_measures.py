"""The measures of a forecast and its verdict, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from inspections import answer, write

from selfteach.analysis.inspection.inspection_data import read_inspection
from selfteach.commands.forecast import measures, verdict
from selfteach.commands.forecast.step_cost import MeanLengths, step_cost
from selfteach.commands.forecast.verdict import decide
from selfteach.config.recipe import Recipe
from selfteach.evaluation.statistics import Interval

NAN = float("nan")


def table(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=bool)


def test_a_share_counts_rollouts_among_those_that_qualify() -> None:
    correct = table([1, 0], [0, 0])
    share = measures.share(correct)
    assert share is not None and share.mean == 25 and share.low == 0 and share.high == 50
    among = measures.share(correct, table([1, 0], [0, 1]))
    assert among is not None and among.mean == 50
    assert measures.share(correct, table([0, 0], [0, 0])) is None


def test_mixed_groups_are_subsets_of_the_rollouts_where_there_are_enough() -> None:
    # k = 4, G = 2. One right: 1 - C(3,2)/6 = 1/2. Two right: 1 - (1 + 1)/6 = 2/3.
    mixed = measures.mixed_groups(table([1, 0, 0, 0], [1, 1, 0, 0]), 2)
    assert mixed is not None and mixed.mean == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert measures.is_unbiased(4, 4) and not measures.is_unbiased(4, 5)


def test_mixed_groups_are_draws_at_the_problems_rate_where_there_are_too_few() -> None:
    # k = 2, G = 4. One right of two: 1 - 2/16. None: 0.
    mixed = measures.mixed_groups(table([1, 0], [0, 0]), 4)
    assert mixed is not None and mixed.mean == pytest.approx(100 * 0.875 / 2)


def test_no_right_rollout_leaves_as_many_mixed_groups_as_so_few_draws_allow() -> None:
    mixed = measures.mixed_groups(np.zeros((24, 4), dtype=bool), 8)
    rate = 1 - 0.025 ** (1 / 96)  # missed in 96 draws with probability 0.025
    assert mixed is not None and mixed.mean == 0 and mixed.low == 0
    assert mixed.high == pytest.approx(100 * (1 - (1 - rate) ** 8 - rate**8))
    every = measures.mixed_groups(np.ones((24, 4), dtype=bool), 8)
    assert every is not None and every.high == pytest.approx(mixed.high)


def test_the_edge_compares_the_teacher_with_the_other_rollouts_of_the_problem() -> None:
    correct = table([1, 0], [0, 0])
    teacher = np.array([[1.0, 1.0], [1.0, NAN]])
    # Against the other rollout: 1 - 0, 1 - 1, 1 - 0; the last has no context.
    edge = measures.edge(teacher, correct)
    assert edge is not None and edge.mean == pytest.approx(200 / 3)
    wrong = measures.edge(teacher, correct, wrong_only=True)
    assert wrong is not None and wrong.mean == pytest.approx(50)
    assert measures.edge(np.full((2, 2), NAN), correct) is None


def test_a_teacher_that_answers_like_the_policy_has_no_edge_on_wrong_rollouts() -> None:
    """Choosing wrong rollouts does not lower the policy's side."""
    rng = np.random.default_rng(0)
    correct = rng.random((600, 4)) < 0.3
    teacher = (rng.random((600, 4)) < 0.3).astype(float)
    edge = measures.edge(teacher, correct, wrong_only=True)
    assert edge is not None and edge.low < 0 < edge.high and abs(edge.mean) < 5


def test_equal_problems_leave_an_interval_as_wide_as_their_number() -> None:
    edge = measures.edge(np.zeros((10, 2)), np.zeros((10, 2), dtype=bool))
    width = 100 * (1 - 0.025**0.1)
    assert edge is not None and edge.mean == 0
    assert (edge.low, edge.high) == pytest.approx((-width, width))
    share = measures.share(np.ones((10, 2), dtype=bool))
    assert share is not None
    assert (share.low, share.mean, share.high) == pytest.approx((100 - width, 100, 100))


def test_token_measures_of_a_context(tmp_path: Path) -> None:
    # Five steps of one token, the last the final answer; the second is wrong.
    rows = [answer("p", [0, 1, 2, 3, 4], first_error=1, correct=False)]
    kinds = {0: ["style", "task", "style", "task", "other"]}
    folder = write(tmp_path, ["c"], rows, {(0, "c"): [-1, -4, 1, 2, 2]}, kinds=kinds)
    measured = measures.token_measures(
        read_inspection(folder), np.array([0.1, 0.2, 0.3, 0.4, 0.5]), "c"
    )
    end = measured["end_mass"]
    # One problem shows next to nothing: missed with probability 0.025 in one draw.
    assert end is not None and (end.low, end.high) == (0, 100)
    means = {name: value.mean for name, value in measured.items() if value is not None}
    assert means == pytest.approx(
        {
            "divergence": 0.3,
            "contrast": 4.0,  # 4 on the failing step, 1 on the right one before it
            "failing_mass": 40.0,  # 4 of 10
            "end_mass": 40.0,  # the last step and the final answer: 2 + 2 of 10
            "style_leak": 1 / 3,  # mean of 1 and 1, over mean of 4 and 2
        }
    )


def test_a_short_rollout_has_no_end_of_its_own(tmp_path: Path) -> None:
    rows = [answer("p", [0, 1, 2], first_error=1, correct=False)]
    folder = write(tmp_path, ["c"], rows, {(0, "c"): [-1, -4, 1]})
    assert measures.token_measures(read_inspection(folder), np.zeros(3), "c")["end_mass"] is None


GOOD = {
    "divergence": Interval(0.1, 0.1, 0.1),
    "shown": Interval(100, 86, 100),
    "end_mass": Interval(10, 8, 12),
    "edge_on_wrong": Interval(30, 20, 40),
}


@pytest.mark.parametrize(
    ("changed", "outcome", "reason"),
    [
        ({}, "can", "right more often"),
        ({"edge_on_wrong": Interval(3, 0.1, 5.1)}, "can", "right more often"),
        ({"edge_on_wrong": Interval(3, 0, 6)}, "undecided", "may be nothing"),
        ({"edge_on_wrong": Interval(1, -2, 4.9)}, "cannot", "no more often than the policy"),
        ({"edge_on_wrong": Interval(3, 1, 4.9)}, "cannot", "no more often"),
        ({"edge_on_wrong": None, "edge": Interval(9, 1, 20)}, "can", "right more often than the"),
        ({"edge_on_wrong": None}, "undecided", "no rollout has a context"),
        ({"divergence": Interval(0, 0, 9e-5)}, "cannot", "predicts what the student predicts"),
        ({"shown": Interval(10, 5, 9.9)}, "cannot", "a context for 1 in 10 rollouts"),
        ({"shown": Interval(10, 5, 15)}, "undecided", "a context for 1 in 10 rollouts"),
        ({"shown": Interval(0, 0, 9)}, "cannot", "none of the rollouts"),
        ({"shown": Interval(12, 10, 15)}, "can", "right more often"),
        ({"end_mass": Interval(90, 76, 99)}, "cannot", "90 % of what the context changes"),
        ({"end_mass": Interval(78, 70, 85)}, "undecided", "the last step"),
        ({"end_mass": Interval(60, 45, 75)}, "can", "right more often"),
        ({"end_mass": None}, "can", "right more often"),
    ],
)
def test_the_verdict_on_an_arm_that_distills(
    changed: dict[str, Interval | None], outcome: str, reason: str
) -> None:
    decided, reasons = decide({**GOOD, **changed}, distills=True, rewards=False)
    assert decided == outcome
    assert any(reason in text for text in reasons), reasons


@pytest.mark.parametrize(
    ("mixed", "outcome", "reason"),
    [
        (Interval(0, 0, 4.9), "cannot", "no group has mixed outcomes"),
        (Interval(2, 0, 4.9), "cannot", "1 in 50 groups have mixed outcomes"),
        (Interval(0, 0, 26), "undecided", "weak or uncertain"),
        (Interval(30, 20, 40), "undecided", "weak or uncertain"),
        (Interval(30, 20.1, 40), "can", "GRPO has a signal"),
    ],
)
def test_the_verdict_on_grpo(mixed: Interval, outcome: str, reason: str) -> None:
    verdict_of_arm, reasons = decide({"mixed_groups": mixed}, distills=False, rewards=True)
    assert verdict_of_arm == outcome and reason in reasons[0]


def test_a_hybrid_objective_teaches_if_one_of_its_terms_does() -> None:
    none_mixed = {"mixed_groups": Interval(0, 0, 1)}
    assert decide({**GOOD, **none_mixed}, distills=True, rewards=True)[0] == "can"
    no_edge = {**GOOD, "edge_on_wrong": Interval(0, -3, 3), **none_mixed}
    assert decide(no_edge, distills=True, rewards=True)[0] == "cannot"


def test_the_reason_for_few_contexts_names_what_stands_in_the_way() -> None:
    measured = {**GOOD, "shown": Interval(5, 2, 8)}
    _, reasons = decide(measured, distills=True, rewards=False, obstacle="malformed")
    assert reasons == ["the teacher has a context for 1 in 20 rollouts (mostly: malformed)"]


def test_only_predictive_measures_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "PREDICTIVE", ("edge_on_wrong",))
    measured = {**GOOD, "end_mass": Interval(90, 80, 99)}
    assert decide(measured, distills=True, rewards=False)[0] == "can"


def test_the_cost_of_a_step_scales_rates_to_its_rollouts_and_tokens() -> None:
    recipe = Recipe.model_validate(
        {
            "context": {"type": "step_aligned"},
            "critic": {"type": "oracle"},
            "train": {"problems_per_step": 2, "group_size": 3, "num_iterations": 2, "steps": 5},
        }
    )
    rates = {"sampling": 0.5, "critique": 2.0, "training": 0.1, "scoring": 0.01}
    cost = step_cost(recipe, MeanLengths(10, 20, 30), rates, share_shown=0.5)
    assert cost == pytest.approx(
        {
            "rollouts": 6,
            "tokens_sampled": 120,
            "tokens_student": 2 * 6 * 30,
            "tokens_teacher": 2 * 6 * 0.5 * 50,
            "seconds_sampling": 60,
            "seconds_critique": 12,
            "seconds_learning": 2 * (180 * 0.1 + 150 * 0.01),
            "seconds": 60 + 12 + 39,
            "steps": 5,
        }
    )
    unknown = step_cost(
        recipe, MeanLengths(10, 20, 30), {**rates, "critique": None}, share_shown=0.5
    )
    assert unknown["seconds_critique"] is None and unknown["seconds"] is None
