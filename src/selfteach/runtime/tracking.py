"""Sinks besides metrics.jsonl: TensorBoard, Weights & Biases, trackio. All off unless a recipe asks.

metrics.jsonl comes first and is the truth; a sink is a copy. A value has the name that it has there,
behind its row's kind: ``step/correct``, ``validation/avg``, ``test/avg``.

On a resume the rows behind the last checkpoint are made again. ``tracking.json`` counts the rows that
each sink has been given, so that none is sent twice, but for the one that was under way when the
process was killed. Rows that a sink has missed (it failed, or was named later) are sent when it is next
opened. Weights & Biases and trackio buffer in a process or thread of their own: what they have not
written when the machine dies, only metrics.jsonl has.
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

from selfteach.errors import RecipeError
from selfteach.runtime.run_folder import read_json, write_json

log = logging.getLogger(__name__)


@runtime_checkable
class Sink(Protocol):
    """Where the numbers of a row go."""

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a training step, by name. May raise; the row then counts as not sent."""
        ...


@dataclass(frozen=True, slots=True)
class Tracked:
    """Which run it is that a sink is told of."""

    folder: Path
    project: str
    name: str
    config: Mapping[str, Any]
    id: str
    """The same for a resumed run; unlike that of any other."""


def require(names: Sequence[str]) -> None:
    """Raises `RecipeError` for a sink whose package is missing, before anything is spent."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f'tracking.sinks: "{name}" needs the package {name}: pip install {name}'
            )


def identify(folder: Path, project: str, config: Mapping[str, Any]) -> Tracked:
    """A run's name among others, and its id, which is kept in its folder."""
    return Tracked(folder, project, run_name(folder), config, _state(folder)["id"])


@contextmanager
def sending(
    sinks: Mapping[str, AbstractContextManager[Sink]],
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Opens sinks, gives them what they have missed of ``rows``, and yields what sends the next row.

    A sink that cannot be opened is a `RecipeError`; one that fails later is left out with a warning
    until the run is next resumed: training goes on.
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
                except Exception as error:  # whatever a sink raises, the run goes on without it
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
    """A row's numbers under the names that sinks get: ``kind/name``."""
    return {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if name not in ("kind", "step") and isinstance(value, int | float)
    }


def run_name(folder: Path) -> str:
    """``study/arm/seed_0`` for a run of a study, else the folder's own name."""
    path = folder.resolve()
    for parent in path.parents:
        if (parent / "study.json").exists():
            inside = [part for part in path.relative_to(parent).parts if part != "runs"]
            return "/".join([parent.name, *inside])
    return path.name


@contextmanager
def tensorboard(run: Tracked) -> Iterator[Sink]:
    """Event files in the run's folder, ``tensorboard/``: ``tensorboard --logdir RUN``."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=str(run.folder / "tensorboard")) as writer:

        def take(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()  # what counts as sent is on disk

        yield take


@contextmanager
def wandb(run: Tracked) -> Iterator[Sink]:
    """A run of Weights & Biases; online unless ``WANDB_MODE=offline`` says otherwise."""
    import wandb as package  # type: ignore[import-not-found]

    opened = package.init(
        project=run.project, name=run.name, id=run.id, resume="allow", dir=str(run.folder),
        config=dict(run.config),
    )  # fmt: skip
    try:
        yield lambda step, values: opened.log(dict(values), step=step)
    finally:
        opened.finish()


@contextmanager
def trackio(run: Tracked) -> Iterator[Sink]:
    """A run of trackio: in its local database unless ``TRACKIO_SPACE_ID`` names a Space."""
    import trackio as package  # type: ignore[import-not-found]

    # It resumes by name: another run of the same name must not be taken for this one.
    opened = package.init(
        project=run.project, name=f"{run.name} {run.id}", config=dict(run.config), resume="allow",
        embed=False, auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    try:
        yield lambda step, values: opened.log(dict(values), step=step)
    finally:
        opened.finish()


def _enter(stack: ExitStack, name: str, sink: AbstractContextManager[Sink]) -> Sink:
    try:
        return stack.enter_context(sink)
    except Exception as error:  # no login, no network, no permission: said before anything is spent
        raise RecipeError(f"tracking.sinks: {name} cannot be opened: {error}") from error


def _state(folder: Path) -> dict[str, Any]:
    """The run's id, and how many rows each sink has been given."""
    path = folder / "tracking.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8], "sent": {}})
    return read_json(path)
