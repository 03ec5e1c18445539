"""Read the folders of runs and studies, also while they run, without the training code."""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfteach.config.migrations import migrate_config, migrate_metrics
from selfteach.config.part_names import unanchored
from selfteach.errors import CheckpointError
from selfteach.evaluation.evaluation_record import Evaluation
from selfteach.runtime import stored_files
from selfteach.runtime.stored_files import read_metrics, reading

Row = Mapping[str, Any]
Groups = Mapping[str, Sequence["RunData"]]
"""An arm's runs, one per seed, by the arm's printed name."""

SEED_FOLDER, RATE_FOLDER = re.compile(r"seed_\d+"), re.compile(r"lr_.+")


@dataclass(frozen=True, slots=True)
class RunData:
    """Holds what one run's folder says: its recipe, and the metrics that it has logged so far."""

    folder: Path
    arm: str
    """Taken from its folder's name: ``runs/grpo/seed_0`` is ``grpo``, ``runs/first`` is ``first``, and
    a sweep's ``runs/grpo/lr_0.001/seed_0`` is ``grpo lr_0.001``."""
    variant: str | None
    config: Mapping[str, Any]
    rows: Sequence[Row]
    """metrics.jsonl, whole lines only."""

    @property
    def label(self) -> str:
        """Return the arm, with its variant where there is one."""
        return self.arm if self.variant is None else f"{self.variant}/{self.arm}"

    @property
    def seed(self) -> int:
        """Return the recipe's seed."""
        return self.config["seed"]

    @property
    def steps(self) -> int:
        """Return the number of training steps in the recipe."""
        return self.config["train"]["steps"]

    @property
    def is_complete(self) -> bool:
        """Return whether the run has ended by itself."""
        return (self.folder / "result.json").exists()

    def of_kind(self, kind: str) -> list[Row]:
        """Return the rows of one kind: ``step``, ``validation`` or ``test``."""
        return [row for row in self.rows if row["kind"] == kind]

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of a metric of training steps, where it was logged; both [E]."""
        rows = [row for row in self.of_kind("step") if metric in row]
        steps_E = np.array([row["step"] for row in rows], dtype=int)
        return steps_E, np.array([row[metric] for row in rows], dtype=float)


def read_run(folder: str | Path, variant: str | None = None) -> RunData:
    """Read a run's folder. Raises `CheckpointError` if it holds none."""
    folder = Path(folder)
    path = folder.resolve()
    inner = path.parent if SEED_FOLDER.fullmatch(path.name) else path
    arm = f"{inner.parent.name} {inner.name}" if RATE_FOLDER.fullmatch(inner.name) else inner.name
    path = folder / "config.json"
    values = read_json(path)
    with reading(path):
        config = unanchored(migrate_config(values, str(path)))
        if not isinstance(config["seed"], int) or not isinstance(config["train"]["steps"], int):
            raise TypeError("seed or train.steps is no number")
    rows = [migrate_metrics(row) for _, row in read_metrics(folder / "metrics.jsonl")]
    return RunData(folder, arm, variant, config, rows)


def read_runs(folder: str | Path) -> list[RunData]:
    """Read all runs that have begun in a study's folder, or the one run that the folder is.

    Raises `CheckpointError` if it is neither.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return [read_run(folder)]
    if not (folder / "study.json").exists():
        raise CheckpointError(f"{folder} is neither a run nor a study: pass the --out of one")
    paths = sorted(path.parent for path in folder.glob("**/seed_*/config.json"))
    return [read_run(path, _variant(path.relative_to(folder))) for path in paths]


@contextmanager
def unpacked(source: Path) -> Iterator[Path]:
    """Yield a study's folder: ``source``, or the unpacked files of an archive, removed afterwards."""
    if source.is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def group_runs(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """Group runs that differ in their seed alone under one name, in order of appearance.

    Names hold no ``-``, which separates the two arms of a pair.
    """
    by_recipe: dict[str, list[RunData]] = {}
    for run in runs:
        recipe = {
            key: value for key, value in run.config.items() if key not in ("seed", "tracking")
        }
        by_recipe.setdefault(json.dumps(recipe, sort_keys=True), []).append(run)
    groups: dict[str, list[RunData]] = {}
    for same_recipe in by_recipe.values():
        name = same_recipe[0].label.replace("-", "_")
        taken = sum(1 for other in groups if other == name or other.startswith(f"{name} ("))
        groups[f"{name} ({taken + 1})" if taken else name] = same_recipe
    return groups


def evaluations(run: RunData, split: str) -> dict[int, Evaluation]:
    """Read a run's saved evaluations on a split, by training step."""
    paths = sorted((run.folder / "evaluations").glob(f"{split}_*.json"))
    by_step = {}
    for path in paths:
        values = read_json(path)
        with reading(path):
            by_step[int(path.stem.rpartition("_")[2])] = Evaluation.from_json(values)
    return by_step


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file. Raises `CheckpointError` if it is missing or damaged."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; run selfteach study, or resume it")
    return stored_files.read_json(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all whole lines of a JSONL file; none if it is missing. A run may be writing the last.

    Raises `CheckpointError` if a line is damaged.
    """
    content = stored_files.read_bytes(path)
    return [] if content is None else stored_files.read_lines(content, path)[0]


def _variant(relative: Path) -> str | None:
    """Return ``easy`` for ``variants/easy/grpo/seed_0``; None for ``runs/…``, the main setting."""
    return relative.parts[1] if relative.parts[0] == "variants" else None
