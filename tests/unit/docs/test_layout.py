"""The layout of the package: few files at its root, names that mean one thing, short files."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import selfteach

PACKAGE = Path(selfteach.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(Path(__file__).parents[2].rglob("*.py"))
VAGUE = {"told", "said", "own", "asked", "kept", "found", "soon"}
"""Words that name no variable: they do not say what a thing is."""


def stored_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def classes(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_the_root_holds_a_few_files_and_folders() -> None:
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(files) <= 6 and len(folders) <= 13, (files, folders)


def test_no_module_and_no_class_name_stands_for_two_things() -> None:
    modules = Counter(path.stem for path in FILES if path.stem != "__init__")
    names = Counter(name for path in FILES for name in classes(path))
    assert [name for name, count in (modules + names).items() if count > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_say_what_they_name_and_files_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert not VAGUE & set(stored_names(tree))
    assert text.count("\n") <= 400
    assert ast.get_docstring(tree) or path.name == "__init__.py"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_names_in_tests_say_what_they_name(path: Path) -> None:
    assert not VAGUE & set(stored_names(ast.parse(path.read_text(encoding="utf-8"))))
