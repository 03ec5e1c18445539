"""Sends metrics to TensorBoard, Weights & Biases or trackio. All are off unless the recipe names them.

metrics.jsonl comes first and is the truth; a sink gets a copy. A value has its name there, prefixed
with the kind of its row: ``step/correct``, ``validation/avg``, ``test/avg``.

On a resume the rows after the last checkpoint are made again. ``tracking.json`` counts the rows that
each sink has received, so that none is sent twice, but for the one that was being sent when the process
was killed. Rows that a sink has missed (it failed, or was added to the recipe since) are sent when it
is next opened. Weights & Biases and trackio buffer in their own process or thread: what they have not
written when the machine dies is in metrics.jsonl only.
"""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from selfteach.errors import CheckpointError, RecipeError
from selfteach.runtime.atomic_files import write_json
from selfteach.runtime.stored_files import read_json

log = logging.getLogger(__name__)


@runtime_checkable
class Sink(Protocol):
    """Receives the numbers of a row."""

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step, by name. May raise; the row then counts as not sent."""
        ...


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """Describes the run to a sink."""

    folder: Path
    project: str
    name: str
    config: Mapping[str, Any]
    id: str
    """Unique to the run; the same after a resume."""


def require_packages(names: Sequence[str]) -> None:
    """Raise `RecipeError` if the package of a sink is missing, before a model is loaded."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f'tracking.sinks: "{name}" needs the package {name}: pip install {name}'
            )


def tracked_run(folder: Path, project: str, config: Mapping[str, Any]) -> TrackedRun:
    """Return the run's description for sinks; its id is stored in its folder."""
    return TrackedRun(folder, project, run_name(folder), config, _state(folder)["id"])


@contextmanager
def open_sinks(
    sinks: Mapping[str, AbstractContextManager[Sink]],
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open sinks, send them the rows they have missed, and yield a function that sends the next row.

    Raises `RecipeError` if a sink cannot be opened. A sink that fails afterwards is left out with a
    warning until the run is next resumed: training goes on.
    """
    state = _state(folder) if sinks else {"sent": {}}
    position = len(rows)
    with ExitStack() as stack:
        opened = {name: _enter(stack, name, sink) for name, sink in sinks.items()}

        def send(row: Mapping[str, Any], at: int) -> None:
            for name in list(opened):
                if at < state["sent"].get(name, 0):
                    continue
                try:
                    opened[name](row["step"], values_of(row))
                except Exception as error:  # a failing sink must not end the run
                    log.warning("tracking: %s is left out from now on: %s", name, error)
                    del opened[name]
                    continue
                state["sent"][name] = at + 1
                write_json(folder / "tracking.json", state)

        def send_next(row: Mapping[str, Any]) -> None:
            nonlocal position
            send(row, position)
            position += 1

        for at, row in enumerate(rows):
            send(row, at)
        yield send_next


def values_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return a row's numbers under the names that sinks get: ``kind/name``."""
    return {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if name not in ("kind", "step") and isinstance(value, int | float)
    }


def run_name(folder: Path) -> str:
    """Return ``study/arm/seed_0`` for a run of a study, else the folder's name."""
    path = folder.resolve()
    for parent in path.parents:
        if (parent / "study.json").exists():
            inside = [part for part in path.relative_to(parent).parts if part != "runs"]
            return "/".join([parent.name, *inside])
    return path.name


@contextmanager
def tensorboard(run: TrackedRun) -> Iterator[Sink]:
    """Write event files into ``tensorboard/`` of the run's folder: ``tensorboard --logdir RUN``."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=str(run.folder / "tensorboard")) as writer:

        def record(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()  # what counts as sent is on disk

        yield record


@contextmanager
def wandb(run: TrackedRun) -> Iterator[Sink]:
    """Log to a run of Weights & Biases; online unless ``WANDB_MODE=offline`` is set."""
    import wandb as package  # type: ignore[import-not-found]

    package_run = package.init(
        project=run.project, name=run.name, id=run.id, resume="allow", dir=str(run.folder),
        config=dict(run.config),
    )  # fmt: skip
    try:
        yield lambda step, values: package_run.log(dict(values), step=step)
    finally:
        package_run.finish()


@contextmanager
def trackio(run: TrackedRun) -> Iterator[Sink]:
    """Log to a run of trackio: in its local database unless ``TRACKIO_SPACE_ID`` names a Space."""
    import trackio as package  # type: ignore[import-not-found]

    # It resumes by name: another run of the same name must not be taken for this one.
    package_run = package.init(
        project=run.project, name=f"{run.name} {run.id}", config=dict(run.config), resume="allow",
        embed=False, auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    try:
        yield lambda step, values: package_run.log(dict(values), step=step)
    finally:
        package_run.finish()


def _enter(stack: ExitStack, name: str, sink: AbstractContextManager[Sink]) -> Sink:
    try:
        return stack.enter_context(sink)
    # No login, no network, no permission: reported before training starts.
    except Exception as error:
        raise RecipeError(f"tracking.sinks: {name} cannot be opened: {error}") from error


def _state(folder: Path) -> dict[str, Any]:
    """Return the run's id, and how many rows each sink has received."""
    path = folder / "tracking.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8], "sent": {}})
    state = read_json(path)
    if not isinstance(state.get("id"), str) or not isinstance(state.get("sent"), dict):
        raise CheckpointError(f"{path} is damaged: it has no id, or no rows that were sent")
    return state
