"""Critiques of episodes that their environment has judged, and of those that a limit has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from two_turns import episode

from selfteach.episodes import EventKind, Segment, ToolCall, episode_text
from selfteach.feedback.alignment import changed_steps, first_change, first_error_token
from selfteach.feedback.contexts import TemplateContext
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.prompts.template_set import Templates
from selfteach.prompts.tool_calls import TOOL_FORMATS
from selfteach.tasks import chain_sums, segmentation, verifiers
from selfteach.tasks.code.code_steps import code_steps
from selfteach.tasks.environments.calculator_oracle import CalculatorOracle
from selfteach.tasks.segmentation import Splitter
from selfteach.types import (
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    Problem,
    Rewards,
    Rollout,
    Verdict,
)

PROBLEM = Problem("p", f"{chain_sums.PREFIX}12 + 30 - 5 =", "37")
WON, LOST = Verdict(True, True, None), Verdict(False, True, None, "It was crane.")
WORDS = ("<guess>crate</guess>", "not t", "<guess>crane</guess>")
HERMES = TOOL_FORMATS["hermes"]


def ended(event: EventKind | None, *texts: str, verdict: Verdict | None = None) -> Rollout:
    """Return an episode of turns and results, five tokens of each, which an event may have ended."""
    runs = [range(10 * i, 10 * i + 5) for i in range(len(texts))]
    one = episode(*runs, problem=PROBLEM, texts=texts)
    if event is not None:
        stop = len(one.token_ids)
        segments = (*one.segments, Segment("environment", stop, stop, "", event))
        one = dataclasses.replace(one, segments=segments, text=episode_text(segments))
    return dataclasses.replace(one, finished=event is None, verdict=verdict)


def call(expression: str) -> str:
    return HERMES.write(ToolCall("calculator", {"expression": expression}))


def written(*texts: str) -> str:
    return "\n".join(f"<turn_{i}>\n{text}\n</turn_{i}>" for i, text in enumerate(texts, 1))


def critiqued(
    rollout: Rollout, turns: Sequence[str], split_steps: Splitter = segmentation.tags
) -> CritiquedRollout:
    verify = verifiers.WithoutAnswers(verifiers.exact)
    verdict = rollout.verdict or verify(PROBLEM, rollout.answer_text)
    critique = CritiqueParser(split_steps, verify)(written(*turns), rollout, verdict)
    return CritiquedRollout(rollout, verdict, critique)


def alignment(one: CritiquedRollout) -> tuple[int | None, list[int], float]:
    """Return the token of the first error, the changed steps, and the share that is repeated."""
    spans = segmentation.step_spans(one.rollout, segmentation.tags)
    counts = [segment.stop - segment.start for segment in one.rollout.segments]
    shown = one.rollout.text_spans
    ends = [end for (_, end), count in zip(shown, counts, strict=True) for _ in range(count)]
    change = first_change(one, spans, ends)
    assert change is not None
    error = first_error_token(one.critique, segmentation.token_spans(spans, ends))
    return error, [index for index, _ in changed_steps(one, spans)], change.fidelity


def test_a_right_episode_that_is_repeated_has_no_error() -> None:
    """The last turn is a step: no verifier of the task can read it."""
    one = critiqued(ended(None, *WORDS, verdict=WON), WORDS[::2])
    assert isinstance(one.critique, Critique)
    assert (one.critique.case, one.critique.first_error) == ("A", None)
    assert [step.status for step in one.critique.steps] == ["kept", "kept"]
    assert alignment(one) == (None, [], 1.0)
    named = critiqued(
        ended(None, *WORDS, verdict=dataclasses.replace(WON, parsed="crane")), WORDS[::2]
    )
    assert alignment(named) == (None, [], 1.0), "also where the environment names an answer"


def test_a_last_turn_that_is_changed_is_the_error() -> None:
    one = critiqued(ended(None, *WORDS[:2], "<guess>crown</guess>", verdict=LOST), WORDS[::2])
    assert isinstance(one.critique, Critique)
    assert (one.critique.case, one.critique.first_error) == ("D", 1)
    assert [step.status for step in one.critique.steps] == ["kept", "fixed"]
    error, changed, fidelity = alignment(one)
    assert (error, changed) == (10, [1]) and fidelity == pytest.approx(0.5)
    (shown,) = TemplateContext("step_aligned", Templates("turns_bare"), seed=0)([one])
    assert isinstance(shown, str) and shown.endswith("<turn_2>\n<guess>crane</guess>\n</turn_2>")
    (answer,) = TemplateContext("answer_only", Templates("turns_bare"), seed=0)([one])
    assert answer == "The final answer is <guess>crane</guess>."


def test_a_failed_episode_that_is_repeated_is_no_critique() -> None:
    one = critiqued(ended(None, *WORDS, verdict=LOST), WORDS[::2])
    assert isinstance(one.critique, CritiqueFailure) and one.critique.reason == "wrong_answer"
    longer = critiqued(ended(None, *WORDS, verdict=LOST), [*WORDS[::2], "<guess>brane</guess>"])
    assert isinstance(longer.critique, Critique)


@pytest.mark.parametrize("event", ["timeout", "failed"])
def test_answers_are_verified_where_the_environment_failed(event: EventKind) -> None:
    broken = Verdict(False, False, None, rewards=Rewards(None, {}))
    one = critiqued(ended(event, *WORDS, verdict=broken), ["x", "<answer>36</answer>"])
    assert isinstance(one.critique, CritiqueFailure)
    turns = [*WORDS[::2], "<answer>36</answer>"]
    one = critiqued(ended(event, *WORDS, verdict=broken), turns)
    assert isinstance(one.critique, CritiqueFailure) and one.critique.reason == "wrong_answer"
    right = critiqued(ended(event, *WORDS, verdict=broken), [*turns[:2], "<answer>37</answer>"])
    assert isinstance(right.critique, Critique) and right.critique.answer == "37"


@pytest.mark.parametrize(
    ("event", "verdict", "first_error"),
    [
        ("budget", None, 1),
        ("budget", LOST, 1),
        ("truncated", None, None),
        ("truncated", LOST, None),
    ],
)
def test_a_last_turn_is_an_error_unless_it_was_cut(
    event: EventKind, verdict: Verdict | None, first_error: int | None
) -> None:
    """Of an episode out of budget the last turn is whole."""
    attempt = ended(event, call("12 + 30"), "42", call("42 + 5"), verdict=verdict)
    turns = [call("12 + 30"), call("42 - 5"), "<answer>37</answer>"]
    one = critiqued(attempt, turns)
    assert isinstance(one.critique, Critique)
    assert (one.critique.case, one.critique.first_error) == ("C", first_error)
    earlier = critiqued(attempt, [call("30 + 12"), *turns[1:]])
    assert isinstance(earlier.critique, Critique) and earlier.critique.first_error == 0


def test_an_answer_that_was_cut_leaves_the_turns_before_it_whole() -> None:
    attempt = ended("truncated", call("12 + 30"), "42", call("42 + 5"), "47", "<answer>4</answer>")
    one = critiqued(attempt, [call("12 + 30"), call("42 - 5"), "<answer>37</answer>"])
    assert isinstance(one.critique, Critique) and one.critique.first_error == 1


@pytest.mark.parametrize(("event", "first_error"), [("budget", 1), ("truncated", None)])
def test_the_oracle_counts_no_turn_as_wrong_that_was_cut(
    event: EventKind, first_error: int | None
) -> None:
    attempt = ended(event, call("12 + 30"), "42", call("42 + 5"))
    rng = np.random.default_rng(0)
    critique = CalculatorOracle().critique_episode(attempt, error_rate=0, rng=rng)
    assert (critique.case, critique.first_error) == ("C", first_error)
    assert [step.text for step in critique.steps] == [call("12 + 30"), call("42 - 5")]
    wrong = ended(event, call("12 - 30"), "-18", call("42 + 5"))
    assert CalculatorOracle().critique_episode(wrong, error_rate=0, rng=rng).first_error == 0


@pytest.mark.parametrize("split_steps", [segmentation.tags, code_steps])
def test_indentation_in_a_call_counts(split_steps: Splitter) -> None:
    """Python is its indentation, whatever the task's own steps are."""
    code = "if x:\n        a()\n        b()"
    wrong, right = (
        f'<tool_call>\n{{"code": "\n{text}\n"}}\n</tool_call>'
        for text in (code, code.replace("        b()", "    b()"))
    )
    attempt = ended(None, wrong, "?", "<answer>3</answer>")
    one = critiqued(attempt, [right, "<answer>37</answer>"], split_steps)
    assert isinstance(one.critique, Critique)
    assert one.critique.first_error == 0 and one.critique.steps[0].status == "fixed"
    assert alignment(one)[:2] == (0, [0, 1])


def test_repeated_turns_have_the_words_of_the_attempt() -> None:
    """White space at the ends of lines is no change, and none of the critic's."""
    attempt = ended(None, "Let me see.\nI call.", "?", "<answer>3</answer>", verdict=WON)
    one = critiqued(attempt, ["Let me see.  \nI call.", "<answer>3</answer>"])
    assert isinstance(one.critique, Critique) and one.critique.case == "A"
    assert [step.text for step in one.critique.steps] == ["Let me see.\nI call.", "3"]
    assert alignment(one)[1:] == ([], 1.0)
