"""Renders template sets: the prompts of student, self-teacher and critic, from Jinja files.

A *template set* is a folder of Jinja files: ``solver.jinja`` (the question as the student sees it),
``teacher.jinja`` (question and context as the self-teacher sees them), ``critic.jinja`` (the
critic's prompt) and one file per context. Sets ship with the package; a recipe may name a folder
instead, whose files override those of ``steps`` one by one. A file ``parents.txt`` in a set names other
shipped sets, one a line: a file that the set lacks comes from the first of them that has it, else from
``steps``.

A template with worked examples (few-shot) writes ``{{ turn }}`` between the turns of a conversation:
the first turn is the user's, the second the assistant's, and so on; the last one is the user's. An
example of an episode writes ``{{ result }}`` behind an assistant's turn that calls a tool: a tool's
result follows, and after it ``{{ turn }}`` begins the assistant's next turn. ``call(name, argument=…)``
is a call in the form of the policy's family, ``tools`` are the tools that the environment offers,
``call_forms`` a call of each, with … for the arguments.

Questions, rollouts, critiques and references are *data*: they are passed as values and never parsed
as templates, they cannot write ``{{ turn }}`` or ``{{ result }}``, and a control token in them
(``<|im_end|>``) is encoded as plain text (`control_tokens`). Two filters keep data inside what a
template puts around it: ``fence`` and ``untagged``.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import jinja2

from selfteach.episodes import Segment, ToolCall
from selfteach.errors import RecipeError
from selfteach.prompts.bounded_jinja import BoundedEnvironment
from selfteach.prompts.control_tokens import BREAK, NONCHARACTERS
from selfteach.prompts.tool_calls import TOOL_FORMATS, Tool, ToolFormat
from selfteach.types import Critique

SHIPPED = Path(__file__).parent / "templates"

Message = dict[str, str]
"""One message of a chat: ``role`` and ``content``."""

TURN = "\ufdd1"
"""Stands for ``{{ turn }}`` until the chat template is applied; it is removed from data."""
RESULT = "\ufdd3"
"""Stands for ``{{ result }}``."""
_MARKS = re.compile(f"([{TURN}{RESULT}])")

_STEP_TAG = re.compile(rf"<{BREAK}?/?(?:(?:step|turn)_\d{{1,9}}|answer)>\Z")
_TAG_LENGTH = len(f"<{BREAK}/step_>") + 9
"""Characters of the longest tag: solver and critic write no step number of more than nine digits."""


class Templates:
    """Renders the templates of one set, given by name or folder.

    Raises `RecipeError` if the set does not exist, or if a template fails.
    """

    def __init__(self, name_or_folder: str = "steps") -> None:
        folder = SHIPPED / name_or_folder if "/" not in name_or_folder else Path(name_or_folder)
        if not folder.is_dir():
            shipped = ", ".join(sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()))
            raise RecipeError(
                f"templates = {name_or_folder!r}: no such template set; "
                f"shipped: {shipped}; to use a folder, write a path with a slash"
            )
        _require_known_names(folder)
        self._environment = BoundedEnvironment(
            loader=jinja2.FileSystemLoader([*_with_parents(folder), SHIPPED / "steps"]),
            undefined=jinja2.StrictUndefined,
            autoescape=False,
            keep_trailing_newline=False,
            auto_reload=False,  # would check the file on every render
        )
        self._environment.filters |= {"fence": fence, "untagged": untagged}
        self._environment.globals |= _globals((), TOOL_FORMATS["hermes"])

    def offering(self, tools: Sequence[Tool], tool_format: ToolFormat | None) -> Templates:
        """Return the same templates with the tools of an environment, in the form of a family."""
        offered = copy.copy(self)
        offered._environment = self._environment.overlay()  # which compiles with its own globals
        offered._environment.globals = {
            **self._environment.globals,
            **_globals(tools, tool_format or TOOL_FORMATS["hermes"]),
        }
        return offered

    def has(self, name: str) -> bool:
        """Return True if the set, a parent of it, or the set ``steps`` has a template of this name."""
        return f"{name}.jinja" in self._environment.list_templates()

    def render(self, name: str, **values: Any) -> str:
        """Render one template; ``values`` are data."""
        data = {key: _without_turns(value) for key, value in values.items()}
        try:
            return self._environment.get_template(f"{name}.jinja").render(**data).strip()
        except Exception as error:  # a template may divide by zero, or worse
            raise RecipeError(f"template {name}.jinja: {' '.join(str(error).split())}") from error

    def context(
        self,
        name: str,
        *,
        critique: Critique | None,
        references: Mapping[str, str],
        correct: bool,
        attempt: str = "",
        peer: str | None = None,
        feedback: str | None = None,
    ) -> str:
        """Render a context from a rollout's critique, verdict, references, peer and feedback.

        ``attempt`` is the rollout's text, for custom templates: no shipped one shows it.
        """
        return self.render(
            name,
            steps=critique.steps if critique else (),
            answer=critique.answer if critique else None,
            first_error=critique.first_error if critique else None,
            case=critique.case if critique else None,
            references=references,
            correct=correct,
            attempt=attempt,
            peer=peer,
            feedback=feedback,
        )

    def critic(
        self,
        question: str,
        answer: str,
        *,
        steps: Sequence[str],
        final: str | None = None,
        finished: bool,
        reference: str | None = None,
        evidence: str | None = None,
        facts: Mapping[str, object] | None = None,
        segments: Sequence[Segment] = (),
    ) -> list[Message]:
        """Render the critic's prompt about a rollout as chat messages.

        ``segments`` are an episode's, in the template each with its ``text`` as the episode shows it
        and ``turn``, its number from 1, or None for what the environment wrote.

        ``answer`` is its text, ``steps`` its steps, ``final`` its final answer, None without one;
        ``finished`` is False for a truncated rollout. ``evidence`` is what running the answer has
        shown, as text, ``facts`` the same as a table; None for a critic that is shown none.
        """
        values = {"answer": answer, "steps": tuple(steps), "final": final, "finished": finished}
        shown = {"reference": reference, "evidence": evidence, "facts": facts}
        values["segments"] = _numbered(segments)
        return conversation(self.render("critic", question=question, **values, **shown))


def _require_known_names(folder: Path) -> None:
    """Raise `RecipeError` for a file that is no template's and that no other one includes."""
    known = {path.name for path in SHIPPED.glob("*/*.jinja")}
    files = {path.name: path for path in sorted(folder.glob("*.jinja"))}
    for name in files:
        others = (path for other, path in files.items() if other != name)
        if name in known or any(name in path.read_text(encoding="utf-8") for path in others):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise RecipeError(
            f"{folder / name}: no template has this name, and none in the folder includes it{hint}"
        )


def _with_parents(folder: Path) -> list[Path]:
    """Return a set's folder and the folders of its parents, in the order they are searched."""
    try:
        parents = (folder / "parents.txt").read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return [folder]
    for parent in parents:
        if "/" in parent or not (SHIPPED / parent).is_dir():
            raise RecipeError(f"{folder / 'parents.txt'}: no shipped template set {parent!r}")
    return [folder, *(path for name in parents for path in _with_parents(SHIPPED / name))]


def conversation(content: str) -> list[Message]:
    """Split a rendered template into messages of user, assistant and tool, the user's last.

    Raises `RecipeError` if the last turn would be another one's, or a result would follow the user.
    """
    first, *others = _MARKS.split(content)
    messages: list[Message] = [{"role": "user", "content": first.strip()}]
    for mark, turn in zip(others[::2], others[1::2], strict=True):
        last = messages[-1]["role"]
        if mark == RESULT and last == "user":
            raise RecipeError("a template's {{ result }} must follow an assistant's turn")
        role = "tool" if mark == RESULT else "user" if last == "assistant" else "assistant"
        messages.append({"role": role, "content": turn.strip()})
    if messages[-1]["role"] != "user":
        raise RecipeError(
            "a template's last turn must be the user's: it ends in another one, by its {{ turn }}"
        )
    return messages


def without_tools(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation for a model that is offered no tools: results are the user's messages."""
    return [{**m, "role": "user"} if m["role"] == "tool" else m for m in messages]


def with_history(messages: Sequence[Message], history: Sequence[tuple[str, str]]) -> list[Message]:
    """Put a problem's earlier messages before its question, the last message.

    A system message comes first of all, worked examples of the template before the conversation.
    """
    *examples, question = messages
    earlier: list[Message] = [{"role": role, "content": content} for role, content in history]
    system = [message for message in earlier if message["role"] == "system"]
    turns = [message for message in earlier if message["role"] != "system"]
    return [*system, *examples, *turns, question]


def fence(data: str, character: str, least: int = 3) -> str:
    """Return a run of a character that is longer than any in the data, so that no data can end it."""
    runs = re.findall(f"{re.escape(character)}+", NONCHARACTERS.sub("", data))
    return character * max(least, 1 + max(map(len, runs), default=0))


def untagged(data: str) -> str:
    """Remove the tags that structure an answer from data that is put inside such tags."""
    text: list[str] = []
    for character in data:
        text.append(character)
        # What is left of a removed tag may close around it to another one: look back at each ">".
        if character == ">" and (tag := _STEP_TAG.search("".join(text[-_TAG_LENGTH:]))):
            del text[-len(tag[0]) :]
    return "".join(text)


def _globals(tools: Sequence[Tool], tool_format: ToolFormat) -> dict[str, Any]:
    """Return what every template may use besides its data."""

    def call(name: str, /, **arguments: Any) -> str:
        return tool_format.write(ToolCall(name, arguments))

    forms = [tool_format.form(tool) for tool in tools]
    return {"turn": TURN, "result": RESULT, "tools": tools, "call": call, "call_forms": forms}


def _numbered(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Return segments as values of a template: their text, and the number of each turn."""
    numbers = count(1)
    return [
        {
            "text": _MARKS.sub("", segment.shown),
            "turn": next(numbers) if segment.kind == "model" else None,
        }
        for segment in segments
    ]


def _without_turns(value: Any) -> Any:
    if isinstance(value, str):
        return _MARKS.sub("", value)
    if isinstance(value, tuple):
        return tuple(map(_without_turns, value))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _without_turns(one) for key, one in value.items()}
    return value
