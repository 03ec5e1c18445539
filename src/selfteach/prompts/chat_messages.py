"""Renders prompts as chat messages, for trainers that apply a chat template themselves."""

from __future__ import annotations

from selfteach.prompts.control_tokens import NONCHARACTERS, ControlTokenEscaper
from selfteach.prompts.template_set import Message, Templates, conversation, with_history
from selfteach.types import Problem


class MessageRenderer:
    """Renders the student's and the teacher's prompt of one template set as messages.

    The messages are those that `Renderer` puts into the chat template. Another trainer tokenises them
    with the template's control tokens parsed as such, so control tokens that data quote are broken by
    a character of no width, as for a served critic (`ControlTokenEscaper`).
    """

    def __init__(
        self, templates: Templates, *, system: str | None = None, teacher_system: str | None = None
    ) -> None:
        """Store the templates; ``teacher_system`` is ``system`` where it is None."""
        self._templates, self._escaper = templates, ControlTokenEscaper()
        self._system = system
        self._teacher_system = system if teacher_system is None else teacher_system

    def solver(self, problem: Problem) -> list[Message]:
        """Return the student's prompt: system prompt, history and question."""
        return self._messages("solver", problem, self._system)

    def teacher(self, problem: Problem, context: str) -> list[Message]:
        """Return the teacher's prompt: system prompt, history, and question with context."""
        return self._messages("teacher", problem, self._teacher_system, context=context)

    def data(self, text: str) -> str:
        """Return a text with its control tokens broken."""
        return self._escaper.escape(NONCHARACTERS.sub("", text))

    def _messages(
        self, template: str, problem: Problem, system: str | None, **data: str
    ) -> list[Message]:
        values = {name: self.data(text) for name, text in data.items()}
        rendered = self._templates.render(template, question=self.data(problem.question), **values)
        history = [(role, self.data(content)) for role, content in problem.history]
        messages = with_history(conversation(rendered), history)
        contents = [message["content"] for message in messages if message["role"] == "system"]
        contents = contents if system is None else [system, *contents]
        turns = [message for message in messages if message["role"] != "system"]
        if not contents:
            return turns
        return [{"role": "system", "content": "\n\n".join(contents)}, *turns]
