"""All that a resume needs, in plain safetensors: weights, optimizer, teacher, and where we are.

Random streams need no saving: they are keyed by (seed, question, sample, policy version).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfteach.errors import CheckpointError
from selfteach.policy import Policy
from selfteach.protocols import Teacher
from selfteach.run_folder import enough_disk, read_json, write_json

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save(folder: Path, step: int, policy: Policy, teacher: Teacher, *, keep: int = 1) -> Path:
    """Write ``folder/step_NNNNNN`` whole or not at all, then delete all but the newest ``keep``."""
    target = path_of(folder, step)
    aside = folder / f".{target.name}.tmp"
    with enough_disk():
        shutil.rmtree(aside, ignore_errors=True)
        try:
            _fill(aside, step, policy, teacher)
            if target.exists():
                shutil.rmtree(target)
            aside.replace(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
            raise
        _sync(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return target


def _fill(aside: Path, step: int, policy: Policy, teacher: Teacher) -> None:
    aside.mkdir(parents=True)
    _save_tensors(aside / "weights.safetensors", dict(policy.trainable))
    _save_tensors(aside / "optimizer.safetensors", _moments(policy))
    _save_tensors(aside / "teacher.safetensors", dict(teacher.state()))
    write_json(aside / "state.json", {"step": step, "version": policy.version})


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after a step is, or would be."""
    return folder / f"step_{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").exists())


def load(checkpoint: Path, policy: Policy, teacher: Teacher) -> int:
    """Put policy, optimizer and teacher back; returns the step after which it was saved.

    Raises `CheckpointError` if it is damaged or of another model.
    """
    state = read_json(checkpoint / "state.json")
    load_weights(checkpoint, policy)
    _restore_moments(policy, _load_tensors(checkpoint / "optimizer.safetensors"))
    teacher.load_state(_load_tensors(checkpoint / "teacher.safetensors"))
    policy.version = state["version"]
    return int(state["step"])


@torch.no_grad()
def load_weights(checkpoint: Path, policy: Policy) -> None:
    """Only the weights, for evaluation."""
    weights = _load_tensors(checkpoint / "weights.safetensors")
    if weights.keys() != policy.trainable.keys():
        raise CheckpointError(f"{checkpoint} holds the weights of another model")
    for name, param in policy.trainable.items():
        param.copy_(weights[name])


def _moments(policy: Policy) -> dict[str, Tensor]:
    return {
        f"{name}::{moment}": policy.optimizer.state[param][moment]
        for name, param in policy.trainable.items()
        for moment in MOMENTS
        if param in policy.optimizer.state
    }


def _restore_moments(policy: Policy, saved: dict[str, Tensor]) -> None:
    for name, param in policy.trainable.items():
        own = {m: saved[f"{name}::{m}"] for m in MOMENTS if f"{name}::{m}" in saved}
        if own:
            policy.optimizer.state[param] = own
        else:
            policy.optimizer.state.pop(param, None)


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
