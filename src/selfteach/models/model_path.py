"""Resolve the name of a model in a recipe to a folder or a hub id; imports no torch."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from selfteach.config.critic_section import LocalCriticConfig
from selfteach.config.model_defaults import LAB_MODEL
from selfteach.config.recipe import Recipe
from selfteach.errors import EngineError

BASES = Path(__file__).parents[1] / "tasks" / "lab" / "bases"
"""The shipped base models, one folder per world, in Hugging Face format."""
HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
"""What may be the id of a hub model; anything else (``./x``, ``~/x``, ``a/b/c``) is a folder."""
NO_NAMESPACE = frozenset({".", "..", "models", "datasets", "spaces", "docs", "api", "tasks"})
"""First parts of a path that no hub id begins with: they are pages of the hub."""
WEIGHT_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
"""Endings of a file of weights; a model is named by its folder."""


def resolve(path: str, key: str = "model.path") -> str:
    """Resolve a model's name in a recipe to something that transformers can load.

    ``lab:WORLD`` is a base model in this package, ``package:NAME`` the folder of an installed Python
    package (``package:NAME/sub/folder`` inside it); anything else is a folder or a hub id.
    Raises `EngineError`, which names ``key``, if there is no such base, package or folder.
    """
    scheme, _, rest = path.partition(":")
    if f"{scheme}:" == LAB_MODEL:
        folder = BASES / rest
        if not rest or not (folder / "config.json").exists():
            shipped = ", ".join(f"lab:{p.name}" for p in sorted(BASES.iterdir()) if p.is_dir())
            raise EngineError(f"{key} = {path!r}: no such base model; shipped: {shipped}")
        return str(folder)
    if scheme == "package":
        return str(_in_package(rest, path, key))
    folder = _expanded(path) if path.strip() else None
    if folder is not None and folder.is_dir():
        return str(folder)
    if folder is not None and folder.is_file():
        raise EngineError(_names_a_file(folder, path, key))
    if not may_be_hub_id(path):
        raise EngineError(f"{key} = {path!r}: no such folder{_did_you_mean(path, folder)}")
    return path


def require_folders(recipes: Iterable[Recipe], *, packages: bool = True) -> None:
    """Check that the models that recipes name by folder are there: the policy's, and a local critic's.

    Takes no time and loads nothing; ``packages``: also those in Python packages. Raises `EngineError`
    in one line.
    """
    for recipe in recipes:
        named = {"model.path": recipe.model.path}
        if isinstance(recipe.critic, LocalCriticConfig):
            named["critic.path"] = recipe.critic.path
        for key, path in named.items():
            if packages or not path.startswith("package:"):
                resolve(path, key)


def may_be_hub_id(path: str) -> bool:
    """Return True for a name that may be a hub model's, and not one of a folder that is missing."""
    first, slash, _ = path.partition("/")
    if not HUB_ID.fullmatch(path) or first in NO_NAMESPACE:
        return False
    return not (slash and Path(first).is_dir())


def _expanded(path: str) -> Path | None:
    """Return a path with the user's folder for ``~``; None for one that no folder can have."""
    try:
        folder = Path(path).expanduser()
        folder.is_dir()
    except (OSError, RuntimeError, ValueError):
        return None
    return folder


def _in_package(name_and_folder: str, path: str, key: str) -> Path:
    name, _, inside = name_and_folder.partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(f"{key} = {path!r}: the Python package {name!r} is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise EngineError(f"{key} = {path!r}: no such folder in the package {name!r}")
    return folder


def _names_a_file(file: Path, path: str, key: str) -> str:
    if file.suffix == ".gguf":
        fix = f'name its folder, and the file as {key.replace("path", "gguf_file")} = "{file.name}"'
    elif file.suffix in WEIGHT_FILES or file.suffix == ".json":
        fix = f"name its folder, {str(file.parent)!r}"
    else:
        fix = "name the folder of a model"
    return f"{key} = {path!r} is a file: {fix}"


def _did_you_mean(path: str, folder: Path | None) -> str:
    """Return a hint with the folder beside the missing one that is named most like it."""
    if folder is None or not folder.parent.is_dir():
        return ""
    try:
        beside = [other.name for other in folder.parent.iterdir() if other.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(folder.name, beside, n=1, cutoff=0.6)
    return f"; did you mean {path[: len(path) - len(folder.name)] + close[0]!r}?" if close else ""
