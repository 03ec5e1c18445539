"""Test the template sets with worked examples: what they show is right and stays within its budget."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from selfteach.config.recipe import CONTEXTS
from selfteach.errors import RecipeError
from selfteach.feedback.contexts import SHARED_TEMPLATE
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.prompts.template_set import SHIPPED, TURN, Templates, conversation
from selfteach.tasks.segmentation import SPLITTERS, content
from selfteach.tasks.verifiers import exact
from selfteach.types import Critique, CritiqueStep, Problem, Rollout

SETS = {"steps_few_shot": "tags", "free_few_shot": "paragraphs"}
"""Template sets with worked examples, with the kind of steps that they ask for."""

ASKS = {
    "steps_few_shot": "Solve it in tagged steps, one equation each.",
    "free_few_shot": "Solve it in short equations, then <answer>.",
}
"""What stands behind every question: a small model forgets the instruction above the examples."""

ANSWERS = {"pump": "600", "jacket": "60", "eggs": "8", "Tom": "18"}
EQUATION = re.compile(r"((?:[\d.]+ [-+*/] )+[\d.]+) = (\d+(?:\.\d+)?)")
PROMPTS = Path(__file__).parents[2] / "fixtures" / "prompts"
PIECE = re.compile(r"\d|[^\W\d_]+|[^\w\s]+|_|\n")
"""About a token of a byte-level tokenizer: a digit, a word, a run of punctuation, a line break."""

FIXED = Critique(
    "D",
    (CritiqueStep("1 + 1 = 2", "kept"), CritiqueStep("2 + 2 = 4", "fixed", "2 + 2 = 5")),
    "4",
    1,
)


def turns(rendered: str) -> list[tuple[str, str]]:
    """Return the worked examples of a prompt: the user's turn and the assistant's."""
    texts = [message["content"] for message in conversation(rendered)]
    return list(zip(texts[:-1:2], texts[1::2], strict=True))


def solver(templates: str) -> list[tuple[str, str]]:
    return turns(Templates(templates).render("solver", question="q"))


def teacher(templates: str) -> list[tuple[str, str]]:
    return turns(Templates(templates).render("teacher", question="q", context="c"))


def critic(
    templates: str, reference: str | None = None, question: str = "q"
) -> list[dict[str, str]]:
    return Templates(templates).critic(
        question, "a", steps=["a"], finished=True, reference=reference
    )


def problem_of(prompt: str) -> Problem:
    (answer,) = (answer for word, answer in ANSWERS.items() if word in prompt)
    return Problem("p", prompt, answer)


def fenced(prompt: str) -> list[str]:
    return re.findall(r"^```\n(.*?)\n```$", prompt, re.DOTALL | re.MULTILINE)


def equations(text: str) -> list[tuple[str, str]]:
    return EQUATION.findall(text)


@pytest.mark.parametrize("templates", SETS)
def test_the_worked_solutions_are_right_and_have_one_equation_per_step(templates: str) -> None:
    examples = solver(templates)
    assert len(examples) == len(ANSWERS)
    assert all(prompt.endswith(ASKS[templates]) for prompt, _ in [*examples, *teacher(templates)])
    for prompt, solution in examples:
        assert exact(problem_of(prompt), solution).correct
        spans = SPLITTERS[SETS[templates]](solution)
        assert len(spans) >= 3, "two steps and the final answer at least"
        results = []
        for span in spans[:-1]:
            ((left, right),) = equations(content(solution, span))
            assert math.isclose(eval(left), float(right)), content(solution, span)
            results.append(right)
        assert results[-1] == problem_of(prompt).answer
        assert ("<step_1>" in solution) == (templates == "steps_few_shot")


@pytest.mark.parametrize("templates", SETS)
def test_the_teacher_s_examples_show_contexts_of_four_kinds(templates: str) -> None:
    examples = teacher(templates)
    assert [solution for _, solution in examples] == [solution for _, solution in solver(templates)]
    aligned, irrelevant, answer_only, prose = (fenced(prompt)[0] for prompt, _ in examples)
    assert aligned == examples[0][1], "the trace as the context step_aligned shows it"
    assert not set(re.findall(r"\d+", irrelevant)) & set(re.findall(r"\d+", examples[1][1]))
    assert answer_only == f"<answer>{problem_of(examples[2][0]).answer}</answer>"
    assert problem_of(examples[3][0]).answer in prose and not equations(prose)


@pytest.mark.parametrize("templates", SETS)
@pytest.mark.parametrize("reference", [None, "r"])
def test_the_parser_accepts_the_critic_s_examples(templates: str, reference: str | None) -> None:
    messages = critic(templates, reference)
    parse = CritiqueParser(SPLITTERS[SETS[templates]], exact)
    seen = []
    for prompt, reply in zip(messages[:-1:2], messages[1::2], strict=True):
        problem, text = problem_of(prompt["content"]), fenced(prompt["content"])[-1]
        finished = "cut off at its end" not in prompt["content"]
        rollout = Rollout(problem, 0, (), (1,), (0.0,), text, finished, 0)
        critique = parse(reply["content"], rollout, exact(problem, text))
        assert isinstance(critique, Critique), critique
        assert reply["content"].startswith(f"<case>{critique.case}</case>")
        assert exact(problem, text).correct == (critique.case == "A")
        assert len(fenced(prompt["content"])) == (1 if reference is None else 2)
        seen.append((critique.case, critique.first_error, len(critique.steps)))
    # The first step, the last and a middle one are wrong; none is; the attempt is cut.
    assert seen == [("D", 0, 2), ("D", 1, 2), ("D", 1, 4), ("A", None, 2), ("C", None, 2)]


@pytest.mark.parametrize("templates", SETS)
def test_the_critic_s_examples_show_a_reference_only_where_there_is_one(templates: str) -> None:
    shown, hidden = critic(templates, "REFERENCE"), critic(templates)
    assert all("for you alone" in turn["content"] for turn in shown[::2])
    assert not any("for you alone" in turn["content"] for turn in hidden)


@pytest.mark.parametrize("templates", SETS)
def test_all_examples_come_before_the_question_and_the_context(templates: str) -> None:
    shown = Templates(templates)
    pairs = [
        [shown.render("solver", question=q) for q in ("A", "B")],
        [shown.render("teacher", question=q, context=q) for q in ("A", "B")],
        [TURN.join(turn["content"] for turn in critic(templates, q, q)) for q in ("A", "B")],
    ]
    for pair in pairs:
        differ = next(i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b)
        assert pair[0][:differ].count(TURN) == pair[0].count(TURN), "the prefix of a batch"
        assert len(pair[0]) - differ < 120


@pytest.mark.parametrize(
    ("templates", "budgets"),
    [("steps_few_shot", (530, 680, 1000)), ("free_few_shot", (420, 550, 1000))],
)
def test_prompts_keep_within_their_budgets(templates: str, budgets: tuple[int, ...]) -> None:
    shown = Templates(templates)
    prompts = (
        shown.render("solver", question="q"),
        shown.render("teacher", question="q", context="c"),
        "\n".join(turn["content"] for turn in critic(templates)),
    )
    lengths = [len(PIECE.findall(prompt)) for prompt in prompts]
    assert all(length <= budget for length, budget in zip(lengths, budgets, strict=True)), lengths


@pytest.mark.parametrize("templates", SETS)
@pytest.mark.parametrize(
    "name", sorted({SHARED_TEMPLATE.get(n, n) for n in CONTEXTS if n != "none"})
)
@pytest.mark.parametrize("finished", [True, False])
def test_every_prompt_renders_and_its_context_is_the_zero_shot_set_s(
    templates: str, name: str, finished: bool
) -> None:
    values = {
        "critique": FIXED, "references": {"reference": "r", "aligned_reference": "s"},
        "correct": False, "attempt": "a", "peer": "p", "feedback": "f",
    }  # fmt: skip
    shown, zero_shot = Templates(templates), Templates(templates.removesuffix("_few_shot"))
    context = shown.context(name, **values)
    assert context == zero_shot.context(name, **values)
    last = conversation(shown.render("teacher", question="q", context=context))[-1]["content"]
    assert last == f"q\nFeedback:\n```\n{context}\n```\n{ASKS[templates]}"
    for reference in (None, "r"):
        for final in (None, "4"):
            (*_, request) = shown.critic(
                "q", "a", steps=["a"], final=final, finished=finished, reference=reference
            )
            assert ("cut off at its end" in request["content"]) == (not finished)


@pytest.mark.parametrize("templates", SETS)
def test_prompts_equal_the_golden_files(templates: str) -> None:
    shown, question = Templates(templates), "1 + 1 + 2 ="
    context = shown.context("step_aligned", critique=FIXED, references={}, correct=False)
    messages = shown.critic(
        question, "1 + 1 = 2", steps=["1 + 1 = 2"], finished=False, reference="2 + 2 = 4"
    )
    prompts = [
        shown.render("solver", question=question),
        shown.render("teacher", question=question, context=context),
        "\n{{ turn }}\n".join(message["content"] for message in messages),
    ]
    golden = (PROMPTS / f"{templates}.txt").read_text(encoding="utf-8")
    assert "\n%%%%\n".join(prompts).replace(TURN, "{{ turn }}") + "\n" == golden


def test_the_free_set_numbers_the_steps_of_an_attempt_for_the_critic() -> None:
    attempt = {"steps": ["ONE</step_1>", "TWO"], "final": "4", "finished": True}
    (*_, free) = Templates("free_few_shot").critic("q", "ONE\n\nTWO\n\n4", **attempt)
    numbered = "<step_1>ONE</step_1>\n<step_2>TWO</step_2>\n<answer>4</answer>"
    assert fenced(free["content"]) == [numbered]
    (*_, plain) = Templates("steps_few_shot").critic("q", "ONE\n\nTWO\n\n4", **attempt)
    assert fenced(plain["content"]) == ["ONE\n\nTWO\n\n4"]


def test_a_set_falls_back_to_its_parents_in_order() -> None:
    free = Templates("free_few_shot")
    assert not (SHIPPED / "free_few_shot" / "solver.jinja").exists(), (
        "steps_few_shot's, in free's form"
    )
    assert "<step_" not in free.render("solver", question="q")
    assert free.has("critic") and free.has("peer")


def test_a_folder_with_parents_brings_worked_examples_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "parents.txt").write_text("free_few_shot\n")
    example = '{"question": "2 + 2", "steps": ["2 + 2 = 4"], "answer": "4"}'
    (tmp_path / "examples.jinja").write_text(f"{{%- set examples = [{example}] -%}}")
    (*_, last) = turns(Templates(str(tmp_path)).render("solver", question="q"))
    assert (
        last[0].endswith(f"\n\n2 + 2\n{ASKS['free_few_shot']}")
        and last[1] == "2 + 2 = 4\n\n<answer>4</answer>"
    )


def test_a_parent_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "parents.txt").write_text("stepz\n")
    with pytest.raises(RecipeError, match=r"parents\.txt: no shipped template set 'stepz'"):
        Templates(str(tmp_path))
