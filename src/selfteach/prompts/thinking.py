"""Separates a model's thought (``<think>…</think>``) from its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Thinking:
    """Configures prompts of models that can think before they answer, and which tokens are scored.

    The student's rollout is scored after the self-teacher's prompt. If thinking is enabled for one of
    them alone, the teacher expects another first token than the student sampled (``<think>``, or the
    answer itself), and the first tokens teach nothing else. So the teacher's prompt ends, by default,
    in the student's header: with Qwen3 and ``student=False`` in an empty thought. Qwen3's template
    writes the switch nowhere else, so a ``teacher`` that differs needs ``boundary="teacher"`` there.
    """

    student: bool | None = None
    """Passed to the chat template as ``enable_thinking``; None passes nothing."""
    teacher: bool | None = None
    """The same, for the teacher's prompt."""
    boundary: Literal["student", "teacher"] = "student"
    """Whose header ends the teacher's prompt where ``student`` and ``teacher`` differ."""
    scored: bool = True
    """False: only tokens after the thought enter the loss."""
    tags: tuple[str, str] = ("<think>", "</think>")
    """What the model writes before and after a thought."""


def split_thinking(
    text: str, tags: tuple[str, str] = ("<think>", "</think>"), *, opened: bool = False
) -> tuple[str, str]:
    """Split a text: ``"<think>hm</think> 4"`` becomes ``("<think>hm</think> ", "4")``.

    The two concatenated are the text. The answer is what follows the last closing tag. A thought that
    was opened (by the text, or by the prompt: ``opened``) and not closed leaves no answer; a text
    without a thought is all answer.
    """
    begin, end = tags
    closed = text.rfind(end)
    if closed < 0:
        begun = opened or text.lstrip().startswith(begin)
        return (text, "") if begun else ("", text)
    answer = text[closed + len(end) :].lstrip()
    return text[: len(text) - len(answer)], answer
