"""Text in, token ids out: the only caller of templates, tokenizer and chat template.

A *template set* is a folder of Jinja files: ``solver.jinja`` (the question as the student sees it),
``teacher.jinja`` (question and context as the self-teacher sees them) and one file per context.
Sets ship with the package (``lab``, ``steps``); a recipe may name a folder of its own instead, whose
files override those of ``steps`` one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from selfteach.errors import RecipeError
from selfteach.types import Critique

SHIPPED = Path(__file__).parent / "templates"


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
            autoescape=False,  # noqa: S701 - prompts are text for a model, not HTML
            keep_trailing_newline=False,
        )

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
