"""Test chain sums: problem sets, checker, oracle, templates."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfteach.config.recipe import CONTEXTS
from selfteach.errors import DataError, RecipeError
from selfteach.feedback.contexts import SHARED_TEMPLATE
from selfteach.prompts.template_set import SHIPPED, TURN, Templates, conversation
from selfteach.tasks import chain_sums
from selfteach.types import Critique, CritiqueStep, Problem

pytest.importorskip("reasoning_gym")

KIND = {"min_terms": 3, "max_terms": 4, "max_digits": 2}
SIZES = {"train": 40, "validation": 10, "test": 10}


def sets(seed: int = 0, **changes: int) -> tuple[tuple[Problem, ...], ...]:
    return chain_sums.problem_sets(**{"seed": seed, **KIND, **SIZES, **changes})


relaxed = settings(deadline=None)
"""No deadline: load on the machine must not fail a test."""

PROBLEMS = [problem for split in sets() for problem in split]
NINE = Problem("nine", f"{chain_sums.PREFIX}9 - 2 + 4 - 0 =", "11", {},
               {"terms": [9, 2, 4, 0], "signs": "+-+-"})  # fmt: skip
NINE_RIGHT = "9 - 2 = 7\n7 + 4 = 11\n11 - 0 = 11\nAnswer: 11"


def trace(critique: Critique) -> str:
    return "\n".join([*(step.text for step in critique.steps), f"Answer: {critique.answer}"])


@st.composite
def answered(draw: st.DrawFn) -> tuple[Problem, str]:
    """Draw a problem and an answer that begins right and may go wrong, stop or ramble."""
    problem = draw(st.sampled_from(PROBLEMS))
    lines = problem.references["aligned_reference"].split("\n")
    for index in draw(st.lists(st.integers(0, len(lines) - 1), max_size=2)):
        lines[index] = draw(
            st.sampled_from([
                lines[index][:-1] + "x", lines[index] + "3", "so it goes", "1 + 1 = 2", "",
                "9 - 3 = 6, 6 + 1 = 7", "The answer is 12", "Answer: 1,000.50", lines[0],
            ])
        )  # fmt: skip
    return problem, "\n".join(lines[: draw(st.integers(0, len(lines)))])


# Problem sets


def test_the_same_seed_gives_the_same_problems_and_another_gives_others() -> None:
    assert sets(seed=3) == sets(seed=3)
    assert sets(seed=3) != sets(seed=4)


def test_a_larger_set_begins_with_the_smaller() -> None:
    assert sets(seed=5, train=60)[0][:40] == sets(seed=5)[0]


def test_no_two_splits_share_a_question_for_any_seeds() -> None:
    by_split = [set(), set(), set()]
    for seed in (0, 1):
        for seen, problems in zip(by_split, sets(seed=seed, max_digits=1), strict=True):
            questions = [problem.question for problem in problems]
            assert len(set(questions)) == len(questions)
            seen.update(questions)
    train, validation, test = by_split
    assert not train & validation and not train & test and not validation & test


def test_the_worked_examples_are_in_no_problem_set() -> None:
    questions = {p.question for s in sets(max_terms=3, max_digits=1, train=400) for p in s}
    assert not questions & {f"{chain_sums.PREFIX}{shot} =" for shot in chain_sums.SHOTS}


def test_running_values_stay_above_zero_unless_allowed() -> None:
    def lowest(problem: Problem) -> int:
        chain = chain_sums.parse_question(problem.question)
        return min(chain.value(count) for count in range(1, len(chain) + 1))

    assert all(lowest(problem) >= 0 for problem in PROBLEMS)
    either = chain_sums.problem_sets(seed=0, **KIND, **SIZES, allow_negative=True)
    assert any(lowest(problem) < 0 for problem in either[0])


def test_too_few_distinct_questions_raise_an_error() -> None:
    with pytest.raises(DataError, match=r"of 500 train.*request fewer"):
        sets(min_terms=2, max_terms=2, max_digits=1, train=500)


def test_without_reasoning_gym_the_error_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.arithmetic.chain_sum", None)
    with pytest.raises(DataError, match=r"selfteach\[problems\]"):
        sets()


def test_meta_survives_json() -> None:
    problem = PROBLEMS[0]
    meta = json.loads(json.dumps(problem.meta))
    again = Problem(problem.id, problem.question, problem.answer, {}, meta)
    text = problem.references["aligned_reference"]
    assert chain_sums.check(again, text) == chain_sums.check(problem, text)


def test_a_problem_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError, match="no chain sum"):
        chain_sums.critique_rollout(Problem("x", "How many?", "3"), "Answer: 3", finished=True)
    with pytest.raises(DataError, match="not a chain sum"):
        chain_sums.parse_question("2 * 3 =")


# Verifier and checker


@pytest.mark.parametrize("name", ["reference", "aligned_reference"])
def test_worked_solutions_verify_and_corrupted_ones_do_not(name: str) -> None:
    for problem in PROBLEMS:
        gold = problem.references[name]
        assert chain_sums.verify(problem, gold).correct
        corrupted = gold.replace(f"Answer: {problem.answer}", f"Answer: {int(problem.answer) + 1}")
        verdict = chain_sums.verify(problem, corrupted)
        assert verdict.formatted and not verdict.correct


def test_the_reference_is_another_derivation() -> None:
    for problem in PROBLEMS:
        lines = problem.references["reference"].split("\n")[:-1]
        assert all(line.error for line in chain_sums.check(problem, "\n".join(lines)).lines)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Answer: 11", "11"), ("9 - 2 = 7\nThe answer is 11.", "11"),
        ("**Final answer: +011**", "11"),
        ("So, the answer to this arithmetic problem is -2.", "-2"), ("Answer: 1,010.50", "1010.5"),
        ("Answer: 5\nAnswer: 6", "6"), ("Answer: −3", "-3"),
        ("11", None), ("Answer:", None), ("Answer: 7 or 8", None), ("", None),
    ],
)  # fmt: skip
def test_parsing_a_final_answer(text: str, parsed: str | None) -> None:
    verdict = chain_sums.verify(NINE, text)
    assert verdict.parsed == parsed
    assert verdict.formatted == (parsed is not None)
    assert verdict.correct == (parsed == "11")


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (NINE_RIGHT, [None] * 4),
        ("Step 1: 9-2=7\n- So 4 + 7 = 11.\n3. 11 - 0 = 11\nThe answer is 11", [None] * 4),
        ("9 - 2 + 4 - 0 = 11\nAnswer: 11", [None, None]),
        ("9 - 2 = 7, 7 + 4 = 11\n\n11 - 0 = 11", [None, None]),
        ("9 - 2 = 8\n8 + 4 = 12", ["value", "operands"]),
        ("9 - 2 = 8\n9 - 2 = 7", ["value", None]),
        ("9 - 2 = 7 + 4 = 11", ["form"]),
        ("9 - 2 = 7.5", ["value"]),
        ("9 + 2 = 11", ["operands"]),
        ("2 - 9 = 7", ["operands"]),
        ("9 - 2 = 7\n7 + 4 = 11\n11 - 0 = 11\n11 - 1 = 10", [None, None, None, "operands"]),
        ("I love numbers\nAnswer: 10", ["form", "value"]),
        ("9 - 2 = 7 (nope)", ["form"]),
        ("9 - 2 =", ["form"]),
    ],
)  # fmt: skip
def test_checking_lines(text: str, errors: list[str | None]) -> None:
    assert [line.error for line in chain_sums.check(NINE, text).lines] == errors


@relaxed
@given(st.text("ab 1+=\n\r\t", max_size=40))
def test_spans_partition_the_lines_of_a_text(text: str) -> None:
    spans = chain_sums.split_spans(text)
    covered = [i for start, end in spans for i in range(start, end)]
    assert covered == sorted(set(covered))
    assert all(not text[i].strip() for i in set(range(len(text))) - set(covered))
    assert all(text[start:end].strip() and "\n" not in text[start:end] for start, end in spans)


@relaxed
@given(answered())
def test_a_critique_counts_errors_in_the_splitters_spans(case: tuple[Problem, str]) -> None:
    problem, text = case
    spans = chain_sums.split_spans(text)
    lines = chain_sums.check(problem, text).lines
    assert [text[start:end].strip() for start, end in spans] == [line.text for line in lines]


# Oracle


@pytest.mark.parametrize(
    ("text", "finished", "case", "first_error", "statuses"),
    [
        (NINE_RIGHT, True, "A", None, ["kept"] * 3),
        ("Answer: 11", True, "B", None, ["new"] * 3),
        ("9 - 2 = 7\nAnswer: 11", True, "B", None, ["kept", "new", "new"]),
        ("9 - 2 = 7\n7 + 4 =", False, "C", 1, ["kept", "fixed", "new"]),
        ("9 - 2 = 7\n7 + 4 = 12\n12 - 0 = 12\nAnswer: 12", True, "D", 1, ["kept", "fixed", "new"]),
        ("9 - 2 = 7\nAnswer: 7", True, "D", 1, ["kept", "new", "new"]),
        ("9 - 2 = 7", True, "D", None, ["kept", "new", "new"]),
        ("9 - 2 = 6\n7 + 4 = 11\n11 - 0 = 11\nAnswer: 11", True, "D", 0, ["fixed", "new", "new"]),
        ("", True, "D", None, ["new"] * 3),
    ],
)  # fmt: skip
def test_cases(
    text: str, finished: bool, case: str, first_error: int | None, statuses: list[str]
) -> None:
    critique = chain_sums.critique_rollout(NINE, text, finished=finished)
    assert (critique.case, critique.first_error) == (case, first_error)
    assert [step.status for step in critique.steps] == statuses
    assert trace(critique) == NINE_RIGHT


def test_a_fixed_step_holds_the_solvers_words_beside_the_right_ones() -> None:
    critique = chain_sums.critique_rollout(NINE, "9 - 2 = 5\nAnswer: 5", finished=True)
    assert critique.steps[0] == CritiqueStep("9 - 2 = 7", "fixed", "9 - 2 = 5")


@relaxed
@given(st.sampled_from(PROBLEMS))
def test_the_critique_of_a_right_answer_reproduces_it(problem: Problem) -> None:
    text = problem.references["aligned_reference"]
    critique = chain_sums.critique_rollout(problem, text, finished=True)
    assert critique.case == "A" and trace(critique) == text


@relaxed
@given(answered(), st.booleans())
def test_the_trace_keeps_the_right_prefix_and_ends_right(
    case: tuple[Problem, str], finished: bool
) -> None:
    problem, text = case
    critique = chain_sums.critique_rollout(problem, text, finished=finished)
    checked = chain_sums.check(problem, text)
    prefix = [line.text for line in checked.lines[: checked.first_error] if not line.is_answer]
    repeated = [step for step in critique.steps if step.status == "kept"]
    assert [step.text for step in repeated] == prefix == [step.original for step in repeated]
    assert all(line in text for line in prefix)
    assert critique.answer == problem.answer
    again = chain_sums.critique_rollout(problem, trace(critique), finished=True)
    assert again.case == "A" and trace(again) == trace(critique)


@relaxed
@given(answered(), st.integers(0, 2**32 - 1))
def test_a_critic_that_errs_writes_a_wrong_trace(case: tuple[Problem, str], seed: int) -> None:
    problem, text = case
    rng = np.random.default_rng(seed)
    critique = chain_sums.critique_rollout(problem, text, finished=True, error_rate=1.0, rng=rng)
    assert critique.answer != problem.answer
    checked = chain_sums.check(problem, trace(critique))
    assert checked.first_error is not None
    assert all(line.error is None for line in checked.lines[: checked.first_error])


def test_a_critic_errs_at_the_error_rate() -> None:
    rng = np.random.default_rng(0)
    answers = [
        chain_sums.critique_rollout(NINE, NINE_RIGHT, finished=True, error_rate=0.3, rng=rng).answer
        for _ in range(500)
    ]
    share = sum(answer != NINE.answer for answer in answers) / 500
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 500) ** 0.5


# Templates

WRONG = chain_sums.critique_rollout(NINE, "9 - 2 = 7\n7 + 4 = 12\nAnswer: 12", finished=True)
NAMES = [SHARED_TEMPLATE.get(name, name) for name in CONTEXTS if name != "none"]


@pytest.mark.parametrize("templates", ["chain_sums", "steps", "lab"])
@pytest.mark.parametrize("name", NAMES)
def test_every_context_renders_and_is_shown_to_the_teacher(templates: str, name: str) -> None:
    shown = Templates(templates)
    assert (SHIPPED / templates / f"{name}.jinja").exists()
    references = {"reference": "by another way", "aligned_reference": "by the same way"}
    context = shown.context(name, critique=WRONG, references=references, correct=False)
    assert context
    prompt = shown.render("teacher", question=NINE.question, context=context)
    assert context in prompt and NINE.question in prompt


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("step_aligned", NINE_RIGHT),
        ("full_repetition", "9 - 2 = 7\n7 + 4 = 12 is wrong:\n7 + 4 = 11\n11 - 0 = 11\nAnswer: 11"),
        ("omission", "Line 1 is right.\n7 + 4 = 11\n11 - 0 = 11\nAnswer: 11"),
        ("holistic", "The attempt is wrong.\nAnswer: 11"),
        ("answer_only", "Answer: 11"),
    ],
)
def test_the_text_of_each_context(name: str, text: str) -> None:
    shown = Templates("chain_sums")
    assert shown.context(name, critique=WRONG, references={}, correct=False) == text


def test_a_reference_that_is_missing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="reference"):
        Templates("chain_sums").context("reference", critique=None, references={}, correct=False)


@pytest.mark.parametrize("name", ["solver", "teacher"])
def test_the_worked_examples_are_right_and_as_declared(name: str) -> None:
    prompt = Templates("chain_sums").render(name, question="Q?", context="C")
    turns = conversation(prompt)
    assert [turn["role"] for turn in turns[:2]] == ["user", "assistant"]
    questions = [turn["content"].removeprefix(chain_sums.PREFIX) for turn in turns[:-1:2]]
    shots = [text.splitlines()[0] for text in questions]  # the teacher's context follows
    assert shots == [f"{shot} =" for shot in chain_sums.SHOTS]
    for shot, reply in zip(shots, turns[1::2], strict=True):
        chain = chain_sums.parse_question(shot)
        meta = {"terms": chain.terms, "signs": chain.signs}
        problem = Problem("shot", shot, str(chain.value()), {}, meta)
        assert chain_sums.critique_rollout(problem, reply["content"], finished=True).case == "A"
    question, *context = turns[-1]["content"].splitlines()
    assert question == "Q?" and ("C" in context) == (name == "teacher")


def test_student_and_teacher_answer_after_the_same_examples() -> None:
    shown = Templates("chain_sums")
    solver = conversation(shown.render("solver", question="Q?"))
    teacher = conversation(shown.render("teacher", question="Q?", context="C"))
    assert solver[1::2] == teacher[1::2]


def test_a_conversation_ends_with_the_user() -> None:
    with pytest.raises(RecipeError, match="turn must be the user's"):
        conversation(f"question{TURN}answer")
