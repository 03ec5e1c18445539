"""Generated functions: distinct by split, with tests that worked solutions pass and others fail."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from selfteach.config.code_section import CodeConfig
from selfteach.config.data_section import CodeTasksData
from selfteach.errors import DataError
from selfteach.tasks.code.code_mutations import mutants
from selfteach.tasks.code.code_oracle import SOLUTIONS, CodeOracle
from selfteach.tasks.code.code_pool import CodePool
from selfteach.tasks.code.code_steps import code_steps
from selfteach.tasks.code.code_tests import KEY, read_tests
from selfteach.tasks.code.code_verifier import CodeVerifier
from selfteach.tasks.code.generator.code_tasks import problem_sets, shared_templates
from selfteach.tasks.code.generator.function_templates import LEVELS, function_templates
from selfteach.tasks.task import describe_problems, load_task
from selfteach.types import Critique, Problem


def data(**settings: object) -> CodeTasksData:
    sizes = {"train": 40, "validation": 10, "test": 10}
    return CodeTasksData.model_validate({"type": "code_tasks", **sizes, **settings})


@pytest.fixture(scope="module")
def one_of_each() -> list[Problem]:
    problems = {}
    for problem in problem_sets(data(train=400))[0]:
        problems.setdefault(problem.meta["template"], problem)
    assert len(problems) == len(function_templates()) >= 30
    return [*problems.values()]


def test_problems_depend_on_the_section_alone_and_splits_share_none() -> None:
    splits = problem_sets(data())
    assert splits == problem_sets(data()) != problem_sets(data(seed=1))
    questions = [{problem.question for problem in split} for split in splits]
    assert [len(split) for split in questions] == [40, 10, 10]
    other = [{p.question for p in split} for split in problem_sets(data(seed=1))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not questions[first] & (questions[second] | other[second])
    same = {p.question: p for split in problem_sets(data(seed=1, train=200)) for p in split}
    for problem in splits[0]:
        twin = same.get(problem.question, problem)
        assert (twin.meta, twin.answer) == (problem.meta, problem.answer)
    assert shared_templates(splits).endswith("no question is")


def test_levels_are_graded_and_drawn_equally() -> None:
    levels = Counter(problem.meta["level"] for problem in problem_sets(data(train=200))[0])
    assert set(levels) == set(LEVELS) and min(levels.values()) > 30
    lengths = {
        level: [len(code_steps(s)) for t in function_templates() if t.level == level
                for s in t.solutions[:1]]
        for level in LEVELS
    }  # fmt: skip
    means = [sum(values) / len(values) for values in lengths.values()]
    assert means == sorted(means)
    few = {"train": 12, "validation": 1, "test": 1, "functions": ("limited", "turned", "in_base")}
    only = problem_sets(data(min_level=2, max_level=2, **few))
    assert {problem.meta["template"] for problem in only[0]} == {"limited", "turned"}


def test_tests_are_hidden_and_of_several_values(one_of_each: list[Problem]) -> None:
    for problem in one_of_each:
        tests = problem.meta[KEY]
        assert isinstance(tests, dict) and len(tests["cases"]) == 10, problem.question
        assert read_tests({"tests": tests["cases"]}, CodeConfig()) == tests
        example = problem.question.split("For example, `")[1].split("` returns")[0]
        arguments = [ast.literal_eval(one) for one in ast.parse(example).body[0].value.args]  # type: ignore[attr-defined]
        assert arguments not in [case["args"] for case in tests["cases"]]
        assert len({repr(case["expected"]) for case in tests["cases"]}) >= 3, problem.question


EVERY = [pytest.param(1, marks=pytest.mark.slow), 5]
"""All functions, and each fifth of them."""


@pytest.mark.parametrize("every", EVERY)
def test_all_worked_solutions_pass_the_tests(
    one_of_each: list[Problem], any_pool: CodePool, every: int
) -> None:
    problems = one_of_each[::every]
    programs = [(p, code) for p in problems for code in p.meta[SOLUTIONS]]  # type: ignore[attr-defined]
    outcomes = any_pool.run_all([(p.meta[KEY], code) for p, code in programs])  # type: ignore[misc]
    for (problem, code), outcome in zip(programs, outcomes, strict=True):
        assert outcome["kind"] == "passed", (problem.question, code, outcome)
    assert all(len(set(problem.meta[SOLUTIONS])) >= 2 for problem in problems)  # type: ignore[call-overload]


@pytest.mark.parametrize("every", EVERY)
def test_wrong_variants_fail(one_of_each: list[Problem], any_pool: CodePool, every: int) -> None:
    wrong = []
    for problem in one_of_each[::every]:
        lines = problem.answer.split("\n")
        changed = [(i, m) for i, line in enumerate(lines) for m in mutants(line)]
        for index, mutant in changed[:: max(1, len(changed) // 3)]:
            wrong.append((problem, "\n".join([*lines[:index], mutant, *lines[index + 1 :]])))
    outcomes = any_pool.run_all([(p.meta[KEY], code) for p, code in wrong])  # type: ignore[misc]
    failed = Counter(
        p.id for (p, _), outcome in zip(wrong, outcomes, strict=True) if outcome["kind"] != "passed"
    )
    assert set(failed) == {problem.id for problem in one_of_each[::every]}
    assert sum(failed.values()) >= 0.8 * len(wrong)  # some changes change nothing


@pytest.mark.slow
def test_the_oracle_corrects_wrong_variants(one_of_each: list[Problem], any_pool: CodePool) -> None:
    oracle = CodeOracle(CodeVerifier(pool=any_pool))
    right = tried = 0
    for problem in one_of_each[::2]:
        lines = problem.answer.split("\n")
        changed = [(i, m) for i, line in enumerate(lines) for m in mutants(line)]
        for index, mutant in changed[:: max(1, len(changed) // 2)]:
            code = "\n".join([*lines[:index], mutant, *lines[index + 1 :]])
            critique = oracle(problem, code, finished=True)
            if isinstance(critique, Critique) and critique.case == "A":
                continue  # a change that changes nothing
            tried += 1
            if isinstance(critique, Critique):
                right += critique.first_error == index - lines[:index].count("")
    assert tried >= 30 and right >= 0.9 * tried, (right, tried)


def test_a_recipe_can_name_generated_functions() -> None:
    try:
        task = load_task(data(train=8, validation=2, test=2, code={"workers": 1}), "")
    except DataError as error:
        pytest.skip(str(error))
    assert (task.templates, task.split_steps) == ("code", code_steps)
    assert isinstance(task.oracle, CodeOracle) and isinstance(task.verify, CodeVerifier)
    lines = [*describe_problems(task)]
    assert any("misjudges 0 of the problems" in line for line in lines), lines
    assert any("templates of functions" in line for line in lines)
    problem = task.train[0]
    reference = problem.references["aligned_reference"]
    critique = task.oracle(problem, reference, finished=True, error_rate=0.0, rng=None)  # type: ignore[arg-type]
    assert isinstance(critique, Critique) and critique.case == "A"
    task.verify.process.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"functions": ["sort_all"]}, "no function 'sort_all' is generated; there are cells_after"),
        ({"min_level": 3, "max_level": 2}, "data.min_level = 3 is larger"),
        ({"functions": ["limited"], "max_level": 1}, "none of them has a level from 1 to 1"),
        ({"functions": ["every_few"]}, "too few distinct questions .* of 40 train"),
    ],
)
def test_a_section_that_cannot_be_generated_is_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        problem_sets(data(**settings))


def test_generated_problems_have_no_columns() -> None:
    with pytest.raises(ValueError, match=r"data\.code\.prelude names a column"):
        data(code={"prelude": "prompt"})
