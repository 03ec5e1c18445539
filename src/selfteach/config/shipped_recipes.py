"""Finds recipe files: by path, or by the name of a recipe that is shipped with the package."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from selfteach.errors import RecipeError

FOLDER = Path(__file__).parents[1] / "recipes"
"""The shipped recipes, in an installed package as in the repository."""
SHARED = "shared"
"""Folder of sections that shipped recipes have in common; they are no recipes of their own."""
EARLIER_FOLDER = "recipes/"
"""Where the repository had them: a path there still names the shipped recipe."""


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the shipped recipes by name, like ``paper`` and ``baselines/sdpo``."""
    files = sorted(FOLDER.rglob("*.toml"), key=lambda path: (len(path.parts), path))
    return {
        name: path
        for path in files
        if not (name := path.relative_to(FOLDER).with_suffix("").as_posix()).startswith(SHARED)
    }


def summary_of(file: Path) -> str:
    """Return the first sentence of a recipe's opening comment, without a final full stop."""
    lines: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        lines.append(text)
    return re.split(r"(?<=[\w)])[.?](?:\s|$)", " ".join(lines), maxsplit=1)[0]


def find_recipe(path_or_name: str | Path) -> Path:
    """Return the file of a recipe: at this path, or the shipped one of this name.

    A file is preferred to a shipped recipe, a shipped recipe to a folder of its name. Raises
    `RecipeError`, which lists the shipped names, if there is neither.
    """
    path = Path(path_or_name).expanduser() if str(path_or_name)[:1] == "~" else Path(path_or_name)
    if path.is_file():
        return path
    if (file := shipped_file(path)) is not None:
        return file
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name the recipe file, {path / 'recipe.toml'}")
    raise RecipeError(f"{path}: no such recipe; name a TOML file by its path, or {_choices(path)}")


def shipped_file(path: Path) -> Path | None:
    """Return the shipped file that a name means, ``shared`` ones included; None if it is no name."""
    name = path.as_posix().removeprefix(EARLIER_FOLDER).removesuffix(".toml")
    if path.is_absolute() or ".." in path.parts or not name.strip("./"):
        return None
    file = FOLDER / f"{name}.toml"
    if file.is_file():
        return file
    shipped = shipped_recipes()
    matches = [path for known, path in shipped.items() if known.rpartition("/")[2] == name]
    return matches[0] if len(matches) == 1 else None


def _choices(path: Path) -> str:
    names = list(shipped_recipes())
    last = {name.rpartition("/")[2]: name for name in names}
    close = difflib.get_close_matches(path.name.removesuffix(".toml"), last, n=1, cutoff=0.6)
    hint = f" (did you mean {last[close[0]]!r}?)" if close else ""
    return f"a shipped recipe by its name: {', '.join(names)}{hint}"
