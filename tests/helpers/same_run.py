"""Whether two runs have ended alike: the same weights, bit for bit, and metrics but for clocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from selfteach.runtime.run_folder import RunFolder, load_result

CLOCKS = ("time/", "active_", "waiting", "overlap")
"""What metrics begin with that differ between two runs of one recipe."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def checkpoint_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return what trains, at the last checkpoint."""
    return load_file(sorted((folder / "checkpoints").glob("step_*"))[-1] / "weights.safetensors")


def assert_same(a: Path, b: Path) -> None:
    """Compare the exported models."""
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def timeless_rows(folder: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without times."""
    rows = RunFolder(folder).metrics()
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


def step_rows(folder: Path) -> list[dict[str, Any]]:
    """Return a run's metrics of training steps."""
    return [row for row in RunFolder(folder).metrics() if row["kind"] == "step"]


def end_of(folder: Path) -> tuple[object, ...]:
    """Return all that a run says, but for times."""
    result = load_result(folder)
    result["budget"].pop("seconds")
    return result, timeless_rows(folder)


def assert_same_end(a: Path, b: Path) -> None:
    """Compare results, metrics and exported models."""
    assert end_of(a) == end_of(b)
    assert_same(a, b)
