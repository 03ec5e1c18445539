"""Critiques of answers that are code: parsed from a program, with evidence, and as contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfteach.config.code_section import CodeConfig
from selfteach.config.critic_section import EndpointConfig
from selfteach.errors import DataError, RecipeError
from selfteach.feedback.alignment import changed_steps, first_change, first_error_token
from selfteach.feedback.contexts import TemplateContext
from selfteach.feedback.critics.chat_model import NoReply, OnReply, Reply, Request
from selfteach.feedback.critics.code_parser import CodeCritiqueParser
from selfteach.feedback.critics.llm import PASSED, LlmCritic
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.feedback.critics.reply_cache import CachedModel, ReplyCache
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Critic
from selfteach.tasks.code.code_steps import code_steps
from selfteach.tasks.code.code_tests import KEY
from selfteach.tasks.code.code_verifier import CodeVerifier
from selfteach.tasks.segmentation import token_spans
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, Problem, Rollout, Verdict

CASES = [
    {"call": "f", "args": [[1, 2, 3]], "expected": 6},
    {"call": "f", "args": [[]], "expected": 0},
    {"call": "f", "args": [[-1]], "expected": -1},
]
GOLD = "def f(xs):\n    return sum(xs)"
PROBLEM = Problem(
    "p", "Write f(xs), the sum.", GOLD, {"reference": GOLD},
    {KEY: {"shape": "cases", "cases": CASES}},
)  # fmt: skip
RIGHT = "def f(xs):\n    t = 0\n    for x in xs:\n        t += x\n    return t"
WRONG = RIGHT.replace("t += x", "t = x")


@pytest.fixture(scope="module")
def verify() -> Iterator[CodeVerifier]:
    try:
        verifier = CodeVerifier(CodeConfig(cpu_s=1.0, workers=1))
    except DataError as error:
        pytest.skip(str(error))
    yield verifier
    verifier.process.close()


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def rollout(text: str, *, finished: bool = True) -> Rollout:
    return Rollout(PROBLEM, 0, (1,), tuple(range(len(text))), (0.0,) * len(text), text, finished, 0)


class Parsed:
    """Holds a parsed critique with its rollout, whose every character is a token."""

    def __init__(
        self, verify: CodeVerifier, answer: str, reply: str, finished: bool = True
    ) -> None:
        attempt = rollout(answer, finished=finished)
        verdict = verify(PROBLEM, answer)
        self.critique = CodeCritiqueParser(code_steps, verify)(reply, attempt, verdict)
        self.critiqued = CritiquedRollout(attempt, verdict, self.critique)
        self.spans = code_steps(answer)
        self.ends = [*range(1, len(answer) + 1)]

    @property
    def changed(self) -> list[str]:
        text = self.critiqued.rollout.text
        return [text[slice(*self.spans[i])] for i, _ in changed_steps(self.critiqued, self.spans)]

    @property
    def statuses(self) -> list[tuple[str, str]]:
        assert isinstance(self.critique, Critique), self.critique
        return [(step.status, step.text) for step in self.critique.steps]


def test_lines_are_kept_up_to_the_first_wrong_one(verify: CodeVerifier) -> None:
    answer = f"I add them up.\n\n{block(WRONG)}\nIt keeps the last one."
    parsed = Parsed(verify, answer, f"<think>Hm.</think>Sure:\n{block(RIGHT)}\nNow it adds.")
    assert parsed.statuses == [
        ("kept", "I add them up."), ("kept", "```python"), ("kept", "def f(xs):"),
        ("kept", "    t = 0"), ("kept", "    for x in xs:"), ("fixed", "        t += x"),
        ("kept", "    return t"), ("kept", "```"),
    ]  # fmt: skip
    critique = parsed.critique
    assert isinstance(critique, Critique)
    assert (critique.case, critique.first_error, critique.answer) == ("D", 5, GOLD)
    assert critique.steps[5].original == "        t = x"
    at = answer.index("        t = x")
    assert first_error_token(critique, token_spans(parsed.spans, parsed.ends)) == at
    change = first_change(parsed.critiqued, parsed.spans, parsed.ends)
    assert change is not None and (change.step, change.token) == (5, at + len("        t "))
    assert parsed.changed == ["        t = x", "It keeps the last one."]


def test_a_right_answer_is_repeated_whole(verify: CodeVerifier) -> None:
    answer = f"{block(RIGHT)}\nIt adds."
    parsed = Parsed(verify, answer, block(RIGHT))
    assert isinstance(parsed.critique, Critique)
    assert (parsed.critique.case, parsed.critique.first_error) == ("A", None)
    assert parsed.changed == []
    change = first_change(parsed.critiqued, parsed.spans, parsed.ends)
    assert change is not None and change.fidelity == 1


def test_indentation_is_part_of_a_line(verify: CodeVerifier) -> None:
    early = RIGHT.replace("    return t", "        return t")
    parsed = Parsed(verify, block(early), block(RIGHT))
    assert isinstance(parsed.critique, Critique) and parsed.critique.first_error == 5
    assert parsed.changed == ["        return t"]
    assert parsed.statuses[5] == ("fixed", "    return t")
    spaces = Parsed(verify, block(WRONG), block(RIGHT.replace("\n", "  \n").replace("\n", "\n\n")))
    assert isinstance(spaces.critique, Critique) and spaces.critique.first_error == 4


def test_comments_and_docstrings_are_no_errors(verify: CodeVerifier) -> None:
    remarks = WRONG.replace("    t = 0", '    """Add."""\n    # begin\n    t = 0')
    reply = RIGHT.replace("    for", "    # go on\n    for").replace(
        "t +=", "# fixed\n        t +="
    )
    reply = reply.replace("        # fixed", "        # fixed")
    parsed = Parsed(verify, block(remarks), block(reply))
    assert isinstance(parsed.critique, Critique) and parsed.critique.first_error == 6
    assert [text for status, text in parsed.statuses if status == "fixed"] == ["        t += x"]
    assert '    """Add."""' in [text for status, text in parsed.statuses if status == "kept"]


def test_a_missing_line_is_new_and_an_attempt_may_be_cut_off(verify: CodeVerifier) -> None:
    missing = RIGHT.removesuffix("\n    return t")
    parsed = Parsed(verify, block(missing), block(RIGHT))
    assert isinstance(parsed.critique, Critique) and parsed.critique.case == "D"
    assert ("new", "    return t") in parsed.statuses and parsed.critique.first_error == 5
    cut = "```python\n" + RIGHT[: RIGHT.index("+= x")]
    parsed = Parsed(verify, cut, block(RIGHT), finished=False)
    assert isinstance(parsed.critique, Critique)
    assert (parsed.critique.case, parsed.critique.first_error) == ("C", None)
    assert parsed.statuses[-1] == ("new", "```")


def test_an_answer_without_code_gets_a_program(verify: CodeVerifier) -> None:
    parsed = Parsed(verify, "Use sum.", block(GOLD))
    assert isinstance(parsed.critique, Critique) and parsed.critique.first_error == 0
    assert [text for _, text in parsed.statuses] == ["```python", *GOLD.split("\n"), "```"]
    assert parsed.changed[0] == "Use sum."


@pytest.mark.parametrize(
    ("reply", "reason", "detail"),
    [
        ("", "empty", "no text"),
        ("<think>x</think>", "empty", "a thought"),
        ("The answer is fine.", "malformed", "no code"),
        (block(WRONG), "wrong_answer", "Expected: 6; Got: 3"),
        (block("def f(xs):\n    return 7"), "wrong_answer", "Test: f([1, 2, 3])"),
        (block("import os\nf = sum"), "misaligned", "share 0%"),
    ],
)
def test_a_reply_that_is_no_critique_has_a_reason(
    verify: CodeVerifier, reply: str, reason: str, detail: str
) -> None:
    failure = Parsed(verify, block(WRONG), reply).critique
    assert isinstance(failure, CritiqueFailure) and failure.reason == reason
    assert detail in failure.detail


def test_contexts_of_code_are_programs(verify: CodeVerifier) -> None:
    parsed = Parsed(verify, f"Add.\n{block(WRONG)}", block(RIGHT))

    def shown(name: str) -> str:
        (context,) = TemplateContext(name, Templates("code"), seed=0)([parsed.critiqued])
        assert isinstance(context, str)
        return context

    assert shown("step_aligned") == f"Add.\n{block(RIGHT)}"
    assert "# The attempt says:         t = x\n# This is wrong. Instead:\n        t += x" in shown(
        "full_repetition"
    )
    assert shown("reference") == shown("answer_only") == block(GOLD)
    assert shown("holistic").startswith("The attempt is wrong.") and block(GOLD) in shown(
        "holistic"
    )
    assert shown("omission").count("# This line is right.") == 5
    assert shown("environment") == (
        "The attempt was checked. A test failed: the value is wrong.\nTest: f([1, 2, 3])\n"
        "Expected: 6\nGot: 3"
    )


class Echo:
    """A chat model that always returns one text."""

    identity = "echo"
    remote = False

    def __init__(self, text: str) -> None:
        self.text = text
        self.requests: list[Request] = []

    def complete(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply | NoReply]:
        self.requests += requests
        replies = [Reply(self.text, True, 1, 1) for _ in requests]
        for index, reply in enumerate(replies):
            on_reply(index, reply)
        return [*replies]


@pytest.mark.parametrize("templates", ["code", "code_few_shot"])
@pytest.mark.parametrize("sees", [True, False])
def test_a_critic_sees_evidence_if_the_recipe_says_so(
    verify: CodeVerifier, tmp_path: Path, sees: bool, templates: str
) -> None:
    config = EndpointConfig.model_validate({
        "type": "endpoint", "base_url": "http://unused/v1", "model": "m", "sees_evidence": sees,
    })  # fmt: skip
    model = Echo(block(RIGHT))
    parser = CodeCritiqueParser(code_steps, verify)
    cached = CachedModel(model, ReplyCache(tmp_path / "r.sqlite"))  # type: ignore[arg-type]
    critic = LlmCritic(cached, Templates(templates), parser, config)
    judged = [(rollout(block(code)), verify(PROBLEM, block(code))) for code in (WRONG, RIGHT)]
    assert [getattr(one, "case", one) for one in critic(judged)] == ["D", "A"]
    wrong, right = (request.messages[-1][1] for request in model.requests)
    assert ("Test: f([1, 2, 3])\nExpected: 6\nGot: 3" in wrong) == sees
    assert (PASSED in right) == sees and WRONG in wrong and PROBLEM.question in wrong


def test_the_examples_of_the_template_set_are_right(verify: CodeVerifier) -> None:
    environment = Templates("code_few_shot")._environment
    module = environment.get_template("examples.jinja").module
    cases = {
        "longest_word": ([[["ab", "cd"]], "ab"], [[[]], ""], [[["a", "xyz"]], "xyz"]),
        "price_with_tax": ([[[10, 20], 10], 33], [[[9], 50], 13]),
        "pairs_of_equals": ([[[1, 1, 1, 2]], 2], [[[]], 0]),
    }
    for example in module.examples:  # type: ignore[attr-defined]
        name = example["program"].split("(")[0].removeprefix("def ")
        tests = [{"call": name, "args": args, "expected": value} for args, value in cases[name]]
        problem = Problem("p", "q", "", meta={KEY: {"shape": "cases", "cases": tests}})
        for key in ("program", "reference", "attempt"):
            verdict = verify(problem, block(example[key]))
            is_right = key != "attempt" or example["program"] == example["attempt"]
            assert verdict.correct == is_right, (name, key, verdict.feedback)
            if key == "attempt" and example["finished"]:
                assert (verdict.feedback or PASSED) == example["evidence"]


def test_a_training_sample_of_code_has_its_steps_in_tokens(verify: CodeVerifier) -> None:
    from selfteach.trainer.step import build_samples

    parsed = Parsed(verify, block(WRONG), block(RIGHT))
    renderer = SimpleNamespace(
        scored_from=lambda ids: 0, teacher_prompt=lambda problem, context: (1, 2),
        token_ends=lambda ids: parsed.ends,
    )  # fmt: skip
    contexts = TemplateContext("step_aligned", Templates("code"), seed=0)
    components = SimpleNamespace(
        context=contexts, split_steps=code_steps, renderer=renderer, max_length=9999,
        ranks=SimpleNamespace(gather=lambda rows: rows),
    )  # fmt: skip
    unchecked = CritiquedRollout(
        parsed.critiqued.rollout, parsed.critiqued.verdict, CritiqueFailure("other_way")
    )
    sample, dropped = build_samples(components, [parsed.critiqued, unchecked])  # type: ignore[arg-type]
    at = block(WRONG).index("        t = x")
    assert sample.first_error_token == at
    assert sample.changed_spans == ((at, at + len("        t = x\n")),)
    assert sample.context == block(RIGHT) and dropped.dropped == "other_way"


def test_a_verifier_of_ones_own_compares_code_with_its_indentation_too() -> None:
    def accepts(problem: Problem, text: str) -> Verdict:
        return Verdict("        return" not in text, True, "same")

    early = rollout(block(RIGHT.replace("    return t", "        return t")))
    parser = CritiqueParser(code_steps, accepts)
    critique = parser(block(RIGHT), early, accepts(PROBLEM, early.text))
    assert isinstance(critique, Critique) and critique.first_error == 5


def test_an_oracle_needs_worked_solutions_before_a_run(verify: CodeVerifier) -> None:
    from selfteach.config.critic_section import OracleConfig
    from selfteach.tasks.code.code_oracle import CodeOracle
    from selfteach.tasks.task import Task
    from selfteach.trainer.build_critic import build_critic

    def critic_of(problem: Problem) -> Critic:
        task = Task((problem,), (), (), verify, code_steps, CodeOracle(verify), "code")
        return build_critic(OracleConfig(), task, Templates("code"), seed=0)

    (critique,) = critic_of(PROBLEM)([(rollout(block(RIGHT)), verify(PROBLEM, block(RIGHT)))])
    assert isinstance(critique, Critique) and critique.case == "A"
    with pytest.raises(RecipeError, match="none of the 1 training problems has a worked solution"):
        critic_of(replace(PROBLEM, answer=""))


def test_evidence_needs_templates_that_show_it() -> None:
    from selfteach.config.recipe import Recipe
    from selfteach.trainer.fit_checks import require_fitting_templates

    critic = {
        "type": "endpoint",
        "base_url": "http://unused/v1",
        "model": "m",
        "sees_evidence": True,
    }
    recipe = Recipe.model_validate({"critic": critic, "context": {"type": "step_aligned"}})
    require_fitting_templates(recipe, Templates("code"))
    require_fitting_templates(recipe, Templates("code_few_shot"))
    with pytest.raises(RecipeError, match=r"sees_evidence = true, and critic\.jinja shows neither"):
        require_fitting_templates(recipe, Templates("steps"))
