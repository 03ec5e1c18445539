"""docs/recipe.md is what the generator makes of the schema, and the schema explains every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from selfteach.config import reference
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import Study
from selfteach.config.schema import Section

PAGE = Path(__file__).parents[3] / "docs" / "recipe.md"


def all_sections(section: type[Section]) -> set[type[Section]]:
    fields = section.model_fields.values()
    inner = [part for field in fields for part in reference.sections_of(field.annotation)]
    return {section}.union(*map(all_sections, inner))


TABLES = [section for _, section in reference.STUDY_TABLES]
SECTIONS = sorted(set().union(*map(all_sections, [Recipe, *TABLES])), key=lambda s: s.__name__)


def test_the_page_is_what_the_generator_makes() -> None:
    made = "python -m selfteach.config.reference > docs/recipe.md"
    assert PAGE.read_text(encoding="utf-8") == reference.reference(), f"run {made}"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_a_docstring_of_whole_sentences(section: type[Section]) -> None:
    lines = reference.docstrings(section)
    assert section.__doc__ and section.__doc__ != Section.__doc__
    for name in section.model_fields:
        assert lines.get(name), f"{section.__name__}.{name} has no docstring"
        assert lines[name][0].isupper() or lines[name][0] == "`", (name, lines[name])
        assert lines[name].endswith("."), (name, lines[name])


def test_every_table_of_a_recipe_file_is_on_the_page() -> None:
    text = reference.reference()
    for name in Recipe.model_fields.keys() - {"seed"}:
        assert f"`[{name}]`" in text
    for name in Study.model_fields.keys() - {"common"}:
        assert f"`[{name}]`" in text or f"`[{name}.NAME]`" in text
    for section in SECTIONS:
        for name in section.model_fields.keys() - {"type"}:
            assert f"| `{name}` |" in text, (section, name)


class Example(Section):
    """Shows each kind of field."""

    kind: int | None = Field(default=None, ge=1)
    """A number."""
    names: tuple[str, ...] = Field(default=("a",), min_length=1)
    """Names."""
    table: dict[str, Any] = Field(default_factory=dict)
    """A table | with a bar."""
    undocumented: bool = True


def test_a_row_holds_type_default_values_and_meaning() -> None:
    rows = [
        reference._row(name, Example.model_fields[name], Example)
        for name in ("kind", "names", "table")
    ]
    assert rows == [
        "| `kind` | integer | *unset* | ≥ 1 | A number. |",
        '| `names` | list of strings | `["a"]` | not empty | Names. |',
        "| `table` | table | `{}` |  | A table \\| with a bar. |",
    ]
    assert "undocumented" not in reference.docstrings(Example)
    with pytest.raises(KeyError, match="undocumented"):
        reference._row("undocumented", Example.model_fields["undocumented"], Example)
