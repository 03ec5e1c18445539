"""Record the source of a run's own parts in its folder, and require the same one when it is resumed.

    parts.json    name, options and SHA-256 of each part, and of every file that it consists of
    parts/        copies of the parts that are files, with what they import beside them

A part's files are its own and those that they import from the same folder or package, followed
through import statements; installed packages of others and files that it reads are not among them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfteach.config.part_names import IN_FILE, Kind, unanchored
from selfteach.config.part_section import CustomPart, named_parts, part_keys, part_name, with_names
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import CheckpointError
from selfteach.runtime.atomic_files import make_folder, write_json, write_text
from selfteach.runtime.parts import import_part, is_given, shown
from selfteach.runtime.stored_files import read_json, reading

log = logging.getLogger(__name__)

FILE, COPIES = "parts.json", "parts"
GIVEN = "given"
"""The word in parts.json for an object that was given from Python, which no recipe can build."""


@dataclass(frozen=True, slots=True)
class PartSource:
    """Holds what a part's source is: files by their name below the folder of imports."""

    name: str
    files: Mapping[str, bytes]
    is_file: bool
    """True for a part of a file, which is copied; False for one of a package."""
    options: Mapping[str, Any]
    given: bool = False

    @property
    def digest(self) -> str:
        """Return the SHA-256 of all files, in the order of their names."""
        total = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            total.update(f"{name}\0{len(content)}\0".encode() + content)
        return total.hexdigest()

    def record(self) -> dict[str, Any]:
        """Return what parts.json holds of it."""
        files = {
            name: hashlib.sha256(text).hexdigest() for name, text in sorted(self.files.items())
        }
        row = {
            "name": self.name,
            "options": dict(self.options),
            "sha256": self.digest,
            "files": files,
        }
        return {**row, GIVEN: True} if self.given else row


def source_of(kind: Kind, part: CustomPart) -> PartSource:
    """Return the source of a part that a recipe names. Raises `PartError` if it cannot be imported."""
    imported = import_part(kind, part.type)
    if imported.given:
        return _source_of_given(part.type, imported.target)
    is_file = IN_FILE.fullmatch(part.type) is not None
    name = unanchored({"type": part.type})["type"]
    if imported.file is None or imported.root is None:
        return PartSource(name, {}, False, part.options)
    return PartSource(name, _files(imported.file, imported.root, is_file), is_file, part.options)


def require_given(folder: Path, recipe: Recipe) -> None:
    """Raise `CheckpointError` if a run was begun with an object from Python that is not given now."""
    recorded, named = _stored(folder).get("parts", {}), named_parts(recipe)
    for key, row in recorded.items():
        if row.get(GIVEN) and key in named and not is_given(named[key][0], named[key][1].type):
            kind = named[key][0]
            raise CheckpointError(
                f"{folder} began with a {kind} from Python, {row['name']}: continue it with "
                f'selfteach.train(recipe, folder, components={{"{kind}": …}})'
            )


def require_same_sources(folder: Path, recipe: Recipe) -> None:
    """Record the sources of a run's parts, or require those that are recorded.

    Raises `CheckpointError` if a part's source is another one than when the run began.
    """
    named = named_parts(recipe).items()
    _require(folder, {key: source_of(kind, part) for key, (kind, part) in named})


def require_same_sources_of_all(folder: Path, recipes: Iterable[Recipe]) -> None:
    """Record the sources of the parts of all runs of a study, or require those that are recorded.

    So runs that begin later have the parts of those that are complete. Raises `CheckpointError`.
    """
    sources: dict[str, PartSource] = {}
    for recipe in recipes:
        for kind, part in named_parts(recipe).values():
            source = source_of(kind, part)
            sources[f"{kind} {source.name}"] = replace(source, is_file=False)  # runs have copies
    _require(folder, sources)


def _require(folder: Path, sources: Mapping[str, PartSource]) -> None:
    stored = _stored(folder)
    recorded: Mapping[str, Any] = stored.get("parts", {})
    for key, source in sources.items():
        if key in recorded and recorded[key]["sha256"] != source.digest:
            raise CheckpointError(_changed(folder, key, recorded[key], source))
    if sources.keys() - recorded.keys():
        _write(folder, stored, recorded, sources)


def accept_sources(folder: Path, *, given: bool = False) -> None:
    """Accept the sources that parts have now, in a run's folder and in those below it.

    The hashes of earlier sources stay in parts.json. Objects from Python only with ``given``.
    """
    for path in sorted(folder.rglob(FILE)):
        stored = _stored(path.parent)
        parts: Mapping[str, Any] = stored.get("parts", {})
        retained = {key: row for key, row in parts.items() if row.get(GIVEN) and not given}
        earlier = {key: row for key, row in parts.items() if key not in retained}
        if earlier:
            history = [*stored.get("earlier", []), earlier]
            write_json(path, {"parts": retained, "earlier": history})


def with_copies(recipe: Recipe, folder: Path, *, only_missing: bool = False) -> Recipe:
    """Return a run's recipe with the copies of its parts in place of their files.

    With ``only_missing`` just where a file is not there any more, which is logged.
    """
    names = {}
    for key, (kind, part) in named_parts(recipe).items():
        match, copy = IN_FILE.fullmatch(part.type), _copy(folder, key, part.type)
        if match is None or copy is None or not copy.exists():
            continue
        if only_missing and Path(match["place"]).exists():
            continue
        if only_missing:
            log.warning("%s %s is not there: the copy in %s is used", kind, shown(part.type), copy)
        names[key] = f"{copy.resolve()}:{match['name']}"
    if not names:
        return recipe
    return validate(Recipe, with_names(recipe.model_dump(mode="json"), names), where=str(folder))


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config with the names that its recipe.toml has for parts: those of the copies."""
    names = {}
    for key in part_keys(config):
        value = part_name(config, key)
        if isinstance(value, str) and (match := IN_FILE.fullmatch(value)):
            names[key] = f"./{COPIES}/{key}/{Path(match['place']).name}:{match['name']}"
    return with_names(config, names)


def _stored(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.exists():
        return {}
    values = read_json(path)
    with reading(path):
        for row in values["parts"].values():
            if not {"sha256", "name"} <= row.keys():
                raise KeyError("sha256")
    return values


def _write(
    folder: Path,
    stored: Mapping[str, Any],
    recorded: Mapping[str, Any],
    sources: Mapping[str, PartSource],
) -> None:
    for key, source in sources.items():
        for name, content in source.files.items() if source.is_file else ():
            copy = folder / COPIES / key / name
            make_folder(copy.parent)
            write_text(copy, content.decode("utf-8", "replace"))
    records = {key: source.record() for key, source in sources.items()}
    write_json(folder / FILE, {**stored, "parts": {**recorded, **records}})


def _source_of_given(name: str, part: Any) -> PartSource:
    """Return the source of an object that was given from Python: the text of its class or function."""
    target = part if inspect.isroutine(part) or inspect.isclass(part) else type(part)
    try:
        text = inspect.getsource(target)
    except (OSError, TypeError):  # typed at a prompt, or written in C
        text = ""
    return PartSource(name, {target.__qualname__: text.encode()}, False, {}, given=True)


def _copy(folder: Path, key: str, name: str) -> Path | None:
    match = IN_FILE.fullmatch(name)
    return folder / COPIES / key / Path(match["place"]).name if match else None


def _changed(folder: Path, key: str, row: Mapping[str, Any], now: PartSource) -> str:
    files = row.get("files", {})
    names = sorted(
        name
        for name in files.keys() | now.files.keys()
        if name not in now.files or files.get(name) != hashlib.sha256(now.files[name]).hexdigest()
    )
    copies = folder / COPIES / key
    what = f" (a copy is in {copies})" if copies.is_dir() else ""
    accept = f"selfteach resume {folder} --accept-parts"
    if now.given:
        accept = "selfteach.train(recipe, folder, components=…, accept_parts=True)"
    return (
        f"{folder}: the source of its {key.split()[0]} {row['name']} has changed since this run began "
        f"({', '.join(names)}): restore it{what}, or go on with the new one: {accept}"
    )


# -- which files a part consists of -----------------------------------------------------------------


def _files(file: Path, root: Path, is_file: bool) -> dict[str, bytes]:
    """Return a part's file and those it imports: from its folder, or from its top-level package."""
    within = root if is_file else root / file.relative_to(root).parts[0]
    contents: dict[str, bytes] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(root).as_posix()
        if name in contents:
            continue
        contents[name] = path.read_bytes()
        waiting += [
            other for other in _imported(path, contents[name], root) if other.is_relative_to(within)
        ]
    return contents


def _imported(path: Path, content: bytes, root: Path) -> Iterator[Path]:
    """Yield the files beneath ``root`` that a file's import statements may name."""
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            dotted, base = [alias.name for alias in node.names], root
        elif isinstance(node, ast.ImportFrom):
            start = f"{node.module}." if node.module else ""
            dotted = [node.module or "", *(start + alias.name for alias in node.names)]
            base = path.parents[node.level - 1] if node.level else root
        else:
            continue
        for name in filter(None, dotted):
            place = base.joinpath(*name.split("."))
            yield from (p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file())
