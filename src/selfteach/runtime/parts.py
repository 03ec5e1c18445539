"""Import parts of a user's own by the name that a recipe gives, and build them with their options.

The one place where a user's code is imported. What a name refers to is one of three:

- a class: constructed with the options as keyword arguments;
- a function: the part itself, with the options bound as keyword arguments (of an objective, a
  teacher and an environment, which are no functions: what constructs them);
- any other object: the part itself, which takes no options.

A class or function that names a parameter of `Offered`, such as ``seed``, gets it from the run.
What a part raises becomes a `PartError` of one line that names the part and what was called.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from selfteach.config.part_names import GROUPS, IN_FILE, IN_MODULE, Kind
from selfteach.config.part_section import CustomPart
from selfteach.config.schema import nearest
from selfteach.errors import PartError
from selfteach.runtime.part_calls import Checks, place_of, reported

CALLED_WITH: Mapping[Kind, tuple[str, ...]] = {
    "problems": ("split",),
    "verifier": ("problem", "text"),
    "splitter": ("text",),
    "critic": ("judged",),
    "context": ("critiqued",),
    "reward": (),
}
"""What a part that is a function is called with, by position. An objective, a teacher and an
environment are objects with methods; a reward gets its arguments by name (TRL's signature), so that
one without a default is no option."""
NEEDED: Mapping[Kind, str] = {"hub_environment": "verifiers"}
"""The library that parts of a kind are made with."""
Offered = Mapping[str, Any]
"""Values of the run by the parameter name under which a part may ask for them."""


@dataclass(frozen=True, slots=True)
class ImportedPart:
    """Holds what a part's name refers to, and where its source is."""

    kind: Kind
    name: str
    target: Any
    """A class, a function or another object."""
    file: Path | None
    """Source file; None for an object whose module has none."""
    root: Path | None
    """Folder on the path of imports beneath which the source's other modules are."""
    given: bool = False
    """True for an object that was given from Python (`given_parts`)."""

    @property
    def label(self) -> str:
        """Return the kind and the name, for error messages."""
        return f"{self.kind} {shown(self.name)}"


def shown(name: str) -> str:
    """Return a part's name for a person: its file relative to the working directory, if it is there."""
    match = IN_FILE.fullmatch(name)
    if match is None:
        return name
    path = Path(match["place"])
    near = path.is_relative_to(Path.cwd())
    return f"{path.relative_to(Path.cwd()) if near else path}:{match['name']}"


_GIVEN: ContextVar[Mapping[tuple[Kind, str], Any]] = ContextVar("given parts", default={})  # noqa: B039


@contextmanager
def given_parts(parts: Mapping[tuple[Kind, str], Any]) -> Iterator[None]:
    """Let names of parts, by kind, refer to objects from Python instead of what could be imported."""
    token = _GIVEN.set({**_GIVEN.get(), **parts})
    try:
        yield
    finally:
        _GIVEN.reset(token)


def is_given(kind: Kind, name: str) -> bool:
    """Return True if a name refers to an object from Python now."""
    return (kind, name) in _GIVEN.get()


def import_part(kind: Kind, name: str) -> ImportedPart:
    """Import what a part's name refers to. Raises `PartError` in one line."""
    label = f"{kind} {shown(name)}"
    if kind in NEEDED and importlib.util.find_spec(NEEDED[kind]) is None:
        raise PartError(f"{label}: needs {NEEDED[kind]}: pip install {NEEDED[kind]}")
    if is_given(kind, name):
        return ImportedPart(kind, name, _GIVEN.get()[kind, name], None, None, given=True)
    if match := IN_FILE.fullmatch(name):
        path = Path(match["place"]).expanduser().resolve()
        module, root = _import_file(label, path), path.parent
    elif match := IN_MODULE.fullmatch(name):
        module = _import_module(label, match["place"])
        path, root = _source_of(module)
    else:
        return _import_plugin(kind, name, label)
    return ImportedPart(kind, name, _member(label, module, match["name"]), path, root)


def build_part(
    kind: Kind, part: CustomPart, offered: Offered | None = None, checks: Checks | None = None
) -> Any:
    """Import and build a part; its errors are reported under its name, its results checked.

    ``checks`` say what is broken about the result of a method by its name. Raises `PartError`.
    """
    return reported(*construct_part(kind, part, offered), checks or {})


def construct_part(
    kind: Kind,
    part: CustomPart,
    offered: Offered | None = None,
    imported: ImportedPart | None = None,
) -> tuple[Any, str]:
    """Import (unless it is ``imported``) and build a part as it is; also return its label, for errors.

    Raises `PartError`.
    """
    imported = imported or import_part(kind, part.type)
    built = _construct(imported, bound_options(imported, part.options, offered or {}))
    return built, imported.label


OFFERED_BY_KIND: Mapping[Kind, frozenset[str]] = {
    "problems": frozenset(),
    "hub_environment": frozenset(),
    "verifier": frozenset({"verify", "answer_in", "read_answer"}),
    "splitter": frozenset({"split_steps"}),
    "reward": frozenset(),
    "critic": frozenset({"task", "templates", "seed", "verify", "split_steps"}),
    "context": frozenset({"task", "templates", "seed"}),
    "objective": frozenset({"sampling_temperature", "seed"}),
    "teacher": frozenset({"policy"}),
    "environment": frozenset(),
}
"""Names of the values of the run that a part of each kind may ask for."""


def require_part(kind: Kind, part: CustomPart) -> None:
    """Import a part and check its options, without building it. Raises `PartError` in one line."""
    offered, imported = dict.fromkeys(OFFERED_BY_KIND[kind]), import_part(kind, part.type)
    if kind != "hub_environment" or is_function(
        imported.target
    ):  # else settings, which its loader reads
        bound_options(imported, part.options, offered)


def bound_options(
    imported: ImportedPart, options: Mapping[str, Any], offered: Offered
) -> dict[str, Any]:
    """Return the keyword arguments of a part: its options, checked, and what it asks of the run.

    Raises `PartError` for an option that it does not take, that has a wrong type, or that is missing.
    """
    target, label = imported.target, imported.label
    if not (inspect.isclass(target) or is_function(target)):
        if options:
            raise PartError(
                f"{label}: is an object and not a class or function: it takes no options"
            )
        return {}
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # of a class written in C
        return dict(options)
    if getattr(getattr(target, "__init__", None), "__name__", "") == "_no_init_or_replace_init":
        signature = inspect.Signature()  # a subclass of a protocol without a constructor
    if inspect.isclass(target) or imported.kind not in CALLED_WITH:
        names = list(signature.parameters)
    else:
        names = _require_callable(label, signature, CALLED_WITH[imported.kind])
    parameters = {name: signature.parameters[name] for name in names}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keywords = [
        n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    for option in options:
        if option not in keywords and not takes_any:
            known = [name for name in keywords if name not in offered]
            hint = nearest(option, known) if known else "it takes none"
            raise PartError(f"{label}: no option {option!r}; {hint}")
    taken = {name: value for name, value in offered.items() if name in keywords}
    by_name = imported.kind == "reward" and is_function(target)
    missing = [
        n for n in keywords if parameters[n].default is inspect.Parameter.empty
        and n not in taken and n not in options and not by_name
    ]  # fmt: skip
    if missing:
        raise PartError(f"{label}: option {missing[0]!r} is missing: write it into its options")
    return {**taken, **_typed(label, target, options)}


def is_function(target: object) -> bool:
    """Return True for a function, a method, a builtin or a partial of one."""
    return inspect.isroutine(target) or isinstance(target, functools.partial)


def _construct(imported: ImportedPart, arguments: Mapping[str, Any]) -> Any:
    target, kind = imported.target, imported.kind
    if is_function(target) and kind in CALLED_WITH:
        return functools.partial(target, **arguments) if arguments else target
    built = target
    if inspect.isclass(target) or is_function(target):
        try:
            built = target(**arguments)
        except Exception as error:
            raise PartError(
                f"{imported.label}: {_listed(arguments)} raised {_described(error)}"
            ) from error
    if kind in CALLED_WITH and not callable(built):
        called = ", ".join(CALLED_WITH[kind])
        raise PartError(f"{imported.label}: cannot be called: define __call__(self, {called})")
    return built


def _require_callable(
    label: str, signature: inspect.Signature, called_with: tuple[str, ...]
) -> list[str]:
    """Return the parameters besides those it is called with. Raises `PartError` if these do not fit."""
    positional = [
        name
        for name, p in signature.parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    takes_all = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    if called_with and len(positional) < len(called_with) and not takes_all:
        raise PartError(
            f"{label}: takes {signature}, and is called with ({', '.join(called_with)})"
        )
    return [name for name in signature.parameters if name not in positional[: len(called_with)]]


def _typed(label: str, target: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options converted to the annotated types of the signature, where there are any."""
    function = target.__init__ if inspect.isclass(target) else getattr(target, "func", target)
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # names that exist for type checkers alone
        hints = {}
    converted = dict(options)
    for name in options.keys() & hints.keys():
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # the type has a configuration of its own
            continue
        try:
            converted[name] = adapter.validate_python(options[name])
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise PartError(
                f"{label}: option {name} = {options[name]!r}: {message[0].lower() + message[1:]}"
            ) from None
    return converted


def _listed(arguments: Mapping[str, Any]) -> str:
    return f"construction with ({', '.join(arguments)})"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}{place_of(error)}"


# -- imports -----------------------------------------------------------------------------------


def _import_file(label: str, path: Path) -> ModuleType:
    """Import a file once per process, under a name that only its path and its content have."""
    if not path.is_file():
        raise PartError(f"{label}: {path}: no such file; a relative path is relative to the recipe")
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]
    name = f"selfteach_part_{path.stem}_{digest}"  # the same in every process: pickles name it
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: its modules hide none that are installed
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PartError(f"{label}: its import raised {_described(error)}") from error
    return module


def _import_module(label: str, name: str) -> ModuleType:
    """Import a module; the working directory is on the path too, as for ``python -m``."""
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise PartError(
                f"{label}: no module {missing!r}; install its package, or name a file: ./file.py:name"
            ) from None
        raise PartError(f"{label}: its import raised {_described(error)}") from error


def _import_plugin(kind: Kind, name: str, label: str) -> ImportedPart:
    offers = list(entry_points(group=GROUPS[kind], name=name))
    if not offers:
        raise PartError(f"{label}: no installed package offers it in the group {GROUPS[kind]}")
    if len({offer.value for offer in offers}) > 1:
        packages = " and ".join(sorted(str(offer.dist and offer.dist.name) for offer in offers))
        raise PartError(f"{label}: {packages} offer it both: name it by package.module:name")
    module = _import_module(label, offers[0].module)
    file, root = _source_of(module)
    target = _member(label, module, offers[0].attr) if offers[0].attr else module
    return ImportedPart(kind, name, target, file, root)


def _source_of(module: ModuleType) -> tuple[Path | None, Path | None]:
    """Return a module's source file, and the folder on the path that holds its top-level package."""
    file = getattr(module, "__file__", None)
    if not file or not file.endswith(".py"):
        return None, None
    path, levels = Path(file).resolve(), module.__name__.count(".")
    return path, path.parents[levels + 1 if path.name == "__init__.py" else levels]


def _member(label: str, module: ModuleType, dotted: str) -> Any:
    value: Any = module
    for name in dotted.split("."):
        if not hasattr(value, name):
            public = (
                [n for n in vars(value) if not n.startswith("_")]
                if hasattr(value, "__dict__")
                else []
            )
            hint = nearest(name, public) if public else "it is empty"
            raise PartError(f"{label}: no {name!r} in it; {hint}")
        value = getattr(value, name)
    return value
