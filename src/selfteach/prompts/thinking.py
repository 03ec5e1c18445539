"""The boundary between a model's thought and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a model that can think before it answers is asked, and what of it is scored.

    The student's answer is scored behind the self-teacher's prompt. If one is asked to think and the
    other is not, the teacher expects another first token than the student wrote (``<think>``, or the
    answer itself), and all that the first tokens teach is that. So the teacher's prompt ends, by
    default, in the student's own header: with Qwen3 and ``student=False`` in an empty thought.
    """

    student: bool | None = None
    """Passed to the chat template as ``enable_thinking``; None passes nothing."""
    teacher: bool | None = None
    boundary: Literal["student", "teacher"] = "student"
    """Whose header ends the teacher's prompt where both differ."""
    scored: bool = True
    """False: only tokens behind the thought count."""
    tags: tuple[str, str] = ("<think>", "</think>")
    """What the model writes around a thought."""


def split_thinking(
    text: str, marks: tuple[str, str] = ("<think>", "</think>"), *, opened: bool = False
) -> tuple[str, str]:
    """A thought and the answer after it: ``"<think>hm</think> 4"`` is ``("<think>hm</think> ", "4")``.

    Both together are the text. The answer is what follows the last closing mark. A thought that was
    begun (by the text, or by the prompt: ``opened``) and not closed leaves no answer; a text without
    a thought is all answer.
    """
    begin, end = marks
    closed = text.rfind(end)
    if closed < 0:
        begun = opened or text.lstrip().startswith(begin)
        return (text, "") if begun else ("", text)
    answer = text[closed + len(end) :].lstrip()
    return text[: len(text) - len(answer)], answer
