"""Write the reference of all recipe keys from the schema: ``python -m selfteach.config.reference``.

Types, defaults and ranges come from pydantic; meanings are the docstrings under the fields.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from selfteach.config.data_section import SelectConfig
from selfteach.config.migrations import RECIPE_KEYS, RECIPE_VALUES, SELECT_KEYS, RenamedKey
from selfteach.config.part_section import CustomPart
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import StudyConfig, SweepConfig, VariantConfig
from selfteach.config.schema import Section

INTRODUCTION = """\
# Recipe keys

<!-- Generated: python -m selfteach.config.reference > docs/recipe.md -->

Every key of a recipe file, with its type, its default, the values it takes and its meaning. A table
with several types lists the keys of each; its key `type` chooses one. A default of *unset* means that
the key is left out; its meaning says what happens then. Unknown keys are refused.

`extends = "../other/recipe.toml"` at the top of a file starts from the common sections of another file,
`extends = "paper"` from those of a shipped recipe (`selfteach recipes`).
`--set KEY=VALUE` overrides a key of the common sections and of every arm; `--set arms.NAME.KEY=VALUE`
overrides a key of one arm.
"""

ARMS = """\
## `[arms.NAME]`

One table per arm of a study, with overrides of the common sections: `[arms.grpo]` with
`objective = { type = "grpo" }`. Names are letters, digits and underscores; `base` is reserved.
"""

STUDY_TABLES: tuple[tuple[str, type[Section]], ...] = (
    ("study", StudyConfig),
    ("variants.NAME", VariantConfig),
    ("sweep", SweepConfig),
    ("select", SelectConfig),
)
"""Tables of a recipe file besides the sections of a run."""

NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "table", Any: "any"}

SYMBOLS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def reference() -> str:
    """Return the reference of all recipe keys as Markdown."""
    headings: dict[type[Section], str] = {}
    blocks = [INTRODUCTION, _table("Top level", Recipe)]
    for name, field in Recipe.model_fields.items():
        for section in sections_of(field.annotation):
            blocks += _tables(name, section, headings)
    for name, section in STUDY_TABLES:
        blocks += _tables(name, section, headings)
        if name == "study":
            blocks.append(ARMS)
    return "\n".join([*blocks, _renamed_keys()])


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the sections among the alternatives of an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Annotated, tuple):
        return sections_of(get_args(annotation)[0])
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return [section for part in alternatives for section in sections_of(part)]


@cache
def docstrings(section: type[Section]) -> dict[str, str]:
    """Return the docstring under each field of a section, inherited fields included, on one line."""
    lines: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section) and base is not Section:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(body, ast.ClassDef)
            lines |= dict(_field_docstrings(body))
    return lines


def _field_docstrings(body: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            yield field.target.id, " ".join(following.value.value.split())


def _tables(path: str, section: type[Section], headings: dict[type[Section], str]) -> list[str]:
    """Return a section's table of keys and those of the sections inside it, each only once.

    ``headings`` holds the sections that have a table already, and gets those of this call.
    """
    kind = _single_type(section)
    if issubclass(section, CustomPart):
        kind = "package.module:name"
    is_chosen = "." not in path or path.startswith("[")
    heading = f"`[{path}]`" + (f', `type = "{kind}"`' if kind and is_chosen else "")
    if section in headings:
        same = f"## {heading}\n\nHas the keys of {headings[section]}.\n"
        return [] if headings[section] == heading else [same]
    headings[section] = heading
    blocks = [_table(heading, section)]
    for name, field in section.model_fields.items():
        for inner in sections_of(field.annotation):
            below = f"{path}.{name}".replace("[", "").replace("]", "")
            is_list = get_origin(field.annotation) is tuple
            blocks += _tables(f"[{below}]" if is_list else below, inner, headings)
    return blocks


def _table(heading: str, section: type[Section]) -> str:
    doc = " ".join(inspect.cleandoc(section.__doc__ or "").split())
    rows = [
        _row(name, field, section)
        for name, field in section.model_fields.items()
        if not (name == "type" and _single_type(section))
    ]
    header = (
        ["| Key | Type | Default | Values | Meaning |", "|---|---|---|---|---|"] if rows else []
    )
    return "\n".join(
        [f"## {heading}", "", _markdown(doc), "", *header, *rows, *([""] if rows else [])]
    )


def _single_type(section: type[Section]) -> str | None:
    """Return the ``type`` that chooses a section among others; None for a section without."""
    field = section.model_fields.get("type")
    kinds = get_args(field.annotation) if field else ()
    return kinds[0] if len(kinds) == 1 else None


def _row(name: str, field: FieldInfo, section: type[Section]) -> str:
    cells = (
        f"`{name}`",
        _type(field.annotation),
        _default(field),
        _values(field),
        _markdown(docstrings(section)[name]),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return NAMES[type(arguments[0])]
    if origin in (Union, UnionType):
        names = [_type(part) for part in arguments if part is not type(None)]
        return " or ".join(dict.fromkeys(names))
    if origin is tuple:
        items = dict.fromkeys(_type(part) for part in arguments if part is not ...)
        return f"list of {' or '.join(f'{name}s' for name in items)}"
    if sections_of(annotation) or origin is dict:
        return "table"
    return NAMES[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "*unset*"
    if isinstance(default, Section):
        kind = getattr(default, "type", None)
        return f'`type = "{kind}"`' if kind else "its defaults"
    if isinstance(default, str) and "\n" in default:
        return "*a shipped text*"
    return f"`{_toml(default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return "{}" if value == {} else f"{value:g}" if isinstance(value, float) else str(value)


def _values(field: FieldInfo) -> str:
    """Return the values that a field takes: its literals, and its bounds."""
    limits = [
        *_literals(field.annotation),
        *_bounds(field.metadata),
        *_inner_bounds(field.annotation),
    ]
    return ", ".join(dict.fromkeys(limits))


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [f"`{_toml(value)}`" for value in get_args(annotation)]
    return [text for part in get_args(annotation) for text in _literals(part)]


def _inner_bounds(annotation: Any) -> list[str]:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        limits = [
            limit for item in metadata for limit in _bounds(getattr(item, "metadata", [item]))
        ]
        name = f"{_type(inner)} " if limits else ""
        return [name + " and ".join(limits)] if limits else []
    if sections_of(annotation):
        return []
    return [text for part in get_args(annotation) for text in _inner_bounds(part)]


def _bounds(metadata: list[Any]) -> list[str]:
    limits = []
    for item in metadata:
        for name, symbol in SYMBOLS.items():
            if (bound := getattr(item, name, None)) is not None:
                limits.append(f"{symbol} {_toml(bound)}")
        if (length := getattr(item, "min_length", None)) is not None:
            limits.append("not empty" if length == 1 else f"at least {length} characters")
    return limits


def _markdown(text: str) -> str:
    return text.replace("``", "`")


def _renamed_keys() -> str:
    def row(key: RenamedKey, prefix: str = "") -> str:
        section = prefix + (f"{key.section}." if key.section else "")
        return f"| `{section}{key.old}` | `{section}{key.new}` | {key.note} |"

    return "\n".join(
        [
            "## Old names",
            "",
            "Recipes and run folders with these names are still read; each is reported in one line.",
            "",
            "| Old key | Key | Values |",
            "|---|---|---|",
            *(row(key) for key in (*RECIPE_KEYS, *RECIPE_VALUES)),
            *(row(key, "select.") for key in SELECT_KEYS),
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(reference())
