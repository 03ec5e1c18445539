"""Imports an environment of `verifiers` by a package's id or a name, and builds it with its options."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from selfteach.config.data_section import EnvironmentData
from selfteach.config.part_section import CustomPart
from selfteach.errors import DataError, PartError
from selfteach.runtime.parts import construct_part, import_part, shown
from selfteach.tasks.hub_environments.attempts import SingleTurn
from selfteach.tasks.hub_environments.rubric_environment import RubricEnvironment
from selfteach.tasks.hub_environments.taskset_environment import TasksetEnvironment

SHIPPED = "verifiers.v1.tasksets"
"""Package of the tasksets that the library brings."""


def build_environment(
    config: EnvironmentData, options: Mapping[str, Any], *, episodes: bool = False
) -> SingleTurn:
    """Build the environment that a recipe names; with ``episodes`` one of several turns.

    Raises `DataError` or `PartError` in one line.
    """
    if importlib.util.find_spec("verifiers") is None:
        raise DataError(
            'data.type = "verifiers" needs the package verifiers, which is in no extra of selfteach: '
            "pip install verifiers (docs/install.md)"
        )
    part = CustomPart(type=config.environment, options=dict(options))
    if ":" not in config.environment:
        part = CustomPart(type=_exported_by(config.environment), options=dict(options))
    label = f"environment {shown(config.environment)}"
    with _restored():
        imported = import_part("hub_environment", part.type)
        if inspect.isclass(imported.target) and hasattr(imported.target, "task_type"):
            return _of_one_turn(TasksetEnvironment.build(imported.target, options, label), episodes)
        built, _ = construct_part("hub_environment", part)
        return _wrapped(built, label, episodes)


def _of_one_turn(taskset: TasksetEnvironment, episodes: bool) -> TasksetEnvironment:
    if episodes:
        raise DataError(
            f"{taskset.label}: is a taskset of verifiers.v1, whose tasks can be trained on in a single "
            "turn alone: remove [environment]"
        )
    return taskset


def _wrapped(built: Any, label: str, episodes: bool) -> SingleTurn:
    """Wrap an environment, or a taskset that was built already."""
    if hasattr(type(built), "task_type") and hasattr(built, "config"):
        return _of_one_turn(TasksetEnvironment(built, label), episodes)
    if hasattr(built, "rubric") and hasattr(built, "build_dataset"):
        return RubricEnvironment(built, label, episodes=episodes)
    raise PartError(
        f"{label}: is a {type(built).__name__}, neither an environment nor a taskset of verifiers: "
        "name a function that returns one (load_environment), or a Taskset"
    )


def _exported_by(id_: str) -> str:
    """Return ``module:name`` of what an environment's package exports. Raises `DataError`."""
    from verifiers.v1 import Env, Taskset  # pyright: ignore[reportMissingImports]

    name = id_.rsplit("/", 1)[-1].split("@", 1)[0].replace("-", "_")
    candidates = (f"{SHIPPED}.{name.lower()}", name, name.lower())
    importable = next((module for module in candidates if _exists(module)), None)
    if importable is None:
        raise DataError(
            f"environment {id_}: no module {name!r} is installed: prime env install {id_}, or name "
            "yours: ./file.py:load_environment"
        )
    try:
        module = importlib.import_module(importable)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"environment {id_}: its import raised {type(error).__name__}: {reason}"
        ) from error
    exported = [getattr(module, name, None) for name in getattr(module, "__all__", ())]
    classes = [one for one in exported if inspect.isclass(one)]
    if several := [one for one in classes if issubclass(one, Env) and one is not Env]:
        raise DataError(
            f"environment {id_}: it runs its tasks with {several[0].__name__}, an Env of its own: only "
            "tasks of a single turn can be trained on here"
        )
    tasksets = [one for one in classes if issubclass(one, Taskset) and one is not Taskset]
    if len(tasksets) == 1:
        return f"{importable}:{tasksets[0].__name__}"
    if callable(getattr(module, "load_environment", None)):
        return f"{importable}:load_environment"
    raise DataError(
        f"environment {id_}: the module {importable} exports neither load_environment nor one "
        "Taskset in __all__: name what makes it, package.module:name"
    )


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@contextmanager
def _restored() -> Iterator[None]:
    """Keep handlers of signals, which environments replace, and show no bars of `datasets`."""
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in signals}
    shows_bars = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shows_bars:
            enable_progress_bars()
        for number, handler in handlers.items():
            if in_main_thread and handler is not None:
                signal.signal(number, handler)
