"""Verifiers as reward functions of TRL's signature."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from typing import Any

import pytest

from selfteach.errors import DataError, RecipeError
from selfteach.integrations import trl
from selfteach.integrations.trl import reward_func
from selfteach.tasks import chain_sums
from selfteach.types import Problem, Verdict


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TEXTS = ["<answer>5</answer>", "<answer>6</answer>", "no answer", "<think><answer>5</answer>"]
PROMPTS = ["What is 2 + 3?"] * 4


@pytest.mark.parametrize("column", ["solution", "answer", "ground_truth"])
@pytest.mark.parametrize("conversational", [True, False])
def test_rewards_of_texts_and_messages(column: str, conversational: bool) -> None:
    prompts: list[Any] = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
        if conversational
        else prompt
        for prompt in PROMPTS
    ]
    completions = [chat(text) if conversational else text for text in TEXTS]
    columns = {column: ["5"] * 4, "trainer_state": object(), "log_extra": print}
    rewards = reward_func("exact")(
        prompts=prompts, completions=completions, completion_ids=[[1]] * 4, **columns
    )
    assert rewards == [1.0, 0.0, 0.0, 0.0]


def test_a_null_answer_has_no_reward() -> None:
    rewards = reward_func()(PROMPTS[:3], TEXTS[:3], solution=["5", None, ""])
    assert rewards == [1.0, None, None]


def test_answers_in_a_box_and_mathematics() -> None:
    pytest.importorskip("math_verify")
    texts = [r"so \boxed{\frac{1}{2}}", r"so \boxed{0.5}", r"so \boxed{2}", "<answer>0.5</answer>"]
    f = reward_func("math", answer_in="boxed")
    assert f(PROMPTS, texts, solution=["0.5"] * 4) == [1.0, 1.0, 0.0, 0.0]
    worked = [r"Half of one is \boxed{\frac{1}{2}}."] * 4
    assert f(PROMPTS, texts, solution=worked) == [1.0, 1.0, 0.0, 0.0]


def test_a_verifier_of_ones_own_and_the_columns_it_needs() -> None:
    seen: list[Problem] = []

    def verify(problem: Problem, text: str) -> Verdict:
        seen.append(problem)
        return Verdict.of_final(text == "yes", text)

    f = reward_func(verify, question="task.text", answer="gold", name="mine")
    columns = {"task": [{"text": "q"}], "gold": ["5"], "problem_id": ["p7"], "meta": [{"a": 1}]}
    assert f(["p"], ["yes"], **columns) == [1.0] and f.__name__ == "mine"
    assert (seen[0].id, seen[0].question, dict(seen[0].meta)) == ("p7", "q", {"a": 1})
    assert reward_func("exact").__name__ == "exact_reward"
    assert reward_func(verify).__name__ == "verify_reward"


def test_problems_of_a_generator() -> None:
    problem = chain_sums.problem_sets(
        seed=0, min_terms=3, max_terms=3, max_digits=1, train=1, validation=1, test=1
    )[0][0]
    right = problem.references["aligned_reference"]
    columns = {"answer": [problem.answer] * 2, "meta": [dict(problem.meta)] * 2}
    rewards = reward_func("chain_sums")([problem.question] * 2, [right, "Answer: ?"], **columns)
    assert rewards == [1.0, 0.0]


def test_wrong_use_is_one_line() -> None:
    with pytest.raises(RecipeError, match="verifier = 'exakt': one of exact, math"):
        reward_func("exakt")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="answer_in = 'brackets': one of tag, boxed"):
        reward_func("exact", answer_in="brackets")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="neither a name nor a function"):
        reward_func(3)  # type: ignore[arg-type]
    with pytest.raises(
        DataError, match=r"row 0 of the batch: no column 'answer'.*'prompt', 'gold'"
    ) as e:
        reward_func()(PROMPTS, TEXTS, gold=["5"] * 4)
    assert 'answer="…"' in str(e.value) and "data.columns" not in str(e.value)
    with pytest.raises(DataError, match="a completion is a dict"):
        reward_func()(PROMPTS[:1], [{"text": "5"}], answer=["5"])


@pytest.mark.parametrize("verifier", ["exact", "math", "chain_sums", chain_sums.verify])
def test_it_can_be_pickled_for_trainers_that_score_in_processes(verifier: Any) -> None:
    if verifier == "math":
        pytest.importorskip("math_verify")
    copy = pickle.loads(pickle.dumps(reward_func(verifier, name="mine", answer="gold")))
    assert copy.__name__ == "mine"
    if isinstance(verifier, str) and verifier != "chain_sums":
        assert copy(PROMPTS, TEXTS, gold=["5"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_it_is_a_plain_function_which_trl_does_not_await() -> None:
    assert not asyncio.iscoroutinefunction(reward_func())
    assert not asyncio.iscoroutinefunction(reward_func().__call__)
    names = list(inspect.signature(reward_func()).parameters)
    assert names == ["prompts", "completions", "completion_ids", "columns"]


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trl.nothing  # type: ignore[attr-defined]
