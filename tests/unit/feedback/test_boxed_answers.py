"""Test critiques of rollouts whose final answer is a box and not a tag."""

from __future__ import annotations

import pytest

from selfteach.feedback.alignment import first_change
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.tasks import segmentation, verifiers
from selfteach.types import Critique, CritiquedRollout, FirstChange, Problem, Rollout

PROBLEM = Problem("p", "q", "10")
NUMBERED = "<step_1>a b</step_1>\n<step_2>c d</step_2>\n"


def critiqued(text: str, reply: str, splitter: str, reader: verifiers.AnswerIn) -> CritiquedRollout:
    verify = verifiers.ExactVerifier(reader)
    rollout = Rollout(PROBLEM, 0, (1,), (5,), (-0.5,), text, True, 0)
    verdict = verify(PROBLEM, text)
    parser = CritiqueParser(segmentation.SPLITTERS[splitter], verify)
    return CritiquedRollout(rollout, verdict, parser(reply, rollout, verdict))


@pytest.mark.parametrize("reader", ["boxed", "tag_or_boxed"])
@pytest.mark.parametrize(
    ("splitter", "text"),
    [
        ("lines", "a b\nc d\n\\boxed{10}"),
        ("lines", "a b\nc d\nso \\boxed{10}\nas was to be shown."),
        ("paragraphs", "a b\n\nc d\n\n\\boxed{10}\n\nDone."),
        ("tags", NUMBERED + "\\boxed{10}"),
    ],
)
def test_a_box_behind_the_steps_is_the_answer_and_no_step(
    splitter: str, text: str, reader: verifiers.AnswerIn
) -> None:
    row = critiqued(text, NUMBERED + "So it is \\boxed{10}.", splitter, reader)
    assert isinstance(row.critique, Critique) and row.critique.case == "A"
    assert [step.text for step in row.critique.steps] == ["a b", "c d"]
    spans = segmentation.SPLITTERS[splitter](text)
    assert first_change(row, spans, range(1, len(text) + 1)) == FirstChange(None, None, 1.0)


def test_the_last_step_before_a_box_counts() -> None:
    text = NUMBERED + "\\boxed{9}"
    fixed = NUMBERED.replace("c d", "c e")
    row = critiqued(text, fixed + "\\boxed{10}", "tags", "boxed")
    assert isinstance(row.critique, Critique) and row.critique.first_error == 1
    change = first_change(row, segmentation.tags(text), range(1, len(text) + 1))
    assert change is not None and (change.step, change.token) == (1, text.index("d</step_2>"))


def test_a_rollout_without_tokens_has_no_token_before_its_first() -> None:
    row = critiqued("", NUMBERED + "\\boxed{10}", "tags", "boxed")
    change = first_change(row, [], [])
    assert change is not None and change.token == 0
