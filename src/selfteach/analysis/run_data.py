"""Runs and studies as they lie on disk, also while they go on; read without the training code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfteach.config.migrations import migrate_config, migrate_metrics
from selfteach.errors import CheckpointError
from selfteach.evaluation.statistics import avg_at_k, maj_at_k, pass_at_k

Row = Mapping[str, Any]
Groups = Mapping[str, Sequence["Run"]]
"""Runs of one arm each, one per seed, by the name to print."""

SEED_FOLDER, RATE_FOLDER = re.compile(r"seed_\d+"), re.compile(r"lr_.+")


@dataclass(frozen=True, slots=True)
class Run:
    """One run's folder: its recipe, and what it has written so far."""

    folder: Path
    arm: str
    """What its folder calls it: ``runs/grpo/seed_0`` is ``grpo``, ``runs/first`` is ``first``, and a
    sweep's ``runs/grpo/lr_0.001/seed_0`` is ``grpo lr_0.001``."""
    variant: str | None
    config: Mapping[str, Any]
    rows: Sequence[Row]
    """metrics.jsonl, whole lines only."""

    @property
    def label(self) -> str:
        """The arm, with its variant where there is one."""
        return self.arm if self.variant is None else f"{self.variant}/{self.arm}"

    @property
    def seed(self) -> int:
        """The recipe's."""
        return self.config["seed"]

    @property
    def steps(self) -> int:
        """Steps that the recipe asks for."""
        return self.config["train"]["steps"]

    @property
    def is_complete(self) -> bool:
        """True once the run has ended by itself."""
        return (self.folder / "result.json").exists()

    def of_kind(self, kind: str) -> list[Row]:
        """Rows of one kind: ``step``, ``validation`` or ``test``."""
        return [row for row in self.rows if row["kind"] == kind]

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric of training steps, where it was logged; both [E]."""
        rows = [row for row in self.of_kind("step") if metric in row]
        steps_E = np.array([row["step"] for row in rows], dtype=int)
        return steps_E, np.array([row[metric] for row in rows], dtype=float)


def read_run(folder: Path, variant: str | None = None) -> Run:
    """A run's folder. Raises `CheckpointError` if it holds none."""
    path = folder.resolve()
    inner = path.parent if SEED_FOLDER.fullmatch(path.name) else path
    arm = f"{inner.parent.name} {inner.name}" if RATE_FOLDER.fullmatch(inner.name) else inner.name
    path = folder / "config.json"
    config = migrate_config(read_json(path), str(path))
    rows = [migrate_metrics(row) for row in read_rows(folder / "metrics.jsonl")]
    return Run(folder, arm, variant, config, rows)


def read_runs(folder: Path) -> list[Run]:
    """All runs that have begun in a study's folder, or the one run that the folder is.

    Raises `CheckpointError` if it is neither.
    """
    if (folder / "config.json").exists():
        return [read_run(folder)]
    if not (folder / "study.json").exists():
        raise CheckpointError(f"{folder} is neither a run nor a study: name the --out of one")
    found = sorted(path.parent for path in folder.glob("**/seed_*/config.json"))
    return [read_run(path, _variant(path.relative_to(folder))) for path in found]


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, under one name; in order of appearance.

    Names hold no ``-``, which stands between the two arms of a pair.
    """
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        recipe = {
            key: value for key, value in run.config.items() if key not in ("seed", "tracking")
        }
        by_recipe.setdefault(json.dumps(recipe, sort_keys=True), []).append(run)
    groups: dict[str, list[Run]] = {}
    for own in by_recipe.values():
        name = own[0].label.replace("-", "_")
        taken = sum(1 for other in groups if other == name or other.startswith(f"{name} ("))
        groups[f"{name} ({taken + 1})" if taken else name] = own
    return groups


def evaluations(run: Run, split: str) -> dict[int, Row]:
    """A run's evaluations on a split by training step, as saved: lists [P][k]."""
    found = sorted((run.folder / "evaluations").glob(f"{split}_*.json"))
    return {int(path.stem.rpartition("_")[2]): read_json(path) for path in found}


def per_problem(evaluation: Row) -> dict[str, np.ndarray]:
    """An evaluation's measures per problem [P]: rates in percent, length in tokens."""
    correct_PK = np.array(evaluation["correct"], dtype=float)
    cut_PK = 1 - np.array(evaluation["finished"], dtype=float)
    return {
        "avg": 100 * avg_at_k(correct_PK),
        "pass": 100 * pass_at_k(correct_PK, evaluation["k"]),
        "maj": 100 * maj_at_k(evaluation["parsed"], correct_PK),
        "length": np.array(evaluation["lengths"], dtype=float).mean(1),
        "truncated": 100 * cut_PK.mean(1),
        "format": 100 * np.array(evaluation["formatted"], dtype=float).mean(1),
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file. Raises `CheckpointError` if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not there; run selfteach study, or resume it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file; none if it is not there. A run may be writing the last."""
    return list(_whole_lines(path)) if path.exists() else []


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _variant(inside: Path) -> str | None:
    """``variants/easy/grpo/seed_0`` is of the variant ``easy``; ``runs/…`` is the main setting."""
    return inside.parts[1] if inside.parts[0] == "variants" else None
