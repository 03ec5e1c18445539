"""Text in, token ids out: the only caller of templates, tokenizer and chat template.

A *template set* is a folder of Jinja files: ``solver.jinja`` (the question as the student sees it),
``teacher.jinja`` (question and context as the self-teacher sees them) and one file per context.
Sets ship with the package (``lab``, ``steps``); a recipe may name a folder of its own instead, whose
files override those of ``steps`` one by one.

A template that shows worked examples writes ``{{ turn }}`` between the turns of a conversation: the
user speaks first, then the assistant, and so on; the last turn is the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from selfteach.errors import EngineError, RecipeError
from selfteach.types import Critique, Problem

SHIPPED = Path(__file__).parent / "templates"
TURN = "\x1eturn\x1e"
"""What ``{{ turn }}`` stands for until the chat template is applied; no text holds it by chance."""


class Templates:
    """A template set by name or folder.

    Raises `RecipeError` if the set does not exist, or a template fails on what it is given.
    """

    def __init__(self, name_or_folder: str = "steps") -> None:
        folder = SHIPPED / name_or_folder if "/" not in name_or_folder else Path(name_or_folder)
        if not folder.is_dir():
            shipped = ", ".join(sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()))
            raise RecipeError(
                f"templates = {name_or_folder!r}: no such template set; "
                f"shipped: {shipped}; a folder of your own is named by a path with a slash"
            )
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader([folder, SHIPPED / "steps"]),
            undefined=jinja2.StrictUndefined,
            autoescape=False,
            keep_trailing_newline=False,
        )
        self._environment.globals["turn"] = TURN

    def has(self, name: str) -> bool:
        """True if the set (or the shipped one behind it) holds a template of this name."""
        return f"{name}.jinja" in self._environment.list_templates()

    def render(self, name: str, **values: Any) -> str:
        """Render one template."""
        try:
            return self._environment.get_template(f"{name}.jinja").render(**values).strip()
        except jinja2.TemplateError as error:
            raise RecipeError(f"template {name}.jinja: {error}") from error

    def context(
        self,
        name: str,
        *,
        critique: Critique | None,
        references: Mapping[str, str],
        correct: bool,
    ) -> str:
        """Render a context from what is known of an answer."""
        return self.render(
            name,
            steps=critique.steps if critique else (),
            answer=critique.answer if critique else None,
            first_error=critique.first_error if critique else None,
            case=critique.case if critique else None,
            references=references,
            correct=correct,
        )


class Renderer:
    """Prompts as token ids and answers as text, for one tokenizer and one template set.

    Raises `EngineError` for a tokenizer without a chat template or without an end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, templates: Templates) -> None:
        if tokenizer.chat_template is None:
            raise EngineError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "use an instruction-tuned model, or save the tokenizer with one"
            )
        if tokenizer.eos_token_id is None:
            raise EngineError(f"the tokenizer of {tokenizer.name_or_path!r} has no end token")
        self._tokenizer, self._templates = tokenizer, templates

    def solver_prompt(self, problem: Problem) -> tuple[int, ...]:
        """What the student sees: the question, and the header of the answer."""
        return self._prompt(self._templates.render("solver", question=problem.question))

    def teacher_prompt(self, problem: Problem, context: str) -> tuple[int, ...]:
        """What the self-teacher sees: question, context, and the same header."""
        content = self._templates.render("teacher", question=problem.question, context=context)
        return self._prompt(content)

    def decode(self, answer_ids: Sequence[int]) -> str:
        """An answer's text, without special tokens."""
        return self._decode(answer_ids)

    def token_text(self, token: int) -> str:
        """One token as text, special tokens by name."""
        return str(self._tokenizer.decode([token]))

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer that was *not* sampled, end token included (for tests and analysis).

        A sampled answer is never encoded again: other ids can spell the same text.
        """
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        assert isinstance(end, int)
        return (*ids, end)

    def token_ends(self, answer_ids: Sequence[int]) -> list[int]:
        """Where each token of an answer ends in its text, in characters.

        Decoding token by token is exact for most tokenizers and is checked; where pieces do not add
        up to the text (characters split over tokens) every prefix is decoded instead.
        """
        text = self._decode(answer_ids)
        pieces = [self._decode([token]) for token in answer_ids]
        for gap in ("", " "):
            ends = _ends(pieces, gap)
            if ends and ends[-1] == len(text) and gap.join(filter(None, pieces)) == text:
                return ends
        return [len(self._decode(answer_ids[: i + 1])) for i in range(len(answer_ids))]

    def _prompt(self, content: str) -> tuple[int, ...]:
        text = self._tokenizer.apply_chat_template(
            conversation(content), add_generation_prompt=True, tokenize=False
        )
        assert isinstance(text, str)
        # The template has written every special token itself: a second BOS would go unseen.
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def conversation(content: str) -> list[dict[str, str]]:
    """A rendered template as chat messages, user and assistant by turns, the user's last.

    Raises `RecipeError` if the last turn would be the assistant's.
    """
    turns = content.split(TURN)
    if len(turns) % 2 == 0:
        raise RecipeError("a template's last turn must be the user's: an even number of {{ turn }}")
    return [
        {"role": "assistant" if i % 2 else "user", "content": turn.strip()}
        for i, turn in enumerate(turns)
    ]


def _ends(pieces: Sequence[str], gap: str) -> list[int]:
    ends, at = [], 0
    for piece in pieces:
        if piece:
            at += len(piece) + (len(gap) if at else 0)
        ends.append(at)
    return ends


def split_thinking(text: str) -> tuple[str, str]:
    """A thought and what follows it; the thought is empty where there is none."""
    thought, end, said = text.rpartition("</think>")
    if end:
        return thought, said
    return (text, "") if "<think>" in text else ("", text)
