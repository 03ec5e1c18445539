"""Contexts and the oracle critic: what the self-teacher is shown, and why it is shown nothing."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from selfteach.config.recipe import CONTEXTS
from selfteach.feedback.contexts import (
    FallbackContext,
    NoContext,
    PartlyAlignedContext,
    TemplateContext,
)
from selfteach.feedback.critics.oracle import OracleCritic
from selfteach.prompts.template_set import Templates
from selfteach.runtime.seeds import hashed_rng
from selfteach.tasks import verifiers
from selfteach.tasks.lab import lab_task
from selfteach.tasks.lab.alignment_dial import partly_aligned
from selfteach.tasks.lab.world import STYLES, World, text_of
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, Problem, Rollout, Verdict

WORLD = World()
PROBLEMS = lab_task.problems(WORLD, "train", 3)


def rollout(problem: Problem, text: str, sample: int = 0) -> Rollout:
    return Rollout(problem, sample, (1,), (5,), (-0.5,), text, True, 0)


def wrong_answer(problem: Problem, style: str = "minus", at: int = 2) -> str:
    """The true solution with another value in one line (and everything after it left as it was)."""
    lines = WORLD.solution(problem.question.split(), STYLES[style])
    texts = [str(line) for line in lines]
    texts[at] = texts[at][:-1] + ("a" if lines[at].c != "a" else "b")
    return "\n".join([*texts, "# p"])


def right_answer(problem: Problem, style: str = "plus") -> str:
    return text_of(WORLD.solution(problem.question.split(), STYLES[style]), problem.answer)


def critiqued(problem: Problem, sample: int = 0, text: str | None = None) -> CritiquedRollout:
    answer = rollout(problem, text or wrong_answer(problem), sample)
    verdict = lab_task.StepVerifier(WORLD)(problem, answer.text)
    (critique,) = OracleCritic(lab_task.Oracle(WORLD), error_rate=0.0, seed=0)([(answer, verdict)])
    return CritiquedRollout(answer, verdict, critique)


def context(name: str) -> TemplateContext:
    return TemplateContext(name, Templates("lab"), seed=0)


def show(name: str, *answers: CritiquedRollout) -> list[str | CritiqueFailure]:
    return context(name)(answers)


def test_step_aligned_keeps_the_right_steps_and_never_quotes_the_wrong_one() -> None:
    answer = critiqued(PROBLEMS[0])
    (shown,) = show("step_aligned", answer)
    assert isinstance(shown, str)
    attempt, lines = answer.rollout.text.splitlines(), shown.splitlines()
    assert lines[:2] == attempt[:2]
    assert "!" in lines[2] and attempt[2] not in shown
    assert lines[-1] == f"# {PROBLEMS[0].answer}"


def test_full_repetition_quotes_the_wrong_step_before_the_correction() -> None:
    answer = critiqued(PROBLEMS[0])
    (shown,) = show("full_repetition", answer)
    assert isinstance(shown, str)
    lines = shown.splitlines()
    assert lines[2] == answer.rollout.text.splitlines()[2] and "!" in lines[3]


def test_omission_repeats_no_right_step() -> None:
    answer = critiqued(PROBLEMS[0])
    (shown,) = show("omission", answer)
    assert isinstance(shown, str)
    attempt = answer.rollout.text.splitlines()
    assert [line.split()[1] for line in shown.splitlines()[:2]] == ["ok", "ok"]
    assert attempt[0] not in shown and attempt[1] not in shown


def test_references_are_of_the_problem_and_the_terse_contexts_of_the_verdict() -> None:
    answer = critiqued(PROBLEMS[0])
    assert show("reference", answer) == [PROBLEMS[0].references["reference"]]
    assert show("aligned_reference", answer) == [PROBLEMS[0].references["aligned_reference"]]
    assert show("holistic", answer) == [f"wrong\n# {PROBLEMS[0].answer}"]
    assert show("answer_only", answer) == [f"# {PROBLEMS[0].answer}"]
    true = critiqued(PROBLEMS[0], text=right_answer(PROBLEMS[0]))
    assert show("holistic", true) == [f"ok\n# {PROBLEMS[0].answer}"]


def test_shuffled_lines_are_the_same_lines_in_another_order_and_repeatable() -> None:
    answers = [critiqued(problem) for problem in PROBLEMS]
    straight, shuffled = show("step_aligned", *answers), show("shuffled_lines", *answers)
    assert shuffled == show("shuffled_lines", *answers)
    assert shuffled != straight
    for a, b in zip(straight, shuffled, strict=True):
        assert isinstance(a, str) and isinstance(b, str)
        assert sorted(a.splitlines()) == sorted(b.splitlines())


def test_other_answer_is_the_trace_of_another_question() -> None:
    answers = [critiqued(problem, sample) for problem in PROBLEMS for sample in (0, 1)]
    straight, other = show("step_aligned", *answers), show("other_answer", *answers)
    assert other == [*straight[2:], *straight[:2]]
    (alone,) = show("other_answer", answers[0])
    assert alone == CritiqueFailure("no other question in this step")


def test_other_reference_is_the_reference_of_another_problem_and_repeatable() -> None:
    answers = [critiqued(problem, sample) for problem in PROBLEMS for sample in range(8)]
    shown = show("other_reference", *answers)
    references = {p.references["reference"] for p in PROBLEMS}
    for answer, text in zip(answers, shown, strict=True):
        assert text in references - {answer.rollout.problem.references["reference"]}
    assert len({shown[i] for i in range(8)}) == 2, "both other problems are drawn"
    assert show("other_reference", *reversed(answers)) == shown[::-1], "the order does not matter"
    missing = CritiqueFailure("no other problem of the step has a reference")
    assert show("other_reference", answers[0]) == [missing]
    twin = dataclasses.replace(PROBLEMS[0], id="another problem with the same reference")
    assert show("other_reference", answers[0], critiqued(twin)) == [missing, missing]


def test_without_a_context_the_teacher_is_shown_nothing() -> None:
    assert NoContext()([critiqued(problem) for problem in PROBLEMS]) == [None, None, None]


def test_a_missing_context_has_a_reason() -> None:
    bare = CritiquedRollout(
        rollout(Problem("q", "a b", "c"), "# c"),
        Verdict(True, True, "c"),
        CritiqueFailure("refused"),
    )
    assert show("step_aligned", bare) == [CritiqueFailure("refused")]
    assert show("reference", bare) == [CritiqueFailure("the problem has no reference")]
    uncritiqued = CritiquedRollout(bare.rollout, bare.verdict, None)
    assert show("step_aligned", uncritiqued) == [CritiqueFailure("no critic was asked")]


def test_a_peer_is_another_right_answer_to_the_same_question() -> None:
    wrong, plus, minus = (
        critiqued(PROBLEMS[0], sample, text)
        for sample, text in enumerate(
            [
                wrong_answer(PROBLEMS[0]),
                right_answer(PROBLEMS[0]),
                right_answer(PROBLEMS[0], "minus"),
            ]
        )
    )
    unrelated = critiqued(PROBLEMS[1], 0, right_answer(PROBLEMS[1]))
    shown = show("peer", wrong, plus, minus, unrelated)
    assert shown[0] in (plus.rollout.text, minus.rollout.text)
    assert shown[1:3] == [minus.rollout.text, plus.rollout.text], "never the answer itself"
    assert shown[3] == CritiqueFailure("no other answer is right")
    twin = critiqued(PROBLEMS[0], 3, right_answer(PROBLEMS[0]))
    assert show("peer", plus, twin) == [CritiqueFailure("no other answer is right")] * 2, (
        "nor its twin"
    )


def test_which_peer_is_drawn_by_the_answer_and_the_seed_alone() -> None:
    problem = PROBLEMS[0]
    right = [critiqued(problem, 9 + i, right_answer(problem, s)) for i, s in enumerate(STYLES)]
    wrong = [critiqued(problem, sample) for sample in range(9)]
    shown = show("peer", *wrong, *right)[:9]
    assert set(shown) == {one.rollout.text for one in right}, "not always the same one"
    assert show("peer", *wrong[::-1], *right)[:9] == shown[::-1]
    other = TemplateContext("peer", Templates("lab"), seed=1)
    assert other([*wrong, *right])[:9] != shown


def test_the_environment_context_names_the_error_and_not_the_answer() -> None:
    problem = PROBLEMS[0]
    assert show("environment", critiqued(problem)) == ["0 wrong"], "minus: 3 1 0 2 4"
    right = right_answer(problem)
    assert show("environment", critiqued(problem, text=right)) == [
        CritiqueFailure("the environment says nothing")
    ]
    other = "a" if problem.answer != "a" else "b"
    for text, feedback in (
        (right[:-1] + other, "# wrong"),
        (right.removesuffix(f"\n# {problem.answer}"), "# wrong"),
        ("0 nonsense", "! wrong"),
    ):
        assert show("environment", critiqued(problem, text=text)) == [feedback]


@pytest.mark.parametrize("templates", ["steps", "free", "chain_sums", "free_few_shot"])
def test_a_peer_is_shown_with_its_tags_and_the_attempt_is_not(templates: str) -> None:
    problem = Problem("q", "1 + 1", "2")
    texts = ["<step_1>1 + 1 = 3</step_1><answer>3</answer>", "<step_1>2</step_1><answer>2</answer>"]
    rollouts = [rollout(problem, text, sample) for sample, text in enumerate(texts)]
    answers = [CritiquedRollout(one, verifiers.exact(problem, one.text), None) for one in rollouts]
    peer, environment = (
        TemplateContext(name, Templates(templates), seed=0)(answers)[0]
        for name in ("peer", "environment")
    )
    assert isinstance(peer, str) and texts[1] in peer and "1 + 1 = 3" not in peer
    assert isinstance(environment, str) and "The final answer 3 is wrong." in environment
    assert texts[0] not in environment and "1 + 1 = 3" not in environment


def test_the_fallback_is_used_where_no_peer_is_correct() -> None:
    context = FallbackContext(
        TemplateContext("peer", Templates("lab"), seed=0),
        TemplateContext("environment", Templates("lab"), seed=0),
    )
    helped, alone = critiqued(PROBLEMS[0]), critiqued(PROBLEMS[1])
    right = critiqued(PROBLEMS[0], 1, right_answer(PROBLEMS[0]))
    shown = context([helped, alone, right])
    assert shown[0] == right.rollout.text and shown[1] == "0 wrong"
    assert shown[2] == CritiqueFailure("no other answer is right"), "the first reason counts"


@pytest.mark.parametrize("name", [name for name in CONTEXTS if name != "none"])
def test_every_context_of_a_recipe_renders(name: str) -> None:
    answers = [critiqued(problem) for problem in PROBLEMS]
    right = [critiqued(problem, 1, right_answer(problem)) for problem in PROBLEMS]
    for shown in show(name, *answers, *right)[: len(answers)]:
        assert isinstance(shown, str) and shown


def partly(alignment: float, *answers: CritiquedRollout) -> list[str]:
    context = PartlyAlignedContext(
        TemplateContext("partly_aligned", Templates("lab"), seed=0),
        partly_aligned,
        alignment,
        seed=3,
    )
    shown = context(answers)
    assert all(isinstance(text, str) for text in shown)
    return [str(text) for text in shown]


def test_alignment_goes_from_the_reference_to_the_critique_step_by_step() -> None:
    answers = [critiqued(problem, sample) for problem in PROBLEMS for sample in range(4)]
    assert partly(1.0, *answers) == show("step_aligned", *answers)
    assert partly(0.0, *answers) == show("reference", *answers)
    common: list[list[set[str]]] = []
    for steps in range(6):
        lines = [set(text.splitlines()[:-1]) for text in partly(steps / 5, *answers)]
        aligned = [set(str(text).splitlines()) for text in show("step_aligned", *answers)]
        common.append([a & b for a, b in zip(lines, aligned, strict=True)])
        assert all(len(both) == steps for both in common[-1])
    for low, high in pairwise(common):
        assert all(a < b for a, b in zip(low, high, strict=True)), (
            "a step that stays at one alignment stays at all higher ones"
        )
    first = {frozenset(partly(0.4, answer)[0].splitlines()) for answer in answers[:4]}
    assert len(first) > 1, "different rollouts keep different steps"


def test_partial_alignment_needs_a_critique_and_a_reference() -> None:
    answer = critiqued(PROBLEMS[0])
    context = PartlyAlignedContext(
        TemplateContext("partly_aligned", Templates("lab"), seed=0), partly_aligned, 0.5, seed=0
    )
    bare = dataclasses.replace(
        answer, rollout=dataclasses.replace(answer.rollout, problem=Problem("x", "a", "b"))
    )
    silent = dataclasses.replace(answer, critique=CritiqueFailure("malformed"))
    assert context([bare, silent]) == [
        CritiqueFailure("the problem has no reference"), CritiqueFailure("malformed"),
    ]  # fmt: skip


def test_the_oracle_errs_at_its_error_rate_and_reproducibly() -> None:
    problems = lab_task.problems(WORLD, "train", 200)
    judged = [(rollout(p, wrong_answer(p)), Verdict(False, True, "p")) for p in problems]

    def wrong(rate: float) -> list[bool]:
        critiques = OracleCritic(lab_task.Oracle(WORLD), error_rate=rate, seed=3)(judged)
        return [
            isinstance(c, Critique) and c.answer != p.answer
            for c, p in zip(critiques, problems, strict=True)
        ]

    assert not any(wrong(0.0))
    assert 0.2 < sum(wrong(0.3)) / 200 < 0.4
    assert wrong(0.3) == wrong(0.3)


def test_the_random_stream_of_a_rollout_is_fixed() -> None:
    assert hashed_rng(3, "q", 1).integers(10**6, size=3).tolist() == [946921, 481279, 937551]
